"""Launches that call a compiled kernel at once, without Triton's JIT in between.

At every launch the JIT binds the arguments, makes a key of them and looks for the compiled kernel: with many
arguments more than half of the time that Triton's Python takes. Here the first launch of a key goes through
it, and what it returns is kept and called by the later ones. The key tells apart all that the Tritons of
`CHECKED` compile apart for an NVIDIA GPU: dtypes, pointers that are multiples of 16, integers that are 1,
multiples of 16 or wider than 32 bits, what is None, constants and options.

Device, stream, hooks of launches and alignment of pointers are read at every launch. What the JIT alone can
do (hooks before a run, debugging, instrumentation, other types of arguments) is left to it. One of its checks
is not made after the first launch: that a kernel's global constants are those that it was compiled with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

CHECKED = (3, 6), (3, 9)  # versions of Triton whose specialisation and calls of a compiled kernel were read
FORMS = 256  # of a kernel at most; one more, and all of them are looked for again
_TENSORS = frozenset({Tensor, torch.nn.Parameter})  # other subclasses are left to the JIT
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1  # of 32 bits


@dataclass(slots=True)
class _Kernel:
    """A kernel, held so that no other one gets its id, and its compiled forms with their constants in order.

    `width_only` tells of each argument whether its value is not specialised; None: the JIT has to launch it.
    `constants` are the names and defaults of what follows the arguments.
    """

    kernel: Any
    width_only: tuple[bool, ...] | None
    constants: dict[str, Any] = field(default_factory=dict)
    forms: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = field(default_factory=dict)

    def keep(self, key: tuple[Any, ...], compiled: Any, constants: dict[str, Any]) -> None:
        """What the JIT returned for a key, if it can be called: not what is still being compiled."""
        if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
            return
        if len(self.forms) >= FORMS:
            self.forms.clear()
        self.forms[key] = compiled, tuple((self.constants | constants)[name] for name in self.constants)


_kernels: dict[int, _Kernel] = {}


def unfit() -> str | None:
    """Why this Triton's kernels are not called directly, or None."""
    oldest, newest = (".".join(map(str, version)) for version in CHECKED)
    if CHECKED[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= CHECKED[1]:
        return None
    return f"direct launches are checked with Triton {oldest} to {newest}, this is {triton.__version__}"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """As `kernel[grid](*arguments, **options, **constants)`, on the current device."""
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _look_at(kernel)
    key = _key(known, arguments, options, constants)
    form = None if key is None else known.forms.get(key)
    if form is None:
        compiled = kernel[grid](*arguments, **options, **constants)
        if key is not None:
            known.keep(key, compiled, constants)
    else:
        compiled, rest = form
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def _look_at(kernel: Any) -> _Kernel:
    """A kernel of the interpreter, or one whose constants are not its last arguments, is left to the JIT."""
    if type(kernel) is not JITFunction or kernel.launch_metadata is not None:
        return _Kernel(kernel, None)
    constant = [parameter.is_constexpr for parameter in kernel.params]
    if sorted(constant) != constant:
        return _Kernel(kernel, None)
    count = constant.count(False)
    width_only = tuple(bool(parameter.do_not_specialize) for parameter in kernel.params[:count])
    return _Kernel(kernel, width_only, {last.name: last.default for last in kernel.params[count:]})


def _key(
    known: _Kernel, arguments: tuple[Any, ...], options: dict[str, Any], constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Equal keys are compiled alike; None: the JIT has to see this launch."""
    if known.width_only is None or len(arguments) != len(known.width_only):
        return None
    runtime = knobs.runtime
    if known.kernel.pre_run_hooks or known.kernel.debug or runtime.debug:
        return None
    if knobs.compilation.instrumentation_mode or runtime.add_stages_inspection_hook is not None:
        return None
    parts: list[Any] = [driver.active.get_current_device()]
    append = parts.append
    for value, width_only in zip(arguments, known.width_only, strict=True):
        if value is None:
            append(None)
            continue
        kind = type(value)
        if kind in _TENSORS:
            append(value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,))
        elif kind is int and _LOWEST <= value <= _HIGHEST:
            append(32 if width_only else 1 if value == 1 else 0 if value & 15 else 16)
        elif kind is float or kind is bool:
            append(kind)
        elif kind is int and -(2**63) <= value < 2**63:
            append(64 if width_only or value & 15 else 80)
        else:
            return None
    # As in Triton's own table 1 and True are the same constant.
    return (*parts, *options.values(), *constants, *constants.values())
