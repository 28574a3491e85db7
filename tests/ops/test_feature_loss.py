"""Masked losses: the eager forms against the oracle, and the kernels against them."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import DEVICE, DTYPES
from feature_loss_cases import (
    assert_loss_is_accurate,
    differentiate,
    draw,
    feature_inputs,
    masked,
    pixel_inputs,
)
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.feature_loss import (
    masked_feature_loss,
    masked_feature_target,
    masked_mse,
    masked_pixel_loss,
    masked_pixel_target,
)
from lmim_fast.ops.masking import select_patches
from lmim_fast.reference import normalise_patches, patchify

SIZES = [(3, 16, 5, 20), (1, 5, 4, 7), (2, 12, 1, 100), (1, 4, 1, 600), (2, 8, 2, 256)]


def test_targets_are_the_oracle_targets_at_masked_rows() -> None:
    _, ids_masked = select_patches(torch.rand(2, 256), 51)
    features = torch.randn(2, 257, 24, requires_grad=True)
    rows = ids_masked[:, :, None]
    expected = F.layer_norm(features[:, 1:], (24,), eps=1e-5).gather(1, rows.expand(-1, -1, 24))
    target = masked_feature_target(features, ids_masked)
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad
    images = torch.rand(2, 3, 32, 128) * 2 - 1
    for normalise in (False, True):
        pixels = patchify(images, 4)
        pixels = normalise_patches(pixels) if normalise else pixels
        ours = masked_pixel_target(images, ids_masked, 4, normalise=normalise)
        torch.testing.assert_close(ours, pixels.gather(1, rows.expand(-1, -1, 48)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_loss_is_that_of_its_parts(dtype: torch.dtype) -> None:
    product, bias, features, ids = (tensor.cpu() for tensor in feature_inputs((3, 16, 5, 20), dtype))
    pred = product + bias.to(dtype)
    with dispatch.backend("eager"):
        loss = masked_feature_loss(product, bias, features, ids, eps=1e-3)
    assert torch.equal(loss, masked_mse(pred, masked_feature_target(features, ids, eps=1e-3)))
    product, bias, images, ids = (tensor.cpu() for tensor in pixel_inputs("uint8", dtype))
    with dispatch.backend("eager"):
        loss = masked_pixel_loss(product, None, images, ids, 4, normalise=True)
    assert torch.equal(loss, masked_mse(product, masked_pixel_target(images, ids, 4, normalise=True)))


def test_masked_mse_refuses_to_broadcast() -> None:
    assert masked_mse(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 3.0)) == 9.0
    with pytest.raises(ValueError, match=r"pred \(2, 3, 4\) and target \(2, 3, 1\)"):
        masked_mse(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1))


def test_gradients_of_the_eager_forms_are_right() -> None:
    ids = select_patches(torch.rand(2, 6), 2)[1]

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    features, images = double(2, 7, 5).detach(), double(2, 3, 4, 6).detach()
    assert torch.autograd.gradcheck(masked_feature_loss, (double(2, 4, 5), double(5), features, ids))
    pixels = partial(masked_pixel_loss, patch_size=2, normalise=True)
    assert torch.autograd.gradcheck(pixels, (double(2, 4, 12), double(12), images, ids))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_feature_kernel_is_as_accurate_as_the_eager_form(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = feature_inputs(sizes, dtype)
    assert_loss_is_accurate(masked_feature_loss, inputs)
    assert_loss_is_accurate(partial(masked_feature_loss, eps=0.5), inputs, bias=False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("layout", ["uint8", "float"])
def test_pixel_kernel_is_as_accurate_as_the_eager_form(
    layout: str, normalise: bool, dtype: torch.dtype
) -> None:
    for patch in (4, 5):
        loss = partial(masked_pixel_loss, patch_size=patch, normalise=normalise)
        assert_loss_is_accurate(loss, pixel_inputs(layout, dtype, patch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_teacher_rows_without_variance_stay_finite(backend: str, dtype: torch.dtype) -> None:
    product, bias, features, ids = feature_inputs((2, 4, 1, 20), dtype)
    features = features.clone()
    features[0], features[1] = 7.0, 0.0
    loss, *gradients = differentiate(backend, masked_feature_loss, (product, bias, features, ids))
    torch.testing.assert_close(loss, (product.float() + bias).square().mean(), rtol=2e-3, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)
    images = torch.full((2, 8, 8, 3), 255, dtype=torch.uint8, device=DEVICE)
    pixels = partial(masked_pixel_loss, patch_size=4, normalise=True)
    loss = differentiate(backend, pixels, (draw(2, 3, 48), draw(48), images, masked(2, 4, 1)))[0]
    assert loss.isfinite()


@pytest.mark.usefixtures("kernels")
def test_a_patch_that_is_not_there_shows_as_nan() -> None:
    product, bias, features, ids = feature_inputs((2, 4, 1, 20), torch.float32)
    images = draw(2, 3, 8, 8)
    for wrong in (4, -1, 2**40):
        ids[1, 2] = wrong
        assert masked_feature_loss(product, bias, features, ids).isnan()
        assert masked_pixel_loss(draw(2, 3, 48), None, images, ids, 4, normalise=False).isnan()


def test_strides_of_inputs_do_not_matter() -> None:
    product, bias, features, ids = feature_inputs((2, 8, 2, 20), torch.float32)
    plain = differentiate("triton", masked_feature_loss, (product, bias, features, ids))
    apart = draw(2, 9, 60)
    apart[:, 1:7, 3:43:2], apart[:, :, 44:] = product, float("nan")
    spread = torch.stack([features, features + 1], dim=3)[..., 0]
    backwards = ids.t().contiguous().t()
    for changed in (
        (apart[:, 1:7, 3:43:2], bias, features, ids),
        (product.transpose(0, 1).contiguous().transpose(0, 1), bias, spread, backwards),
        (
            product,
            torch.stack([bias, bias], 1)[:, 0],
            features.transpose(1, 2).contiguous().transpose(1, 2),
            ids,
        ),
    ):
        for mine, other in zip(differentiate("triton", masked_feature_loss, changed), plain, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.usefixtures("poisoned")
def test_two_runs_give_the_same_bits() -> None:
    inputs = feature_inputs((4, 16, 2, 100), torch.float16)
    first, second = (differentiate("triton", masked_feature_loss, inputs, 3.0) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


def test_wide_rows_run_the_eager_form() -> None:
    inputs = feature_inputs((1, 2, 1, 2049), torch.float32)
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="at most 2048 values, got 2049"):
        masked_feature_loss(*inputs)
    assert_loss_is_accurate(masked_feature_loss, feature_inputs((1, 2, 1, 2048), torch.float32))


def test_wrong_feature_inputs_are_named() -> None:
    product, bias, features, ids = feature_inputs((2, 6, 2, 8), torch.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(product=product[0]), r"float \(B, M, D\), got torch.float32 of \(4, 8\)"),
        (
            dict(product=product[:, :0], ids_masked=ids[:, :0]),
            r"product \(2, 0, 8\) needs at least one masked",
        ),
        (dict(product=product[:0]), r"product \(0, 4, 8\) needs at least one masked"),
        (dict(ids_masked=ids[:, 1:]), r"int64 \(2, 4\) for product \(2, 4, 8\), got torch.int64 of \(2, 3\)"),
        (dict(ids_masked=ids.int()), r"got torch.int32 of \(2, 4\)"),
        (dict(bias=bias[1:]), r"bias must be float \(8,\), got torch.float32 of \(7,\)"),
        (dict(features=features[..., 1:]), r"features \(2, 7, 7\) must be \(2, 1\+L, 8\)"),
        (dict(features=features[:1]), r"features \(1, 7, 8\) must be \(2, 1\+L, 8\)"),
        (dict(features=features.long()), "features must be floating-point, got torch.int64"),
        (dict(features=features.to("meta")), "one device, got product on .*, features on meta"),
    ]
    for changed, message in cases:
        arguments = dict(product=product, bias=bias, features=features, ids_masked=ids) | changed
        with pytest.raises(ValueError, match=message):
            masked_feature_loss(**arguments)


def test_wrong_pixel_inputs_are_named() -> None:
    product, bias, images, ids = pixel_inputs("uint8", torch.float32)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((product, bias, images[:2], ids, 4), r"product is of 3 images, images \(2, 8, 12, 3\) of 2"),
        ((product, bias, images[..., :2], ids, 4), r"got torch.uint8 of shape \(3, 8, 12, 2\)"),
        ((product, bias, images, ids, 5), r"images \(3, 8, 12, 3\) do not split into patches of 5 pixels"),
        ((product, bias, images, ids, 2), r"product \(3, 4, 48\) must be \(B, M, 12\) for patch_size 2"),
        ((product[:, :0], bias, images, ids[:, :0], 4), "at least one masked patch"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            masked_pixel_loss(*arguments, normalise=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [384, 768, 2048])
def test_features_of_real_sizes_in_bf16(width: int) -> None:
    inputs = feature_inputs((64, 256, 51, width), torch.bfloat16)
    for upstream in (1.0, 0.25):
        assert_loss_is_accurate(masked_feature_loss, inputs, upstream)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_pixels_of_real_sizes_in_bf16() -> None:
    images = torch.randint(0, 256, (64, 32, 128, 3), dtype=torch.uint8, device=DEVICE)
    inputs = draw(64, 205, 48, dtype=torch.bfloat16), draw(48), images, masked(64, 256, 51)
    for normalise in (False, True):
        assert_loss_is_accurate(partial(masked_pixel_loss, patch_size=4, normalise=normalise), inputs)
