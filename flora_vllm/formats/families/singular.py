"""The part of a weight that its largest or smallest singular values make, as two factors.

By the decomposition that PEFT made when training began, in float32: what was taken off the base then has its rounding,
which the same routine gives again. Products of singular vectors do not depend on the signs that a library chose.
"""

import torch


def largest_part(weight_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up (O, count), down (count, I)) float32 of the `count` largest singular values."""
    return _part(weight_OI, slice(0, count))


def smallest_part(
    weight_OI: torch.Tensor, count: int, kept: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the smallest, of min(O, I) in all; vectors and values rounded to `kept` before the product."""
    return _part(weight_OI, slice(-count, None), kept)


def _part(
    weight_OI: torch.Tensor, which: slice, kept: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    left, sizes, right = (factor.to(kept).float() for factor in found)
    return left[:, which] * sizes[which], right[which]


def svd_lowrank(
    matrix_MN: torch.Tensor, rank: int, rounds: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, sizes, right) of `torch.svd_lowrank` after `torch.manual_seed(seed)`, bit for bit.

    That draws from the process's own random numbers, on a GPU's too: those that requests are sampled with meanwhile.
    """
    tall = matrix_MN if matrix_MN.shape[0] >= matrix_MN.shape[1] else matrix_MN.mH
    generator = torch.Generator(matrix_MN.device).manual_seed(seed)
    basis = tall @ torch.randn(tall.shape[1], rank, dtype=tall.dtype, device=tall.device, generator=generator)
    basis = torch.linalg.qr(basis).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(tall.mH @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    left, sizes, right = torch.linalg.svd(basis.mH @ tall, full_matrices=False)
    left, right = basis @ left, right.mH
    return (left, sizes, right) if tall is matrix_MN else (right, sizes, left)
