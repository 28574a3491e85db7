"""Colours in C++ against the eager form: the same bits, for every program, size and batch."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_threads import other_threads_run_during
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lmim_fast.native import native
from lmim_fast.ops import dispatch
from lmim_fast.ops import photometric as module
from lmim_fast.ops.photometric import ColorProgram, photometric

pytest.importorskip("lmim_fast._C", reason="lmim_fast._C is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Arguments = tuple[Tensor, Tensor, ColorProgram]


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMIM_FAST_BACKEND", raising=False)


def inputs(batch: int, height: int = 32, width: int = 128, seed: int = 0, strength: float = 0.5) -> Arguments:
    """Random images and programs; every second threshold is a value that a pixel has."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def images(*shape: int) -> Tensor:
        return (256 * rand(batch, height, width, *shape)).byte()

    def matrices() -> Tensor:
        matrix = torch.eye(3) + strength * (2 * rand(batch, 3, 3) - 1)
        return torch.cat((matrix, 160 * strength * (rand(batch, 3, 1) - 0.5)), dim=2)

    warped, before, threshold = images(3), matrices(), 32 + 96 * rand(batch)
    seen = module._affine(before, module._planes(warped)).flatten(1)
    if seen.numel():
        threshold[::2] = seen[::2, int(seed % seen.shape[1])]
    program = ColorProgram(
        before=before,
        threshold=threshold,
        invert_above=rand(batch) < 0.5,
        after=matrices(),
        coverage=images(),
        border=255 * rand(batch, 3),
        contrast=2 * rand(batch),
        final=matrices(),
    )
    return images(3), warped, program


