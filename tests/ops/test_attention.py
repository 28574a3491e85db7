"""Packed attention against attention written out."""

import pytest
import torch
from torch import Tensor

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


def test_gradients_are_right_in_fp64() -> None:
    qkv = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: self_attention(a, b, 2, [(2, 2), (1, 2)]), (qkv, bias))


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


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkv \(7, 12\) must be \(6, 3D\)"):
        self_attention(torch.randn(7, 12), None, 2, [(2, 3)])
    with pytest.raises(ValueError, match=r"q \(1, 2, 8\) and kv \(1, 3, 8\)"):
        cross_attention(torch.randn(1, 2, 8), None, torch.randn(1, 3, 8), None, 2)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        self_attention(torch.randn(6, 12), None, 2, [(2, 3)], p=1.0)
