"""The part of a weight that its largest or smallest singular values make, as two factors.

It is a projection, `U_k U_kᵀ W` with eigenvectors of `W Wᵀ` (or `W V_k V_kᵀ`, whichever side is smaller): there is no
sign to choose, and it takes half the time of a decomposition of W. In float64, because squares lose half the digits.
"""

import torch


def largest_part(weight_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up (O, count), down (count, I)) float32 of the `count` largest singular values."""
    return _part(weight_OI, slice(-count, None))


def smallest_part(weight_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the smallest, of min(O, I) in all."""
    return _part(weight_OI, slice(0, count))


def _part(weight_OI: torch.Tensor, which: slice) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight_OI.double()
    if weight.shape[0] <= weight.shape[1]:
        # eigh orders from the smallest.
        vectors = torch.linalg.eigh(weight @ weight.T)[1][:, which]
        return vectors.float().contiguous(), (vectors.T @ weight).float()
    vectors = torch.linalg.eigh(weight.T @ weight)[1][:, which]
    return (weight @ vectors).float(), vectors.T.float().contiguous()
