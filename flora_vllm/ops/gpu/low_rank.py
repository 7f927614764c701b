"""Triton kernel of the first half of low-rank terms; `opaque.flora_sum` adds the second half.

NOT RUN ON HARDWARE YET, as `kernels`, whose layouts and terms hold here. One program a token, no tensor core:
made for decode steps, where it reads each factor about once; long runs of one adapter are two plain products, made by
`TritonLinear`.
"""

# ruff: noqa: ANN001, ANN201 - Triton types a kernel's arguments itself: pointers, integers, constants.
import triton
import triton.language as tl

from flora_vllm.ops.gpu.kernels import _factor


@triton.jit
def flora_low_down(
    x, middle, tokens, token_slots, counts, low,
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
        entry = low + (slot * n_slices + slice_index) * 3
        rank = tl.load(entry + 2).to(tl.int32)
        if first < rank:
            token = tl.load(tokens + position).to(tl.int64)
            in_rank = j < rank
            down_ptr = _factor(tl.load(entry), j, in_features, ELEMENT, ALIGNED)[:, None] + k[None, :]
            x_ptr = x + token * x_stride + k
            acc = tl.zeros((BR, BK), tl.float32)
            for k0 in range(0, in_features, BK):
                in_k = k < in_features - k0
                down_RK = tl.load(down_ptr + k0, mask=in_rank[:, None] & in_k[None, :], other=0.0).to(tl.float32)
                x_K = tl.load(x_ptr + k0, mask=in_k, other=0.0).to(tl.float32)
                acc += down_RK * x_K[None, :]
            out = middle + (tl.full((), position, tl.int64) * n_slices + slice_index) * most + j
            tl.store(out, tl.sum(acc, axis=1), mask=in_rank)
