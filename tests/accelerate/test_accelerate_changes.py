"""accelerate(model): a layer that is changed after the swap runs its own forward, whatever was changed."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_models import FEATURES, HEADS, WIDTH, MaskedAutoencoder, attention, encoder_layer
from timm_like import Block, Mlp
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lmim_fast import accelerate
from lmim_fast.layers.accelerated import record
from lmim_fast.layers.accelerated.base import Accelerated

X = 3 * torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))


class FlaggedMlp(Mlp):
    """An MLP with a flag of the class and a helper."""

    negate = False

    def finish(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.finish(super().forward(x))
        return -x if self.negate else x


def decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True)


def set_in(path: str, value: Callable[[], object]) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        torch.manual_seed(0)
        *names, last = path.split(".")
        setattr(layer.get_submodule(".".join(names)), last, value())

    return change


def patch_method(layer: nn.Module) -> None:
    layer._ff_block = types.MethodType(lambda self, x: torch.zeros_like(x), layer)


def forget_bias(layer: nn.Module) -> None:
    del layer.fc1.bias
    layer.fc1.register_parameter("bias", None)


def block() -> nn.Module:
    return Block(WIDTH, HEADS)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None], str]] = {
    "activation": (block, set_in("mlp.act", lambda: nn.GELU("tanh")), "a GELU was replaced"),
    "its option": (block, set_in("mlp.act.approximate", lambda: "tanh"), "approximate of its GELU"),
    "scale": (block, set_in("attn.scale", lambda: 1.0), "scale of its Attention"),
    "eps": (block, set_in("norm1.eps", lambda: 1.0), "eps of its LayerNorm"),
    "norm": (
        block,
        set_in("norm1", lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
        "a LayerNorm was replaced",
    ),
    "bias of a norm": (
        lambda: nn.LayerNorm(WIDTH),
        set_in("bias", lambda: None),
        "parameters of its LayerNorm",
    ),
    "bias of a linear": (lambda: Mlp(WIDTH, 40), forget_bias, "parameters of its Linear"),
    "bias of torch's linear": (
        lambda: encoder_layer(activation="gelu"),
        set_in("linear1.bias", lambda: None),
        "parameters of its Linear",
    ),
    "attention with zero_attn": (
        encoder_layer,
        set_in("self_attn", lambda: attention(add_zero_attn=True)),
        "a MultiheadAttention was replaced",
    ),
    "attention with bias_kv": (
        decoder_layer,
        set_in("multihead_attn", lambda: attention(add_bias_kv=True)),
        "a MultiheadAttention was replaced",
    ),
    "all dropped": (encoder_layer, set_in("dropout1.p", lambda: 1.0), "p of its Dropout is 1.0"),
    "patched method": (encoder_layer, patch_method, "_ff_block of its TransformerEncoderLayer"),
    "patched helper": (
        lambda: FlaggedMlp(WIDTH, 40),
        set_in("finish", lambda: torch.neg),
        "finish of its FlaggedMlp",
    ),
    "flag": (lambda: FlaggedMlp(WIDTH, 40), set_in("negate", lambda: True), "negate of its FlaggedMlp"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_layer_runs_its_own_forward_and_the_table_says_what_changed(case: str) -> None:
    make, change, expected = CHANGES[case]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    original = copy.deepcopy(layer)
    report = accelerate(layer, only="")
    arguments = (X, X) if isinstance(layer, nn.TransformerDecoderLayer) else (X,)
    before = layer(*arguments)
    assert not report.rows[0].note
    change(layer)
    change(original)
    found = layer(*arguments)
    assert torch.equal(found, original(*arguments))
    assert not torch.equal(found, before)
    assert report.rows[0].note.endswith(expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_knows_what_it_was_and_is_changed_by_itself(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = Block(WIDTH, HEADS)
    report = accelerate(layer, only="")
    other = copied(layer)
    assert torch.equal(other(X), layer(X))
    other.attn.scale = 1.0
    assert not torch.allclose(other(X), layer(X))
    assert not report.rows[0].note
    accelerate.undo(other)
    plain = other(X)
    assert not any(isinstance(part, Accelerated) for part in other.modules())
    assert isinstance(layer, Accelerated)
    other.attn.scale = layer.attn.scale
    assert not torch.equal(other(X), plain)


def test_a_class_that_is_patched_later_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(FlaggedMlp(WIDTH, 40), FlaggedMlp(WIDTH, 40))
    report = accelerate(layer, only="0")
    monkeypatch.setattr(FlaggedMlp, "finish", lambda self, x: torch.zeros_like(x))
    assert not layer[0](X).any()
    assert "finish of FlaggedMlp" in report.rows[0].note
    other = Block(WIDTH, HEADS)
    accelerate(other, only="")
    monkeypatch.setattr(Mlp, "forward", lambda self, x: -x)
    monkeypatch.setattr(type(other.attn), "forward", lambda self, x, attn_mask=None: torch.zeros_like(x))
    torch.testing.assert_close(other(X), X - other.norm2(X))


def test_attributes_that_mean_the_same_or_nothing_keep_the_fast_form() -> None:
    layer = Block(WIDTH, HEADS)
    report = accelerate(layer)
    layer.attn.scale = float(layer.attn.head_dim) ** -0.5
    layer.mlp._kept_by_a_wrapper = True
    layer.eval()
    layer(X)
    layer.train()(X)
    assert not [row for row in report.rows if row.note]


def test_dropout_in_another_mode_than_its_layer_takes_the_original_forward() -> None:
    layer = Block(WIDTH, HEADS, proj_drop=0.5, attn_drop=0.5).eval()
    report = accelerate(layer, only="")
    layer.attn.proj_drop.train()
    assert not torch.equal(layer(X), layer(X))
    assert report.rows[0].note.endswith("its Dropout is not in the mode that it is in")


def test_hooks_on_all_modules_see_every_part() -> None:
    layer = Block(WIDTH, HEADS)
    report = accelerate(layer, only="")
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        layer(X)
    finally:
        handle.remove()
    assert {"Linear", "GELU", "Attention", "Mlp"} <= set(seen)
    assert report.rows[0].note.endswith("hooks on all modules")


def test_a_masking_with_another_attribute_runs_the_original() -> None:
    class Curriculum(MaskedAutoencoder):
        first = 0

        def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
            kept, mask, restore = super().random_masking(x, mask_ratio)
            return (kept, mask, restore) if self.first == 0 else (kept, mask * 0, restore)

    model = Curriculum()
    report = accelerate(model, only="")
    assert model.random_masking(X, 0.5)[1].any()
    assert not report.rows[0].note.endswith("Curriculum")
    model.first = 3
    assert not model.random_masking(X, 0.5)[1].any()
    assert report.rows[0].note.endswith("changed since the swap: first of its Curriculum")


@pytest.mark.parametrize("counts", [True, False])
def test_a_forward_set_on_a_part_is_obeyed_by_compilers_that_count_attributes_or_do_not(
    counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch before 2.13 cannot go through the attributes of a module while it compiles."""
    if counts and not record._COMPILER_COUNTS:
        pytest.skip("this PyTorch cannot count them")
    monkeypatch.setattr(record, "_COMPILER_COUNTS", counts)
    layer = Block(WIDTH, HEADS)
    original = copy.deepcopy(layer)
    accelerate(layer)
    torch._dynamo.reset()
    layer.mlp.act.forward = original.mlp.act.forward = torch.tanh
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-5, atol=1e-5)


def test_a_change_after_torch_compile_is_obeyed() -> None:
    layer = Block(WIDTH, HEADS)
    original = copy.deepcopy(layer)
    accelerate(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-5, atol=1e-5)
    layer.attn.scale = original.attn.scale = 1.0
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-5, atol=1e-5)
    layer.mlp.act = original.mlp.act = nn.ReLU()
    torch.testing.assert_close(compiled(X), original(X), rtol=1e-5, atol=1e-5)
