"""Triton kernels of low-rank terms, all segments of a step in one pair of launches: down x, then up added to y.

NOT RUN ON HARDWARE YET, as `kernels`, whose layouts and terms hold here. A block is up to BM tokens of one
segment, so both products are the tensor core's, as in SGMV (arXiv 2310.18547). The first half reads x and W's neighbour
factors and can run beside the base product (`kernels.flora_stacked`); the second reads y once and writes it once, and
only rows that have a low-rank term.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

from flora_vllm.ops.gpu.tables import CHUNK, DOWN, LOW_RANK, UP, WIDTH, columns, factor


@triton.jit
def _blocks_of_segments(segments, n_segments, layout, n_slices, chunk, BM: tl.constexpr):
    """Blocks of the segments chunk .. chunk + CHUNK: ceil(tokens / BM) where the slot has low-rank terms, else none."""
    g = chunk + tl.arange(0, CHUNK)
    slot = tl.load(segments + g * 3, mask=g < n_segments, other=0)
    tokens = tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0)
    return tl.where(tl.load(layout + slot * (n_slices + 2) + n_slices + 1) > 0, tl.cdiv(tokens, BM), 0)


@triton.jit
def _count_blocks(segments, n_segments, layout, n_slices, BM: tl.constexpr):
    total = 0
    for chunk in range(0, n_segments, CHUNK):
        total += tl.sum(_blocks_of_segments(segments, n_segments, layout, n_slices, chunk, BM))
    return total


@triton.jit
def _block(block, segments, n_segments, layout, n_slices, BM: tl.constexpr):
    """(slot, list positions, which of them are the segment's) of a block."""
    segment = 0
    start = 0
    before = 0
    for chunk in range(0, n_segments, CHUNK):
        size = _blocks_of_segments(segments, n_segments, layout, n_slices, chunk, BM)
        end = before + tl.cumsum(size)
        ended = end <= block
        segment += tl.sum(ended.to(tl.int32))
        start = tl.maximum(start, tl.max(tl.where(ended, end, 0)))
        before += tl.sum(size)
    m = (block - start) * BM + tl.arange(0, BM)
    live = m < tl.load(segments + segment * 3 + 2)
    return tl.load(segments + segment * 3).to(tl.int64), tl.load(segments + segment * 3 + 1) + m, live


@triton.jit
def down_program(
    worker, workers, x, middle, tokens, segments, n_segments, table, layout,
    n_slices, in_features, x_stride, middle_stride, most_low,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One of `workers` shares of middle[z, p, i] = down x[t]: in features' run z, list position p, slice i.

    `middle` (SPLIT, T, N, most_low) float32, `middle_stride` between its runs. What lies past a slot's own rank, and
    tokens without low-rank terms, are left as they are.
    """
    ELEMENT: tl.constexpr = x.dtype.element_ty
    k = tl.arange(0, BK)
    run = tl.cdiv(tl.cdiv(in_features, BK), SPLIT) * BK
    rank_tiles = tl.cdiv(most_low, BR)
    of_block = n_slices * rank_tiles * SPLIT
    items = _count_blocks(segments, n_segments, layout, n_slices, BM) * of_block
    for item in range(worker, items, workers):
        part = item % SPLIT
        first = (item // SPLIT) % rank_tiles * BR
        slice_index = item // (SPLIT * rank_tiles) % n_slices
        slot, position, live = _block(item // of_block, segments, n_segments, layout, n_slices, BM)
        entry = table + (slot * n_slices + slice_index) * WIDTH
        rank = tl.load(entry + LOW_RANK).to(tl.int32)
        if first < rank:
            j = first + tl.arange(0, BR)
            token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
            x_ptr = x + token[:, None] * x_stride + k[None, :]
            down_ptr = factor(tl.load(entry + DOWN), j, in_features, ELEMENT, ALIGNED)[None, :] + k[:, None]
            k_last = tl.minimum((part + 1) * run, in_features)
            acc = tl.zeros((BM, BR), tl.float32)
            for k0 in tl.range(part * run, k_last, BK, num_stages=STAGES):
                in_k = k < k_last - k0
                x_MK = tl.load(x_ptr + k0, mask=live[:, None] & in_k[None, :], other=0.0)
                down_KR = tl.load(down_ptr + k0, mask=in_k[:, None] & (j < rank)[None, :], other=0.0)
                acc = tl.dot(x_MK, down_KR, acc, input_precision=DOT)
            out = middle + part.to(tl.int64) * middle_stride
            out += (position.to(tl.int64) * n_slices + slice_index)[:, None] * most_low + j[None, :]
            tl.store(out, acc, mask=live[:, None] & (j < rank)[None, :])


@triton.jit
def flora_low_down(
    x, middle, tokens, segments, counts, table, layout,
    n_slices, in_features, x_stride, middle_stride, most_low,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`down_program` alone, for layers whose base product is not ours; grid (workers,)."""
    down_program(
        tl.program_id(0), tl.num_programs(0), x, middle, tokens, segments, tl.load(counts), table, layout,
        n_slices, in_features, x_stride, middle_stride, most_low, BM, BR, BK, SPLIT, STAGES, ALIGNED, DOT,
    )  # fmt: skip


@triton.jit
def flora_low_up(
    y, middle, tokens, segments, counts, table, layout, tiles,
    n_slices, y_stride, middle_stride, most_low,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y[t] += (Σ_z middle[z, p, i]) up of every token whose slot has a low-rank term in slice i; grid (blocks, P)."""
    ELEMENT: tl.constexpr = y.dtype.element_ty
    slice_index, column, in_slice, first, last = columns(tiles, tl.program_id(1), BN, ALIGNED)
    n_segments = tl.load(counts)
    blocks = _count_blocks(segments, n_segments, layout, n_slices, BM)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        slot, position, live = _block(block, segments, n_segments, layout, n_slices, BM)
        entry = table + (slot * n_slices + slice_index) * WIDTH
        rank = tl.load(entry + LOW_RANK).to(tl.int32)
        if rank > 0:
            acc = tl.zeros((BM, BN), tl.float32)
            middle_row = middle + (position.to(tl.int64) * n_slices + slice_index) * most_low
            for r0 in range(0, rank, BR):
                j = r0 + tl.arange(0, BR)
                middle_ptr = middle_row[:, None] + j[None, :]
                in_middle = live[:, None] & (j < rank)[None, :]
                middle_MR = tl.zeros((BM, BR), tl.float32)
                for _ in range(SPLIT):
                    middle_MR += tl.load(middle_ptr, mask=in_middle, other=0.0)
                    middle_ptr += middle_stride
                up_ptr = factor(tl.load(entry + UP), j, last - first, ELEMENT, ALIGNED)[:, None]
                up_ptr += (column - first)[None, :]
                up_RN = tl.load(up_ptr, mask=(j < rank)[:, None] & in_slice[None, :], other=0.0)
                acc = tl.dot(middle_MR.to(ELEMENT), up_RN, acc, input_precision=DOT)
            token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
            y_ptr = y + token[:, None] * y_stride + column[None, :]
            in_y = live[:, None] & in_slice[None, :]
            tl.store(y_ptr, (acc + tl.load(y_ptr, mask=in_y, other=0.0).to(tl.float32)).to(ELEMENT), mask=in_y)
