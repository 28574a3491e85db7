"""Attention problems for tests: random inputs, the pass through a backend, and the judgement of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from accuracy import (
    CUDA,
    DEVICE,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    assert_as_accurate,
    assert_rms_as_accurate,
)
from torch import Tensor

from lmim_fast.ops import attention

Form = Callable[..., Tensor]
Inputs = list[Tensor | None]
Gradients = list[Tensor | None]

SEED = 2**40 + 77
DTYPE = torch.float16 if CUDA else torch.float32  # for what asks nothing of precision
# Beyond 64 keys a query's normaliser is kept as one fp32 logarithm, whose rounding all its probabilities
# share: too little to be seen in 16 bits; in fp32, which runs in the interpreter alone, up to 5x the error
# of a softmax.
BIAS_FACTOR = {torch.float32: 6.0, torch.float16: GRADIENT_FACTOR, torch.bfloat16: GRADIENT_FACTOR}


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def packed(
    heads: int, dim: int, segments: Sequence[tuple[int, int]], dtype: torch.dtype, bias: bool = True
) -> tuple[Form, Inputs]:
    """Self-attention of these segments with its qkv and bias; the bias is fp32, as under autocast."""
    rows, width = sum(sequences * tokens for sequences, tokens in segments), heads * dim

    def form(qkv: Tensor, qkv_bias: Tensor | None, **options: object) -> Tensor:
        return attention.self_attention(qkv, qkv_bias, heads, segments, **options)

    return form, [draw(rows, 3 * width, dtype=dtype), draw(3 * width) if bias else None]


def crossed(
    heads: int, dim: int, sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool = True
) -> tuple[Form, Inputs]:
    """Cross-attention of (batch, queries, keys) with its q, q_bias, kv, kv_bias."""
    (batch, queries, keys), width = sizes, heads * dim

    def form(
        q: Tensor, q_bias: Tensor | None, kv: Tensor, kv_bias: Tensor | None, **options: object
    ) -> Tensor:
        return attention.cross_attention(q, q_bias, kv, kv_bias, heads, **options)

    biases = (draw(width), draw(2 * width)) if bias else (None, None)
    q, kv = draw(batch, queries, width, dtype=dtype), draw(batch, keys, 2 * width, dtype=dtype)
    return form, [q, biases[0], kv, biases[1]]


def differentiate(
    backend: str, form: Form, inputs: Inputs, upstream: Tensor | None = None, **options: object
) -> tuple[Tensor, Gradients]:
    """Output on this backend and the gradients of all inputs, with `upstream` or that of a sum."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    with attention.backend(backend):
        output = form(*leaves, **options)
    if upstream is None:
        upstream = torch.ones((), dtype=output.dtype, device=output.device).expand(output.shape)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(output, wanted, upstream.to(output.dtype)))
    return output.detach(), [None if leaf is None else next(gradients) for leaf in leaves]


def double(inputs: Inputs) -> Inputs:
    return [None if tensor is None else tensor.double() for tensor in inputs]


def assert_kernel_is_accurate(form: Form, inputs: Inputs, **options: object) -> None:
    """Compare with attention written out in fp64; the kernel's key bias has a gradient of exactly zero."""
    products, biases = inputs[::2], inputs[1::2]
    with torch.no_grad(), attention.backend("eager"):
        upstream = torch.randn_like(form(*inputs, **options))
    ours = differentiate("triton", form, inputs, upstream, **options)
    low = differentiate("eager", form, inputs, upstream, **options)
    truth = differentiate("eager", form, double(inputs), upstream, **options)
    assert_as_accurate([ours[0]], [low[0]], [truth[0]], OUTPUT_FACTOR)
    assert len(ours[1]) == len(products) + len(biases)
    assert_as_accurate(ours[1][::2], low[1][::2], truth[1][::2], GRADIENT_FACTOR)
    if inputs[1] is None:
        assert ours[1][1::2] == [None] * len(biases)
        return
    assert all(mine.dtype == torch.float32 for mine in ours[1][1::2])
    thirds = [torch.cat(gradients[1::2]).chunk(3) for _, gradients in (ours, low, truth)]  # of q, k, v
    assert thirds[0][1].count_nonzero() == 0
    dtype = products[0].dtype  # eager rounds these gradients to it
    mine, eager, exact = (
        [third.to(kind) for third in (q, v)]
        for (q, _, v), kind in zip(thirds, (dtype, dtype, torch.float64), strict=True)
    )
    assert_rms_as_accurate(mine, eager, exact, BIAS_FACTOR[dtype])


def assert_nearly_equal(
    found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], dtype: torch.dtype
) -> None:
    """Errors of one unit in the last place of the largest value at most: a compiler may reorder sums."""
    for mine, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            assert mine.isfinite().all()
            assert (mine - other).abs().max() <= torch.finfo(dtype).eps * other.abs().max()


def mask_mismatch(qkv: Tensor, gradient: Tensor, output: Tensor, upstream: Tensor) -> float:
    """How far a gradient of qkv (no bias) is from one by the mask of the output; of another mask: about 1.

    Given its mask the context is linear in the values, so <context, upstream> = <values, their gradient>.
    """
    v, d_v = (tensor.double().chunk(3, dim=-1)[2] for tensor in (qkv, gradient))
    difference = (output.double() * upstream.double()).sum() - (v * d_v).sum()
    return (difference.abs() / (v * d_v).square().sum().sqrt()).item()


def skip_where_too_long(keys: int) -> None:
    """Skip where the device's kernels are not meant for so many keys."""
    if not CUDA:
        return
    major = torch.cuda.get_device_capability()[0]
    longest = {9: 257, 10: 257}.get(major, 64)
    if keys > longest:
        pytest.skip(f"kernels take up to {longest} keys on compute capability {major}.x")


def attend(**options: object) -> None:
    """A small self-attention."""
    form, inputs = packed(2, 32, [(2, 3)], DTYPE)
    form(*inputs, **options)


def attend_across(**options: object) -> None:
    """A small cross-attention."""
    form, inputs = crossed(2, 32, (2, 3, 4), DTYPE)
    form(*inputs, **options)