def eager(*arguments: object, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    with dispatch.backend("eager"):
        return photometric(*arguments, dtype=dtype)  # type: ignore[arg-type]


def assert_equal(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is None or two is None:
            continue
        assert (one.shape, one.dtype, one.is_contiguous()) == (two.shape, two.dtype, True)
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60)
@given(
    batch=st.sampled_from((0, 1, 3)),
    height=st.integers(1, 40),
    width=st.integers(1, 140),
    seed=st.integers(0, 2**32),
    strength=st.sampled_from((0.0, 0.1, 0.5, 3.0)),
    dtype=st.sampled_from(DTYPES),
)
def test_views_have_the_bits_of_the_eager_form(
    batch: int, height: int, width: int, seed: int, strength: float, dtype: torch.dtype
) -> None:
    arguments = inputs(batch, height, width, seed, strength)
    with mock.patch.object(module, "_eager", side_effect=AssertionError("the eager form ran")):
        found = photometric(*arguments, dtype=dtype)
    assert_equal(found, eager(*arguments, dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_training_batch_has_the_bits_of_the_eager_form(dtype: torch.dtype) -> None:
    arguments = inputs(64)
    assert_equal(photometric(*arguments, dtype=dtype), eager(*arguments, dtype=dtype))
    assert_equal(photometric(arguments[0], dtype=dtype), eager(arguments[0], dtype=dtype))


@pytest.mark.parametrize("above", [True, False])
def test_every_byte_is_solarized_as_by_the_eager_form(above: bool) -> None:
    plain, _, program = inputs(256, 4, 64)
    warped = torch.arange(256, dtype=torch.uint8).view(1, 4, 64, 1).expand(256, 4, 64, 3)
    same = torch.eye(3, 4).expand(256, 3, 4)
    program = dataclasses.replace(
        program,
        before=same,
        threshold=torch.arange(256.0),
        invert_above=torch.full((256,), above),
        after=same,
        coverage=torch.full_like(program.coverage, 255),
        contrast=torch.ones(256),
        final=same,
    )
    found, expected = photometric(plain, warped, program), eager(plain, warped, program)
    assert_equal(found, expected)
    assert found[1] is not None
    bytes_ = (found[1] + 1).mul(127.5).round()[:, 0].flatten(1)
    value, threshold = torch.arange(256.0)[None], torch.arange(256.0)[:, None]
    assert torch.equal(bytes_, torch.where((value >= threshold) == above, 255 - value, value))


def test_what_is_not_a_number_stays_none() -> None:
    plain, warped, program = inputs(5)
    for name in ("before", "threshold", "after", "contrast", "final"):
        broken = getattr(program, name).clone()
        broken[2] = torch.nan
        arguments = (plain, warped, dataclasses.replace(program, **{name: broken}))
        for dtype in DTYPES:
            assert_equal(photometric(*arguments, dtype=dtype), eager(*arguments, dtype=dtype))


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    plain, warped, program = inputs(9, 5, 77)
    whole = photometric(plain, warped, program)
    for rows in (slice(0, 1), slice(3, 8), slice(8, 9)):
        part = photometric(plain[rows], warped[rows], program.take(rows))
        assert_equal(part, (whole[0][rows], whole[1][rows] if whole[1] is not None else None))


def test_strided_images_and_expanded_programs_are_read_as_they_are() -> None:
    plain, warped, program = inputs(3, 7, 9)
    strided = torch.stack((warped, warped), dim=-1)[..., 0]
    shifted = torch.zeros(plain.numel() + 1, dtype=torch.uint8)[1:].view(plain.shape).copy_(plain)
    one = dataclasses.replace(program, final=program.final[:1].expand(3, 3, 4))
    assert_equal(photometric(shifted, strided, one), eager(plain, warped, one))


@pytest.mark.parametrize("how", ["block", "variable"])
def test_the_eager_form_runs_where_it_is_asked_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_native", mock.Mock(side_effect=AssertionError("the C++ form ran")))
    if how == "block":
        eager(*inputs(1))
        return
    monkeypatch.setenv("LMIM_FAST_BACKEND", "eager")
    photometric(*inputs(1))


def test_the_eager_form_runs_where_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(2)
    expected = photometric(*arguments)
    monkeypatch.setattr(module, "native", lambda: None)
    monkeypatch.setattr(module, "_native", mock.Mock(side_effect=AssertionError("the C++ form ran")))
    assert_equal(photometric(*arguments), expected)


def test_compiler_and_fake_tensors_see_the_eager_form() -> None:
    arguments = inputs(2, 4, 16)
    compiled = torch.compile(photometric, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*arguments), photometric(*arguments))
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = torch.empty(2, 4, 16, 3, dtype=torch.uint8)
        assert photometric(plain, dtype=torch.bfloat16)[0].shape == (2, 3, 4, 16)


def test_a_default_device_does_not_matter() -> None:
    arguments = inputs(2)
    expected = photometric(*arguments)
    with torch.device("meta"):
        assert_equal(photometric(*arguments), expected)


def test_a_program_that_wants_gradients_is_run_by_torch() -> None:
    plain, warped, program = inputs(2, 4, 16)
    program = dataclasses.replace(program, contrast=program.contrast.requires_grad_())
    assert_equal(photometric(plain, warped, program), eager(plain, warped, program))


def test_other_python_threads_run_meanwhile() -> None:
    arguments = inputs(512)
    views = np.empty((512, 3, 32, 128), np.float32)
    arrays = [tensor.numpy() for tensor in (arguments[1], *arguments[2].tensors())] + [views]
    assert other_threads_run_during(lambda: native().guidance_views(*arrays))


def test_arrays_of_other_shapes_and_kinds_are_refused() -> None:
    images, views = np.zeros((2, 4, 8, 3), np.uint8), np.zeros((2, 3, 4, 8), np.float32)
    with pytest.raises(ValueError, match="views does not have the shape"):
        native().plain_views(images, views[:1])
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\)"):
        native().plain_views(np.zeros((2, 4, 8, 4), np.uint8), views)
    with pytest.raises(TypeError):
        native().plain_views(images, views.astype(np.float64))
    with pytest.raises(TypeError):
        native().plain_views(images[:, ::2], views[:, :, ::2])
    fields = [tensor.numpy() for tensor in inputs(2, 4, 8)[2].tensors()]
    for place, name in enumerate(item.name for item in dataclasses.fields(ColorProgram)):
        short = [np.ascontiguousarray(field[:1]) if place == at else field for at, field in enumerate(fields)]
        with pytest.raises(ValueError, match=f"{name} does not have the shape"):
            native().guidance_views(images, *short, views)
