"""Triton kernels of the base products. They take plain tensors and are launched by `launch` only.

NOT RUN ON HARDWARE YET: correct in Triton's interpreter, compiled for sm_80, sm_90 and sm_100, nothing more.

A row is one base product W(a ∘ x) of one token; a token needs `rank` of them, and one with a = 1 and b = `plain` where
the sum has a plain `W x` (a slice left alone is that row with plain = 1). Decisions:
* Rows are packed back to back whatever the mix of ranks, so nothing is padded to a rank bucket and one launch reads W
  once for the whole step. A tile takes the tokens whose first row is in its window, so no token is split.
* Which row is whose, and which segments are modulated, is worked out on the device from the segments and the slot
  table: one copy of a step serves all layers, and a captured graph replays rightly after either has changed. Programs
  stride over tiles: a grid smaller than the work is slower, never wrong.
* The modulation is made by the tensor core with the rank padded to 16 in registers (the FMA form spills).
* A product that is cut along in features is summed by the last of its programs to arrive, in the order of the runs:
  no further launch, and the same sum whoever comes last.
Layouts: slot table (S, N, 9) int64 [addresses of a_RI and b_RO, their rank, address of plain_O, its step (0: one number
for all outputs), address of offset_O or 0, addresses of down_RI and up_RO, their rank]; layout (S, N + 2) int32 [rows
by slice, tokens from which a segment is modulated, largest low rank]; counts (1,) int32 segments; segments (G, 3) int32
[slot, first list position, tokens]; tokens (T,) int32 rows of x by list position; tiles (P, 4) int32 [slice, first
column, first and last column of the slice]. plain_O and offset_O are float32, all else has the dtype of W.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

from flora_vllm.ops.gpu.low_rank import down_program
from flora_vllm.ops.gpu.tables import (
    CHUNK,
    OFFSET,
    PLAIN,
    PLAIN_STEP,
    RANK,
    WIDTH,
    A,
    B,
    columns,
    factor,
    pointer,
)  # fmt: skip

# Tokens summed together after a stacked product.
TOKENS = tl.constexpr(64)


@triton.jit
def _rows_of_segments(segments, n_segments, layout, slice_index, n_slices, stack_below, chunk):
    """(stacked rows, stacked tokens) of the segments chunk .. chunk + CHUNK, zero past the last."""
    g = chunk + tl.arange(0, CHUNK)
    slot = tl.load(segments + g * 3, mask=g < n_segments, other=0)
    tokens = tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0)
    of_slot = layout + slot * (n_slices + 2)
    tokens = tl.where(tokens >= tl.maximum(tl.load(of_slot + n_slices), stack_below), 0, tokens)
    return tokens * tl.load(of_slot + slice_index), tokens


@triton.jit
def _count_rows(segments, n_segments, layout, slice_index, n_slices, stack_below):
    total = 0
    for chunk in range(0, n_segments, CHUNK):
        rows, _ = _rows_of_segments(segments, n_segments, layout, slice_index, n_slices, stack_below, chunk)
        total += tl.sum(rows)
    return total


@triton.jit
def _locate(row, segments, n_segments, layout, slice_index, n_slices, stack_below, BM: tl.constexpr):
    """(slot, list position, number among the stacked tokens, which of the token's rows) of each row; past the end,
    those of some token."""
    segment = tl.zeros((BM,), tl.int32)
    start = tl.zeros((BM,), tl.int32)
    number = tl.zeros((BM,), tl.int32)
    before = 0
    tokens_before = 0
    for chunk in range(0, n_segments, CHUNK):
        rows, tokens = _rows_of_segments(segments, n_segments, layout, slice_index, n_slices, stack_below, chunk)
        end = before + tl.cumsum(rows)
        last_number = tokens_before + tl.cumsum(tokens)
        ended = end[None, :] <= row[:, None]
        segment += tl.sum(ended.to(tl.int32), axis=1)
        start = tl.maximum(start, tl.max(tl.where(ended, end[None, :], 0), axis=1))
        number = tl.maximum(number, tl.max(tl.where(ended, last_number[None, :], 0), axis=1))
        before += tl.sum(rows)
        tokens_before += tl.sum(tokens)
    segment = tl.maximum(tl.minimum(segment, n_segments - 1), 0)
    slot = tl.load(segments + segment * 3)
    token_rows = tl.load(layout + slot * (n_slices + 2) + slice_index)
    index = (row - start) // token_rows
    return slot, tl.load(segments + segment * 3 + 1) + index, number + index, row - start - index * token_rows


@triton.jit
def _added(entry, bias, column, in_slice, first, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 offset (zeros where the slot of `entry` has none) and bias of these columns."""
    address = tl.load(entry + OFFSET)
    # A vector of it: the interpreter makes integers of a scalar's mask.
    has_offset = tl.full(column.shape, address, tl.int64) != 0
    offset_ptr = pointer(address, tl.float32, ALIGNED) + (column - first)
    added_N = tl.load(offset_ptr, mask=in_slice & has_offset, other=0.0)
    if HAS_BIAS:
        added_N += tl.load(bias + column, mask=in_slice, other=0.0).to(tl.float32)
    return added_N


@triton.jit
def _plain(address, step, column):
    """Pointers to the weights of the plain W x: float32, one by column or (step 0) one for all."""
    return address.to(tl.pointer_type(tl.float32)) + column * step


@triton.jit
def _store_tokens(
    acc, token, slot, live, y, bias, table, y_stride,
    n_slices, slice_index, column, in_slice, first, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store acc (rows: tokens, columns: out features) with the bias and each token's offset."""
    address = tl.load(table + (slot.to(tl.int64) * n_slices + slice_index) * WIDTH + OFFSET)
    has_offset = ((address != 0) & live)[:, None] & in_slice[None, :]
    offset_ptr = pointer(address, tl.float32, ALIGNED)[:, None] + (column - first)[None, :]
    acc += tl.load(offset_ptr, mask=has_offset, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=in_slice, other=0.0).to(tl.float32)[None, :]
    out = y + token.to(tl.int64)[:, None] * y_stride + column[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=live[:, None] & in_slice[None, :])


@triton.jit
def _store_part(acc, token, live, parts, part_stride, out_features, column, in_slice):
    """Store acc as this run's part of the sum."""
    out = parts + tl.program_id(2).to(tl.int64) * part_stride + token.to(tl.int64)[:, None] * out_features
    tl.store(out + column[None, :], acc, mask=live[:, None] & in_slice[None, :])


@triton.jit
def _members(first_number, number, live):
    """Which of the tile's rows belong to the tokens first_number .. first_number + TOKENS: (TOKENS, rows)."""
    of_token = first_number + tl.arange(0, TOKENS)
    return (of_token[:, None] == number[None, :]) & live[None, :]


@triton.jit
def _of_members(member, of_row):
    """What is the same for all rows of a token, by token."""
    return tl.max(tl.where(member, of_row[None, :], 0), axis=1)


@triton.jit
def _sum_of_members(member, high, low, acc, lost, EXACT_SUM: tl.constexpr, DOT: tl.constexpr):
    """Sum of each token's rows by a 0/1 matrix; a token with a row that is not finite (`lost`) gets NaN."""
    if EXACT_SUM:
        sum_TN = tl.dot(member.to(tl.float32), acc, input_precision=DOT)
    else:
        sum_TN = tl.dot(member.to(tl.bfloat16), high, tl.dot(member.to(tl.bfloat16), low))
    spoilt = tl.max(tl.where(member, lost[None, :], 0), axis=1)
    return tl.where(spoilt[:, None] != 0, float("nan"), sum_TN)


@triton.jit
def _sum_parts(
    first_number, last_number, number, token, slot, live, counter, parts, part_stride, out_features, y, bias, table,
    y_stride, n_slices, slice_index, column, in_slice, first,
    BN: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What the last of a tile's SPLIT programs does: sum the parts of its tokens, in order, and store them."""
    # All of this program's stores come before its arrival, and all of the others' before the sum.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
        tl.store(counter, 0)
        for n0 in range(first_number, last_number + 1, TOKENS):
            member = _members(n0, number, live)
            of_token = _of_members(member, token)
            in_tile = n0 + tl.arange(0, TOKENS) <= last_number
            part = parts + of_token.to(tl.int64)[:, None] * out_features + column[None, :]
            sum_TN = tl.zeros((TOKENS, BN), tl.float32)
            for _ in range(SPLIT):
                # Past the first-level cache, which does not see what other processors wrote.
                sum_TN += tl.load(part, mask=in_tile[:, None] & in_slice[None, :], other=0.0, cache_modifier=".cg")
                part += part_stride
            _store_tokens(
                sum_TN, of_token, _of_members(member, slot), in_tile, y, bias, table, y_stride,
                n_slices, slice_index, column, in_slice, first, HAS_BIAS, ALIGNED,
            )  # fmt: skip


@triton.jit
def _sum_and_store(
    acc, number, token, slot, live, counter, parts, part_stride, out_features, y, bias, table, y_stride,
    n_slices, slice_index, column, in_slice, first,
    BN: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """Sum the rows of each token, which lie side by side, and store the tokens."""
    first_number = tl.min(tl.where(live, number, 2147483647))
    last_number = tl.max(tl.where(live, number, -1))
    if last_number - first_number + 1 == tl.sum(live.to(tl.int32)):
        if SPLIT > 1:
            _store_part(acc, token, live, parts, part_stride, out_features, column, in_slice)
        else:
            _store_tokens(
                acc, token, slot, live, y, bias, table, y_stride,
                n_slices, slice_index, column, in_slice, first, HAS_BIAS, ALIGNED,
            )  # fmt: skip
    else:
        # 0 * inf would carry one token's overflow into the others, so what is not finite stays out of the product and
        # is given back to its own token.
        finite = tl.abs(acc) < float("inf")
        lost = tl.max(tl.where(finite, 0, 1), axis=1)
        acc = tl.where(finite, acc, 0.0)
        high = acc.to(tl.bfloat16)
        low = (acc - high.to(tl.float32)).to(tl.bfloat16)
        for n0 in range(first_number, last_number + 1, TOKENS):
            member = _members(n0, number, live)
            sum_TN = _sum_of_members(member, high, low, acc, lost, EXACT_SUM, DOT)
            of_token, in_tile = _of_members(member, token), n0 + tl.arange(0, TOKENS) <= last_number
            if SPLIT > 1:
                _store_part(sum_TN, of_token, in_tile, parts, part_stride, out_features, column, in_slice)
            else:
                _store_tokens(
                    sum_TN, of_token, _of_members(member, slot), in_tile, y, bias, table, y_stride,
                    n_slices, slice_index, column, in_slice, first, HAS_BIAS, ALIGNED,
                )  # fmt: skip
    if SPLIT > 1:
        _sum_parts(
            first_number, last_number, number, token, slot, live, counter, parts, part_stride, out_features, y, bias,
            table, y_stride, n_slices, slice_index, column, in_slice, first, BN, SPLIT, HAS_BIAS, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window", "stack_below", "down_programs"])
def flora_stacked(
    x, w, y, bias, tokens, segments, counts, table, layout, tiles, parts, counters, middle,
    n_slices, in_features, out_features, x_stride, w_stride, y_stride, part_stride, middle_stride, most_low,
    window, stack_below, down_programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    LOW: tl.constexpr, LOW_M: tl.constexpr, LOW_R: tl.constexpr, LOW_K: tl.constexpr, LOW_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DOT: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_j b[j] ∘ W(a[j] ∘ x[t]) + bias + offset of the stacked segments' tokens; grid (row tiles, D + P, SPLIT).

    The first D = `down_programs` along the second axis do the first half of low-rank terms (LOW) meanwhile.
    SPLIT > 1: each program sums a run of in features into `parts` (SPLIT, T, O) float32; `counters` int32, zero
    between launches, has an entry for each tile. `window`: BM - (most rows of a token) + 1. `stack_below`: segments of
    fewer tokens are stacked whatever the slot says. DOT: precision of float32 products. EXACT_SUM: float32 in the sum
    over rows, not bfloat16 halves.
    """
    n_segments = tl.load(counts)
    if LOW and tl.program_id(1) < down_programs:
        worker = (tl.program_id(2) * down_programs + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        down_program(
            worker, down_programs * tl.num_programs(0) * SPLIT, x, middle, tokens, segments, n_segments, table, layout,
            n_slices, in_features, x_stride, middle_stride, most_low,
            LOW_M, LOW_R, LOW_K, LOW_SPLIT, STAGES, ALIGNED, DOT,
        )  # fmt: skip
    else:
        _stacked_program(
            x, w, y, bias, tokens, segments, n_segments, table, layout, tiles, parts, counters,
            n_slices, in_features, out_features, x_stride, w_stride, y_stride, part_stride,
            window, stack_below, tl.program_id(1) - down_programs, tl.num_programs(1) - down_programs,
            BM, BN, BK, SPLIT, STAGES, HAS_BIAS, ALIGNED, DOT, EXACT_SUM,
        )  # fmt: skip


@triton.jit
def _stacked_program(
    x, w, y, bias, tokens, segments, n_segments, table, layout, tiles, parts, counters,
    n_slices, in_features, out_features, x_stride, w_stride, y_stride, part_stride,
    window, stack_below, column_tile, column_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DOT: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """One column tile's share of row tiles."""
    ELEMENT: tl.constexpr = w.dtype.element_ty
    slice_index, column, in_slice, first, last = columns(tiles, column_tile, BN, ALIGNED)
    total = _count_rows(segments, n_segments, layout, slice_index, n_slices, stack_below)
    k = tl.arange(0, BK)
    w_ptr = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    run = tl.cdiv(tl.cdiv(in_features, BK), SPLIT) * BK
    k_first = tl.program_id(2) * run
    k_last = tl.minimum(k_first + run, in_features)

    for first_row in range(tl.program_id(0) * window, total, tl.num_programs(0) * window):
        row = first_row + tl.arange(0, BM)
        slot, position, number, component = _locate(
            row, segments, n_segments, layout, slice_index, n_slices, stack_below, BM
        )
        head = row - component
        live = (row < total) & (head >= first_row) & (head < first_row + window)
        token = tl.load(tokens + position, mask=live, other=0)
        entry = table + (slot.to(tl.int64) * n_slices + slice_index) * WIDTH
        paired = live & (component < tl.load(entry + RANK))
        a_ptr = factor(tl.load(entry + A), component, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
        x_ptr = x + token.to(tl.int64)[:, None] * x_stride + k[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in tl.range(k_first, k_last, BK, num_stages=STAGES):
            in_k = k < k_last - k0
            x_MK = tl.load(x_ptr + k0, mask=live[:, None] & in_k[None, :], other=0.0)
            a_MK = tl.load(a_ptr + k0, mask=paired[:, None] & in_k[None, :], other=1.0)
            w_KN = tl.load(w_ptr + k0, mask=in_k[:, None] & in_slice[None, :], other=0.0)
            acc = tl.dot(x_MK * a_MK, w_KN, acc, input_precision=DOT)

        b_row = factor(tl.load(entry + B), component, last - first, ELEMENT, ALIGNED)
        b_ptr = b_row[:, None] + (column - first)[None, :]
        acc *= tl.load(b_ptr, mask=paired[:, None] & in_slice[None, :], other=1.0).to(tl.float32)
        plain, step = tl.load(entry + PLAIN)[:, None], tl.load(entry + PLAIN_STEP)[:, None]
        plain_ptr = _plain(plain, step, (column - first)[None, :])
        acc *= tl.load(plain_ptr, mask=(live & ~paired)[:, None] & in_slice[None, :], other=1.0)
        _sum_and_store(
            acc, number, token, slot, live, counters + (first_row // window) * column_tiles + column_tile,
            parts, part_stride, out_features, y, bias, table, y_stride,
            n_slices, slice_index, column, in_slice, first, BN, SPLIT, HAS_BIAS, ALIGNED, DOT, EXACT_SUM,
        )  # fmt: skip


@triton.jit
def _tiles_of_segments(segments, n_segments, layout, n_slices, chunk, BM: tl.constexpr):
    """Row tiles of the segments chunk .. chunk + CHUNK: ceil(tokens / BM) of a modulated one, else none."""
    g = chunk + tl.arange(0, CHUNK)
    slot = tl.load(segments + g * 3, mask=g < n_segments, other=0)
    tokens = tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0)
    return tl.where(tokens >= tl.load(layout + slot * (n_slices + 2) + n_slices), tl.cdiv(tokens, BM), 0)


@triton.jit
def _find_tile(tile, segments, n_segments, layout, n_slices, BM: tl.constexpr):
    """(segment, its first tile) of a row tile."""
    segment = 0
    start = 0
    before = 0
    for chunk in range(0, n_segments, CHUNK):
        size = _tiles_of_segments(segments, n_segments, layout, n_slices, chunk, BM)
        end = before + tl.cumsum(size)
        ended = end <= tile
        segment += tl.sum(ended.to(tl.int32))
        start = tl.maximum(start, tl.max(tl.where(ended, end, 0)))
        before += tl.sum(size)
    return segment, start


@triton.jit
def _count_tiles(segments, n_segments, layout, n_slices, BM: tl.constexpr):
    total = 0
    for chunk in range(0, n_segments, CHUNK):
        total += tl.sum(_tiles_of_segments(segments, n_segments, layout, n_slices, chunk, BM))
    return total


@triton.jit
def flora_modulated(
    x, w, y, bias, tokens, segments, counts, table, layout, tiles,
    n_slices, in_features, x_stride, w_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y[t] = (W ∘ (Bᵀ A + plain)) x[t] + bias + offset of the modulated segments' tokens; grid (row tiles, P).

    Computed transposed, (BN, BM): the modulated tile of W is then the operand that the tensor core takes from
    registers. Segments and slices without Hadamard terms take the loop without modulation.
    """
    ELEMENT: tl.constexpr = w.dtype.element_ty
    slice_index, column, in_slice, first, last = columns(tiles, tl.program_id(1), BN, ALIGNED)
    n_segments = tl.load(counts)
    k = tl.arange(0, BK)
    j = tl.arange(0, RANKS)
    w_ptr = w + column[:, None].to(tl.int64) * w_stride + k[None, :]

    for tile in range(tl.program_id(0), _count_tiles(segments, n_segments, layout, n_slices, BM), tl.num_programs(0)):
        segment, first_tile = _find_tile(tile, segments, n_segments, layout, n_slices, BM)
        slot = tl.load(segments + segment * 3).to(tl.int64)
        m = (tile - first_tile) * BM + tl.arange(0, BM)
        live = m < tl.load(segments + segment * 3 + 2)
        position = tl.load(segments + segment * 3 + 1) + m
        token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
        entry = table + (slot * n_slices + slice_index) * WIDTH
        rank = tl.load(entry + RANK).to(tl.int32)
        plain_ptr = _plain(tl.load(entry + PLAIN), tl.load(entry + PLAIN_STEP), column - first)
        plain_N = tl.load(plain_ptr, mask=in_slice, other=0.0)
        x_ptr = x + token[None, :] * x_stride + k[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        if rank == 0:
            for k0 in tl.range(0, in_features, BK, num_stages=STAGES):
                in_k = k < in_features - k0
                w_NK = tl.load(w_ptr + k0, mask=in_slice[:, None] & in_k[None, :], other=0.0)
                x_KM = tl.load(x_ptr + k0, mask=in_k[:, None] & live[None, :], other=0.0)
                acc = tl.dot(w_NK, x_KM, acc, input_precision=DOT)
            acc *= plain_N[:, None]
        else:
            a_ptr = factor(tl.load(entry + A), j, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
            b_row = factor(tl.load(entry + B), j, last - first, ELEMENT, ALIGNED)
            b_ptr = b_row[None, :] + (column - first)[:, None]
            b_NR = tl.load(b_ptr, mask=(j < rank)[None, :] & in_slice[:, None], other=0.0)
            for k0 in tl.range(0, in_features, BK, num_stages=STAGES):
                in_k = k < in_features - k0
                w_NK = tl.load(w_ptr + k0, mask=in_slice[:, None] & in_k[None, :], other=0.0)
                x_KM = tl.load(x_ptr + k0, mask=in_k[:, None] & live[None, :], other=0.0)
                a_RK = tl.load(a_ptr + k0, mask=(j < rank)[:, None] & in_k[None, :], other=0.0)
                factor_NK = tl.dot(b_NR, a_RK, input_precision=DOT) + plain_N[:, None]
                w_NK = (w_NK.to(tl.float32) * factor_NK).to(ELEMENT)
                acc = tl.dot(w_NK, x_KM, acc, input_precision=DOT)
        acc += _added(entry, bias, column, in_slice, first, HAS_BIAS, ALIGNED)[:, None]
        out = y + token[None, :] * y_stride + column[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=in_slice[:, None] & live[None, :])
