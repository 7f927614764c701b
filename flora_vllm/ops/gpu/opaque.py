"""Triton kernels on either side of a base product that is not ours: scaled rows before it, scale and sum after it.

NOT RUN ON HARDWARE YET, as `kernels`, whose layouts and terms hold here. Over an opaque (quantised) base a
token has one block of rows for all slices: plain x first, if any slice needs it, then each slice's a[j] ∘ x.
`flora_sum` also ends a split product and a step whose low-rank terms come between product and gain.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

from flora_vllm.ops.gpu.kernels import (
    CHUNK,
    IDENTITY,
    _columns,
    _count_rows,
    _factor,
    _finish,
    _gain_and_bias,
    _locate,
    _pointer,
)


@triton.jit(do_not_specialize=["out_rows"])
def flora_expand(
    x, out, tokens, segments, counts, table, layout,
    n_slices, in_features, x_stride, out_rows,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out[v] = a[j] ∘ x[t] for the step's rows v, zero in the rows it does not use; grid (row tiles, K tiles)."""
    ELEMENT: tl.constexpr = out.dtype.element_ty
    n_segments = tl.load(counts)
    rows, rows_stride = layout + n_slices, 2 * n_slices + 1
    total = _count_rows(segments, n_segments, rows, rows_stride)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    in_k = k < in_features
    for first_row in range(tl.program_id(0) * BM, out_rows, tl.num_programs(0) * BM):
        row = first_row + tl.arange(0, BM)
        slot, position, component = _locate(row, segments, n_segments, rows, rows_stride, BM)
        live = row < total
        token = tl.load(tokens + position, mask=live, other=0).to(tl.int64)
        address = tl.zeros((BM,), tl.int64)
        index = tl.zeros((BM,), tl.int32)
        for i in range(n_slices):
            entry = table + (slot.to(tl.int64) * n_slices + i) * 4
            offset = component - tl.load(layout + slot * rows_stride + n_slices + 1 + i)
            here = (offset >= 0) & (offset < tl.load(entry + 2))
            address = tl.where(here, tl.load(entry), address)
            index = tl.where(here, offset, index)
        a_row = _factor(address, index, in_features, ELEMENT, ALIGNED)
        paired = live & (address != 0)
        a_MK = tl.load(a_row[:, None] + k[None, :], mask=paired[:, None] & in_k[None, :], other=1.0)
        x_MK = tl.load(x + token[:, None] * x_stride + k[None, :], mask=live[:, None] & in_k[None, :], other=0.0)
        out_ptr = out + row[:, None].to(tl.int64) * in_features + k[None, :]
        tl.store(out_ptr, x_MK * a_MK, mask=(row < out_rows)[:, None] & in_k[None, :])


@triton.jit
def _first_row(position, segments, n_segments, layout, n_slices):
    """First row, over the opaque base, of the token at a list position."""
    start = tl.full((), 0, tl.int32)
    for chunk in range(0, n_segments, CHUNK):
        g = chunk + tl.arange(0, CHUNK)
        live = g < n_segments
        slot = tl.load(segments + g * 3, mask=live, other=0)
        first = tl.load(segments + g * 3 + 1, mask=live, other=0)
        tokens = tl.load(segments + g * 3 + 2, mask=live, other=0)
        before = tl.minimum(tl.maximum(position - first, 0), tokens)
        start += tl.sum(before * tl.load(layout + slot * (2 * n_slices + 1) + n_slices))
    return start


