"""Whether a Triton kernel can run on a device in this process."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_run(device: torch.device) -> bool:
    """True on a CUDA device with Triton installed, and on a CPU under Triton's interpreter."""
    if not _triton_installed():
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
