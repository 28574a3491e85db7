"""Whether a fast form gives what the original gives: both run on the CPU, with random weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.layers.accelerated.base import Form, reasons, restore, swap
from lmim_fast.layers.accelerated.record import INTERNALS, original_class
from lmim_fast.layers.accelerated.trial import Attributes, MappedDropout, NormInFloat32, alone, random_state

TOLERANCE = (
    1e-5  # of the largest value; an original may compute its softmax in fp32, tanh-GELU differs by 1e-4
)
LOW_TOLERANCE = 0.1  # bfloat16 results are compared for their dtype
Example = tuple[Any, ...]
# Dtypes of parameters and input, and whether autocast is on.
LOW_PRECISION = (
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, True),
    (torch.float32, torch.bfloat16, True),
)


@dataclass(frozen=True)
class Verdict:
    """Result of a trial.

    reason:  why the module has to be left alone, or None.
    dropout: the fast form has all its dropouts in the same places.
    """

    reason: str | None
    dropout: bool = True


def compare(module: nn.Module, form: Form) -> Verdict:
    """Run the module in both forms: outputs in both modes, all gradients, dtypes and places of dropout.

    Nothing of the module is changed and no random number is taken from a global generator.
    """
    assert form.examples is not None
    examples = form.examples(module)
    if not examples:
        return Verdict(None)
    with alone():
        attributes = Attributes(module)
        try:
            return _compare(module, form, examples, attributes)
        finally:
            attributes.restore()


def _compare(module: nn.Module, form: Form, examples: list[Example], attributes: Attributes) -> Verdict:
    generator = torch.Generator("cpu").manual_seed(0)
    parameters: dict[str, Tensor] = {}
    if form.run is None:
        parameters = {name: _random(value, generator) for name, value in module.named_parameters()}
    filled = [
        tuple(_random(x, generator, x) if isinstance(x, Tensor) else x for x in each) for each in examples
    ]
    runs = [_Run(module, form, parameters, filled, attributes, fast) for fast in (False, True)]
    reason = runs[0].in_double()
    if reason:
        return Verdict(reason)
    if runs[0].drew and form.run is None:
        return Verdict("draws random numbers of its own")
    reason_low = runs[0].in_low_precision()
    attribute = attributes.stored()
    if attribute:
        return Verdict(f"its forward stores {attribute}")
    placed = runs[0].with_dropout()
    reason = swap(module, form)
    if reason:
        return Verdict(reason)
    try:
        failed = runs[1].in_double()
        reason_low = reason_low or runs[1].in_low_precision()
        placed = placed and runs[1].with_dropout()
        noted = reasons(module)
    finally:
        restore(module)
    if noted:
        return Verdict(noted[0])
    expected, found = runs
    if failed or not all(map(_close, found.exact, expected.exact)):
        return Verdict(f"gives other results than a {form.kind}")
    if reason_low:
        return Verdict(reason_low)
    for low, expected_low in zip(found.low, expected.low, strict=True):
        if low.dtype != expected_low.dtype:
            return Verdict(f"gives {expected_low.dtype} where a {form.kind} gives {low.dtype}")
        if not _close(low.double(), expected_low.double(), LOW_TOLERANCE):
            return Verdict(f"gives other results than a {form.kind} in bfloat16")
    placed = placed and all(map(_close, found.dropped, expected.dropped))
    if attributes.dropping and not placed:
        return Verdict(f"has its dropouts in other places than a {form.kind}")
    return Verdict(None, placed)


class _Run:
    """One form of a module and its results; each method gives a reason where it cannot be run."""

    def __init__(
        self,
        module: nn.Module,
        form: Form,
        parameters: dict[str, Tensor],
        examples: list[Example],
        attributes: Attributes,
        fast: bool,
    ) -> None:
        self.module, self.form, self.parameters, self.examples = module, form, parameters, examples
        self.attributes, self.fast = attributes, fast
        self.exact: list[Tensor] = []
        self.low: list[Tensor] = []
        self.dropped: list[Tensor] = []
        self.drew = False

    def in_double(self) -> str | None:
        """Outputs of all examples in both modes, then gradients of the first."""
        leaves = [*self.parameters.values(), *(x for x in self.examples[0] if isinstance(x, Tensor))]
        try:
            for inputs in self._in_both_modes(self.examples):
                self.exact += [x.detach() for x in self._call(self.parameters, inputs)]
            outputs = self._call(self.parameters, self.examples[0])
            total = torch.stack([(x * (1 + x)).sum() for x in outputs]).sum()
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        except Exception as error:  # whatever somebody else's forward raises for a plain (B, N, D)
            return f"cannot be tried: {_short(error)}"
        zeros = (torch.zeros_like(leaf) for leaf in leaves)
        self.exact += [zero if grad is None else grad for grad, zero in zip(found, zeros, strict=True)]
        return None

    def in_low_precision(self) -> str | None:
        """Outputs of the first example in bfloat16 and under autocast; of a norm, as on CUDA too."""
        if self.form.run is not None:
            return None
        try:
            for weights, dtype, autocast in LOW_PRECISION:
                parameters = {k: x.detach().to(weights) for k, x in self.parameters.items()}
                example = tuple(x.detach().to(dtype) for x in self.examples[0])
                with torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False):
                    for inputs in self._in_both_modes([example]):
                        self.low += self._call(parameters, inputs)
                    if autocast and isinstance(self.module, nn.LayerNorm) and not self.fast:
                        with NormInFloat32():
                            (result,) = self._call(parameters, example)
                        if result.dtype != torch.float32:
                            return f"gives {result.dtype} under CUDA's autocast"
        except Exception as error:
            return f"cannot be tried in bfloat16: {_short(error)}"
        return None

    def with_dropout(self) -> bool:
        """Outputs of the first example with dropouts that show where they are; False where that fails."""
        if self.form.run is not None or not self.attributes.set_dropouts(0.01):
            return True
        self.drew = False
        try:
            with MappedDropout():
                for inputs in self._in_both_modes(self.examples[:1]):
                    self.dropped += [x.detach() for x in self._call(self.parameters, inputs)]
        except Exception:  # as above; its dropouts must stay 0
            return False
        finally:
            self.attributes.set_dropouts(0.0)
        return not self.drew

    def _in_both_modes(self, examples: list[Example]) -> Any:
        for training in (True, False):
            for part in self.attributes.parts:
                part.training = training
            yield from examples

    def _call(self, parameters: dict[str, Tensor], inputs: Example) -> tuple[Tensor, ...]:
        torch.default_generator.manual_seed(1)
        before = random_state()
        if self.form.run is not None:
            outputs = self.form.run(self.module, *inputs)
        else:
            output = torch.func.functional_call(self.module, parameters, inputs)
            if not isinstance(output, Tensor):
                raise TypeError(f"returns a {type(output).__name__}")
            outputs = (output,)
        self.drew |= random_state() != before
        return outputs


def signature(module: nn.Module, form: Form) -> tuple[Any, ...]:
    """Modules with one signature compute the same function of input and parameters."""

    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(plain(each) for each in value)
        return value if isinstance(value, bool | int | float | str | None) else id(value)

    parts = []
    for part in module.modules():
        own = [(key, plain(value)) for key, value in vars(part).items() if key not in INTERNALS]
        shapes = [(name, value.shape) for name, value in part._parameters.items() if value is not None]
        parts.append((original_class(part), tuple(own), tuple(shapes), tuple(part._modules)))
    return (form.kind, *parts)


def _close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-3))


def _random(like: Tensor, generator: torch.Generator, size: Tensor | None = None) -> Tensor:
    """Weights of such a size that no product explodes, whatever they start from; inputs of that given."""
    scale = like.shape[-1] ** -0.5 if like.dim() > 1 else 0.5
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return ((scale if size is None else size) * values).requires_grad_()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split(chr(10))[0][:80]}"
