"""accelerate(model): what the trial of a layer that is known by its parts sees; it leaves no traces."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate_models import FEATURES, HEADS, WIDTH
from timm_like import Attention, Block, Mlp
from torch import Tensor, nn

from lmim_fast import accelerate

X = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))


class LateDropMlp(Mlp):
    """Dropout after the second linear alone, as BEiT has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.act(self.fc1(x))))


class SwappedDropMlp(Mlp):
    """The right number of dropouts, each in the other's place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop1(self.fc2(self.drop2(self.act(self.fc1(x)))))


class AlwaysDropMlp(Mlp):
    """Its first dropout is in force in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(F.dropout(self.act(self.fc1(x)), self.drop1.p, True)))


class FusedAttention(Attention):
    """timm's with torch's fused attention, which takes the probability alone."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.attn_drop.p if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))


class ForgetfulAttention(FusedAttention):
    """Declares a dropout of the weights and has none."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(context.transpose(1, 2).flatten(2)))


def attention(cls: type[Attention], p: float) -> Attention:
    return cls(WIDTH, HEADS, attn_drop=p, proj_drop=p)


MISPLACED: dict[str, Callable[[float], nn.Module]] = {
    "one dropout of two": lambda p: LateDropMlp(WIDTH, 40, drop=p),
    "dropouts exchanged": lambda p: SwappedDropMlp(WIDTH, 40, drop=p),
    "dropout in evaluation": lambda p: AlwaysDropMlp(WIDTH, 40, drop=p),
    "dropout that is not used": lambda p: attention(ForgetfulAttention, p),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_dropout_in_other_places_leaves_a_layer_alone_unless_it_is_and_stays_0(case: str) -> None:
    (row,) = accelerate(MISPLACED[case](0.25)).rows
    assert not row.swapped
    assert "dropouts in other places" in row.reason
    layer = MISPLACED[case](0.0)
    (row,) = accelerate(layer).rows
    assert row.swapped
    layer(X)
    assert not row.note
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.25
    layer(X)
    assert "changed since the swap: p of its Dropout is 0.25" in row.note


@pytest.mark.parametrize(
    "make",
    [
        lambda: attention(Attention, 0.25),
        lambda: attention(FusedAttention, 0.25),
        lambda: Mlp(WIDTH, 40, drop=0.25),
        lambda: Block(WIDTH, HEADS, proj_drop=0.25, attn_drop=0.25),
    ],
)
def test_dropout_in_the_places_that_timm_has_it_in_is_swapped_and_its_probability_may_change(
    make: Callable[[], nn.Module],
) -> None:
    layer = make()
    report = accelerate(layer)
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    layer(X)
    assert not report.left
    assert not [row for row in report.rows if row.note]
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 1.0
    layer(X)
    assert "is 1.0" in report.rows[0].note


def skipped_by_torch() -> bool:
    return torch.rand(1).item() < 0.5


def skipped_by_python() -> bool:
    return random.random() < 0.5


def skipped_by_numpy() -> bool:
    return np.random.random() < 0.5


@pytest.mark.parametrize("skipped", [skipped_by_torch, skipped_by_python, skipped_by_numpy])
def test_random_numbers_of_its_own_leave_a_layer_alone_and_are_put_back(skipped: Callable[[], bool]) -> None:
    class SkippingBlock(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training and skipped() else super().forward(x)

    layer = SkippingBlock(WIDTH, HEADS)
    states = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())
    for _ in range(4):
        row = accelerate(layer, only="").rows[0]
        assert not row.swapped
        assert row.reason == "draws random numbers of its own"
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


class Float32Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class InputTypeNorm(nn.LayerNorm):
    """As torch's on a CPU; CUDA's autocast gives float32, and this one the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class PreciseMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc2(self.act(self.fc1(x)))


class ParameterTypeBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.norm1.weight.dtype)


class PlainNorm(nn.LayerNorm):
    """As timm's own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class BufferedNorm(PlainNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.to(x.dtype)


class ClampedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-100, 100)


class ScaledGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) * self.gain.to(x.dtype)


UNLIKE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm in float32": (lambda: Float32Norm(WIDTH), "gives torch.float32 where a LayerNorm gives torch.bf"),
    "norm in the input's type": (lambda: InputTypeNorm(WIDTH), "gives torch.bfloat16 under CUDA's autocast"),
    "norm with a buffer": (lambda: BufferedNorm(WIDTH), "has gain of its own"),
    "MLP without autocast": (lambda: PreciseMlp(WIDTH, 40), "bfloat16"),
    "block in its parameters' type": (lambda: ParameterTypeBlock(WIDTH, HEADS), "gives torch.float32 where"),
    "block that clamps": (lambda: ClampedBlock(WIDTH, HEADS), "gives other results"),
    "activation with a buffer": (
        lambda: Mlp(WIDTH, 40, act_layer=ScaledGelu),
        "act has parameters or buffers",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_other_dtypes_buffers_and_treatment_of_large_values_leave_a_layer_alone(case: str) -> None:
    make, expected = UNLIKE[case]
    row = accelerate(make()).rows[0]
    assert not row.swapped
    assert expected in row.reason


def test_a_norm_of_its_own_that_does_what_torchs_does_is_swapped() -> None:
    assert accelerate(PlainNorm(WIDTH)).rows[0].swapped


class CollectingAttention(Attention):
    def __init__(self, store: str) -> None:
        super().__init__(WIDTH, HEADS)
        self.maps: list[Tensor] = []
        self.counts = {"calls": [0]}
        self.circle: list[object] = []
        self.circle.append(self.circle)
        self.store = store

    def forward(self, x: Tensor) -> Tensor:
        if self.store == "maps":
            self.maps.append(x)
        elif self.store == "counts":
            self.counts["calls"][0] += 1
        else:
            self.register_buffer("last", x, persistent=False)
        return super().forward(x)


@pytest.mark.parametrize("store", ["maps", "counts", "_buffers"])
def test_a_forward_that_fills_containers_is_left_alone_and_they_are_as_before(store: str) -> None:
    layer = CollectingAttention(store)
    before = sorted(vars(layer))
    row = accelerate(layer).rows[0]
    assert row.reason == f"its forward stores {store}"
    assert (layer.maps, layer.counts, layer._buffers) == ([], {"calls": [0]}, {})
    assert sorted(vars(layer)) == before
