"""What the host keeps of an adapter gives back the same slot contents, and is few objects for the garbage collector."""

import gc

import torch

from flora_vllm.compact import CompactLayers
from flora_vllm.ops.rare import SharedLow, Turned
from flora_vllm.ops.terms import SliceTerms


def _layers(count: int = 40) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shared, basis = random(3, 7), random(4, 7)
    packed = (
        SliceTerms(torch.ones(1), shared, random(3, 5)),
        None,
        SliceTerms(
            random(9, dtype=torch.float32),
            shared,
            random(3, 9),
            offset_O=random(9, dtype=torch.float32),
            rare=(SharedLow(basis, basis.T.contiguous(), random(4), None), Turned(random(1, 7, 7))),
        ),
    )
    single = (
        SliceTerms(torch.ones(1), down_RI=random(2, 5, dtype=torch.float32), up_RO=random(2, 4, dtype=torch.float32)),
    )
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
            assert [type(term) for term in part.rare] == [type(term) for term in back.rare]
            for one, other in zip(_values(part), _values(back), strict=True):
                if isinstance(one, torch.Tensor):
                    assert one.dtype == other.dtype
                    assert other.is_contiguous()
                    assert torch.equal(one, other)
                else:
                    assert one == other


def _values(part: SliceTerms) -> list:
    hot = [value for name, value in vars(part).items() if name != "rare"]
    return hot + [value for term in part.rare for value in vars(term).values()]


def test_shared_factors_are_kept_once():
    layers = _layers()
    first, _, last = CompactLayers(layers)["0.qkv"]
    assert first.a_RI is last.a_RI
    assert last.rare[0].down_LI is layers["0.qkv"][2].rare[0].down_LI  # not the adapter's own: not copied


def test_a_hundred_adapters_are_few_tracked_objects():
    layers = _layers()
    gc.collect()
    before = len(gc.get_objects())
    kept = [CompactLayers(layers) for _ in range(100)]
    for _ in range(5):  # each pass drops tuples that hold nothing it follows, from the inside out
        gc.collect()
    assert len(gc.get_objects()) - before < 10 * len(kept)
