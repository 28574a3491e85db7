"""Direct launches on a CUDA device: the bits of launches through Triton's JIT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor
from triton.runtime import JITFunction

from lmim_fast.kernels import runtime
from lmim_fast.ops import dispatch
from lmim_fast.ops.attention import self_attention
from lmim_fast.ops.norm import dropout_add_layer_norm

pytestmark = pytest.mark.gpu

ROWS, WIDTH, HEADS = 4 * 52, 384, 6
BF16 = torch.bfloat16
Run = Callable[[], list[Tensor]]


def _rows(width: int, dtype: torch.dtype, offset: int) -> Tensor:
    """(ROWS, width), its first value `offset` values behind a multiple of 16 bytes."""
    memory = torch.randn(ROWS * width + offset, device=DEVICE).to(dtype)
    return memory[offset:].view(ROWS, width)


def _differentiated(op: Callable[..., Any], inputs: list[Tensor], offset: int) -> list[Tensor]:
    """Outputs of `op` and gradients of its inputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    outputs = op(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(1)
    upstream = [_rows(output.shape[-1], output.dtype, offset) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def norm(offset: int) -> Run:
    """Forward and backward of dropout + add + LayerNorm."""
    torch.manual_seed(0)
    seed = torch.tensor([5], device=DEVICE)
    rows = [_rows(WIDTH, BF16, offset), _rows(WIDTH, torch.float32, offset)]
    x_bias, weight, bias = torch.randn(3, WIDTH, device=DEVICE).unbind()

    def op(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        x_bias, weight, bias = parameters
        return dropout_add_layer_norm(x, x_bias, residual, weight, bias, p=0.1, seed=seed)

    return lambda: _differentiated(op, [*rows, x_bias, weight, bias], offset)


def attention(offset: int) -> Run:
    """Forward and backward of self-attention on a packed product."""
    torch.manual_seed(0)
    qkv, bias = _rows(3 * WIDTH, BF16, offset), torch.randn(3 * WIDTH, device=DEVICE)
    return lambda: _differentiated(
        lambda qkv, bias: self_attention(qkv, bias, HEADS, [(4, 52)]), [qkv, bias], offset
    )


CASES = {
    "norm": lambda: norm(0),
    "norm, misaligned": lambda: norm(1),
    "attention": lambda: attention(0),
    "attention, misaligned": lambda: attention(1),
}


def launched(path: str, run: Run) -> tuple[list[Tensor], int]:
    """Results of a run, and how often it went through Triton's JIT."""
    counting = mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run)
    with counting as jit, dispatch.backend("triton"), runtime.launching(path):
        results = run()
    return results, jit.call_count


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_bit_equal(name: str) -> None:
    run = CASES[name]()
    expected, through = launched("triton", run)
    launched("direct", run)  # the compiled kernels are kept
    found, left = launched("direct", run)
    assert (through >= 2, left) == (True, 0)
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, theirs), f"{name}: tensor {number}"


def test_aligned_and_misaligned_calls_in_turn_get_their_own_kernels() -> None:
    runs = [norm(0), norm(1), attention(0), attention(1)]
    expected = [launched("triton", run)[0] for run in runs]
    for _ in range(3):
        for run, results in zip(runs, expected, strict=True):
            assert all(map(torch.equal, launched("direct", run)[0], results))


def test_launches_follow_the_stream_that_is_current() -> None:
    """A long wait on one stream, so that a kernel on the wrong one would read what is not written yet."""
    x, parameter = torch.randn(ROWS, WIDTH, device=DEVICE), torch.ones(WIDTH, device=DEVICE)
    rows = torch.zeros(2, ROWS, WIDTH, device=DEVICE)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def op(number: int) -> Tensor:
        return dropout_add_layer_norm(rows[number], None, x, parameter, parameter)[1]

    def run() -> list[Tensor]:
        rows.zero_()
        torch.cuda.synchronize()
        results = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # about 10 ms
                rows[number].fill_(1 + number)
                results.append(op(number))
        torch.cuda.synchronize()
        return results

    expected = [x + 1, x + 2]
    for path in ("triton", "direct", "direct"):
        found, _ = launched(path, run)
        assert all(map(torch.equal, found, expected)), path
