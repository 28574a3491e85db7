"""Heads of packed rows: their gradients in one matrix, and the derivatives beyond the first."""

import pytest
import torch
from torch import Tensor

from lmim_fast.ops.attention_heads import split_heads

HEADS, FEATURES = 2, 3
SEGMENTS = [(2, 4), (3, 1)]
ROWS, WIDTH = 11, 3 * HEADS * FEATURES


def inputs() -> tuple[Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((ROWS, WIDTH), (WIDTH,))
    )


def flat(qkv: Tensor, bias: Tensor) -> Tensor:
    """All heads' values, each times another number."""
    views = [view for part in split_heads(qkv, bias, HEADS, SEGMENTS) for view in part]
    values = torch.cat([view.flatten() for view in views])
    return values * torch.arange(1, 1 + len(values))


def test_heads_lie_where_the_product_has_them() -> None:
    qkv, bias = inputs()
    first, second = split_heads(qkv, bias, HEADS, SEGMENTS)
    total = qkv + bias
    assert torch.equal(first[1], total[:8].view(2, 4, 3, HEADS, FEATURES)[:, :, 1])
    assert torch.equal(second[2], total[8:].view(3, 1, 3, HEADS, FEATURES)[:, :, 2])


def test_gradients_are_written_into_one_matrix_and_summed_for_the_bias() -> None:
    qkv, bias = inputs()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        output = flat(qkv, bias)
        grads = torch.autograd.grad(output.sum(), (qkv, bias))
    assert "_SplitHeadsBackward" in {event.name for event in profile.events()}
    leaf = qkv.detach().requires_grad_()
    total = leaf + bias.detach()
    views = [view for part in split_heads(total, None, HEADS, SEGMENTS) for view in part]
    values = torch.cat([view.flatten() for view in views])
    (expected,) = torch.autograd.grad((values * torch.arange(1, 1 + len(values))).sum(), leaf)
    assert torch.equal(grads[0], expected)
    assert torch.equal(grads[1], expected.sum(0))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    pair = inputs()
    pair[frozen].requires_grad_(False)
    flat(*pair).sum().backward()
    assert pair[frozen].grad is None
    assert pair[1 - frozen].grad is not None
