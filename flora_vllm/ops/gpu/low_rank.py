"""Triton kernels of low-rank terms: down x of each token, then a sum that ends split products and adds up to them.

NOT RUN ON HARDWARE YET, as `kernels`, whose layouts and terms hold here. One program a token, no tensor core:
made for decode steps, where it reads each factor about once; long runs of one adapter are two plain products, made by
`TritonLinear`.
"""

# ruff: noqa: ANN001, ANN201 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

from flora_vllm.ops.gpu.kernels import DOWN, LOW_RANK, UP, WIDTH, _added, _columns, _factor, _pointer


@triton.jit
def flora_low_down(
    x, middle, tokens, token_slots, counts, table,
    n_slices, in_features, x_stride, most,
    BR: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """middle[p, i] = down x[t] of list position p and slice i, float32; grid (tokens, N, runs of BR low ranks).

    `most`: ranks that middle (T, N, most) has room for. What lies past a slot's own rank is left as it is.
    """
    ELEMENT: tl.constexpr = x.dtype.element_ty
    slice_index = tl.program_id(1)
    first = tl.program_id(2) * BR
    j = first + tl.arange(0, BR)
    k = tl.arange(0, BK)
    for position in range(tl.program_id(0), tl.load(counts + 3), tl.num_programs(0)):
        slot = tl.load(token_slots + position).to(tl.int64)
        entry = table + (slot * n_slices + slice_index) * WIDTH
        rank = tl.load(entry + LOW_RANK).to(tl.int32)
        if first < rank:
            token = tl.load(tokens + position).to(tl.int64)
            in_rank = j < rank
            down_ptr = _factor(tl.load(entry + DOWN), j, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
            x_ptr = x + token * x_stride + k
            acc = tl.zeros((BR, BK), tl.float32)
            for k0 in range(0, in_features, BK):
                in_k = k < in_features - k0
                down_RK = tl.load(down_ptr + k0, mask=in_rank[:, None] & in_k[None, :], other=0.0).to(tl.float32)
                x_K = tl.load(x_ptr + k0, mask=in_k, other=0.0).to(tl.float32)
                acc += down_RK * x_K[None, :]
            out = middle + (tl.full((), position, tl.int64) * n_slices + slice_index) * most + j
            tl.store(out, tl.sum(acc, axis=1), mask=in_rank)


@triton.jit
def flora_sum(
    parts, y, bias, tokens, token_slots, counts, table, middle, tiles,
    n_slices, part_stride, parts_stride, y_stride, most,
    COUNT: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
    FINISH: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_p parts[p, t], with bias and offset if FINISH; grid (tokens, P). `parts` may be y itself (PARTS = 1).

    COUNT names the entry of `counts` that holds how many list positions take part (2: the stacked, 3: all). LOW: up
    times `middle` (see `flora_low_down`) is added; y then has the terms' dtype.
    """
    ELEMENT: tl.constexpr = y.dtype.element_ty
    slice_index, column, in_slice, first, last = _columns(tiles, BN, ALIGNED)
    for position in range(tl.program_id(0), tl.load(counts + COUNT), tl.num_programs(0)):
        token = tl.load(tokens + position).to(tl.int64)
        acc = tl.zeros((BN,), tl.float32)
        for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues] - Triton unrolls it
            part_ptr = parts + tl.full((), part, tl.int64) * part_stride + token * parts_stride + column
            acc += tl.load(part_ptr, mask=in_slice, other=0.0).to(tl.float32)
        entry = table + (tl.load(token_slots + position).to(tl.int64) * n_slices + slice_index) * WIDTH
        if LOW:
            middle_ptr = middle + (tl.full((), position, tl.int64) * n_slices + slice_index) * most
            up_ptr = _pointer(tl.load(entry + UP), ELEMENT, ALIGNED) + (column - first)
            for _ in range(tl.load(entry + LOW_RANK).to(tl.int32)):
                acc += tl.load(middle_ptr) * tl.load(up_ptr, mask=in_slice, other=0.0).to(tl.float32)
                middle_ptr += 1
                up_ptr += last - first
        if FINISH:
            acc += _added(entry, bias, column, in_slice, first, HAS_BIAS, ALIGNED)
        tl.store(y + token * y_stride + column, acc.to(ELEMENT), mask=in_slice)
