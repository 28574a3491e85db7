"""Views made in C++ from decoded crops against those of DALI's operators and OpenCV."""

import warnings

import cv2
import numpy as np
import pytest
import torch
from crop_views import png
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_fast import _C
from lmim_fast.config import AugmentConfig, GuidanceConfig
from lmim_fast.data import dali
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.program import make_augment_program, sample_augmentation
from lmim_fast.data.dali import DaliViews, Stage
from lmim_fast.data.guidance.kernels import Kernels
from lmim_fast.data.guidance.parameters import sample_parameters
from lmim_fast.data.guidance.program import make_program

IDENTITY = Kernels.of([np.ones((1, 1), np.float32)])


def crop(seed, height, width):
    """A photograph-like crop: smooth, with edges and some noise."""
    generator = np.random.default_rng(seed)
    image = cv2.resize(generator.uniform(0, 255, (4, 7, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    image = image.reshape(height, width, 3)
    image[:, width // 3 : width // 2] = generator.uniform(0, 255, 3)
    return np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def batch(seed, count):
    generator = np.random.default_rng(seed)
    heights, widths = generator.integers(8, 90, count), generator.integers(12, 300, count)
    heights[0], widths[0] = 200, 700  # is shrunk
    heights[1], widths[1] = 1, 40
    heights[2], widths[2] = 40, 1
    crops = [crop(seed + n, *size) for n, size in enumerate(zip(heights, widths, strict=True))]
    return crops, heights.astype(np.int32), widths.astype(np.int32)


def by_dali(stage, crops, program, monkeypatch, image_size=(32, 128)):
    with monkeypatch.context() as patch:
        patch.setattr(dali, "native", lambda: None)
        return made(stage, crops, program, image_size)


def made(stage, crops, program, image_size=(32, 128), threads=2):
    views = DaliViews(
        batch_size=len(crops), threads=threads, device=torch.device("cpu"), image_size=image_size, stage=stage
    )
    try:
        return [view.clone() for view in views([png(image) for image in crops], program)]
    finally:
        views.close()


def assert_near(left, right, most):
    difference = (left.int() - right.int()).abs()
    assert difference.max() <= most
    assert (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("image_size", [(32, 128), (48, 160), (31, 97)])
def test_both_views_are_those_of_dali(image_size, monkeypatch):
    crops, heights, widths = batch(1, 40)
    indices = torch.arange(40)
    strong = GuidanceConfig(blur_sigma=(0.5, 3.0))
    parameters = sample_parameters(strong, 0, torch.zeros_like(indices), indices)
    program = make_program(parameters, heights, widths, image_size)
    plain, warped = made(Stage.WARP, crops, program, image_size)
    expected = by_dali(Stage.WARP, crops, program, monkeypatch, image_size)
    assert_near(plain, expected[0], 1)
    assert_near(warped, expected[1], 3)


def test_the_plain_view_alone_is_the_one_beside_the_guidance_view():
    crops, heights, widths = batch(2, 12)
    indices = torch.arange(12)
    parameters = sample_parameters(GuidanceConfig(), 0, torch.zeros_like(indices), indices)
    both = made(Stage.WARP, crops, make_program(parameters, heights, widths))
    (alone,) = made(Stage.PLAIN, crops, None)
    assert torch.equal(alone, both[0])


@pytest.mark.parametrize("kind", ["abinet", "parseq"])
def test_augmented_views_are_those_of_dali(kind, monkeypatch):
    crops, heights, widths = batch(3, 40)
    indices = torch.arange(40)
    keys = Keys(0, torch.zeros_like(indices), indices)
    parameters = sample_augmentation(AugmentConfig(kind=kind), keys)
    program = make_augment_program(parameters, keys, heights, widths)
    (view,) = made(Stage.AUGMENT, crops, program)
    (expected,) = by_dali(Stage.AUGMENT, crops, program, monkeypatch)
    assert_near(view, expected, 3)


def test_views_do_not_depend_on_threads_or_batch():
    crops, heights, widths = batch(4, 33)
    indices = torch.arange(33)
    parameters = sample_parameters(GuidanceConfig(), 0, torch.zeros_like(indices), indices)
    program = make_program(parameters, heights, widths)
    expected = made(Stage.WARP, crops, program, threads=1)
    for threads in (2, 7):
        for view, same in zip(made(Stage.WARP, crops, program, threads=threads), expected, strict=True):
            assert torch.equal(view, same)
    for row in (0, 1, 32):
        rows = slice(row, row + 1)
        alone = make_program(parameters.take(rows), heights[rows], widths[rows])
        for view, same in zip(made(Stage.WARP, crops[rows], alone), expected, strict=True):
            assert torch.equal(view[0], same[row])


def warped(image, map_x, map_y, kernels=IDENTITY):
    view = np.empty((1, *map_x.shape, 3), np.uint8)
    size = np.array([image.shape[:2]], np.float32)
    _C.make_warped_views([image], size, kernels.sides, kernels.taps, map_x[None], map_y[None], view)
    return view[0]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 20),
    width=st.integers(1, 30),
    side=st.sampled_from([1, 3, 5, 7, 27]),
)
def test_filter_and_warp_are_those_of_opencv_on_any_crop(seed, height, width, side):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), np.uint8)
    kernel = generator.uniform(-0.1, 1.0, (side, side)).astype(np.float32)
    kernel /= kernel.sum() or 1.0
    map_x = generator.uniform(0, width - 1, (5, 9)).astype(np.float32)
    map_y = generator.uniform(0, height - 1, (5, 9)).astype(np.float32)
    radius = side // 2
    padded = image.astype(float)
    for axis in (0, 1):
        places = np.arange(-radius, image.shape[axis] + radius)
        last = image.shape[axis] - 1
        places = np.abs(places) % (2 * last) if last else np.zeros_like(places)
        padded = np.take(padded, np.where(places > last, 2 * last - places, places), axis=axis)
    filtered = np.zeros(image.shape)
    for row in range(side):
        for column in range(side):
            filtered += kernel[row, column] * padded[row : row + height, column : column + width].astype(
                float
            )
    filtered = np.floor(np.clip(filtered, 0, 255) + 0.5)
    expected = cv2.remap(
        filtered.astype(np.float32), map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    actual = warped(image, map_x, map_y, Kernels.of([kernel]))
    # OpenCV rounds places to 1/32 pixel; a filtered value may be rounded to either side.
    assert np.abs(actual - expected.reshape(actual.shape)).max() <= 255 / 32 + 1.5


def test_a_map_that_leaves_the_crop_or_is_no_number_reads_the_crop_alone():
    image = np.full((3, 4, 3), 200, np.uint8)
    strange = np.array([[np.nan, np.inf, -np.inf, 1e30, -1e30, -5.0, 99.0, 0.5]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (warped(image, strange, strange) == 200).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sides=np.array([2])), "side must be odd"),
        (dict(sides=np.array([3])), "sides do not fit their taps"),
        (dict(sides=np.array([1, 1])), "one kernel for each crop"),
        (dict(working=np.zeros((1, 2), np.float32)), r"working sizes must be in \[1, 65536\]"),
        (dict(working=np.full((1, 2), np.nan, np.float32)), r"working sizes must be in \[1, 65536\]"),
        (dict(map_x=np.zeros((1, 5, 6), np.float32)), r"maps must be \(B, H, W\)"),
        (dict(crops=[np.zeros((3, 4), np.uint8)]), r"a crop must be \(height, width, 3\) uint8"),
        (dict(crops=[np.zeros((3, 4, 3), np.float32)]), r"a crop must be \(height, width, 3\) uint8"),
        (dict(crops=[]), r"warped must be \(B, H, W, 3\) for 0 crops"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    maps = np.zeros((1, 5, 7), np.float32)
    arguments = dict(
        crops=[np.zeros((3, 4, 3), np.uint8)],
        working=np.array([[3, 4]], np.float32),
        sides=IDENTITY.sides,
        taps=IDENTITY.taps,
        map_x=maps,
        map_y=maps,
        warped=np.zeros((1, 5, 7, 3), np.uint8),
    )
    with pytest.raises(ValueError, match=message):
        _C.make_warped_views(**(arguments | change))
