"""Norm and linear, norm and MLP, and rows with two readers, each in one step of autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import DEVICE, DTYPES
from torch import Tensor

from benchmarks.operation import launches
from lmim_fast.kernels import norm
from lmim_fast.ops import norm_step, products, sublayers
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm

ROWS, WIDTH, HIDDEN, OUT = 26, 48, 64, 40
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.usefixtures("kernels")]
Form = Callable[..., tuple[Tensor, ...]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def seed(number: int) -> Tensor:
    return torch.tensor([number], device=DEVICE)


class Case:
    """Inputs of a norm and of what is behind it."""

    def __init__(self, dtype: torch.dtype, p: float = 0.0, *, added: bool = True) -> None:
        torch.manual_seed(0)
        self.dtype, self.p = dtype, p
        self.x = draw(ROWS, WIDTH, dtype=dtype) if added else None
        self.x_bias = draw(WIDTH) if added else None
        self.residual, self.weight, self.bias = draw(ROWS, WIDTH), draw(WIDTH), draw(WIDTH)
        self.first, self.first_bias, self.second = draw(HIDDEN, WIDTH), draw(HIDDEN), draw(OUT, HIDDEN)
        self.seeds = (seed(3), seed(4)) if p else (None, None)

    def norm(self) -> norm_step.Norm:
        return norm_step.Norm(
            *(
                self.x,
                self.x_bias,
                self.residual,
                self.weight,
                self.bias,
                self.seeds[0],
                self.p,
                1e-6,
                self.dtype,
            )
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """Normalised rows and their sum, by the op."""
        if self.x is None:
            return layer_norm(self.residual, self.weight, self.bias, self.dtype), self.residual
        return dropout_add_layer_norm(
            *(self.x, self.x_bias, self.residual, self.weight, self.bias), p=self.p, seed=self.seeds[0]
        )

    def leaves(self) -> list[Tensor]:
        tensors = self.x, self.x_bias, self.residual, self.weight, self.bias
        return [t for t in (*tensors, self.first, self.first_bias, self.second) if t is not None]

    def linear(self) -> tuple[Tensor, Tensor]:
        return sublayers.norm_linear(self.norm(), self.first)

    def linear_by_ops(self) -> tuple[Tensor, Tensor]:
        rows, total = self.rows()
        return linear(rows, self.first), total

    def mlp(self, *, epilogue: bool = False) -> tuple[Tensor, Tensor]:
        weights = self.first, self.first_bias, self.second
        return sublayers.norm_mlp(self.norm(), *weights, seed=self.seeds[1], p=self.p, epilogue=epilogue)

    def mlp_by_ops(self) -> tuple[Tensor, Tensor]:
        rows, total = self.rows()
        hidden = bias_gelu(linear(rows, self.first), self.first_bias, p=self.p, seed=self.seeds[1])
        return linear(hidden, self.second), total


def run(form: Callable[[], tuple[Tensor, Tensor]], case: Case, *, used: str = "both") -> list[Tensor | None]:
    """Outputs, and gradients of all leaves."""
    product, total = form()
    torch.manual_seed(1)
    upstream = [torch.randn_like(product), torch.randn_like(total)]
    outputs = [product, total]
    chosen = {"both": slice(0, 2), "product": slice(0, 1), "total": slice(1, 2)}[used]
    found = torch.autograd.grad(outputs[chosen], case.leaves(), upstream[chosen], allow_unused=True)
    return [product, total, *found]


def assert_equal(ours: list[Tensor | None], others: list[Tensor | None], **tolerance: float) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("used", ["both", "product", "total"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_bits_are_those_of_the_ops_one_by_one(
    kind: str, dtype: torch.dtype, added: bool, p: float, used: str
) -> None:
    case = Case(dtype, p, added=added)
    ours = run(getattr(case, kind), case, used=used)
    apart = run(getattr(case, f"{kind}_by_ops"), case, used=used)
    if not added and used == "total":  # the residual itself
        ours, apart = ours[:2], apart[:2]
    assert_equal(ours, apart, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_in_the_epilogue_differs_by_rounding_alone(dtype: torch.dtype) -> None:
    case = Case(dtype)
    loose = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=5e-2)
    assert_equal(run(partial(case.mlp, epilogue=True), case), run(case.mlp, case), **loose)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_recomputed_rows_are_the_emitted_ones_for_one_more_launch_each(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(torch.float16)
    results, names = [], []
    for form in norm_step.FORMS:
        monkeypatch.setenv(norm_step.VARIABLE, form)
        with launches() as launched:
            results.append(run(getattr(case, kind), case))
        names.append(sorted(launched))
    assert_equal(*results, rtol=0.0, atol=0.0)
    emitted = ["norm._backward", "norm._forward"]
    again = ["norm._forward"]
    if kind == "mlp":
        emitted, again = [*emitted, "gelu._backward", "gelu._forward"], [*again, "gelu._forward"]
    assert names == [sorted(emitted), sorted(emitted + again)]


def test_an_unknown_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.float32)
    product, _ = case.linear()
    monkeypatch.setenv(norm_step.VARIABLE, "keep")
    with pytest.raises(ValueError, match="'keep'; choose from emit, recompute"):
        product.sum().backward()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_normalised_and_activated_rows_are_not_kept(kind: str) -> None:
    case, kept = Case(torch.float32), []
    rows, _ = case.rows()
    activated = bias_gelu(linear(rows, case.first), case.first_bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(case, kind)()
    for unwanted in (rows, activated):
        assert not any(t.shape == unwanted.shape and torch.equal(t, unwanted) for t in kept)
    sizes = sorted(t.shape for t in kept if t.dim() == 2 and len(t) == ROWS)
    assert sizes == [(ROWS, WIDTH)] + ([(ROWS, HIDDEN)] if kind == "mlp" else [])


@pytest.mark.parametrize("frozen", [(5,), (7,), (3, 4), (1,), (0, 1, 2, 3, 4)])
def test_gradients_that_nobody_needs_are_not_made(frozen: tuple[int, ...]) -> None:
    case = Case(torch.float32)
    for number in frozen:
        case.leaves()[number].requires_grad_(False)
    trained = [leaf for leaf in case.leaves() if leaf.requires_grad]
    product, total = case.mlp()
    with (
        mock.patch.object(norm_step, "weight_gradient", wraps=products.weight_gradient) as first,
        mock.patch.object(sublayers, "weight_gradient", wraps=products.weight_gradient) as second,
        mock.patch.object(norm, "backward", wraps=norm.backward) as backward,
    ):
        ours = torch.autograd.grad(product.sum() + total.sum(), trained)
    assert (first.call_count, second.call_count) == (5 not in frozen, 7 not in frozen)
    asked = backward.call_args.kwargs
    assert asked["parameters"] == (3 not in frozen)
    assert asked["x_bias"] == (1 not in frozen)
    assert (asked["rows"] is not None) == (5 not in frozen)
    assert (asked["residual_dtype"] is None) == (0 in frozen)
    product, total = case.mlp_by_ops()
    apart = torch.autograd.grad(product.sum() + total.sum(), trained)
    assert_equal(list(ours), list(apart), rtol=1e-5, atol=1e-5)


def test_nothing_is_recorded_without_gradients() -> None:
    case = Case(torch.float32)
    with torch.no_grad():
        outputs = (*case.linear(), *case.mlp(), *sublayers.shared_norm(case.norm(), 0)[::2])
        apart = (*case.linear_by_ops(), *case.mlp_by_ops(), case.rows()[0], case.rows()[0])
    assert not any(output.requires_grad for output in outputs)
    assert_equal(list(outputs), list(apart), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("readers", [(0, 2), (0,), (2,), (0, 1, 2), (1, 2), ()])
@pytest.mark.parametrize("first", [0, 5])
def test_rows_with_several_readers_have_the_sum_of_their_gradients(
    first: int, readers: tuple[int, ...]
) -> None:
    case = Case(torch.float32)
    for name in ("x", "residual"):
        tensor = getattr(case, name).detach().view(2, 13, WIDTH)
        setattr(case, name, tensor.requires_grad_())
    readers = tuple(number for number in readers if first or number != 1)
    leaves = case.leaves()[:5]
    results = []
    for shared in (True, False):
        if shared:
            outputs: Any = sublayers.shared_norm(case.norm(), first)
        else:
            rows = case.rows()[0]
            chosen = rows[:, first:].contiguous()
            outputs = rows, chosen if first else None, chosen
        torch.manual_seed(2)
        weights = [None if output is None else torch.randn_like(output) for output in outputs]
        loss = sum((outputs[n] * weights[n]).sum() for n in readers) + 0.0 * case.weight.sum()
        with launches() as names:
            results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        if shared:
            assert names == (["norm._backward"] if readers else [])
    for mine, other in zip(*results, strict=True):
        if readers:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
