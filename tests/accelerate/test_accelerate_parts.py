"""accelerate(model): parts that are replaced, hooked or adapted act; without them the layer is fast again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate_models import FAMILIES, WIDTH, X, attention, block, decoder_layer, encoder_layer, perturbed
from attachments import OF_LINEARS, Undo, replace
from before_and_after import Swapped, run
from timm_like import Block, LayerScale, Mlp
from torch import nn

from benchmarks.operation import launches
from lmim_fast.layers.accelerate import undo
from lmim_fast.ops import attention as attention_op
from lmim_fast.ops import dispatch


class Doubling(nn.Linear):
    """A subclass with the weights of a linear, as loralib's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


KINDS = OF_LINEARS | {
    "subclass": lambda layer, name: replace(layer, name, Doubling(layer.get_submodule(name))),
    "identity": lambda layer, name: replace(layer, name, nn.Identity()),
}
EVERY_KIND = [("attn.qkv", kind) for kind in KINDS if kind != "identity"]
EVERY_PART = [
    (part, kind)
    for part in ("attn", "mlp", "norm1", "attn.proj_drop", "attn.q_norm", "mlp.act", "ls1", "drop_path2")
    for kind in ("forward hook", "patched forward")
]
CALLED = "attn.q_norm", "mlp.act", "drop_path2"  # by the fast form
REPLACED = [("norm2", "identity"), ("mlp", "identity"), ("mlp", "sequential"), ("mlp.fc2", "sequential")]


@pytest.fixture
def attach() -> Iterator[Callable[..., None]]:
    """Attaches to a part of both layers alike; hooks on all modules end with the test."""
    undos: list[Undo] = []

    def attach(swapped: Swapped, part: str, kind: str) -> None:
        swapped.both(lambda layer: undos.append(KINDS[kind](layer, part)))

    yield attach
    for take_away in undos:
        take_away()


@pytest.mark.parametrize(("part", "kind"), EVERY_KIND + EVERY_PART + REPLACED)
def test_what_is_attached_to_a_part_of_a_block_acts_and_trains_as_in_the_original(
    part: str, kind: str, attach: Callable[..., None]
) -> None:
    torch.compiler.reset()
    layer = perturbed(block())
    layer.ls1 = LayerScale(WIDTH)
    swapped = Swapped(layer)
    before = run(layer, X)
    attach(swapped, part, kind)
    for _ in range(2):  # of what hooks keep, the second backward pass would miss a graph
        swapped.check(X, tolerance=1e-4)
    after = run(layer, X)
    unchanged = before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not unchanged
    assert bool(swapped.note) == (part not in CALLED)


OF_VIT, OF_BERT = FAMILIES["transformers' ViT"].make, FAMILIES["transformers' BERT"].make
OTHERS = {
    "attention": (attention, 3, ["out_proj"]),
    "encoder layer": (encoder_layer, 1, ["linear1", "norm2", "self_attn.out_proj"]),
    "decoder layer": (decoder_layer, 2, ["linear2", "multihead_attn", "multihead_attn.out_proj"]),
    "transformers' ViT": (OF_VIT, 1, ["0.attention.q_proj", "0.attention", "1.mlp.fc1", "1.layernorm_after"]),
    "transformers' BERT": (OF_BERT, 1, ["0.attention.key", "0.intermediate.dense", "1.output.LayerNorm"]),
    "torchvision's MLP": (FAMILIES["torchvision's MLP"].make, 1, ["0", "3"]),
    "LMIM's decoder": (FAMILIES["LMIM's decoder"].make, 2, ["linear1"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_of_any_other_layer_acts_and_trains(name: str, attach: Callable[..., None]) -> None:
    make, inputs, parts = OTHERS[name]
    for part in parts:  # torch reads the weight of `out_proj`
        swapped = Swapped(make())
        attach(swapped, part, "pruning" if part.endswith("out_proj") else "lora")
        swapped.check(*[X] * inputs, tolerance=1e-4, **{"need_weights": False} if inputs == 3 else {})


def test_a_layer_is_fast_again_once_its_parts_are_plain() -> None:
    layer = Swapped(block(), only=Block).layer

    def runs_kernels() -> bool:
        with dispatch.backend("triton"), attention_op.backend("eager"), launches() as names:
            layer(X[:1, :2])
        return bool(names)

    for part, kind in (("mlp.fc1", "forward hook"), ("attn.qkv", "lora")):
        assert runs_kernels()
        take_away = KINDS[kind](layer, part)
        assert not runs_kernels()
        take_away()
    assert runs_kernels()


CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": lambda layer: setattr(layer.attn, "scale", 1.0),
    "eps": lambda layer: setattr(layer.norm1, "eps", 1.0),
    "approximate": lambda layer: setattr(layer.mlp.act, "approximate", "tanh"),
    "heads": lambda layer: vars(layer.attn).update(num_heads=1, head_dim=WIDTH),
    "norm without bias": lambda layer: setattr(layer.norm1, "bias", None),
    "no bias": lambda layer: setattr(layer.mlp.fc1, "bias", None),
    "a dropout in another mode": lambda layer: (
        layer.eval(),
        layer.attn.proj_drop.train(),
        setattr(layer.attn.proj_drop, "p", 1.0),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_acts(change: str) -> None:
    swapped = Swapped(perturbed(block()))
    before = swapped.layer(X)
    swapped.both(CHANGES[change]).check(X)
    assert (swapped.layer(X) - before).abs().max() > 1e-5


PATCHED = [(block, Mlp, "forward"), (block, Block, "forward"), (encoder_layer, nn.Module, "__call__")]
PATCHED += [(encoder_layer, cls, "forward") for cls in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout)]
PATCHED += [(encoder_layer, nn.TransformerEncoderLayer, step) for step in ("_sa_block", "_ff_block")]


@pytest.mark.parametrize(("make", "cls", "method"), PATCHED)
def test_a_method_that_is_patched_later_is_obeyed(
    make: Callable[..., nn.Module], cls: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout too, which may be switched on by a patch."""
    layer = block() if make is block else encoder_layer(dropout=0.5, activation=nn.GELU())
    swapped = Swapped(layer.eval())
    before, own = swapped.layer(X), getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, x, *more, **named: 2 * own(self, x, *more, **named))
    swapped.check(X)
    assert not torch.allclose(swapped.layer(X), before, atol=0.01)
    assert swapped.note


@pytest.mark.parametrize("wrap", [lambda new: new, functools.partial])
def test_a_wrapper_around_a_fast_forward_is_called_and_stays(wrap: Callable[..., Any]) -> None:
    """functools.wraps copies the attributes of what it wraps; libraries that move weights wrap so."""
    layer = Swapped(block()).layer
    expected = layer(X) + 2 * layer.mlp(layer.norm2(X + layer.attn(layer.norm1(X))))
    fast = layer.mlp.forward
    layer.mlp.forward = functools.update_wrapper(wrap(lambda x: 3 * fast(x)), fast)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    undo(layer)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)


def test_hooks_on_the_swapped_layer_itself_fire_and_do_not_slow_it_down() -> None:
    layer = block()
    layer.register_forward_hook(lambda *call: 2 * call[2])
    swapped = Swapped(layer)
    swapped.check(X)
    assert not swapped.note
