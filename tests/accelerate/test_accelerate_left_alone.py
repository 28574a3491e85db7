"""accelerate(model): what it does not know is left alone with a reason, and no call gives another result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate_models import (
    FAMILIES,
    FEATURES,
    HEADS,
    WIDTH,
    FurtherLinear,
    MaskedAutoencoder,
    VisionTransformer,
    attention,
    encoder_layer,
)
from timm_like import Attention, Block, Mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lmim_fast import accelerate
from lmim_fast.accelerate import AccelerationReport
from lmim_fast.layers import Block as FastBlock
from lmim_fast.layers.accelerated.base import Accelerated

X = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))


def reason_of(report: AccelerationReport, name: str) -> str:
    """Why the layer of this name was left; it must not be among the swapped."""
    assert name not in [row.name for row in report.swapped]
    return next(row.reason for row in report.left if row.name == name)


# Modules that are built in another way than the fast forms.


class OwnNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnBlockOfTorch(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


class ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class LocalAttention(Attention):
    """Each token sees the 100 before and after it: as global for short sequences."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        return super().forward(x, torch.where((place[:, None] - place).abs() > 100, -torch.inf, 0.0))


class DroppingMlp(Mlp):
    """Dropout without a module: the same in evaluation alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class DetachedMlp(Mlp):
    """The same output, another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.act(self.fc1(x.detach()))))


class RememberingAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


class ScaledMlp(Mlp):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gamma = nn.Parameter(torch.ones(1))


class SpatialAttention(Attention):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return super().forward(x.view(len(x), height * width, -1))


class GainMlp(Mlp):
    """Its result is scaled by a number that no part shows."""

    def __init__(self, gain: float) -> None:
        super().__init__(WIDTH, 40)
        self._gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self._gain * super().forward(x)


class RegisteredMlp(Mlp):
    """A class that no other may extend."""

    def __init_subclass__(cls) -> None:
        raise TypeError("RegisteredMlp is final")


def with_other_norm() -> nn.Module:
    layer = encoder_layer()
    layer.norm1 = nn.RMSNorm(WIDTH)
    return layer


def with_patched_method() -> nn.Module:
    layer = encoder_layer()
    layer._sa_block = lambda x, *_, **__: x
    return layer


def with_mixed_layouts() -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True)
    layer.multihead_attn.batch_first = False
    return layer


def with_lora() -> nn.Module:
    block = Block(WIDTH, HEADS)
    block.attn.qkv = FurtherLinear(WIDTH, 3 * WIDTH)
    return block


def with_stochastic_depth() -> nn.Module:
    block = Block(WIDTH, HEADS)
    block.drop_path1 = nn.Dropout1d(0.1)
    return block


