"""Inputs of masked losses, and how their kernels are judged."""

from collections.abc import Callable

import torch
from accuracy import DEVICE, GRADIENT_FACTOR, assert_as_accurate, assert_rms_as_accurate
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.masking import select_patches

Loss = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # product, bias, source, ids


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def masked(images: int, patches: int, visible: int) -> Tensor:
    return select_patches(torch.rand(images, patches, device=DEVICE), visible)[1]


def feature_inputs(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """product, bias, features and ids of (images, patches, visible ones, width)."""
    images, patches, visible, width = sizes
    product, features = draw(images, patches - visible, width, dtype=dtype), draw(images, 1 + patches, width)
    return product, draw(width), (2 * features + 0.5).to(dtype), masked(images, patches, visible)


def pixel_inputs(layout: str, dtype: torch.dtype, patch: int = 4) -> tuple[Tensor, ...]:
    """product, bias, images of 2 x 3 patches, ids."""
    height, width, pixels = 2 * patch, 3 * patch, 3 * patch**2
    images = torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8).to(DEVICE)
    if layout == "float":
        images = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)  # strides of the bytes
    return draw(3, 4, pixels, dtype=dtype), draw(pixels), images, masked(3, 6, 2)


def differentiate(
    backend: str, loss: Loss, inputs: tuple[Tensor, ...], upstream: float = 1.0, bias: bool = True
) -> list[Tensor]:
    """The loss, and the gradients of product and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[: 1 + bias]]
    with dispatch.backend(backend):
        result = loss(leaves[0], leaves[1] if bias else None, *inputs[2:])
        gradient = torch.tensor(upstream, dtype=result.dtype, device=DEVICE)
        return [result, *torch.autograd.grad(result, leaves, gradient)]


def assert_loss_is_accurate(
    loss: Loss, inputs: tuple[Tensor, ...], upstream: float = 1.0, *, bias: bool = True
) -> None:
    """The loss itself is a sum in fp32 in any dtype: it may be off by a few roundings of that."""
    high = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    truth = differentiate("eager", loss, high, upstream, bias)
    low = differentiate("eager", loss, inputs, upstream, bias)
    ours = differentiate("triton", loss, inputs, upstream, bias)
    assert (ours[0].shape, ours[0].dtype) == ((), torch.float32)
    allowed = max(2 * (low[0].double() - truth[0]).abs().item(), 1e-6 * truth[0].item())
    assert (ours[0].double() - truth[0]).abs().item() <= allowed
    assert_as_accurate(ours[1:2], low[1:2], truth[1:2], GRADIENT_FACTOR)
    assert_rms_as_accurate(ours[2:], low[2:], truth[2:])
