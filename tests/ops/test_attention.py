"""Packed attention in plain PyTorch against attention written out, and the inputs it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lmim_fast.ops import attention, dropout
from lmim_fast.ops.attention import attention_weights, cross_attention, self_attention
from lmim_fast.reference import softmax_attention


@pytest.mark.parametrize("tokens", [1, 16, 51, 52, 64, 255, 256, 257])
def test_self_attention_of_packed_segments_equals_each_apart(tokens: int) -> None:
    heads, width = 2, 32
    segments = [(3, tokens), (2, 5)]
    qkv = torch.randn(3 * tokens + 10, 3 * width, requires_grad=True)
    bias = torch.randn(3 * width, requires_grad=True)
    output = self_attention(qkv, bias, heads, segments)
    expected = []
    for part, (sequences, length) in zip((qkv + bias).split([3 * tokens, 10]), segments, strict=True):
        q, k, v = part.view(sequences, length, 3 * width).chunk(3, dim=-1)
        expected.append(softmax_attention(q, k, v, heads, 0.0).flatten(0, 1))
    truth = torch.cat(expected)
    torch.testing.assert_close(output, truth, rtol=0, atol=1e-5)
    upstream = torch.randn_like(truth)
    ours = torch.autograd.grad(output, (qkv, bias), upstream)
    theirs = torch.autograd.grad(truth, (qkv, bias), upstream)
    for mine, expected_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected_gradient, rtol=1e-4, atol=1e-4)


def test_cross_attention_of_strided_keys_equals_attention_written_out() -> None:
    heads, width = 4, 32
    q, q_bias = torch.randn(3, 205, width), torch.randn(width)
    both_layers, kv_bias = torch.randn(3, 257, 4 * width), torch.randn(2 * width)
    kv = both_layers.chunk(2, dim=-1)[1]
    k, v = (kv + kv_bias).chunk(2, dim=-1)
    truth = softmax_attention(q + q_bias, k, v, heads, 0.0)
    torch.testing.assert_close(cross_attention(q, q_bias, kv, kv_bias, heads), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"p": 0.3, "seed": torch.tensor([5])}])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_gradients_are_right_in_fp64(backend: str, options: dict[str, Any]) -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    with attention.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *inputs: self_attention(*inputs, 2, [(2, 2), (1, 2)], **options),
            (double(6, 12), double(12)),
        )
        assert torch.autograd.gradcheck(
            lambda *inputs: cross_attention(*inputs, 2, **options),
            (double(2, 3, 4), double(4), double(2, 2, 8), double(8)),
        )


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_seeds_mask_counts_sequences_across_segments(backend: str) -> None:
    heads, width, p, seed = 2, 8, 0.4, torch.tensor([2**50 + 1])
    segments = [(2, 3), (1, 20), (2, 5)]
    qkv = torch.randn(2 * 3 + 20 + 2 * 5, 3 * width)
    with attention.backend(backend):
        output = self_attention(qkv, None, heads, segments, p=p, seed=seed)
    row = sequence = 0
    for sequences, tokens in segments:
        for _ in range(sequences):
            x = qkv[row : row + tokens].view(tokens, 3, heads, width // heads)
            for head in range(heads):
                q, k, v = x[:, :, head].unbind(1)
                number = torch.tensor([sequence * heads + head])
                keep = dropout.keep_mask(seed, number, tokens, tokens, p)[0]
                weights = (q @ k.T / (width // heads) ** 0.5).softmax(-1) * keep * dropout.scale(p)
                found = output[row : row + tokens].unflatten(1, (heads, -1))[:, head]
                torch.testing.assert_close(found, weights @ v)
            row, sequence = row + tokens, sequence + 1


def test_expanded_gradients_are_taken() -> None:
    qkv = torch.randn(6, 12, requires_grad=True)
    self_attention(qkv, None, 2, [(2, 3)]).sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


def test_dropout_keeps_the_mean_and_drops() -> None:
    q, kv = torch.randn(1, 4, 8), torch.randn(1, 50, 16)
    plain = cross_attention(q, None, kv, None, 2)
    drawn = torch.stack([cross_attention(q, None, kv, None, 2, p=0.3) for _ in range(3000)])
    deviation = drawn.std(0) / 3000**0.5
    assert ((drawn.mean(0) - plain).abs() < 5 * deviation).all()
    assert (drawn.std(0) > 0).all()


def test_weights_are_those_the_context_is_made_of() -> None:
    q, k, v = torch.randn(3, 2, 9, 16).unbind(0)

    def by_heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (4, 4))

    weights = attention_weights(by_heads(q), by_heads(k))
    context = (weights @ by_heads(v).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(context, softmax_attention(q, k, v, 4, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_context_has_the_products_dtype_whatever_the_biases_are(dtype: torch.dtype) -> None:
    q, kv = torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    assert self_attention(q.repeat(1, 1, 3).flatten(0, 1), torch.randn(24), 2, [(2, 3)]).dtype == dtype
    assert cross_attention(q, torch.randn(8), kv, torch.randn(16), 2).dtype == dtype


QKV, Q, KV = torch.randn(6, 12), torch.randn(1, 2, 8), torch.randn(1, 3, 16)


@pytest.mark.parametrize(
    ("qkv", "bias", "heads", "segments", "options", "message"),
    [
        (
            torch.randn(7, 12),
            None,
            2,
            [(2, 3)],
            {},
            r"qkv \(7, 12\) must be \(6, 3D\) for segments \[\(2, 3\)\]",
        ),
        (torch.randn(6, 13), None, 2, [(2, 3)], {}, r"qkv \(6, 13\) must be \(6, 3D\) .* and 2 heads"),
        (QKV, None, 3, [(2, 3)], {}, r"qkv \(6, 12\) must be \(6, 3D\) .* and 3 heads"),
        (QKV, None, 0, [(2, 3)], {}, r"and 0 heads"),
        (QKV[None], None, 2, [(2, 3)], {}, r"qkv \(1, 6, 12\) must be"),
        (QKV, None, 2, [(2, 3), (3, 0)], {}, r"at least one token a sequence, got \[\(2, 3\), \(3, 0\)\]"),
        (QKV, None, 2, [(4, 3), (-2, 3)], {}, r"at least one token a sequence, got \[\(4, 3\), \(-2, 3\)\]"),
        (QKV[:0], None, 2, [], {}, r"at least one token a sequence, got \[\]"),
        (QKV.long(), None, 2, [(2, 3)], {}, r"qkv must be floating-point, got torch.int64"),
        (QKV, torch.randn(4), 2, [(2, 3)], {}, r"qkv_bias must be \(12,\) .* got \(4,\) torch.float32"),
        (QKV, torch.ones(12).int(), 2, [(2, 3)], {}, r"floating-point .* got \(12,\) torch.int32"),
        (
            QKV,
            torch.ones(12, device="meta"),
            2,
            [(2, 3)],
            {},
            r"one device, got qkv on cpu, qkv_bias on meta",
        ),
        (QKV, None, 2, [(2, 3)], {"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
        (QKV, None, 2, [(2, 3)], {"p": -0.1}, r"p must be in \[0, 1\), got -0.1"),
        (QKV, None, 2, [(2, 3)], {"seed": torch.ones(1)}, r"one int64, got torch.float32"),
        (
            QKV,
            None,
            2,
            [(2, 3)],
            {"seed": torch.tensor([1, 2])},
            r"one int64, got torch.int64 of shape \(2,\)",
        ),
        (
            QKV,
            None,
            2,
            [(2, 3)],
            {"p": 0.1, "seed": torch.ones(1, dtype=torch.int64, device="meta")},
            r"qkv on cpu, seed on meta",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_wrong_inputs_of_self_attention_are_named(
    backend: str,
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    segments: list[tuple[int, int]],
    options: dict[str, Any],
    message: str,
) -> None:
    with attention.backend(backend), pytest.raises(ValueError, match=message):
        self_attention(qkv, bias, heads, segments, **options)


@pytest.mark.parametrize(
    ("q", "q_bias", "kv", "kv_bias", "heads", "message"),
    [
        (Q, None, torch.randn(1, 3, 8), None, 2, r"q \(1, 2, 8\) and kv \(1, 3, 8\) must be \(B, N, D\)"),
        (Q, None, KV, None, 3, r"must be \(B, N, D\), \(B, M, 2D\), 3 heads"),
        (Q, None, KV, None, 0, r"0 heads"),
        (Q[0], None, KV, None, 2, r"q \(2, 8\) and kv \(1, 3, 16\)"),
        (Q, None, KV[0], None, 2, r"q \(1, 2, 8\) and kv \(3, 16\)"),
        (Q.repeat(2, 1, 1), None, KV, None, 2, r"q \(2, 2, 8\) and kv \(1, 3, 16\)"),
        (Q[:, :0], None, KV, None, 2, r"q \(1, 0, 8\) and kv \(1, 3, 16\) must have at least one token"),
        (Q, None, KV[:, :0], None, 2, r"q \(1, 2, 8\) and kv \(1, 0, 16\) must have at least one token"),
        (Q, None, KV.half(), None, 2, r"one dtype, got torch.float32 and torch.float16"),
        (Q.int(), None, KV.int(), None, 2, r"q must be floating-point, got torch.int32"),
        (Q, torch.randn(16), KV, None, 2, r"q_bias must be \(8,\) .* for q \(1, 2, 8\), got \(16,\)"),
        (Q, None, KV, torch.randn(8), 2, r"kv_bias must be \(16,\) .* for kv \(1, 3, 16\), got \(8,\)"),
        (Q, None, KV.to("meta"), None, 2, r"one device, got q on cpu, kv on meta"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_wrong_inputs_of_cross_attention_are_named(
    backend: str,
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    message: str,
) -> None:
    with attention.backend(backend), pytest.raises(ValueError, match=message):
        cross_attention(q, q_bias, kv, kv_bias, heads)