@triton.jit(do_not_specialize=["product_rows"])
def flora_reduce(
    products, y, bias, tokens, token_slots, segments, counts, table, gains, layout, tiles,
    n_slices, out_features, y_stride, product_rows,
    BN: tl.constexpr, FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_j b[j] ∘ products[v(t, j)] in float32, with gain and bias if FINISH; grid (tokens, P).

    A token whose rows lie beyond `product_rows` (a step over its budget) gets NaN: never another token's rows.
    """
    ELEMENT: tl.constexpr = products.dtype.element_ty
    slice_index, column, in_slice, first, last = _columns(tiles, BN, ALIGNED)
    n_segments = tl.load(counts)
    for position in range(tl.program_id(0), tl.load(counts + 2), tl.num_programs(0)):
        token = tl.load(tokens + position).to(tl.int64)
        slot = tl.load(token_slots + position).to(tl.int64)
        entry = table + (slot * n_slices + slice_index) * 4
        rank = tl.load(entry + 2).to(tl.int32)
        flags = tl.load(entry + 3)
        b_ptr = _pointer(tl.load(entry + 1), ELEMENT, ALIGNED) + (column - first)
        start = _first_row(position, segments, n_segments, layout, n_slices)
        slot_layout = layout + slot * (2 * n_slices + 1) + n_slices
        fits = tl.full(column.shape, start + tl.load(slot_layout), tl.int32) <= product_rows
        readable = in_slice & fits
        # Without a plain row this is the first scaled one, read and dropped.
        plain = tl.load(products + start.to(tl.int64) * out_features + column, mask=readable, other=0.0)
        acc = tl.where((flags & IDENTITY) != 0, plain.to(tl.float32), 0.0)
        first_scaled = start + tl.load(slot_layout + 1 + slice_index)
        row_ptr = products + first_scaled.to(tl.int64) * out_features + column
        for _ in range(rank):
            product = tl.load(row_ptr, mask=readable, other=0.0).to(tl.float32)
            acc += product * tl.load(b_ptr, mask=in_slice, other=0.0).to(tl.float32)
            row_ptr += out_features
            b_ptr += last - first
        acc = tl.where(fits, acc, float("nan"))
        if FINISH:
            gain, bias_N = _gain_and_bias(
                gains + slot * n_slices + slice_index, bias, column, in_slice, first, HAS_BIAS, ELEMENT, ALIGNED
            )
            acc = _finish(acc, gain, flags, bias_N)
        tl.store(y + token * y_stride + column, acc.to(y.dtype.element_ty), mask=in_slice)


@triton.jit
def flora_sum(
    parts, y, bias, tokens, token_slots, counts, table, gains, low, middle, tiles,
    n_slices, part_stride, parts_stride, y_stride, most,
    COUNT: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_p parts[p, t], with gain and bias if FINISH; grid (tokens, P). `parts` may be y itself (PARTS = 1).

    COUNT names the entry of `counts` that holds how many list positions take part (2: the stacked, 3: all). LOW: up
    times `middle` (see `flora_low_down`) is added before the gain; y then has the terms' dtype.
    """
    ELEMENT: tl.constexpr = y.dtype.element_ty
    slice_index, column, in_slice, first, last = _columns(tiles, BN, ALIGNED)
    for position in range(tl.program_id(0), tl.load(counts + COUNT), tl.num_programs(0)):
        token = tl.load(tokens + position).to(tl.int64)
        acc = tl.zeros((BN,), tl.float32)
        for part in tl.static_range(PARTS):
            part_ptr = parts + tl.full((), part, tl.int64) * part_stride + token * parts_stride + column
            acc += tl.load(part_ptr, mask=in_slice, other=0.0).to(tl.float32)
        slot = tl.load(token_slots + position).to(tl.int64)
        if LOW:
            entry = low + (slot * n_slices + slice_index) * 3
            middle_ptr = middle + (tl.full((), position, tl.int64) * n_slices + slice_index) * most
            up_ptr = _pointer(tl.load(entry + 1), ELEMENT, ALIGNED) + (column - first)
            for _ in range(tl.load(entry + 2).to(tl.int32)):
                acc += tl.load(middle_ptr) * tl.load(up_ptr, mask=in_slice, other=0.0).to(tl.float32)
                middle_ptr += 1
                up_ptr += last - first
        if FINISH:
            flags = tl.load(table + (slot * n_slices + slice_index) * 4 + 3)
            gain, bias_N = _gain_and_bias(
                gains + slot * n_slices + slice_index, bias, column, in_slice, first, HAS_BIAS, ELEMENT, ALIGNED
            )
            acc = _finish(acc, gain, flags, bias_N)
        tl.store(y + token * y_stride + column, acc.to(ELEMENT), mask=in_slice)
