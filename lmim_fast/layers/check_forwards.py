"""`accelerate(model, check=...)`: both forwards of a layer on what reaches it in the caller's model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lmim_fast.layers.fast_forwards.form import Form, Left, by_position, note, positions
from lmim_fast.ops import dispatch

_LOW = (torch.bfloat16, torch.float16)


class _Call:
    """Arguments of a layer's first call."""

    def __init__(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.arguments, self.named = _copied(arguments), _copied(named)

    def run(self, forward: Any, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of the inputs and of the layer's parameters."""
        arguments, named = _copied(self.arguments), _copied(self.named)
        inputs = [x.requires_grad_() for x in tree_leaves((arguments, named)) if _is_real(x)]
        with torch.enable_grad():
            outputs = [x for x in tree_leaves(forward(module, *arguments, **named)) if _is_real(x)]
            leaves = [*inputs, *(each for each in module.parameters() if each.requires_grad)]
            differentiable = [x for x in outputs if x.requires_grad]
            generator = torch.Generator().manual_seed(0)
            grads = [torch.randn(x.shape, generator=generator).to(x) for x in differentiable]
            found = torch.autograd.grad(differentiable, leaves, grads, materialize_grads=True)
        return outputs, list(found)


def compare_forwards(
    model: nn.Module, chosen: Mapping[nn.Module, Form], inputs: Any, *, must_run: Set[nn.Module]
) -> dict[nn.Module, str]:
    """Reasons why layers must not be swapped: their two forwards differ on these inputs of the model.

    Args:
        model:    not swapped yet; it runs once, in evaluation mode and without gradients.
        chosen:   form of each layer.
        inputs:   a tuple, a dict or a tensor.
        must_run: layers that are not swapped if the inputs do not reach them.
    """
    layers = {module: form for module, form in chosen.items() if form.method == "forward"}
    with _in_evaluation(model):
        calls = _calls(model, layers, inputs)
        found = {module: _difference(module, layers[module], call) for module, call in calls.items()}
    missed = dict.fromkeys(must_run & layers.keys() - calls.keys(), "the inputs of check do not reach it")
    return {module: reason for module, reason in (found | missed).items() if reason}


def _difference(module: nn.Module, form: Form, call: _Call) -> str:
    """Why the two forwards of a layer differ, or ""."""
    own = call.run(type(module).forward, module)
    try:
        with dispatch.backend(dispatch.current_backend() if own[0] and own[0][0].is_cuda else "eager"):
            fast = call.run(form.run, module)
    except Left as left:
        note(module, left.reason)
        return ""
    for what, mine, theirs in zip(("outputs", "gradients"), fast, own, strict=True):
        if [(x.shape, x.dtype) for x in mine] != [(x.shape, x.dtype) for x in theirs]:
            return f"its fast form gives other {what}, or of other shapes or dtypes"
        size, gap = _largest(theirs), _largest(a - b for a, b in zip(mine, theirs, strict=True))
        if not gap <= (3e-2 if any(x.dtype in _LOW for x in theirs) else 1e-3) * size:
            return f"its fast form differs by {gap / size if size else gap:.1e} of the largest of its {what}"
    return ""


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude in any of them, 0 for none; NaN if there is one."""
    largest = [x.abs().max().double().cpu() for x in tensors if x.numel()]
    return torch.stack(largest).max().item() if largest else 0.0


def _calls(model: nn.Module, layers: Mapping[nn.Module, Form], inputs: Any) -> dict[nn.Module, _Call]:
    """The first call of each layer while the model runs."""
    calls: dict[nn.Module, _Call] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module not in calls:  # a form has names of its own
            calls[module] = _Call(*by_position(positions(type(module).forward), arguments, named))

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in layers]
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout, whose draws differ, and with tensors that can be differentiated, inside the block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _copied(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)
