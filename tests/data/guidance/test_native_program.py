"""The programs made in C++ against those made in NumPy."""

import dataclasses
import os
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_threads import other_threads_run_during

from lmim_fast import _C
from lmim_fast.config import GuidanceConfig
from lmim_fast.data.guidance.parameters import Operation, sample_parameters
from lmim_fast.data.guidance.program import make_program, program_in_numpy
from lmim_fast.native import native

STRONG = GuidanceConfig(
    blur_sigma=(0.3, 5.0),
    sharpen_alpha=(0.0, 1.0),
    sharpen_lightness=(0.0, 2.0),
    crop_vertical=(0.0, 0.4),
    crop_horizontal=(0.0, 0.4),
    rotate_degrees=(-90.0, 90.0),
    piecewise_scale=(0.0, 0.2),
    perspective_scale=(0.0, 0.2),
    jitter=(1.0, 1.0, 1.0, 0.5),
)
CONFIGS = {
    "paper": GuidanceConfig(),
    "strong": STRONG,
    "all operations": GuidanceConfig(min_operations=10),
    "none": GuidanceConfig(max_operations=0, min_operations=0),
}


def drawn(seed, batch, config="paper"):
    indices = torch.arange(batch)
    return sample_parameters(CONFIGS[config], seed, torch.zeros_like(indices), indices)


def crop_sizes(seed, batch, low=8, high=600):
    return np.random.default_rng(seed).integers(low, high, (2, batch)).astype(np.int32)


def parts(program):
    """Name -> array of everything the pipeline reads."""
    colors = {item.name: getattr(program.color, item.name) for item in dataclasses.fields(program.color)}
    arrays = {name: value.numpy() for name, value in colors.items()}
    return arrays | {name: getattr(program, name) for name in ("working_size", "map_x", "map_y")}


def assert_equal(left, right):
    for (name, a), (_, b) in zip(parts(left).items(), parts(right).items(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for a, b in zip(left.kernels, right.kernels, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(native_form, numpy_form, pixels):
    """`pixels`: how far maps may be apart."""
    expected = parts(numpy_form)
    for name, actual in parts(native_form).items():
        assert actual.dtype == expected[name].dtype, name
        assert actual.shape == expected[name].shape, name
        if name == "coverage":
            difference = np.abs(actual.astype(int) - expected[name].astype(int))
            assert difference.max(initial=0) <= 1
        else:
            tolerance = {"map_x": pixels, "map_y": pixels}.get(name, 1e-5)
            np.testing.assert_allclose(actual, expected[name], rtol=1e-6, atol=tolerance, err_msg=name)
    for ours, theirs in zip(native_form.kernels, numpy_form.kernels, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def both(seed, batch, config, sizes, image_size=(32, 128)):
    parameters = drawn(seed, batch, config)
    heights, widths = sizes
    in_numpy = program_in_numpy(parameters, np.stack(sizes, axis=1).astype(np.float64), image_size)
    return make_program(parameters, heights, widths, image_size), in_numpy


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**63),
    config=st.sampled_from(sorted(CONFIGS)),
    image_size=st.sampled_from([(32, 128), (33, 101), (1, 1), (48, 160), (7, 200), (64, 63)]),
)
def test_native_programs_equal_those_in_numpy_at_every_seed(seed, config, image_size):
    sizes = crop_sizes(seed % 2**32, 24)
    # Strong views look far outside the crop, where fp32 has fewer digits.
    assert_close(*both(seed, 24, config, sizes, image_size), pixels=1e-3 if config == "strong" else 1e-4)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63))
def test_native_programs_of_crops_of_a_few_pixels_equal_those_in_numpy(seed):
    # A rotated line of one pixel's height lies on a canvas a hundred times higher.
    sizes = crop_sizes(seed % 2**32, 24, 1, 6)
    sizes[1, ::2] *= 100
    assert_close(*both(seed, 24, "paper", sizes), pixels=1e-3)


@pytest.mark.parametrize("operation", list(Operation))
def test_each_operation_alone_equals_that_in_numpy(operation):
    parameters = drawn(3, 32)
    order = np.full_like(parameters.order, -1)
    order[:, 0] = operation
    parameters = dataclasses.replace(parameters, order=order)
    heights, widths = crop_sizes(3, 32)
    in_numpy = program_in_numpy(parameters, np.stack((heights, widths), axis=1).astype(float), (32, 128))
    assert_close(make_program(parameters, heights, widths), in_numpy, pixels=1e-4)


