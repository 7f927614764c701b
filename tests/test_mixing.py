"""A mix's slot contents compute `W + Σ w_i (W_i - W)`, biases too; the oracle mixes the parts' merged weights."""

import pytest
import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.errors import AdapterError
from flora_vllm.mixing import mixed
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.slots import LinearLayout, SliceLayout, layer_terms
from flora_vllm.terms import Added, Dense, Gain, Offset, Product, Shared, Turn, merged

IN, SIZES = 12, {"q": 8, "k": 4}
LAYOUT = LinearLayout(
    "qk",
    IN,
    0,
    IN,
    (SliceLayout("q", 8, 0, 0, 8), SliceLayout("k", 4, 0, 8, 4)),
    sum(SIZES.values()),
)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(kind: str, out: int, seed: int) -> ModuleTerms:
    """A module's terms as families state them."""
    products = Product(random(3, IN, seed=seed), random(out, 3, seed=seed + 1), 1 / 3)
    low = Added(random(2, IN, seed=seed + 2), random(out, 2, seed=seed + 3), 0.5)
    down = Shared("mixing down", (4, IN), lambda: random(4, IN, seed=1))
    up = Shared("mixing up", (8, 4), lambda: random(8, 4, seed=2))
    return ModuleTerms(
        {
            "flora": (products,),
            "lora": (low,),
            "hira": (Product(), products),
            "ia3": (Gain(random(out, seed=seed + 4), scales_bias=True),),
            "dora": (low, Product(), Gain(random(out, seed=seed + 4), scales_bias=False)),
            "bias": (low, Offset(random(out, seed=seed + 5))),
            "dense": (Dense(random(out, IN, seed=seed + 6)),),
            "vera": (Added(down, up, mid=random(4, seed=seed + 7), out=random(out, seed=seed + 8)),),
            "shared": (Added(down, up),),
        }[kind]
    )


# Kind -> share; of `+` the q part alone.
MIXES = [
    {"flora": 0.7, "lora": 0.3},
    {"flora": 0.5, "hira": 0.5},
    {"flora": 1.5},
    {"ia3": -0.4, "dora": 0.8, "bias": 0.1, "dense": 0.2},
    {"vera": 0.3, "shared": 0.6, "flora+": 0.2, "lora+": 0.9},
    {"hira+": 0.7},
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: ",".join(mix))
def test_a_mix_is_the_mix_of_weights(mix):
    weight_OI, bias_O, x_TI = random(12, IN, seed=90), random(12, seed=91), random(5, IN, seed=92)
    wanted_OI, wanted_O, parts = weight_OI.double(), bias_O.double(), []
    for number, (name, share) in enumerate(mix.items()):
        modules = {}
        start = 0
        for module, out in SIZES.items():
            if module == "q" or not name.endswith("+"):
                modules[module] = part(name.rstrip("+"), out, 10 * number)
                rows = slice(start, start + out)
                new_OI, new_O = merged(weight_OI[rows].double(), bias_O[rows].double(), modules[module].terms)
                wanted_OI[rows] += share * (new_OI - weight_OI[rows])
                wanted_O[rows] += share * (new_O - bias_O[rows])
            start += out
        parts.append((share, {"layer": layer_terms(LAYOUT, modules, torch.float32, bias_O)}))
    contents = mixed(parts, {"layer": LAYOUT.sizes})["layer"]
    y_TO = reference_linear(x_TI, weight_OI, bias_O, LAYOUT.sizes, [None, contents], group_by_slot([1] * 5))
    torch.testing.assert_close(y_TO, x_TI.double() @ wanted_OI.T + wanted_O, atol=1e-4, rtol=1e-5)


def test_shares_that_leave_nothing_of_the_base_cost_no_product_of_it():
    parts = [(0.7, "flora"), (0.3, "flora")]
    layers = [
        (share, {"layer": layer_terms(LAYOUT, {"q": part(kind, 8, i)}, torch.float32)})
        for i, (share, kind) in enumerate(parts)
    ]
    contents = mixed(layers, {"layer": LAYOUT.sizes})["layer"][0]
    assert contents is not None
    assert (contents.plain_O, contents.products) == (None, 6)


def test_what_is_no_sum_is_used_alone():
    turned = ModuleTerms((Turn(torch.eye(4).repeat(3, 1, 1)),))
    parts = {"layer": layer_terms(LAYOUT, {"q": turned}, torch.float32)}
    assert mixed([(1.0, parts)], {"layer": LAYOUT.sizes}) == parts
    for shares in ([(0.5, parts)], [(1.0, parts), (0.5, {})]):
        with pytest.raises(AdapterError, match=r"part 1 turns the input.* use it alone, with weight 1"):
            mixed(shares, {"layer": LAYOUT.sizes})
