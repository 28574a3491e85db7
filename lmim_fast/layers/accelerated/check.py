"""Whether a fast form gives what the original gives: both run in float64 on the CPU, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.layers.accelerated.base import Form, original_class, reasons, restore, swap
from lmim_fast.ops import attention, dispatch

TOLERANCE = (
    1e-5  # of the largest value; an original may compute its softmax in fp32, tanh-GELU differs by 1e-4
)
_INTERNALS = frozenset(vars(nn.Module()))
Outcome = list[Tensor]


def differs(module: nn.Module, form: Form) -> str | None:
    """Run the module in both forms: outputs in both modes and all gradients.

    Nothing of the module is changed and no random number is taken from torch's global generator.

    Returns:
        None where the forms agree, else the reason to leave the module alone.
    """
    assert form.examples is not None
    examples = form.examples(module)
    if not examples:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    with _kept(module) as stored, _alone():
        parameters: dict[str, Tensor] = {}
        if form.run is None:
            parameters = {name: _random(value, generator) for name, value in module.named_parameters()}
        filled = [
            tuple(_random(x, generator) if isinstance(x, Tensor) else x for x in each) for each in examples
        ]
        expected = _outcomes(module, form, parameters, filled)
        if isinstance(expected, str):
            return expected
        attribute = stored()
        if attribute:
            return f"its forward stores {attribute}"
        reason = swap(module, form)
        if reason:
            return reason
        try:
            found = _outcomes(module, form, parameters, filled)
            noted = reasons(module)
        finally:
            restore(module)
    if noted:
        return noted[0]
    agrees = not isinstance(found, str) and all(map(_close, found, expected))
    return None if agrees else f"gives other results than a {form.kind}"


def signature(module: nn.Module, form: Form) -> tuple[Any, ...]:
    """Modules with one signature compute the same function of input and parameters."""

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(plain(each) for each in value)
        return value if isinstance(value, bool | int | float | str | None) else id(value)

    parts = []
    for part in module.modules():
        own = [(key, plain(value)) for key, value in vars(part).items() if key not in _INTERNALS]
        shapes = [(name, value.shape) for name, value in part._parameters.items() if value is not None]
        parts.append((original_class(part), tuple(own), tuple(shapes), tuple(part._modules)))
    return (form.kind, *parts)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * (expected.abs().max() + 1e-3))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Values of such a size that no product explodes, whatever they start from in the module."""
    scale = like.shape[-1] ** -0.5 if like.dim() > 1 else 0.5
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (scale * values).requires_grad_()


def _outcomes(
    module: nn.Module, form: Form, parameters: dict[str, Tensor], examples: list[tuple[Any, ...]]
) -> Outcome | str:
    """Outputs of all examples in both modes, then gradients of the first; or what went wrong."""
    outcome: Outcome = []
    try:
        for training in (True, False):
            for part in module.modules():
                part.training = training
            for inputs in examples:
                torch.default_generator.manual_seed(1)
                outcome += [x.detach() for x in _run(module, form, parameters, inputs)]
        leaves = [*parameters.values(), *(x for x in examples[0] if isinstance(x, Tensor))]
        torch.default_generator.manual_seed(1)
        outputs = _run(module, form, parameters, examples[0])
        total = torch.stack([(x * (1 + x)).sum() for x in outputs]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    except Exception as error:  # whatever somebody else's forward raises for a plain (B, N, D)
        message = str(error).split("\n")[0][:80]
        return f"cannot be tried: {type(error).__name__}: {message}"
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    return outcome + [zero if grad is None else grad for grad, zero in zip(gradients, zeros, strict=True)]


def _run(
    module: nn.Module, form: Form, parameters: dict[str, Tensor], inputs: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    if form.run is not None:
        return form.run(module, *inputs)
    output = torch.func.functional_call(module, parameters, inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"returns a {type(output).__name__}")
    return (output,)


@contextmanager
def _alone() -> Iterator[None]:
    """Eager ops, gradients, no autocast, and a random state that is put back, whatever is in force around."""
    with ExitStack() as stack:
        for context in (
            dispatch.backend("eager"),
            attention.backend("sdpa"),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            stack.enter_context(context)
        yield


@contextmanager
def _kept(module: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Attributes of the module and its parts are put back at the end; dropout is 0 meanwhile.

    Gives a function that names an attribute which something has set since.
    """
    parts = list(module.modules())
    before = [dict(vars(part)) for part in parts]
    for part in parts:
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(vars(part).get("dropout"), float):
            vars(part)["dropout"] = 0.0
    at_start = [dict(vars(part)) for part in parts]

    def stored() -> str | None:
        for part, start in zip(parts, at_start, strict=True):
            for name, value in vars(part).items():
                if name != "training" and (name not in start or start[name] is not value):
                    return name
        return None

    try:
        yield stored
    finally:
        for part, attributes in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(attributes)
