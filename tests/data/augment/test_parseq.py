"""PARSeq's augmentation: its draws, and how near its program comes to PIL's operations."""

import dataclasses

import numpy as np
import pytest
import torch
from augment_views import difference, keys, smooth_crops, views
from crop_views import crops, png
from reference_parseq import OPERATIONS, reference_parseq

from lmim_fast.config import AugmentConfig
from lmim_fast.data.augment.parseq import GEOMETRY, Operation, sample_parseq
from lmim_fast.data.augment.program import make_augment_program

CONFIG = AugmentConfig(kind="parseq")


def draw(count, *, config=CONFIG, **options):
    return sample_parseq(config, *keys(count, **options))


def only(parameters, operation):
    """The same directions with one operation."""
    order = np.full_like(parameters.order, -1)
    order[:, 0] = operation
    return dataclasses.replace(parameters, order=order)


@pytest.fixture(scope="module")
def sources(real_crops):
    return crops(real_crops, ["train/IC15_train", "train/IIIT5K_train", "train/SVT_train"], 96)


def test_four_thousand_draws_apply_each_operation_equally_often():
    parameters = draw(4000)
    assert parameters.order.shape == (4000, 3)
    applied = parameters.order >= 0
    assert abs(np.bincount(applied.sum(axis=1)) / 4000 - np.array([1, 3, 3, 1]) / 8).max() < 0.03
    for place in range(3):
        kinds = np.bincount(parameters.order[applied[:, place], place], minlength=16) / 4000
        assert abs(kinds - 1 / 32).max() < 0.01
    assert abs(parameters.sign.mean(axis=0)).max() < 0.05
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in parameters.order)  # each at most once


def test_draws_are_each_image_s_own_and_change_with_epoch_and_seed():
    parameters, one = draw(64), draw(1, first=17)
    np.testing.assert_array_equal(one.order[0], parameters.order[17])
    np.testing.assert_array_equal(one.sign[0], parameters.sign[17])
    assert len({tuple(row) for row in parameters.order}) > 32
    assert (draw(64, epoch=1).order != parameters.order).any(axis=1).mean() > 0.7
    assert (draw(64, seed=2).order != parameters.order).any(axis=1).mean() > 0.7


def test_number_and_probability_of_operations_are_configurable():
    config = dataclasses.replace(CONFIG, operations=16, operation_probability=1.0)
    assert (np.sort(draw(20, config=config).order, axis=1) == np.arange(16)).all()
    none = draw(20, config=dataclasses.replace(CONFIG, operations=0))
    assert none.order.shape == (20, 0)
    assert views(none, smooth_crops(20)).shape == (20, 32, 128, 3)


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 5.0, 10.0])
def test_strengths_at_any_magnitude_are_the_literal_ones(magnitude):
    config = dataclasses.replace(CONFIG, magnitude=magnitude, operations=1)
    parameters = draw(16, config=config)
    parameters = dataclasses.replace(parameters, order=(np.arange(16) % 15)[:, None])  # all but the noise
    result = difference(parameters, smooth_crops(16), reference_parseq)
    thresholds = [Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD]
    result[thresholds] /= 2  # before the resize they leave slopes, behind it none
    assert result.max() < 2.0, result


# Largest mean absolute difference of smooth crops, in bytes, where it is more than 0.7.
SMOOTH = {
    Operation.ROTATE: 1.1,
    Operation.SHEAR_Y: 1.1,
    Operation.EQUALIZE: 2.0,
    Operation.POSTERIZE: 5.5,  # a resize before it or after it: steps stay steps, or get slopes
    Operation.SOLARIZE_ADD: 2.4,
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name.lower())
def test_each_operation_on_smooth_crops_is_the_literal_one(operation):
    result = difference(only(draw(24), operation), smooth_crops(24), reference_parseq)
    assert result.max() < SMOOTH.get(operation, 0.7), result


RESAMPLE = (*GEOMETRY, Operation.GAUSSIAN_BLUR)


@pytest.mark.parametrize(
    "operation",
    [one for one in OPERATIONS if one not in RESAMPLE],
    ids=lambda operation: operation.name.lower(),
)
def test_each_operation_on_bytes_of_the_view_s_size_is_the_literal_one(operation):
    rng = np.random.default_rng(0)
    noise = [rng.integers(20, 220, (32, 128, 3)) for _ in range(16)]
    images = [(image * np.array([1.0, 0.8, 0.5])).astype(np.uint8) for image in noise]
    images[0][:] = 77  # one value: nothing to stretch
    result = difference(
        only(draw(16), operation), [(png(image), image) for image in images], reference_parseq
    )
    assert result.max() < 0.1, result


# Median mean absolute difference on real crops, in bytes, where it is more than 3. Extremes, histograms and
# thresholds of the crop are not those of the resized view.
REAL = {
    Operation.AUTO_CONTRAST: 5.5,
    Operation.EQUALIZE: 9.5,
    Operation.POSTERIZE: 7.5,
    Operation.SOLARIZE_ADD: 4.5,
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name.lower())
def test_each_operation_on_real_crops_is_near_the_literal_one(operation, sources):
    result = difference(only(draw(len(sources)), operation), sources, reference_parseq)
    assert np.median(result) < REAL.get(operation, 3.0), (np.median(result), result.max())


def test_whole_views_of_real_crops_are_near_the_literal_ones(sources):
    parameters = draw(len(sources))
    order = np.where(parameters.order == Operation.POISSON_NOISE, -1, parameters.order)
    result = difference(dataclasses.replace(parameters, order=order), sources, reference_parseq)
    assert np.median(result) < 3.7, (np.median(result), result.max())


@pytest.mark.parametrize("size", [(32, 128), (64, 256)], ids=str)
def test_noise_is_as_strong_as_the_literal_one(size):
    parameters = only(draw(24), Operation.POISSON_NOISE)
    image = np.full((*size, 3), 120, np.uint8)
    ours = views(parameters, [(png(image), image)] * 24).astype(float)
    literal = np.stack([reference_parseq(image, parameters, row, noise=True) for row in range(24)])
    assert abs(ours.mean() - 120) < 0.5
    assert abs(ours.std() / literal.std() - 1) < 0.25, (ours.std(), literal.std())
    assert (ours[..., 0] == ours[..., 2]).all()  # one number for the three colours
    assert (ours[0] != ours[1]).any()


def test_views_of_odd_sizes_look_inside_the_crop():
    sizes = [(1, 1), (1, 400), (300, 1), (2, 2), (7, 3000), (2000, 9)] * 30
    heights, widths = np.array(sizes).T
    program = make_augment_program(draw(len(sizes)), keys(len(sizes)), heights, widths)
    for values, last in (
        (program.map_x, program.working_size[:, 1]),
        (program.map_y, program.working_size[:, 0]),
    ):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert (values <= last[:, None, None] - 1).all()
    finished = program.finish(torch.full((len(sizes), 32, 128, 3), 90, dtype=torch.uint8))
    assert finished.shape == (len(sizes), 32, 128, 3)
