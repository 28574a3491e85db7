"""Attention in other people's kernels and in plain PyTorch, by name; `ops/attention.py` chooses among them.

q (B, N, H, d), k and v (B, M, H, d), biases added, to (B, N, H, d). With `causal`, N = M, query i sees keys
0..i; `seen` (B, M) says which keys the queries of a sequence see, one at least; None is all of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmim_fast.ops import dropout

NAMES = ("auto", "triton", "flash", "cudnn", "sdpa", "eager")
VARIABLE = "LMIM_FAST_ATTENTION"
_override: str | None = None
_environment = os.environ._data  # type: ignore[attr-defined]  # as in dispatch.py
_key = os.environ.encodekey(VARIABLE)


def is_asked_for() -> bool:
    """Whether a backend but "auto" is in force, by a `backend` block or by LMIM_FAST_ATTENTION."""
    return (_override is not None or _key in _environment) and current() != "auto"


def current() -> str:
    """The attention backend in force: of the innermost `backend` block, else of LMIM_FAST_ATTENTION."""
    return _known(_override or os.environ.get(VARIABLE, "auto"))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run attention inside the block on backend `name`.

    "triton" is this package's kernel; "flash" the flash-attn package (FlashAttention 2, or 4 where only that
    is installed); "cudnn" and "sdpa" PyTorch's scaled_dot_product_attention by cuDNN and by PyTorch's own
    choice; "eager" explicit products and softmax; "auto" the kernel if it fits and kernels are on, or what a
    rule of `ops/routes.py` names in its place, else "sdpa", or "eager" if a dropout seed is given. A backend
    that is named and cannot run is an error.
    The block has to hold the recomputation of checkpointed modules too.
    """
    global _override
    previous, _override = _override, _known(name)
    try:
        yield
    finally:
        _override = previous


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"unknown attention backend {name!r}; choose from {', '.join(NAMES)}")
    return name


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    keep: Tensor | None = None,
    *,
    causal: bool = False,
    seen: Tensor | None = None,
) -> Tensor:
    """Explicit attention with an fp32 softmax.

    Args:
        keep: (B, H, N, M) dropout mask, True where a probability is kept; None draws one by torch's
        generator.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if keep is not None:
        weights = torch.where(keep, weights * dropout.scale(p), 0.0)
    else:
        weights = F.dropout(weights, p)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, p: float, *, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if seen is None else seen[:, None, None].expand(-1, -1, q.shape[2], -1)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
    return context.transpose(1, 2)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, p: float, *, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """cuDNN's attention through PyTorch; RuntimeError where it cannot run."""
    _refuse_lengths("cudnn", seen)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, p, causal=causal)


def _refuse_lengths(name: str, seen: Tensor | None) -> None:
    if seen is not None:
        raise RuntimeError(
            f"attention backend {name!r} takes no key_lengths, got those of {len(seen)} sequences: "
            "choose auto, triton, sdpa or eager"
        )


def flash(
    q: Tensor, k: Tensor, v: Tensor, p: float, *, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """The flash-attn package; its deterministic form under `torch.use_deterministic_algorithms`.

    Raises:
        RuntimeError: it is not installed, or dropout is asked for and only FlashAttention 4 is installed, or
            `seen` is not None.
    """
    _refuse_lengths("flash", seen)
    function, version = _flash_function()
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    if causal:
        options["causal"] = True
    if version == 2:
        output: Tensor = function(q, k, v, dropout_p=p, **options)
        return output
    if p:
        raise RuntimeError(f"FlashAttention 4 has no dropout, got p = {p}: install flash-attn 2, or p = 0")
    result = function(q, k, v, **options)
    return result[0] if isinstance(result, tuple) else result


def _flash_function() -> tuple[Callable[..., Any], int]:
    if importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError(
            "attention backend 'flash' was asked for, but flash-attn is not installed: pip install flash-attn"
        )
    if importlib.util.find_spec("flash_attn.flash_attn_interface") is not None:
        from flash_attn import flash_attn_func

        return flash_attn_func, 2
    from flash_attn.cute import flash_attn_func  # FlashAttention 4 alone brings only this part

    return flash_attn_func, 4


PLAIN: dict[str, Callable[..., Tensor]] = {"eager": eager, "sdpa": sdpa, "cudnn": cudnn, "flash": flash}
