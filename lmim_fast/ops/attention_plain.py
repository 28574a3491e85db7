"""Attention over packed rows on any backend but the kernel; `ops/attention.py` chooses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lmim_fast.ops import attention_backends, dropout
from lmim_fast.ops.attention_heads import split_heads
from lmim_fast.ops.routes import Route


def self_attention(
    name: str,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    heads: int,
    segments: Sequence[tuple[int, int]],
    p: float,
    seed: Tensor | None,
    causal: bool = False,
    added: bool = False,
) -> Tensor:
    """`ops.attention.self_attention` on backend `name`."""
    qkv_bias = _bias(qkv_bias, qkv, added)
    contexts, first = [], 0
    for q, k, v in split_heads(qkv, qkv_bias, heads, segments):
        contexts.append(_attend(name, q, k, v, p, seed, first, causal=causal).flatten(2).flatten(0, 1))
        first += len(q)
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def cross_attention(
    name: str,
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    p: float,
    seed: Tensor | None,
    key_lengths: Tensor | None = None,
    added: bool = False,
) -> Tensor:
    """`ops.attention.cross_attention` on backend `name`."""
    q_bias, kv_bias = _bias(q_bias, q, added), _bias(kv_bias, kv, added)
    q = q if q_bias is None else q + q_bias
    kv = kv if kv_bias is None else kv + kv_bias
    seen = None
    if key_lengths is not None:
        places = torch.arange(kv.shape[1], device=kv.device)
        # A weight of 0 does not hide a NaN; and zeros are the context of a sequence that sees no key.
        kv = torch.where((places < key_lengths[:, None])[:, :, None], kv, 0.0)
        seen = places < key_lengths.clamp(min=1)[:, None]  # a softmax needs one key
    features = q.shape[2] // heads
    k, v = kv.view(*kv.shape[:2], 2, heads, features).unbind(2)
    q = q.view(*q.shape[:2], heads, features)
    return _attend(name, q, k, v, p, seed, 0, seen=seen).flatten(2)


def _bias(bias: Tensor | None, product: Tensor, added: bool) -> Tensor | None:
    """What is still to be added: to a product with its bias, a zero that takes the gradient of the bias."""
    if bias is None:
        return None
    return (bias - bias.detach() if added else bias).to(product.dtype)


def run(form: Callable[..., Tensor], chosen: str | Route, arguments: tuple[Any, ...]) -> Tensor:
    """`form` above on a backend by name, or on that of a rule, which keeps the dtype of its inputs."""
    if not isinstance(chosen, Route):
        return form(chosen, *arguments)
    with torch.autocast(arguments[0].device.type, enabled=False):
        return form(chosen.backend, *arguments)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, PyTorch's algorithms give the same bits in each run, or raise RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def gradients(
    route: Route,
    form: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `form` above by the backend of a rule.

    Args:
        form:      `self_attention` or `cross_attention` of this module.
        arguments: those of `form` behind the name; the first ones are the tensors, or None.
        grad:      of the context.
        needed:    which of the first arguments get a gradient; the others get None.
    Raises:
        RuntimeError: the rule is deterministic, and the backend has no such form or torch.compile is at work.
    """
    if route.deterministic and get_proxy_mode() is not None:
        raise RuntimeError(f"torch.compile would lose that the route is deterministic: {route}")
    count = len(needed)
    leaves = [None if tensor is None else tensor.detach() for tensor in arguments[:count]]
    wanted = [need and leaf is not None for leaf, need in zip(leaves, needed, strict=True)]
    inputs = [
        leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if leaf is not None and want
    ]
    with torch.enable_grad(), _deterministic() if route.deterministic else contextlib.nullcontext():
        context = run(form, route, (*leaves, *arguments[count:]))
        found = iter(torch.autograd.grad(context, inputs, grad))
    return [next(found) if want else None for want in wanted]


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    seed: Tensor | None,
    first_sequence: int,
    *,
    causal: bool = False,
    seen: Tensor | None = None,
) -> Tensor:
    """(B, N, H, d), (B, M, H, d) twice to (B, N, H, d)."""
    if not p or seed is None:
        return attention_backends.PLAIN[name](q, k, v, p, causal=causal, seen=seen)
    sequences, rows, heads, _ = q.shape
    masks = first_sequence * heads + torch.arange(sequences * heads, device=q.device)
    keep = dropout.keep_mask(seed, masks, rows, k.shape[1], p).view(sequences, heads, rows, k.shape[1])
    return attention_backends.eager(q, k, v, p, keep, causal=causal, seen=seen)
