"""Blur and sharpen kernels for every strength that a configuration allows."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from crop_views import as_bytes, only, png, psnr, run_programs

from lmim_fast.config import MAX_BLUR_SIGMA, GuidanceConfig
from lmim_fast.data.guidance.filter import filter_gains, filter_kernels
from lmim_fast.data.guidance.parameters import Operation, sample_parameters
from lmim_fast.data.guidance.program import make_program


def draw(count, **ranges):
    config = GuidanceConfig(**ranges)
    return sample_parameters(config, 1, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def blurs(sigmas):
    """Parameters of one blur each, nothing else."""
    parameters = only(draw(len(sigmas)), [Operation.BLUR])
    return dataclasses.replace(parameters, blur_sigma=np.array(sigmas))


def deviation(kernel):
    taps = np.arange(len(kernel)) - len(kernel) // 2
    return np.sqrt((kernel.sum(axis=0, dtype=np.float64) * taps**2).sum())


def test_up_to_sigma_1_5_the_window_is_five_pixels_and_beyond_it_grows_with_sigma():
    sigmas = [0.1, 1.0, 1.5, 1.51, 2.0, 3.0, 5.0]
    kernels = filter_kernels(blurs(sigmas), np.ones((len(sigmas), 2)))
    assert [len(kernel) for kernel in kernels] == [5, 5, 5, 7, 9, 15, 27]


@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.0, MAX_BLUR_SIGMA])
def test_a_strong_blur_has_the_deviation_asked_for(sigma):
    (kernel,) = filter_kernels(blurs([sigma]), np.ones((1, 2)))
    np.testing.assert_allclose(kernel.sum(), 1.0, rtol=1e-5)
    assert 0.92 * sigma < deviation(kernel) <= sigma


def test_a_strong_blur_through_the_pipeline_is_opencvs_gaussian():
    rng = np.random.default_rng(0)
    images = [cv2.resize(rng.integers(0, 256, (6, 18, 3), dtype=np.uint8), (128, 32)) for _ in range(4)]
    sigmas = [2.0, 3.0, 4.0, 5.0]
    program = make_program(blurs(sigmas), np.full(4, 32), np.full(4, 128))
    _, guidance = run_programs([png(image) for image in images], program)
    literal = [
        cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
        for image, sigma in zip(images, sigmas, strict=True)
    ]
    assert psnr(as_bytes(guidance), np.stack(literal)).min() > 35.0


def test_kernels_of_mixed_strengths_do_not_feel_their_batch():
    parameters = draw(200, blur_sigma=(0.2, MAX_BLUR_SIGMA))
    scale = np.random.default_rng(0).uniform(1.0, 8.0, (200, 2))
    together = filter_kernels(parameters, scale)
    assert max(len(kernel) for kernel in together) == 29  # the strongest blur, sharpened
    for row in range(200):
        (alone,) = filter_kernels(parameters.take(slice(row, row + 1)), scale[row : row + 1])
        np.testing.assert_array_equal(alone, together[row])
    sums = [kernel.sum(dtype=np.float64) for kernel in together]
    np.testing.assert_allclose(sums, filter_gains(parameters), rtol=1e-4)


def test_strong_blurs_of_tiny_crops_work():
    images = [np.full(size, 90, np.uint8) for size in ((1, 1, 3), (1, 40, 3), (30, 1, 3), (2, 3, 3))]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    _, guidance = run_programs(
        [png(image) for image in images], make_program(blurs([5.0] * 4), heights, widths)
    )
    assert abs(as_bytes(guidance).astype(int) - 90).max() <= 1


def test_a_sharpening_that_removes_all_brightness_gives_finite_colours():
    parameters = only(draw(8, sharpen_alpha=(1.0, 1.0), sharpen_lightness=(0.0, 0.0)), [Operation.SHARPEN])
    program = make_program(parameters, np.full(8, 20), np.full(8, 60))
    _, guidance = run_programs([png(np.full((20, 60, 3), 77, np.uint8))] * 8, program)
    assert torch.isfinite(guidance).all()
    assert (as_bytes(guidance) == 0).all()  # the edges of a flat crop
