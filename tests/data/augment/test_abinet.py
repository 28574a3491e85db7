"""ABINet's augmentation: its draws, and how near its program comes to the literal operations."""

import dataclasses

import numpy as np
import pytest
from augment_views import difference, keys, smooth_crops, views
from crop_views import crops, png
from reference_abinet import reference_abinet

from lmim_fast.config import AugmentConfig
from lmim_fast.data.augment.abinet import Deterioration, Geometry, sample_abinet
from lmim_fast.data.augment.deterioration import noise_deviation
from lmim_fast.data.augment.program import make_augment_program

CONFIG = AugmentConfig()


def draw(count, **options):
    return sample_abinet(CONFIG, *keys(count, **options))


def only(parameters, *, geometry=None, deterioration=(), jitter=False):
    """The same draws with one kind of geometry, some parts of the deterioration, with or without colours."""
    count = len(parameters)
    nothing = dict(blur_length=Deterioration.MOTION_BLUR, halvings=Deterioration.RESCALE)
    changes = {
        name: getattr(parameters, name) if part in deterioration else np.full(count, 1 - place)
        for place, (name, part) in enumerate(nothing.items())
    }
    variance = parameters.variance if Deterioration.NOISE in deterioration else np.zeros(count)
    return dataclasses.replace(
        parameters,
        geometry=np.full(count, -1 if geometry is None else geometry),
        deterioration=np.full(count, bool(deterioration)),
        variance=variance,
        jitter=np.full(count, jitter),
        **changes,
    )


@pytest.fixture(scope="module")
def sources(real_crops):
    return crops(real_crops, ["train/IC15_train", "train/IIIT5K_train", "train/SVT_train"], 96)


def test_four_thousand_draws_have_the_recipe_s_frequencies_and_ranges():
    parameters = draw(4000)
    assert abs((parameters.geometry >= 0).mean() - 0.5) < 0.03
    kinds = np.bincount(parameters.geometry[parameters.geometry >= 0], minlength=3) / 4000
    assert abs(kinds - np.array([0.165, 0.165, 0.17])).max() < 0.02
    assert abs(parameters.deterioration.mean() - 0.25) < 0.03
    assert abs(parameters.jitter.mean() - 0.25) < 0.03
    assert abs(np.bincount(parameters.halvings) / 4000 - np.array([1, 2, 2, 2, 1]) / 8).max() < 0.03
    assert abs(np.bincount(parameters.deterioration_order[:, 0]) / 4000 - 1 / 3).max() < 0.03
    assert abs(parameters.angle.std() - 45 / 3) < 0.5  # Beta(4, 4) on (-1, 1) has a deviation of 1/3
    assert abs(parameters.angle).max() < 45
    assert abs(parameters.shear.std(axis=0) - np.array([15, 5])).max() < 0.5
    assert abs(parameters.corners.mean() - 0.25 / 5) < 0.002  # Beta(1, 4) has a mean of 1/5
    assert 0 <= parameters.corners.min() < parameters.corners.max() < 0.25
    assert 0.5 <= parameters.scale.min() < 0.51
    assert 1.99 < parameters.scale.max() <= 2.0
    assert set(parameters.variance) <= set(range(1, 20))
    assert set(parameters.blur_length) == {1, 2, 3, 4, 5}


def test_draws_are_each_image_s_own_and_change_with_epoch_and_seed():
    parameters = draw(64)
    assert len(set(parameters.angle)) == len(set(parameters.jitter_factors[:, 0])) == 64
    one = draw(1, first=17)
    for item in dataclasses.fields(parameters):
        np.testing.assert_array_equal(getattr(one, item.name)[0], getattr(parameters, item.name)[17])
    assert (draw(64, epoch=1).angle != parameters.angle).all()
    assert (draw(64, seed=2).angle != parameters.angle).all()


# Largest and median mean absolute difference, in bytes, of 24 smooth crops.
GEOMETRY = {Geometry.ROTATION: (0.7, 0.5), Geometry.AFFINE: (0.7, 0.5), Geometry.PERSPECTIVE: (0.7, 0.5)}


