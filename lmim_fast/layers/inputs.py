"""Input checks that all layers share; their errors name the layer's own arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.linear import compute_dtype

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that autocast converts


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless heads divide the width."""
    if heads < 1 or width % heads:
        raise ValueError(f"width {width} must be a multiple of the number of heads, got {heads} heads")


def features(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """Check x (..., D) against a weight (F, D), and cast it to the dtype of their matmul.

    Raises:
        ValueError: D or the device differs, or torch would not multiply the two dtypes either.
    """
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} {tuple(x.shape)} must have {weight.shape[1]} features in its last dimension"
        )
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}, the layer's parameters on {weight.device}")
    autocast = torch.is_autocast_enabled(weight.device.type)
    if x.dtype != weight.dtype and not (autocast and x.dtype in _AUTOCAST_DTYPES):
        raise ValueError(
            f"{name} is {x.dtype}, the layer's parameters are {weight.dtype}: convert one of them"
            + ("" if autocast else ", or use torch.autocast")
        )
    return x.to(compute_dtype(weight))


def tokens(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """As `features`, for x (B, N, D) with at least one token.

    Raises:
        ValueError: as `features`; x is not three-dimensional, or has no sequence or no token.
    """
    if x.dim() != 3:
        raise ValueError(f"{name} {tuple(x.shape)} must be (B, N, {weight.shape[1]})")
    x = features(name, x, weight)
    if 0 in x.shape:
        raise ValueError(f"{name} {tuple(x.shape)} must have at least one sequence and one token")
    return x