def test_programs_do_not_depend_on_threads_or_batch():
    parameters, (heights, widths) = drawn(5, 67), crop_sizes(5, 67)
    alone = make_program(parameters, heights, widths)
    for threads in (1, 2, 5, 16):
        workers = _C.Workers(threads)
        for _ in range(5):
            assert_equal(make_program(parameters, heights, widths, workers=workers), alone)
    for row in (0, 1, 66):
        rows = slice(row, row + 1)
        single = make_program(parameters.take(rows), heights[rows], widths[rows])
        for name, values in parts(single).items():
            np.testing.assert_array_equal(values[0], parts(alone)[name][row], err_msg=name)
        np.testing.assert_array_equal(next(iter(single.kernels)), list(alone.kernels)[row])


def test_an_empty_batch_has_an_empty_program():
    none = np.zeros(0, np.int32)
    program = make_program(drawn(0, 0), none, none)
    assert program.map_x.shape == (0, 32, 128)
    assert len(program.kernels) == 0


def test_other_threads_run_while_programs_are_made():
    parameters, (heights, widths) = drawn(1, 4096), crop_sizes(1, 4096)
    assert other_threads_run_during(lambda: make_program(parameters, heights, widths))


def test_a_forked_child_makes_programs_without_its_parents_threads():
    parameters, (heights, widths) = drawn(2, 40), crop_sizes(2, 40)
    workers = _C.Workers(3)
    expected = make_program(parameters, heights, widths, workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            assert_equal(make_program(parameters, heights, widths, workers=workers), expected)
            del workers
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_workers_end_with_their_object():
    before = len(os.listdir("/proc/self/task"))
    workers = _C.Workers(7)
    assert workers.threads == 7
    assert len(os.listdir("/proc/self/task")) == before + 6
    del workers
    assert len(os.listdir("/proc/self/task")) == before
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        _C.Workers(0)


def test_two_callers_share_a_team():
    parameters, (heights, widths) = drawn(7, 200), crop_sizes(7, 200)
    expected = make_program(parameters, heights, widths)
    workers, results = _C.Workers(2), []
    callers = [
        threading.Thread(
            target=lambda: results.extend(
                make_program(parameters, heights, widths, workers=workers) for _ in range(20)
            )
        )
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 60
    for result in results:
        assert_equal(result, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order=np.zeros((3, 10), np.int64)), "order has the wrong shape for 4 samples"),
        (dict(piecewise=np.zeros((4, 4, 2))), "piecewise has the wrong shape for 4 samples"),
        (dict(jitter_factors=np.zeros((4, 5))), "jitter_factors has the wrong shape for 4 samples"),
    ],
)
def test_arrays_of_another_shape_are_refused(change, message):
    class Changed:
        """Parameters whose arrays do not fit each other."""

    parameters, (heights, widths) = drawn(0, 4), crop_sizes(0, 4)
    program = make_program(parameters, heights, widths)
    changed = Changed()
    changed.__dict__.update(vars(parameters) | change)
    colors = {item.name: getattr(program.color, item.name) for item in dataclasses.fields(program.color)}
    with pytest.raises(ValueError, match=message):
        _C.guidance_programs(
            changed,
            heights,
            widths,
            program.working_size,
            program.map_x,
            program.map_y,
            **{name: value.numpy() for name, value in colors.items()},
        )


def test_a_default_device_does_not_matter():
    parameters, (heights, widths) = drawn(4, 8), crop_sizes(4, 8)
    expected = make_program(parameters, heights, widths)
    with torch.device("meta"):
        assert_equal(make_program(parameters, heights, widths), expected)


def test_without_the_native_form_numpy_makes_the_program(monkeypatch):
    parameters, (heights, widths) = drawn(4, 8), crop_sizes(4, 8)
    monkeypatch.setitem(sys.modules, "lmim_fast._C", None)  # makes the import fail
    native.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"lmim_fast._C is not built"):
            actual = make_program(parameters, heights, widths)
    finally:
        native.cache_clear()
    sizes = np.stack((heights, widths), axis=1).astype(np.float64)
    assert_equal(actual, program_in_numpy(parameters, sizes, (32, 128)))
