"""The colour pass over both views: its stages one by one, and that an image never feels its batch."""

import dataclasses

import pytest
import torch

from lmim_fast.ops.photometric import LUMA, ColorProgram, photometric


def bytes_image(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 32, 128, 3), dtype=torch.uint8, generator=generator)


def identity(batch=3, **fields):
    """A program that changes nothing but `fields`."""
    same = torch.cat((torch.eye(3), torch.zeros(3, 1)), dim=1).expand(batch, 3, 4)
    program = ColorProgram(
        before=same,
        threshold=torch.full((batch,), 256.0),
        invert_above=torch.ones(batch, dtype=torch.bool),
        after=same,
        coverage=torch.full((batch, 32, 128), 255, dtype=torch.uint8),
        border=torch.zeros(batch, 3),
        contrast=torch.ones(batch),
        final=same,
    )
    return dataclasses.replace(program, **fields)


def random_program(batch=5):
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    def matrices():
        return torch.cat((torch.eye(3) + 0.5 * rand(batch, 3, 3), 40 * rand(batch, 3, 1) - 20), dim=2)

    return ColorProgram(
        before=matrices(),
        threshold=32 + 96 * rand(batch),
        invert_above=rand(batch) < 0.5,
        after=matrices(),
        coverage=(rand(batch, 32, 128) * 256).byte(),
        border=255 * rand(batch, 3),
        contrast=0.6 + 0.8 * rand(batch),
        final=matrices(),
    )


def values(view):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) in 0..255."""
    return (view.permute(0, 2, 3, 1).double() + 1) * 127.5


def apply(matrix, value):
    result = (
        torch.einsum("bij,bhwj->bhwi", matrix[:, :, :3].double(), value)
        + matrix[:, None, None, :, 3].double()
    )
    return result.clamp(0, 255)


def test_both_views_are_normalised_as_released():
    image = bytes_image()
    plain, guidance = photometric(image, image, identity())
    expected = ((image.permute(0, 3, 1, 2).double() / 255) - 0.5) / 0.5
    assert plain.shape == (3, 3, 32, 128)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(guidance.double(), expected, rtol=0, atol=1e-6)


def test_the_plain_view_alone_equals_the_one_made_with_guidance():
    image = bytes_image()
    plain, guidance = photometric(image)
    assert guidance is None
    assert torch.equal(plain, photometric(image, image, identity())[0])


def test_whole_programs_equal_their_definition_in_double_precision():
    image, program = bytes_image(5), random_program(5)
    _, guidance = photometric(image, image, program)
    value = apply(program.before, image.double())
    threshold = program.threshold.double()[:, None, None, None]
    above = program.invert_above[:, None, None, None]
    value = torch.where(torch.where(above, value >= threshold, value < threshold), 255 - value, value)
    value = apply(program.after, value)
    share = program.coverage.double()[..., None] / 255
    value = share * value + (1 - share) * program.border.double()[:, None, None]
    mean = (value @ torch.tensor(LUMA, dtype=torch.float64)).mean(dim=(1, 2))[:, None, None, None]
    contrast = program.contrast.double()[:, None, None, None]
    value = apply(program.final, (contrast * value + (1 - contrast) * mean).clamp(0, 255))
    error = (values(guidance) - value).abs()
    assert (error > 1e-2).double().mean() < 1e-4  # fp32 may fall on the other side of a threshold
    assert error.median() < 1e-4


@pytest.mark.parametrize("above", [True, False])
def test_solarize_inverts_the_threshold_itself_only_when_above(above):
    image = torch.full((1, 32, 128, 3), 100, dtype=torch.uint8)
    program = identity(1, threshold=torch.tensor([100.0]), invert_above=torch.tensor([above]))
    assert values(photometric(image, image, program)[1]).round().unique().tolist() == [
        155.0 if above else 100.0
    ]


def test_contrast_keeps_the_mean_gray():
    image = (bytes_image() // 2 + 60).byte()  # far from clamping
    _, guidance = photometric(image, image, identity(contrast=torch.tensor([0.6, 1.0, 1.2])))
    gray_weights = torch.tensor(LUMA, dtype=torch.float64)
    before, after = image.double() @ gray_weights, values(guidance) @ gray_weights
    torch.testing.assert_close(after.mean(dim=(1, 2)), before.mean(dim=(1, 2)), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        after.std(dim=(1, 2)) / before.std(dim=(1, 2)), torch.tensor([0.6, 1.0, 1.2]).double()
    )


def test_an_uncovered_pixel_has_the_border_colour():
    image = bytes_image()
    coverage = torch.zeros(3, 32, 128, dtype=torch.uint8)
    border = torch.tensor([[10.0, 20.0, 30.0]]).expand(3, 3)
    _, guidance = photometric(image, image, identity(coverage=coverage, border=border))
    expected = border.double()[:, None, None].expand(3, 32, 128, 3)
    torch.testing.assert_close(values(guidance), expected, rtol=0, atol=1e-4)


def test_an_image_comes_out_bit_equal_in_any_batch_and_thread_count():
    image, program = bytes_image(5), random_program(5)
    plain, guidance = photometric(image, image, program)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(1, 4), slice(2, 5), slice(4, 5)):
                part = photometric(image[rows], image[rows], program.take(rows))
                assert torch.equal(part[0], plain[rows])
                assert torch.equal(part[1], guidance[rows])
    finally:
        torch.set_num_threads(threads)


def test_low_precision_is_the_rounded_fp32_result():
    image, program = bytes_image(5), random_program(5)
    full = photometric(image, image, program)
    low = photometric(image, image, program, dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(full, low, strict=True))


def test_inputs_stay_as_they_were_and_may_be_strided():
    image, program = bytes_image(), identity()
    before = image.clone()
    strided = torch.stack((image, image), dim=-1)[..., 0]
    assert torch.equal(photometric(strided, strided, program)[1], photometric(image, image, program)[1])
    assert torch.equal(image, before)


def test_an_empty_batch_gives_empty_views():
    image = bytes_image(3)[:0]
    plain, guidance = photometric(image, image, identity(0))
    assert plain.shape == guidance.shape == (0, 3, 32, 128)


@pytest.mark.parametrize(
    ("plain", "warped", "program", "message"),
    [
        (bytes_image().float(), None, None, "plain must be"),
        (bytes_image()[0], None, None, "plain must be"),
        (bytes_image(), bytes_image(), None, "belong together"),
        (bytes_image(), None, identity(), "belong together"),
        (bytes_image(), bytes_image(2), identity(), "warped must be"),
        (bytes_image(), bytes_image(), identity(2), r"program.before must be \(3, 3, 4\)"),
        (bytes_image(), bytes_image(), identity(coverage=torch.zeros(3, 4, 4)), "program.coverage"),
    ],
)
def test_wrong_input_is_refused_by_name(plain, warped, program, message):
    with pytest.raises(ValueError, match=message):
        photometric(plain, warped, program)
