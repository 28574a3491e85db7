"""Products of rows and weights in their own dtype, and the copies of weights that they read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.transforms import transformed


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast leaves dtypes alone."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype, under autocast too. Differentiate `ops.linear.linear` instead.

    On a CPU large fp32 products run as convolutions of 1 x 1, which PyTorch gives to oneDNN while it gives
    linears to MKL: 5 to 20 % faster on an AMD EPYC with 2 threads, forward alone.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        with torch.autocast(kind, enabled=False):
            return matmul(x, weight, bias)
    bias = None if bias is None else in_dtype(bias, x.dtype)
    if not convolves(x, weight):
        return F.linear(x, weight, bias)
    image = x.view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    rows = F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    # no view for autograd: the output of a function that is one could not be changed in place
    product: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
    return product


def convolves(x: Tensor, weight: Tensor) -> bool:
    """The product runs as a convolution: where that is faster, and PyTorch has oneDNN for it."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if min(weight.shape) < 128 or x.numel() < 256 * x.shape[-1] or torch.compiler.is_compiling():
        return False
    onednn = torch.backends.mkldnn
    if transformed() or not x.is_contiguous() or torch.get_num_threads() == 1:
        return False
    return onednn.is_available() and bool(onednn.enabled)


def weight_gradient(grad: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (M, F).T @ rows (M, D), in fp32 for an fp32 weight if PyTorch can: sums are fp32 anyway."""
    low = grad.dtype in (torch.bfloat16, torch.float16)
    if dtype == torch.float32 and low and grad.device.type == "cuda" and not torch.is_grad_enabled():
        return torch.mm(grad.T, rows, out_dtype=torch.float32)  # which has no derivative
    return grad.T @ rows


_copies: Mapping[int, Tensor] = {}  # of the weights with these ids, while `WeightCopies.read` is open


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype: its copy where `WeightCopies` offers one and autograd does not record.

    Of a view of a copied weight, the same view of the copy.
    """
    if weight.dtype == dtype:
        return weight
    if not _copies or torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad):
        return weight.to(dtype)
    base = weight if weight._base is None else weight._base
    copy = _copies.get(id(base))
    if copy is None or copy.dtype != dtype:
        return weight.to(dtype)
    if base is weight:
        return copy
    return copy.as_strided(weight.shape, weight.stride(), weight.storage_offset() - base.storage_offset())


class WeightCopies:
    """Copies of weights in another dtype, all made by one call, in the same memory every time.

    Whoever changes the weights has to call `refresh` before the next `read`: a training step does both. A
    CUDA graph of a step holds them too.

    Args:
        weights: contiguous; kept.
        dtype:   of the copies.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = list(weights)
        self._tensors = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        self._by_id = dict(zip(map(id, self._weights), self._tensors, strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies what the weights are now."""
        if self._weights:
            torch._foreach_copy_(self._tensors, self._weights)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """A block in which `in_dtype` reads the copies; backward passes keep what forward ones have read."""
        global _copies
        previous, _copies = _copies, self._by_id
        try:
            yield
        finally:
            _copies = previous
