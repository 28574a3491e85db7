"""accelerate(model): parts that are replaced, hooked or adapted act; without them the layer is fast again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_models import FEATURES, HEADS, WIDTH, accelerated, encoder_layer
from foreign_layers import HuggingFaceViT
from timm_like import Block, Mlp
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lmim_fast.layers.accelerate import undo

X = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))


class Adapter(nn.Module):
    """A linear that is kept, and a low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LowRankLinear(nn.Linear):
    """A subclass with a low rank, as loralib's; the weights of its base are kept."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down, self.up = (
            nn.Parameter(torch.randn(s)) for s in ((2, self.in_features), (self.out_features, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


ATTACH: dict[str, Callable[[nn.Module, str], object]] = {
    "adapter": lambda owner, name: setattr(owner, name, Adapter(getattr(owner, name))),
    "subclass": lambda owner, name: setattr(owner, name, LowRankLinear(getattr(owner, name))),
    "Sequential": lambda owner, name: setattr(owner, name, nn.Sequential(getattr(owner, name), nn.Tanh())),
    "hook": lambda owner, name: getattr(owner, name).register_forward_hook(lambda *call: 2 * call[2]),
    "pre-hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "backward hook": lambda owner, name: getattr(owner, name).register_full_backward_hook(
        lambda _, grads, __: (3 * grads[0],)
    ),
    "pruning": lambda owner, name: prune.l1_unstructured(getattr(owner, name), "weight", 0.5),
    "weight norm": lambda owner, name: weight_norm(getattr(owner, name)),
    "spectral norm": lambda owner, name: spectral_norm(getattr(owner, name)),
    "parametrization": lambda owner, name: parametrizations.weight_norm(getattr(owner, name)),
    "patched forward": lambda owner, name: setattr(
        getattr(owner, name), "forward", lambda x, **_: torch.full_like(x, 0.5)
    ),
}
PARTS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Block(WIDTH, HEADS), "attn.qkv"),
    (lambda: Block(WIDTH, HEADS), "mlp.fc1"),
    (lambda: encoder_layer(), "linear1"),
    (lambda: HuggingFaceViT(WIDTH, HEADS), "attention.q_proj"),
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("part", range(len(PARTS)))
@pytest.mark.parametrize("how", [name for name in ATTACH if name != "patched forward"])
def test_what_is_attached_to_a_linear_acts_and_trains_as_in_the_original(how: str, part: int) -> None:
    make, path = PARTS[part]
    layer = make()
    original = copy.deepcopy(layer)
    report = accelerated(layer)
    assert not torch.equal(layer(X), original(X)) or torch.allclose(layer(X), original(X))
    owner, name = path.rpartition(".")[::2]
    results = []
    for each in (layer, original):
        torch.manual_seed(0)
        ATTACH[how](each.get_submodule(owner), name)
        x = X.clone().requires_grad_()
        for _ in range(2):  # of what hooks keep, the second backward pass would miss a graph
            each.zero_grad()
            output = each(x)
            output.square().sum().backward()
        gradients = {key: p.grad for key, p in each.named_parameters() if p.grad is not None}
        results.append((output, x.grad, gradients))
    (output, of_x, found), (right, right_of_x, expected) = results
    torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_x, right_of_x, rtol=1e-3, atol=1e-3)
    assert found.keys() == expected.keys()
    assert any(name in key for key in found)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-3, msg=key)
    assert f"{name} " in report.rows[0].note


@pytest.mark.parametrize("part", ["attn", "mlp", "norm1", "attn.proj_drop", "mlp.act", "ls1", "drop_path2"])
@pytest.mark.parametrize("how", ["hook", "patched forward"])
def test_any_part_of_a_block_acts(how: str, part: str) -> None:
    layer = Block(WIDTH, HEADS)
    original = copy.deepcopy(layer)
    accelerated(layer)
    before = layer(X)
    owner, name = part.rpartition(".")[::2]
    for each in (layer, original):
        ATTACH[how](each.get_submodule(owner), name)
    torch.testing.assert_close(layer(X), original(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(X), before, atol=0.1)


@pytest.mark.parametrize("part", ["attn", "mlp", "norm2", "attn.qkv", "mlp.fc2"])
@pytest.mark.parametrize("other", [nn.Identity, lambda: nn.Sequential(nn.Tanh())])
def test_a_part_that_is_replaced_by_anything_is_called(part: str, other: Callable[[], nn.Module]) -> None:
    layer = Block(WIDTH, HEADS, mlp_ratio=1.0)
    original = copy.deepcopy(layer)
    accelerated(layer)
    for each in (layer, original):
        owner, name = part.rpartition(".")[::2]
        new = (
            other()
            if "." not in part or "fc2" in part
            else nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), other())
        )
        torch.manual_seed(0)
        for module in new.modules():
            module.reset_parameters() if hasattr(module, "reset_parameters") else None
        if part == "attn":
            new.forward = lambda x, attn_mask=None: torch.tanh(x)
        setattr(each.get_submodule(owner), name, new)
    torch.testing.assert_close(layer(X), original(X), rtol=1e-5, atol=1e-5)


def test_a_layer_is_fast_again_once_its_parts_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmim_fast.layers.fast_forwards import vit

    calls: list[int] = []
    form = vit.pre_norm_block
    monkeypatch.setattr(vit, "pre_norm_block", lambda *a, **k: calls.append(1) or form(*a, **k))
    layer = Block(WIDTH, HEADS)
    accelerated(layer)
    linear, hook = layer.attn.qkv, layer.mlp.fc1.register_forward_hook(lambda *_: None)
    layer(X)
    assert not calls
    hook.remove()
    layer(X)
    assert len(calls) == 1
    layer.attn.qkv = Adapter(linear)
    layer(X)
    assert len(calls) == 1
    layer.attn.qkv = linear
    layer(X)
    assert len(calls) == 2


CHANGES: dict[str, Callable[[Any], None]] = {
    "scale": lambda layer: setattr(layer.attn, "scale", 1.0),
    "eps": lambda layer: setattr(layer.norm1, "eps", 1.0),
    "approximate": lambda layer: setattr(layer.mlp.act, "approximate", "tanh"),
    "heads": lambda layer: (setattr(layer.attn, "num_heads", 1), setattr(layer.attn, "head_dim", WIDTH)),
    "norm without weights": lambda layer: setattr(
        layer, "norm1", nn.LayerNorm(WIDTH, elementwise_affine=False)
    ),
    "no bias": lambda layer: setattr(layer.mlp.fc1, "bias", None),
    "a dropout in another mode": lambda layer: (
        layer.eval(),
        layer.attn.proj_drop.train(),
        setattr(layer.attn.proj_drop, "p", 1.0),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_acts(change: str) -> None:
    torch.manual_seed(0)
    layer = Block(WIDTH, HEADS)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    original = copy.deepcopy(layer)
    accelerated(layer)
    before = layer(X)
    CHANGES[change](layer)
    CHANGES[change](original)
    torch.testing.assert_close(layer(X), original(X), rtol=1e-5, atol=1e-5)
    assert (layer(X) - before).abs().max() > 1e-5


def test_a_class_that_is_patched_later_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Block(WIDTH, HEADS)
    report = accelerated(layer)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: -x)
    torch.testing.assert_close(layer(X) * 0, X * 0)
    y = X + layer.attn(layer.norm1(X))
    torch.testing.assert_close(layer(X), y - layer.norm2(y), rtol=1e-5, atol=1e-5)
    assert "patched class" in report.rows[0].note


PATCHED = [(cls, "forward") for cls in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout)]
PATCHED += [(nn.TransformerEncoderLayer, "_sa_block"), (nn.TransformerEncoderLayer, "_ff_block")]
PATCHED += [(nn.Linear, "__call__"), (nn.Module, "__call__")]


@pytest.mark.parametrize(("cls", "method"), PATCHED)
def test_a_method_of_torch_that_is_patched_later_is_obeyed(
    cls: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = encoder_layer(dropout=0.5, activation=nn.GELU()).eval()  # dropout may be switched on by a patch
    original = copy.deepcopy(layer)
    report = accelerated(layer)
    before = layer(X)
    form = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, x, *more, **named: 2 * form(self, x, *more, **named))
    torch.testing.assert_close(layer(X), original(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(X), before, atol=0.01)
    assert report.rows[0].note


@pytest.mark.parametrize("wrap", [lambda new: new, functools.partial])
def test_a_wrapper_around_a_fast_forward_is_called_and_stays(wrap: Callable[..., Any]) -> None:
    """functools.wraps copies the attributes of what it wraps; libraries that move weights wrap so."""
    layer = Block(WIDTH, HEADS)
    accelerated(layer)
    expected = layer(X) + 2 * layer.mlp(layer.norm2(X + layer.attn(layer.norm1(X))))
    fast = layer.mlp.forward
    layer.mlp.forward = functools.update_wrapper(wrap(lambda x: 3 * fast(x)), fast)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    undo(layer)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)


def test_hooks_on_all_modules_see_every_part() -> None:
    layer = Block(WIDTH, HEADS)
    report = accelerated(layer, only=Block)
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        layer(X)
    finally:
        handle.remove()
    assert {"Linear", "GELU", "Attention", "Mlp"} <= set(seen)
    assert report.rows[0].note.endswith("hooks on all modules or a patch of torch.nn")


def test_hooks_on_the_swapped_layer_itself_fire_and_do_not_slow_it_down() -> None:
    layer = Block(WIDTH, HEADS)
    layer.register_forward_hook(lambda *call: 2 * call[2])
    expected = layer(X)
    report = accelerated(layer)
    torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)
    assert report.rows[0].swapped
    assert not report.rows[0].note
