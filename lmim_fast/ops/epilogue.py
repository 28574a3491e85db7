"""Whether the GELU of an MLP runs in the epilogue of its products or in a separate pass."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.ops import dispatch
from lmim_fast.ops.epilogue_table import FASTER

SETTINGS = ("auto", "on", "off")
VARIABLE = "LMIM_FAST_GELU_EPILOGUE"


def check_setting(name: str) -> str:
    """The setting itself.

    Raises:
        ValueError: it is none of "auto", "on" and "off".
    """
    if name not in SETTINGS:
        raise ValueError(f"unknown setting of the GELU epilogue {name!r}; choose from {', '.join(SETTINGS)}")
    return name


def in_epilogue(
    setting: str,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    dtype: torch.dtype | None = None,
) -> bool:
    """True if the kernel with GELU in its epilogue takes an MLP without dropout between its products.

    Args:
        setting: "on" takes the kernel on every CUDA device, "off" never; "auto" leaves the choice to
                 LMIM_FAST_GELU_EPILOGUE. If that is "auto" too, the kernel is taken if it is the faster form
                 by `ops/epilogue_table.py`, and under backend "triton". Whatever the setting, no kernel runs
                 under backend "eager", nor on a CPU under backend "auto".
        x:       (..., D) rows, or what they are the norm of.
        weight1, bias1, weight2: as for `mlp`.
        dtype:   of the rows; None for x's.
    Raises:
        ValueError:   an unknown setting.
        RuntimeError: "on", or backend "triton", and the kernel does not take these inputs.
    """
    dtype = dtype or x.dtype
    if check_setting(setting) == "auto":
        setting = check_setting(os.environ.get(VARIABLE, "auto"))
    if setting == "off" or (setting == "auto" and not _preferred(x, weight1, bias1, weight2, dtype)):
        return False
    tensors, reason = (x, weight1, bias1, weight2), None
    if not (weight1.numel() and weight2.numel()):
        reason = f"has no kernel for empty weights, got {tuple(weight1.shape)} and {tuple(weight2.shape)}"
    if dispatch.takes("mlp", tensors, reason, dtype):
        return True
    if setting == "on" and x.device.type == "cuda" and dispatch.current_backend() != "eager":
        reason = dispatch.refusal(tensors, reason, dtype)
        raise RuntimeError(f"the GELU epilogue is 'on', but mlp {reason}; set it to 'off'")
    return False


def _preferred(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, dtype: torch.dtype) -> bool:
    """What "auto" takes: the kernel if it was asked for by backend, or measured to be faster."""
    if dispatch.current_backend() == "triton":
        return True
    if not FASTER or x.device.type != "cuda":
        return False
    hidden, width = weight1.shape
    if dtype not in (torch.bfloat16, torch.float16) or len(weight2) != width:
        return False
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight1, bias1, weight2))
    direction = "forward+backward" if trained else "forward"
    return (direction, runtime.capability(x.device), width, hidden) in FASTER