@pytest.mark.parametrize("kind", GEOMETRY, ids=lambda kind: kind.name.lower())
def test_geometry_of_smooth_crops_is_the_literal_one(kind):
    result = difference(only(draw(24), geometry=kind), smooth_crops(24), reference_abinet)
    assert (result.max(), np.median(result)) <= GEOMETRY[kind], result


# Median mean absolute difference on real crops, in bytes. The literal view resamples the crop several times.
REAL = {
    "rotation": (dict(geometry=Geometry.ROTATION), 2.0),
    "affine": (dict(geometry=Geometry.AFFINE), 2.8),
    "perspective": (dict(geometry=Geometry.PERSPECTIVE), 2.2),
    "motion_blur": (dict(deterioration=[Deterioration.MOTION_BLUR]), 2.0),
    "rescale": (dict(deterioration=[Deterioration.RESCALE]), 6.0),
    "jitter": (dict(jitter=True), 4.0),
}


@pytest.mark.parametrize("name", REAL)
def test_each_operation_on_real_crops_is_near_the_literal_one(name, sources):
    options, bound = REAL[name]
    result = difference(only(draw(len(sources)), **options), sources, reference_abinet)
    assert np.median(result) < bound, (np.median(result), result.max())


def test_whole_views_of_real_crops_are_near_the_literal_ones(sources):
    parameters = dataclasses.replace(draw(len(sources)), variance=np.zeros(len(sources)))
    result = difference(parameters, sources, reference_abinet)
    assert np.median(result) < 3.3, (np.median(result), result.max())


def test_motion_blur_is_the_literal_one_to_its_anchor():
    parameters = only(draw(24), deterioration=[Deterioration.MOTION_BLUR])
    parameters = dataclasses.replace(parameters, blur_length=np.arange(24) % 7 + 2)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 128, 3), dtype=np.uint8) for _ in range(24)]
    result = difference(parameters, [(png(image), image) for image in images], reference_abinet)
    assert result.max() < 1.0, result


@pytest.mark.parametrize("size", [(16, 64), (32, 128), (96, 384)], ids=str)
def test_noise_has_the_deviation_that_the_resize_leaves_of_it(size):
    count = 48
    parameters = only(draw(count), deterioration=[Deterioration.NOISE])
    parameters = dataclasses.replace(parameters, variance=np.full(count, 64.0))
    image = np.full((*size, 3), 120, np.uint8)
    ours = views(parameters, [(png(image), image)] * count).astype(float)
    assert abs(ours.mean() - 120) < 0.1
    literal = np.stack([reference_abinet(image, parameters, row, noise=True) for row in range(count)])
    if size[0] >= 32:  # where the crop is enlarged, the literal noise is smoothed, and ours stays white
        assert abs(ours.std() / literal.std() - 1) < 0.3, (ours.std(), literal.std())
    else:
        assert abs(ours.std() - 8.0) < 0.1
    assert (ours[0] != ours[1]).any()


def test_noise_before_blur_or_rescaling_is_weaker_than_after_it():
    parameters = draw(2)
    parameters = dataclasses.replace(
        parameters,
        deterioration=np.ones(2, bool),
        deterioration_order=np.array([[0, 1, 2], [1, 2, 0]]),
        variance=np.full(2, 16.0),
        blur_length=np.full(2, 4),
        blur_angle=np.zeros(2),
        halvings=np.full(2, 3),
    )
    deviation = noise_deviation(parameters, np.array([[32.0, 128.0]] * 2), (32, 128))
    np.testing.assert_allclose(deviation, [4.0 / 2.0 / 2.0, 4.0])


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
    assert (program.working_size >= 1).all()
    assert (program.working_size <= np.stack((heights, widths), axis=1)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("geometry_probability", 1.5), ("rotate_degrees", 95.0), ("scale", (0.0, 1.0)), ("rescale", 9)],
)
def test_values_that_make_no_sense_are_refused_with_their_value(name, value):
    with pytest.raises(ValueError, match=name):
        AugmentConfig(**{name: value})
