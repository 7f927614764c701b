"""Triton kernels of the adapted linear. They take plain tensors and are launched by `launch` only.

NOT RUN ON HARDWARE YET: correct in Triton's interpreter, compiled for sm_80, sm_90 and sm_100, nothing more.

A row is one base product W(a ∘ x) of one token; a token needs `rank` of them, and one with a = 1 and b = `plain` where
the sum has a plain `W x` (a slice left alone is that row with plain = 1). Decisions:
* Rows are packed back to back whatever the mix of ranks, so nothing is padded to a rank bucket and one launch reads W
  once for the whole step. A tile takes the tokens whose first row is in its window, so no token is split.
* Which row is whose is computed on the device from the segments and the slot table: a captured graph replays rightly
  after either has changed. Programs stride over tiles: a grid smaller than the work is slower, never wrong.
* The modulation is made by the tensor core with the rank padded to 16 in registers (the FMA form spills).
Layouts: slot table (S, N, 9) int64 [addresses of a_RI and b_RO, their rank, address of plain_O, its step (0: one number
for all outputs), address of offset_O or 0, addresses of down_RI and up_RO, their rank]; layout (S, N) int32 rows by
slice; segments (G, 3) int32 [slot, first list position, tokens]; tiles (P, 4) int32 [slice, first column, first and
last column of the slice]. plain_O and offset_O are float32, all else has the dtype of W.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

# Entries of the slot table for a slot and slice, and where they are.
WIDTH, A, B, RANK, PLAIN, PLAIN_STEP, OFFSET, DOWN, UP, LOW_RANK = (tl.constexpr(i) for i in (9, *range(9)))
# Segments looked at together when rows are located.
CHUNK = tl.constexpr(32)
# Tokens summed together after a stacked product.
TOKENS = tl.constexpr(64)


@triton.jit
def _rows_of_segments(segments, n_segments, rows, rows_stride, chunk):
    """Rows of the segments chunk .. chunk + CHUNK, zero past the last."""
    g = chunk + tl.arange(0, CHUNK)
    slot = tl.load(segments + g * 3, mask=g < n_segments, other=0)
    tokens = tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0)
    return tokens * tl.load(rows + slot * rows_stride)


@triton.jit
def _count_rows(segments, n_segments, rows, rows_stride):
    total = 0
    for chunk in range(0, n_segments, CHUNK):
        total += tl.sum(_rows_of_segments(segments, n_segments, rows, rows_stride, chunk))
    return total


@triton.jit
def _locate(row, segments, n_segments, rows, rows_stride, BM: tl.constexpr):
    """(slot, list position of the token, which of the token's rows) of each row; past the end, some valid slot."""
    segment = tl.zeros((BM,), tl.int32)
    start = tl.zeros((BM,), tl.int32)
    before = 0
    for chunk in range(0, n_segments, CHUNK):
        size = _rows_of_segments(segments, n_segments, rows, rows_stride, chunk)
        end = before + tl.cumsum(size)
        ended = end[None, :] <= row[:, None]
        segment += tl.sum(ended.to(tl.int32), axis=1)
        start = tl.maximum(start, tl.max(tl.where(ended, end[None, :], 0), axis=1))
        before += tl.sum(size)
    segment = tl.maximum(tl.minimum(segment, n_segments - 1), 0)
    slot = tl.load(segments + segment * 3)
    token_rows = tl.load(rows + slot * rows_stride)
    index = (row - start) // token_rows
    return slot, tl.load(segments + segment * 3 + 1) + index, row - start - index * token_rows


@triton.jit
def _columns(tiles, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """(slice, columns, which of them are in the slice, the slice's first and last column) of this program's tile."""
    tile = tiles + tl.program_id(1) * 4
    n0, first, last = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if ALIGNED:
        # Known to be multiples, the bounds leave loads and stores whole: one of 16 bytes for eight of two.
        n0, first, last = tl.multiple_of(n0, 16), tl.multiple_of(first, 16), tl.multiple_of(last, 16)
    column = n0 + tl.arange(0, BN)
    return tl.load(tile), column, column < last, first, last


@triton.jit
def _pointer(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _factor(address, index, length, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to row `index` of a factor of rows of `length` at an address."""
    pointer = _pointer(address, ELEMENT, ALIGNED) + index.to(tl.int64) * length
    if ALIGNED:
        # Said again for the sum: that length is a multiple need not be known.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _added(entry, bias, column, in_slice, first, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 offset (zeros where the slot of `entry` has none) and bias of these columns."""
    address = tl.load(entry + OFFSET)
    # A vector of it: the interpreter makes integers of a scalar's mask.
    has_offset = tl.full(column.shape, address, tl.int64) != 0
    offset_ptr = _pointer(address, tl.float32, ALIGNED) + (column - first)
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
    acc, position, live, y, tokens, token_slots, table, bias, split_stride, y_stride,
    n_slices, slice_index, column, in_slice, first,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store acc (rows: list positions, columns: out features), with bias and offset if FINISH."""
    token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
    if FINISH:
        slot = tl.load(token_slots + position, mask=live, other=0).to(tl.int64)
        address = tl.load(table + (slot * n_slices + slice_index) * WIDTH + OFFSET)
        has_offset = ((address != 0) & live)[:, None] & in_slice[None, :]
        offset_ptr = _pointer(address, tl.float32, ALIGNED)[:, None] + (column - first)[None, :]
        acc += tl.load(offset_ptr, mask=has_offset, other=0.0)
        if HAS_BIAS:
            acc += tl.load(bias + column, mask=in_slice, other=0.0).to(tl.float32)[None, :]
    out = y + tl.program_id(2).to(tl.int64) * split_stride + token[:, None] * y_stride + column[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=live[:, None] & in_slice[None, :])


@triton.jit
def _sum_and_store(
    acc, position, live, y, tokens, token_slots, table, bias, split_stride, y_stride,
    n_slices, slice_index, column, in_slice, first,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """Sum the rows of each token, which lie side by side, and store the tokens."""
    first_position = tl.min(tl.where(live, position, 2147483647))
    last_position = tl.max(tl.where(live, position, -1))
    if last_position - first_position + 1 == tl.sum(live.to(tl.int32)):
        _store_tokens(
            acc, position, live, y, tokens, token_slots, table, bias, split_stride, y_stride,
            n_slices, slice_index, column, in_slice, first, FINISH, HAS_BIAS, ALIGNED,
        )  # fmt: skip
    else:
        # Sum each token's rows by a 0/1 matrix. 0 * inf would carry one token's overflow into the others, so
        # what is not finite stays out of the product and is given back to its own token.
        finite = tl.abs(acc) < float("inf")
        lost = tl.max(tl.where(finite, 0, 1), axis=1)
        acc = tl.where(finite, acc, 0.0)
        high = acc.to(tl.bfloat16)
        low = (acc - high.to(tl.float32)).to(tl.bfloat16)
        for p0 in range(first_position, last_position + 1, TOKENS):
            out = p0 + tl.arange(0, TOKENS)
            member = (out[:, None] == position[None, :]) & live[None, :]
            if EXACT_SUM:
                sum_TN = tl.dot(member.to(tl.float32), acc, input_precision=DOT)
            else:
                sum_TN = tl.dot(member.to(tl.bfloat16), high, tl.dot(member.to(tl.bfloat16), low))
            spoilt = tl.max(tl.where(member, lost[None, :], 0), axis=1)
            sum_TN = tl.where(spoilt[:, None] != 0, float("nan"), sum_TN)
            _store_tokens(
                sum_TN, out, out <= last_position, y, tokens, token_slots, table, bias, split_stride,
                y_stride, n_slices, slice_index, column, in_slice, first, FINISH, HAS_BIAS, ALIGNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["window"])
def flora_stacked(
    x, w, y, bias, tokens, token_slots, segments, counts, table, layout, tiles,
    n_slices, in_features, x_stride, w_stride, y_stride, split_stride, window,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, EXACT_SUM: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_j b[j] ∘ W(a[j] ∘ x[t]) of the stacked segments' tokens; grid (row tiles, P, SPLIT).

    SPLIT > 1: y is float32 (SPLIT, T, O), each part the sum over a run of in features. `window`: BM - (most rows of a
    token) + 1. DOT: precision of float32 products. EXACT_SUM: float32 in the sum over rows, not bfloat16 halves.
    """
    ELEMENT: tl.constexpr = w.dtype.element_ty
    slice_index, column, in_slice, first, last = _columns(tiles, BN, ALIGNED)
    n_segments = tl.load(counts)
    rows, rows_stride = layout + slice_index, n_slices
    total = _count_rows(segments, n_segments, rows, rows_stride)
    k = tl.arange(0, BK)
    w_ptr = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    run = tl.cdiv(tl.cdiv(in_features, BK), SPLIT) * BK
    k_first = tl.program_id(2) * run
    k_last = tl.minimum(k_first + run, in_features)

    for first_row in range(tl.program_id(0) * window, total, tl.num_programs(0) * window):
        row = first_row + tl.arange(0, BM)
        slot, position, component = _locate(row, segments, n_segments, rows, rows_stride, BM)
        head = row - component
        live = (row < total) & (head >= first_row) & (head < first_row + window)
        token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
        entry = table + (slot.to(tl.int64) * n_slices + slice_index) * WIDTH
        paired = live & (component < tl.load(entry + RANK))
        a_ptr = _factor(tl.load(entry + A), component, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
        x_ptr = x + token[:, None] * x_stride + k[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in tl.range(k_first, k_last, BK, num_stages=STAGES):
            in_k = k < k_last - k0
            x_MK = tl.load(x_ptr + k0, mask=live[:, None] & in_k[None, :], other=0.0)
            a_MK = tl.load(a_ptr + k0, mask=paired[:, None] & in_k[None, :], other=1.0)
            w_KN = tl.load(w_ptr + k0, mask=in_k[:, None] & in_slice[None, :], other=0.0)
            acc = tl.dot(x_MK * a_MK, w_KN, acc, input_precision=DOT)

        b_row = _factor(tl.load(entry + B), component, last - first, ELEMENT, ALIGNED)
        b_ptr = b_row[:, None] + (column - first)[None, :]
        acc *= tl.load(b_ptr, mask=paired[:, None] & in_slice[None, :], other=1.0).to(tl.float32)
        plain_ptr = _plain(
            tl.load(entry + PLAIN)[:, None], tl.load(entry + PLAIN_STEP)[:, None], (column - first)[None, :]
        )
        acc *= tl.load(plain_ptr, mask=(live & ~paired)[:, None] & in_slice[None, :], other=1.0)
        _sum_and_store(
            acc, position, live, y, tokens, token_slots, table, bias, split_stride, y_stride,
            n_slices, slice_index, column, in_slice, first, FINISH, HAS_BIAS, ALIGNED, DOT, EXACT_SUM,
        )  # fmt: skip


@triton.jit
def _find_tile(tile, segments, n_segments, BM: tl.constexpr):
    """(segment, its first tile) of a row tile, where every segment has its own ceil(tokens / BM) tiles."""
    segment = 0
    start = 0
    before = 0
    for chunk in range(0, n_segments, CHUNK):
        g = chunk + tl.arange(0, CHUNK)
        size = tl.cdiv(tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0), BM)
        end = before + tl.cumsum(size)
        ended = end <= tile
        segment += tl.sum(ended.to(tl.int32))
        start = tl.maximum(start, tl.max(tl.where(ended, end, 0)))
        before += tl.sum(size)
    return segment, start


@triton.jit
def _count_tiles(segments, n_segments, BM: tl.constexpr):
    total = 0
    for chunk in range(0, n_segments, CHUNK):
        g = chunk + tl.arange(0, CHUNK)
        total += tl.sum(tl.cdiv(tl.load(segments + g * 3 + 2, mask=g < n_segments, other=0), BM))
    return total


@triton.jit
def flora_modulated(
    x, w, y, bias, tokens, segments, counts, table, tiles,
    n_slices, in_features, x_stride, w_stride, y_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y[t] = (W ∘ (Bᵀ A + plain)) x[t] of the modulated segments' tokens; grid (row tiles, P).

    Computed transposed, (BN, BM): the modulated tile of W is then the operand that the tensor core takes from
    registers. Segments and slices without Hadamard terms take the loop without modulation.
    """
    ELEMENT: tl.constexpr = w.dtype.element_ty
    slice_index, column, in_slice, first, last = _columns(tiles, BN, ALIGNED)
    n_segments = tl.load(counts + 1)
    k = tl.arange(0, BK)
    j = tl.arange(0, RANKS)
    w_ptr = w + column[:, None].to(tl.int64) * w_stride + k[None, :]

    for tile in range(tl.program_id(0), _count_tiles(segments, n_segments, BM), tl.num_programs(0)):
        segment, first_tile = _find_tile(tile, segments, n_segments, BM)
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
            a_ptr = _factor(tl.load(entry + A), j, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
            b_row = _factor(tl.load(entry + B), j, last - first, ELEMENT, ALIGNED)
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
        if FINISH:
            acc += _added(entry, bias, column, in_slice, first, HAS_BIAS, ALIGNED)[:, None]
        out = y + token[None, :] * y_stride + column[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=in_slice[:, None] & live[None, :])
