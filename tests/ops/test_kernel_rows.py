"""What backward kernels do besides: make rows of the forward pass again, add a second gradient on load."""

from typing import Any

import pytest
import torch
from accuracy import DEVICE, DTYPES
from torch import Tensor

from lmim_fast.kernels import gelu, norm, rows, tokens
from lmim_fast.ops.dropout import threshold

WIDTHS = (48, 384)
DROPOUTS = (0.0, 0.3)

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def seed_for(p: float) -> Tensor | None:
    return torch.tensor([2**40 + 77], device=DEVICE) if p else None


def assert_close(ours: Any, theirs: Any) -> None:
    """Both are tuples of tensors or None, with no NaN; another kernel may sum in another order."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            exact = mine.dtype == torch.float32
            torch.testing.assert_close(mine, other, **(dict(rtol=1e-5, atol=1e-5) if exact else {}))


class Norm:
    """A forward pass over (2, 9, D), or (B, N, D), and calls of its backward pass."""

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        *,
        shape: tuple[int, int] = (2, 9),
        residual: torch.dtype = torch.float32,
        p: float = 0.0,
        branch: bool = True,
    ) -> None:
        shape3 = *shape, width
        x = draw(*shape3, dtype=dtype) if branch else None
        stream, x_bias = 3 + draw(*shape3, dtype=residual), draw(width) if branch else None
        self.weight, self.bias = 1 + draw(width), draw(width)
        self.dropout = seed_for(p), threshold(p)
        self.normalised, total, self.statistics = norm.forward(
            x, x_bias, stream, self.weight, self.bias, *self.dropout, dtype, 1e-6
        )
        self.total = stream if total is None else total
        self.grad = draw(*shape3, dtype=dtype)
        self.grad_total = draw(*shape3, dtype=residual) if branch else None
        self.branch, self.dtype = branch, dtype

    def backward(self, grad: Tensor | None = None, **options: Any) -> tuple[Tensor | None, ...]:
        return norm.backward(
            self.grad if grad is None else grad,
            self.grad_total,
            self.total,
            self.weight,
            self.statistics,
            *self.dropout,
            x_dtype=self.dtype if self.branch else None,
            residual_dtype=self.total.dtype,
            parameters=True,
            x_bias=self.branch,
            **options,
        )


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_backward_makes_the_rows_of_the_forward_pass_again_to_the_bit(
    width: int, dtype: torch.dtype, branch: bool
) -> None:
    for residual in {torch.float32, dtype}:
        one = Norm(width, dtype, residual=residual, branch=branch, shape=(3, 11))
        again = poison(*one.normalised.shape, dtype=dtype)
        gradients = one.backward(rows=again, bias=one.bias)
        assert torch.equal(again, one.normalised)
        assert_close(gradients, one.backward())


def test_norm_rows_can_be_made_in_another_type_than_the_gradients() -> None:
    one = Norm(48, torch.float16)
    again = poison(*one.normalised.shape, dtype=torch.float32)
    one.backward(rows=again, bias=one.bias)
    assert torch.equal(again.half(), one.normalised)


def test_norm_rows_do_not_depend_on_dropout() -> None:
    one = Norm(48, torch.float16, p=0.3)
    again = poison(*one.normalised.shape, dtype=torch.float16)
    gradients = one.backward(rows=again, bias=one.bias)
    assert torch.equal(again, one.normalised)
    assert_close(gradients, one.backward())


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("first", [0, 1, 4])
def test_norm_adds_a_second_gradient_of_all_tokens_or_of_those_from_one_on(
    first: int, width: int, dtype: torch.dtype, p: float
) -> None:
    one = Norm(width, dtype, p=p)
    grad_more = draw(2, 9 - first, width, dtype=dtype)
    whole = one.grad.to(torch.float32, copy=True)
    whole[:, first:] += grad_more.float()
    again = poison(*one.normalised.shape, dtype=dtype)
    ours = one.backward(extra=[grad_more], first=first, rows=again, bias=one.bias)
    assert_close(ours, one.backward(whole))  # it is added in fp32, and rounded nowhere
    assert_close(ours, one.backward(extra=[grad_more], first=first))
    assert torch.equal(again, one.normalised)


@pytest.mark.parametrize("first", [0, 4])
def test_norm_adds_a_third_gradient(first: int) -> None:
    one = Norm(48, torch.float16)
    extra = [draw(2, 9 - first, 48, dtype=torch.float16) for _ in range(2)]
    whole = one.grad.to(torch.float32, copy=True)
    whole[:, first:] += extra[0].float()
    whole[:, first:] += extra[1].float()
    assert_close(one.backward(extra=extra, first=first), one.backward(whole))
    with pytest.raises(ValueError, match="up to two gradients, got 3"):
        one.backward(extra=[*extra, extra[0]], first=first)


def test_norm_takes_a_second_gradient_of_other_strides_and_type() -> None:
    one = Norm(48, torch.float16)
    grad_more = draw(2, 9, 96)[:, 2:, ::2]
    whole = one.grad.to(torch.float32, copy=True)
    whole[:, 2:] += grad_more
    assert_close(one.backward(extra=[grad_more], first=2), one.backward(whole))


def test_norm_refuses_what_needs_a_gradient_without_one() -> None:
    one = Norm(48, torch.float32)
    given = (None, one.grad_total, one.total, one.weight, one.statistics, None, 0)
    wanted = dict(x_dtype=None, residual_dtype=torch.float32, parameters=False, x_bias=False)
    for extra in (dict(rows=torch.empty_like(one.total), bias=one.bias), dict(extra=[one.grad])):
        with pytest.raises(ValueError, match="need the gradient of the normalised rows"):
            norm.backward(*given, **wanted, **extra)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows need the bias"):
        one.backward(rows=torch.empty_like(one.total))


def test_norm_refuses_a_second_gradient_of_another_size() -> None:
    one = Norm(48, torch.float32)
    for first, count in ((0, 8), (1, 9), (9, 0)):
        with pytest.raises(ValueError, match=r"extra \(2, \d, 48\)"):
            one.backward(extra=[draw(2, count, 48)], first=first)


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_backward_makes_the_activations_of_the_forward_pass_again_to_the_bit(
    width: int, dtype: torch.dtype, p: float
) -> None:
    x, bias, dropout = draw(3, 11, width, dtype=dtype), draw(width), (seed_for(p), threshold(p))
    grad, activated = draw(3, 11, width, dtype=dtype), poison(3, 11, width, dtype=dtype)
    gradients = gelu.backward(grad, x, bias, *dropout, bias_wanted=True, activated=activated)
    assert torch.equal(activated, gelu.forward(x, bias, *dropout))
    assert_close(gradients, gelu.backward(grad, x, bias, *dropout, bias_wanted=True))


@pytest.mark.parametrize("mask_token", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_add_a_second_gradient_of_the_shown_rows(
    width: int, dtype: torch.dtype, mask_token: bool
) -> None:
    grad, grad_shown = draw(3, 9, width, dtype=dtype), draw(3, 4, width, dtype=dtype)
    whole = grad.to(torch.float32, copy=True)
    whole[:, :4] += grad_shown.float()
    options: dict[str, Any] = dict(mask_token=mask_token)
    for visible_dtype in (dtype, None):
        options["visible_dtype"] = visible_dtype
        ours = tokens.decoder_tokens_backward(grad, 4, **options, grad_shown=grad_shown)
        assert_close(ours, tokens.decoder_tokens_backward(whole, 4, **options))


def test_tokens_take_a_second_gradient_of_other_strides() -> None:
    grad, wide = draw(3, 9, 48), draw(3, 9, 48)
    options: dict[str, Any] = dict(visible_dtype=torch.float32, mask_token=True)
    ours = tokens.decoder_tokens_backward(grad, 4, **options, grad_shown=wide[:, :4])
    theirs = tokens.decoder_tokens_backward(grad, 4, **options, grad_shown=wide[:, :4].contiguous())
    assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"grad_shown \(3, 5, 48\) must be \(3, 4, 48\)"):
        tokens.decoder_tokens_backward(grad, 4, **options, grad_shown=wide[:, :5])


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 384, 512, 1100])
def test_tiles_cover_a_row_by_a_power_of_two(count: int) -> None:
    found = rows.power_of_two(count)
    assert found.bit_count() == 1
    assert found // 2 < count <= found
    tile, half = rows.halved_tile(count, 2048, 16)
    assert 2 * half == max(16, found)
    assert tile * 2 * half <= 2048
    height, columns, across = rows.tile_shape(count, 2048, 512, 16)
    assert (across - 1) * columns < count <= across * columns
    assert height * columns <= 2048


def test_rows_are_copied_only_where_their_columns_are_apart() -> None:
    whole = draw(2, 3, 40)
    for view, stride in ((whole, 40), (whole[:, :, 8:24], 40), (whole[:, 1:2], 120)):
        given, found = rows.with_stride(view)
        assert (given.data_ptr(), found) == (view.data_ptr(), stride)
    given, stride = rows.with_stride(whole[:, :, ::2])
    assert given.data_ptr() != whole.data_ptr()
    assert (stride, given.stride(-1)) == (20, 1)


def test_two_runs_with_everything_added_give_the_same_bits() -> None:
    one = Norm(48, torch.float16, shape=(5, 14), p=0.3)
    grad_more = draw(5, 13, 48, dtype=torch.float16)
    x, bias, activated = draw(5, 14, 48), draw(48), [poison(5, 14, 48, dtype=torch.float32) for _ in range(2)]
    again = [poison(5, 14, 48, dtype=torch.float16) for _ in range(2)]
    runs = [
        (
            *one.backward(extra=[grad_more], first=1, rows=again[run], bias=one.bias),
            *gelu.backward(x, x, bias, None, 0, bias_wanted=True, activated=activated[run]),
            *tokens.decoder_tokens_backward(
                x, 3, visible_dtype=torch.float16, mask_token=True, grad_shown=x[:, :3]
            ),
            again[run],
            activated[run],
        )
        for run in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_writes_its_gradient_over_the_one_it_reads(dtype: torch.dtype, p: float) -> None:
    x, bias, grad = draw(37, 96, dtype=dtype), draw(96), draw(37, 96, dtype=dtype)
    dropout = (torch.tensor([3], device=DEVICE), round(256 * p)) if p else (None, 0)
    expected, sums = gelu.backward(grad.clone(), x, bias, *dropout, bias_wanted=True)
    activated = poison(37, 96, dtype=dtype)
    found, again = gelu.backward(
        grad, x, bias, *dropout, bias_wanted=True, activated=activated, in_place=True
    )
    assert found.data_ptr() == grad.data_ptr()
    assert torch.equal(found, expected)
    assert sums is not None
    assert torch.equal(sums, again)
    assert torch.equal(activated, gelu.forward(x, bias, *dropout))
