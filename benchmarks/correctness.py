"""Holds a form of an operation against plain PyTorch before its speed is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmim_fast.ops import dispatch

FACTOR = 3.0  # times the error of plain PyTorch in the same precision
SUM_FACTOR = 8.0  # the same for a parameter's gradient: terms of other forms cancel in another order
LARGEST_FACTOR = 16.0  # the same for the largest error of it


def assert_correct(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    make_inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]],
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Outputs and gradients of `ours` are as near to the truth as those of `plain` in the same dtype.

    So are its outputs under `torch.no_grad()`, where a form may take another path.
    The truth is `plain` in fp64 on a CPU, in fp32 elsewhere. With dropout the eager form of our own op stands
    for `plain`: it draws the same mask.

    Raises:
        AssertionError: they are not; the message says which tensor, its error and what is allowed.
    """
    torch.manual_seed(0)
    inputs = make_inputs(device, dtype)
    high = torch.float64 if device.type == "cpu" else torch.float32
    seed = torch.tensor([20], device=device) if p else None

    def reference(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        if seed is None:
            return plain(*tensors)
        with dispatch.backend("eager"):
            return ours(*tensors, seed=seed)

    exact = [tensor.detach().to(high).requires_grad_(tensor.requires_grad) for tensor in inputs]
    gradients = [torch.randn_like(output) for output in _as_list(reference(*inputs))]
    truth = _results(reference, exact, [gradient.to(high) for gradient in gradients])
    low = _results(reference, inputs, gradients)
    mine = _results(lambda *tensors: ours(*tensors, seed=seed), inputs, gradients)
    for number, tensors in enumerate(zip(mine, low, truth, strict=True)):
        _assert_near(f"tensor {number}", *tensors)
    with torch.no_grad():
        outputs = _as_list(ours(*inputs, seed=seed))
    for number, tensors in enumerate(zip(outputs, low, truth, strict=False)):  # gradients follow the outputs
        _assert_near(f"tensor {number} without gradients", *tensors)


def _results(
    run: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradients of all inputs that require one."""
    outputs = _as_list(run(*inputs))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad(outputs, wanted, gradients) if wanted else ()
    return [*(output.detach() for output in outputs), *found]


def _assert_near(name: str, mine: Tensor, low: Tensor, truth: Tensor) -> None:
    """By the largest error; one row (a sum over rows) by the root mean square, and loosely by the largest."""
    if truth.dim() > 0 and truth.numel() == truth.shape[-1]:
        _assert_within(f"root mean square of {name}", _root_mean_square, SUM_FACTOR, mine, low, truth)
        _assert_within(f"largest of {name}", _largest, LARGEST_FACTOR, mine, low, truth)
    else:
        _assert_within(name, _largest, FACTOR, mine, low, truth)


def _assert_within(
    name: str, size: Callable[[Tensor], float], factor: float, mine: Tensor, low: Tensor, truth: Tensor
) -> None:
    rounding = torch.finfo(mine.dtype).eps / 2 * size(truth)
    allowed = factor * max(size(low.to(truth.dtype) - truth), rounding)
    error = size(mine.to(truth.dtype) - truth)
    assert error <= allowed, f"{name} is wrong: error {error:.3g}, allowed {allowed:.3g}"


def _largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item()


def _root_mean_square(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _as_list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
