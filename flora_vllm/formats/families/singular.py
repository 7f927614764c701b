"""The part of a weight that its largest or smallest singular values make, as two factors.

By the decomposition that PEFT made when training began, in float32: what was taken off the base then has its rounding,
which the same routine gives again. Products of singular vectors do not depend on the signs that a library chose.
"""

import torch


def largest_part(weight_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up (O, count), down (count, I)) float32 of the `count` largest singular values."""
    return _part(weight_OI, slice(0, count))


def smallest_part(weight_OI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the smallest, of min(O, I) in all."""
    return _part(weight_OI, slice(-count, None))


def _part(weight_OI: torch.Tensor, which: slice) -> tuple[torch.Tensor, torch.Tensor]:
    left, sizes, right = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    return left[:, which] * sizes[which], right[which]
