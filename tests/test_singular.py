"""The decomposition from a seed is torch's own, and takes no random number of the process's."""

import pytest
import torch

from flora_vllm.formats.families.singular import svd_lowrank


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_decomposition_from_a_seed_is_torchs(shape: tuple[int, int], rounds: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    found = svd_lowrank(matrix, 4, rounds, 5)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = torch.svd_lowrank(matrix, q=4, niter=rounds)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
