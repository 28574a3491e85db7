"""The kernel for both views against the eager form."""

import dataclasses

import pytest
import torch
from accuracy import CUDA, DEVICE, DTYPES
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.photometric import ColorProgram, photometric

# The last is larger than a block, and its last block is not full; the one before has no whole words.
SIZES = [(4, 16), (3, 5), (96, 64) if CUDA else (52, 80)]
NEAR = 1e-3  # to the threshold: fp32 sums of another order may fall on its other side


def inputs(batch: int = 2, size: tuple[int, int] = (4, 16)) -> tuple[Tensor, Tensor, ColorProgram]:
    """Random images and programs; the first image solarizes what is below its threshold."""

    def images(*shape: int) -> Tensor:
        return torch.randint(0, 256, (batch, *size, *shape), dtype=torch.uint8).to(DEVICE)

    def matrices() -> Tensor:
        matrix = torch.eye(3) + 0.4 * torch.rand(batch, 3, 3) - 0.1
        return torch.cat((matrix, 40 * torch.rand(batch, 3, 1) - 20), dim=2)

    program = ColorProgram(
        before=matrices(),
        threshold=32 + 96 * torch.rand(batch),
        invert_above=torch.arange(batch) % 2 == 1,
        after=matrices(),
        coverage=images(),
        border=255 * torch.rand(batch, 3),
        contrast=0.6 + 0.8 * torch.rand(batch),
        final=matrices(),
    )
    return images(3), images(3), program.to(DEVICE)


