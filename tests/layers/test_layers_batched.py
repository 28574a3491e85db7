"""Batched gradients (`is_grads_batched`) through eager forms; the error where a kernel cannot make them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers import Block, DecoderLayer, Mlp, MultiheadAttention
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import dispatch
from lmim_fast.ops.align import split_aligned
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import shared_input_linears

WIDTH = 24
MODEL = ModelConfig(
    image_size=(8, 16),
    width=64,
    depth=1,
    heads=2,
    mlp_ratio=2.0,
    decoder_width=64,
    decoder_depth=2,
    decoder_heads=2,
    decoder_ffn=48,
    decoder_dropout=0.0,
    mask_ratio=0.6,
    pos_grid="true",
)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_batched(form: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Three gradients at once are those one by one."""
    output = form()
    upstream = torch.randn(3, *output.shape, dtype=output.dtype)
    options = dict(retain_graph=True, allow_unused=True)
    together = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, **options)
    for number in range(3):
        alone = torch.autograd.grad(output, leaves, upstream[number], **options)
        for many, one in zip(together, alone, strict=True):
            assert (many is None) == (one is None)
            if many is not None:
                torch.testing.assert_close(many[number], one)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Block": lambda: Block(WIDTH, 3, qkv_bias=True),
    "Mlp": lambda: Mlp(WIDTH, 48),
    "DecoderLayer": lambda: DecoderLayer(WIDTH, 3, 48, 0.0),
    "MultiheadAttention": lambda: MultiheadAttention(WIDTH, 3, batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers(name: str) -> None:
    layer, x, memory = LAYERS[name]().double(), double(2, 5, WIDTH), double(2, 7, WIDTH)
    inputs = {"DecoderLayer": (x, memory), "MultiheadAttention": (x, memory, memory)}.get(name, (x,))

    def form() -> Tensor:
        output = layer(*inputs)
        return output[0] if isinstance(output, tuple) else output

    assert_batched(form, [*inputs, *layer.parameters()])


@pytest.mark.parametrize("stop", ["none", "masked", "guidance"])
def test_gradients_of_ops_that_write_in_place(stop: str) -> None:
    features, weights, bias = double(2 * (3 + 4), WIDTH), [double(4, WIDTH), double(6, WIDTH)], double(WIDTH)

    def aligned() -> Tensor:
        parts = split_aligned(features * 1, 2, 3, 4, stop_gradient=stop)
        return torch.cat([part.flatten() for part in parts])

    assert_batched(aligned, [features])
    assert_batched(lambda: split_aligned(features * 1, 2, 3, 4, stop_gradient=stop)[2], [features])
    assert_batched(lambda: torch.cat(shared_input_linears(features, weights), -1), [features, *weights])
    assert_batched(lambda: bias_gelu(features, bias), [features, bias])


def test_gradients_of_the_whole_model() -> None:
    model, images = LMIM(MODEL), torch.rand(2, 3, *MODEL.image_size)
    noise = torch.rand(2, MODEL.num_patches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def losses() -> Tensor:
        output = model(images, images.flip(0), noise)
        return torch.stack([output.loss_recon, output.loss_align])

    assert_batched(losses, trained)


def test_a_kernel_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, bias = torch.randn(4, 16, requires_grad=True), torch.zeros(16)
    with dispatch.backend("triton"):
        output = bias_gelu(x, bias)
    with pytest.raises(RuntimeError, match=r"backend\(.eager.\)"):
        torch.autograd.grad(output, x, torch.randn(3, 4, 16), is_grads_batched=True)
