"""What the host keeps of an adapter gives back the same slot contents, and is few objects for the garbage collector."""

import gc

import torch

from flora_vllm.compact import CompactLayers
from flora_vllm.ops.terms import SliceTerms


def _layers(count: int = 40) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shared = random(3, 7)
    packed = (
        SliceTerms(a_RI=shared, b_RO=random(3, 5), identity=True),
        None,
        SliceTerms(a_RI=shared, b_RO=random(3, 9), gain_O=random(9), gain_bias=True),
    )
    single = (SliceTerms(down_RI=random(2, 5, dtype=torch.float32), up_RO=random(2, 4, dtype=torch.float32)),)
    return {name: terms for i in range(count) for name, terms in ((f"{i}.qkv", packed), (f"{i}.down", single))}


def test_every_slice_comes_back():
    layers = _layers()
    kept = CompactLayers(layers)
    assert list(kept) == list(layers)
    assert kept.get("elsewhere") is None
    for name, terms in layers.items():
        for part, back in zip(terms, kept[name], strict=True):
            assert (part is None) == (back is None)
            if part is None:
                continue
            assert (part.identity, part.gain_bias, part.rank) == (back.identity, back.gain_bias, back.rank)
            for one, other in zip(vars(part).values(), vars(back).values(), strict=True):
                if isinstance(one, torch.Tensor):
                    assert one.dtype == other.dtype
                    assert other.is_contiguous()
                    assert torch.equal(one, other)
                else:
                    assert one == other


def test_shared_factors_are_kept_once():
    first, _, last = CompactLayers(_layers())["0.qkv"]
    assert first.a_RI.data_ptr() == last.a_RI.data_ptr()


def test_a_hundred_adapters_are_few_tracked_objects():
    layers = _layers()
    gc.collect()
    before = len(gc.get_objects())
    kept = [CompactLayers(layers) for _ in range(100)]
    for _ in range(5):  # each pass drops tuples that hold nothing it follows, from the inside out
        gc.collect()
    assert len(gc.get_objects()) - before < 10 * len(kept)