def kept_order(self: MaskedAutoencoder, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masks blocks, not what the noise says."""
    kept, mask, restore = MaskedAutoencoder.random_masking(self, x, mask_ratio)
    return kept, mask.roll(1, 1), restore


UNLIKE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LayerNorm without weight": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "no weight"),
    "LayerNorm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), "no bias"),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((9, WIDTH)), "over 2 dimensions"),
    "subclass of LayerNorm": (lambda: OwnNorm(WIDTH), "gives other results"),
    "attention with other keys": (lambda: attention(kdim=8), "kdim"),
    "attention with bias_kv": (lambda: attention(add_bias_kv=True), "add_bias_kv"),
    "attention with zero_attn": (lambda: attention(add_zero_attn=True), "add_zero_attn"),
    "tanh GELU in torch's layer": (lambda: encoder_layer(activation=nn.GELU("tanh")), "activation"),
    "another activation in torch's layer": (lambda: encoder_layer(activation=F.silu), "silu"),
    "torch's layer without biases": (lambda: encoder_layer(bias=False), "no bias"),
    "subclass of torch's layer": (lambda: OwnBlockOfTorch(WIDTH, HEADS, 48), "_ff_block"),
    "torch's layer with another norm": (with_other_norm, "norm1 is a RMSNorm"),
    "torch's layer with a patched method": (with_patched_method, "_sa_block"),
    "torch's layer of two layouts": (with_mixed_layouts, "batch_first"),
    "a class that cannot be extended": (lambda: RegisteredMlp(WIDTH, 40), "RegisteredMlp is final"),
    "tanh GELU in an MLP": (lambda: Mlp(WIDTH, 40, act_layer=lambda: nn.GELU("tanh")), "gives other results"),
    "MLP with dropout in its function": (lambda: DroppingMlp(WIDTH, 40), "random numbers of its own"),
    "MLP with another gradient": (lambda: DetachedMlp(WIDTH, 40), "gives other results"),
    "MLP with a parameter more": (lambda: ScaledMlp(WIDTH, 40), "gamma"),
    "block of another wiring": (lambda: ParallelBlock(WIDTH, HEADS), "gives other results"),
    "block with a LoRA linear": (with_lora, "qkv is a FurtherLinear"),
    "block with stochastic depth": (with_stochastic_depth, "drop_path1 is a Dropout1d"),
    "block with a tanh GELU": (
        lambda: Block(WIDTH, HEADS, act_layer=lambda: nn.GELU("tanh")),
        "gives other results",
    ),
    "attention in a window": (lambda: LocalAttention(WIDTH, HEADS), "gives other results"),
    "attention that stores its result": (lambda: RememberingAttention(WIDTH, HEADS), "stores seen"),
    "attention with sizes": (lambda: SpatialAttention(WIDTH, HEADS), "cannot be tried: TypeError"),
    "dropout of everything": (lambda: Mlp(WIDTH, 40, drop=1.0), "drop1 is 1.0"),
    "a layer of this package": (lambda: FastBlock(WIDTH, HEADS), "fast already"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_layer_that_computes_something_else_is_left_alone(case: str) -> None:
    make, expected = UNLIKE[case]
    model = nn.Sequential(make())
    before = type(model[0]), sorted(vars(model[0]))
    random_state = torch.random.get_rng_state()
    report = accelerate(model)
    assert expected in reason_of(report, "0")
    assert (type(model[0]), sorted(vars(model[0]))) == before
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_layers_of_one_class_are_judged_by_their_own_attributes() -> None:
    report = accelerate(nn.Sequential(GainMlp(1.0), GainMlp(2.0), GainMlp(1.0)))
    assert [row.name for row in report.swapped] == ["0", "2"]
    assert "gives other results" in reason_of(report, "1")


def test_a_masking_that_does_something_else_is_left_alone() -> None:
    cls = type("BlockMasking", (MaskedAutoencoder,), {"random_masking": kept_order})
    assert "gives other results" in reason_of(accelerate(cls()), "")
    patched = MaskedAutoencoder()
    patched.random_masking = patched.random_masking
    assert "patched" in reason_of(accelerate(patched), "")


def hook(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_on_a_layer_or_in_it_leave_it_alone(register: str) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), Block(WIDTH, HEADS), Block(WIDTH, HEADS))
    getattr(model[0], register)(hook)
    getattr(model[1].mlp.fc1, register)(hook)
    report = accelerate(model)
    assert "hooks" in reason_of(report, "0")
    assert (
        reason_of(report, "1") == reason_of(report, "1.mlp") == "has hooks or a patched forward in its Linear"
    )
    assert {"1.norm1", "1.attn", "2"} <= {row.name for row in report.swapped}


def test_a_patched_forward_leaves_the_layer_alone() -> None:
    layer = nn.LayerNorm(WIDTH)
    layer.forward = lambda x: x
    assert "patched forward" in reason_of(accelerate(layer), "")
    assert torch.equal(layer(X), X)


def test_weight_norm_and_parametrizations_leave_the_layer_alone() -> None:
    block, norm = Block(WIDTH, HEADS), nn.LayerNorm(WIDTH)
    parametrizations.weight_norm(block.mlp.fc1)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    report = accelerate(nn.Sequential(block, norm))
    assert reason_of(report, "0") == "has a parametrized weight in its ParametrizedLinear"
    assert reason_of(report, "1") == "has a parametrized weight"


def test_a_scripted_part_is_left_alone_and_the_rest_swapped() -> None:
    model = nn.Sequential(torch.jit.script(nn.LayerNorm(WIDTH)), nn.LayerNorm(WIDTH))
    report = accelerate(model)
    assert reason_of(report, "0") == "scripted"
    assert [row.name for row in report.swapped] == ["1"]


def test_a_compiled_part_is_left_alone() -> None:
    in_place = nn.LayerNorm(WIDTH)
    in_place.compile(backend="eager")
    model = nn.Sequential(torch.compile(nn.LayerNorm(WIDTH), backend="eager"), in_place)
    report = accelerate(model)
    assert "before torch.compile" in reason_of(report, "0")
    assert "before torch.compile" in reason_of(report, "1")


def test_a_wrapper_for_several_devices_is_left_alone() -> None:
    report = accelerate(nn.Sequential(nn.DataParallel(nn.LayerNorm(WIDTH))))
    assert "several devices" in reason_of(report, "0")
    assert not report.swapped


def test_frozen_layers_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(Block(WIDTH, HEADS).requires_grad_(False), nn.LayerNorm(WIDTH))
    expected = model(X)
    report = accelerate(model)
    assert "frozen=True" in reason_of(report, "0")
    report = accelerate(model, frozen=True)
    assert "0" in [row.name for row in report.swapped]
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_parameters_on_several_devices_leave_the_layer_alone() -> None:
    layer = encoder_layer()
    layer.norm1.to("meta")
    assert "several devices: cpu, meta" in reason_of(accelerate(layer), "")


def test_a_model_without_memory_is_swapped_and_filled_later() -> None:
    family = FAMILIES["timm's ViT"]
    source = family.model()
    with torch.device("meta"):
        model = VisionTransformer()
    report = accelerate(model)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    torch.testing.assert_close(model(family.input()), source(family.input()), rtol=1e-5, atol=1e-5)
    assert not [row for row in report.swapped if row.note]


def test_a_layer_with_two_names_is_swapped_once_and_named_twice() -> None:
    shared = nn.LayerNorm(WIDTH)
    report = accelerate(nn.ModuleDict({"first": shared, "second": shared}))
    assert [(row.name, row.reason) for row in report.rows] == [
        ("first", ""),
        ("second", "same module as first"),
    ]
    report.undo()
    assert type(shared) is nn.LayerNorm


def test_a_second_call_changes_nothing_and_its_undo_neither() -> None:
    model = FAMILIES["timm's ViT"].model()
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    second = accelerate(model)
    assert not second.swapped
    assert {row.reason for row in second.left} == {"swapped already", "no fast form"}
    second.undo()
    assert [type(module) for module in model.modules()] == classes
    first.undo()
    assert not any(isinstance(module, Accelerated) for module in model.modules())