def eager(*arguments: object, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    with dispatch.backend("eager"):
        return photometric(*arguments, dtype=dtype)  # type: ignore[arg-type]


def near_threshold(warped: Tensor, program: ColorProgram) -> Tensor:
    """(B, H, W) pixels with a colour within `NEAR` of the threshold."""
    value = torch.einsum("bij,bhwj->bhwi", program.before[..., :3].double(), warped.double())
    value = (value + program.before[:, None, None, :, 3]).clamp(0, 255)
    return ((value - program.threshold[:, None, None, None]).abs() < NEAR).any(dim=-1)


@pytest.mark.usefixtures("kernels", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, *(set(DTYPES) - {torch.float32})])
@pytest.mark.parametrize("size", SIZES)
def test_views_are_those_of_the_eager_form_but_at_the_threshold(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    arguments = inputs(2, size)
    plain, guidance = photometric(*arguments, dtype=dtype)
    expected, expected_guidance = eager(*arguments, dtype=torch.float32)
    assert (plain.shape, plain.dtype, plain.is_contiguous()) == ((2, 3, *size), dtype, True)
    assert guidance is not None
    assert (guidance.shape, guidance.dtype, guidance.is_contiguous()) == ((2, 3, *size), dtype, True)
    tolerance = dict(rtol=0, atol=1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-4)
    torch.testing.assert_close(plain.float(), expected, **tolerance)
    aside = near_threshold(*arguments[1:])
    assert aside.float().mean() < 0.01  # 6 values in 255,000 of a colour
    keep = ~aside[:, None].expand_as(guidance)
    torch.testing.assert_close(guidance.float()[keep], expected_guidance[keep], **tolerance)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("above", [True, False])
def test_the_threshold_itself_counts_as_above(above: bool) -> None:
    plain, warped, program = inputs(1)
    same = torch.cat((torch.eye(3), torch.zeros(3, 1)), dim=1)[None].to(DEVICE)
    program = dataclasses.replace(
        program,
        before=same,
        after=same,
        final=same,
        threshold=torch.full((1,), 100.0, device=DEVICE),
        invert_above=torch.tensor([above], device=DEVICE),
        coverage=torch.full_like(program.coverage, 255),
        contrast=torch.ones(1, device=DEVICE),
    )
    views = [photometric(plain, torch.full_like(warped, value), program)[1] for value in (99, 100)]
    found = [((view + 1) * 127.5).round().unique().tolist() for view in views if view is not None]
    assert found == ([[99.0], [155.0]] if above else [[156.0], [100.0]])


@pytest.mark.usefixtures("kernels", "poisoned")
def test_the_plain_view_alone_is_the_one_made_with_guidance() -> None:
    images, warped, program = inputs()
    plain, guidance = photometric(images)
    assert guidance is None
    assert torch.equal(plain, photometric(images, warped, program)[0])


@pytest.mark.usefixtures("kernels")
def test_strided_and_shifted_images_and_expanded_programs_are_read_as_they_are() -> None:
    plain, warped, program = inputs()
    expected = photometric(plain, warped, program)
    strided = torch.stack((warped, warped), dim=-1)[..., 0]
    for offset in (1, 4):  # a slice of a larger buffer, at an address that is no multiple of 4, and at one
        buffer = torch.zeros(plain.numel() + offset, dtype=torch.uint8, device=DEVICE)
        shifted = buffer[offset:].view(plain.shape).copy_(plain)
        found = photometric(shifted, strided, program)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = dataclasses.replace(
        program, final=program.final[:1].expand(2, 3, 4), contrast=program.contrast[:1].expand(2)
    )
    own = dataclasses.replace(one, final=one.final.contiguous(), contrast=one.contrast.contiguous())
    assert torch.equal(photometric(plain, warped, one)[1], photometric(plain, warped, own)[1])


@pytest.mark.usefixtures("kernels")
def test_an_image_has_the_same_bits_in_every_run_and_batch() -> None:
    plain, warped, program = inputs(3)
    first, again = photometric(plain, warped, program), photometric(plain, warped, program)
    rows = slice(1, 3)
    part = photometric(plain[rows], warped[rows], program.take(rows))
    for one, two, three in zip(first, again, part, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one[rows], three)


@pytest.mark.usefixtures("kernels")
def test_no_images_give_no_views() -> None:
    plain, warped, program = inputs(1)
    none = slice(0, 0)
    views = photometric(plain[none], warped[none], program.take(none))
    assert all(view.shape == (0, 3, 4, 16) for view in views)


@pytest.mark.usefixtures("kernels")
def test_the_operator_has_a_fake_that_says_what_comes() -> None:
    plain, warped, program = inputs(1)
    torch.library.opcheck(
        torch.ops.lmim_fast.photometric.default, (plain, warped, program.tensors(), DTYPES[1])
    )
    torch.library.opcheck(torch.ops.lmim_fast.photometric.default, (plain, None, [], DTYPES[0]))


@pytest.mark.usefixtures("kernels")
def test_it_is_one_graph_for_the_compiler() -> None:
    arguments = inputs(1)
    compiled = torch.compile(photometric, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*arguments), photometric(*arguments), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("kernels")
def test_what_the_kernel_is_not_made_for_is_named() -> None:
    plain, warped, program = inputs(1)
    with pytest.raises(RuntimeError, match=r"no kernel for results in torch\.float64"):
        photometric(plain, dtype=torch.float64)
    if not CUDA:
        with pytest.raises(RuntimeError, match=r"torch\.bfloat16 in Triton's interpreter"):
            photometric(plain, dtype=torch.bfloat16)
    double = dataclasses.replace(program, border=program.border.double())
    with pytest.raises(RuntimeError, match=r"takes program\.border in torch\.float32, got torch\.float64"):
        photometric(plain, warped, double)
    numbers = dataclasses.replace(program, invert_above=program.invert_above.int())
    with pytest.raises(RuntimeError, match=r"takes program\.invert_above in torch\.bool, got torch\.int32"):
        photometric(plain, warped, numbers)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels", "poisoned")
def test_crops_of_a_training_batch_on_a_device() -> None:
    plain, warped, program = inputs(512, (32, 128))
    views = photometric(plain, warped, program, dtype=torch.bfloat16)
    expected = eager(plain, warped, program, dtype=torch.float32)
    aside = near_threshold(warped, program)
    assert aside.float().mean() < 1e-3
    for view, truth in zip(views, expected, strict=True):
        assert view is not None
        assert truth is not None
        keep = ~aside[:, None].expand_as(truth)
        torch.testing.assert_close(view.float()[keep], truth[keep], rtol=0, atol=2**-8 + 1e-4)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_a_replayed_graph_gives_the_views_of_its_inputs() -> None:
    plain, warped, program = inputs(8, (32, 128))
    photometric(plain, warped, program, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = photometric(plain, warped, program, dtype=torch.bfloat16)
    plain.copy_(plain.flip(0))
    warped.copy_(warped.flip(0))
    graph.replay()
    for view, expected in zip(
        captured, photometric(plain, warped, program, dtype=torch.bfloat16), strict=True
    ):
        assert torch.equal(view, expected)
