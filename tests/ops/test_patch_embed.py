"""Patch embedding: the eager form against the oracle's long way round, and the kernels against it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    CUDA,
    DEVICE,
    DTYPES,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    assert_as_accurate,
    assert_rms_as_accurate,
    every_second,
)
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.patch_embed import View, normalise_images, patch_embed, patch_embed_packed

HALF = DTYPES[-1]  # bf16 on a GPU


class Parameters(NamedTuple):
    weight: Tensor
    bias: Tensor
    position: Tensor
    cls_token: Tensor


def parameters(width: int, patches: int, patch: int, device: torch.device = DEVICE) -> Parameters:
    """fp32, as under autocast."""
    draw = partial(torch.randn, device=device)
    return Parameters(
        draw(width, 3, patch, patch) / patch, draw(width), draw(1, 1 + patches, width), draw(1, 1, width)
    )


def pixels(batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (batch, height, width, 3), dtype=dtype, device=DEVICE)
    return (torch.rand(batch, 3, height, width, device=DEVICE) * 2 - 1).to(dtype)


def example_views(
    dtype: torch.dtype, *, batch: int = 3, patch: int = 4, grid: tuple[int, int] = (2, 6), kept: int = 5
) -> list[View]:
    """Some patches of one view and all of another."""
    height, width = (patch * count for count in grid)
    ids, _ = select_patches(torch.rand(batch, grid[0] * grid[1], device=DEVICE), kept)
    return [(pixels(batch, height, width, dtype), ids), (pixels(batch, height, width, dtype), None)]


def differentiate(
    backend: str,
    views: Sequence[View],
    given: Parameters,
    upstream: Tensor,
    *,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Tokens in upstream's dtype and the gradients of weight, bias and cls; `compute` is autocast's dtype."""
    learned = [given.weight, given.bias, given.cls_token]
    weight, bias, cls = (tensor.detach().requires_grad_() for tensor in learned)
    cast = torch.autocast(DEVICE.type, dtype=compute, enabled=compute not in (None, torch.float32))
    with dispatch.backend(backend), cast:
        tokens = patch_embed_packed(views, weight, bias, given.position, cls, dtype=upstream.dtype)
    return tokens, list(torch.autograd.grad(tokens, [weight, bias, cls], upstream))


def exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def assert_sums_are_near(ours: Tensor, truth: Tensor) -> None:
    """Sums of gradients as they came: far more exact than a 16-bit number."""
    error = (ours.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 2e-5, f"relative error {error:.3g}"


def assert_kernel_is_accurate(
    views: Sequence[View], given: Parameters, compute: torch.dtype, dtype: torch.dtype
) -> None:
    rows = sum(
        len(images) * (given.position.shape[1] if ids is None else 1 + ids.shape[1]) for images, ids in views
    )
    upstream = torch.randn(rows, len(given.weight), device=DEVICE).to(dtype)
    truth = differentiate(
        "eager",
        [(exact(images), ids) for images, ids in views],
        Parameters(*(tensor.double() for tensor in given)),
        upstream.double(),
    )
    low = differentiate("eager", views, given, upstream, compute=compute)
    ours = differentiate("triton", views, given, upstream, compute=compute)
    assert_as_accurate([ours[0]], [low[0]], [truth[0]], OUTPUT_FACTOR)
    assert_rms_as_accurate(ours[1][:1], low[1][:1], truth[1][:1], GRADIENT_FACTOR)
    for mine, wanted in zip(ours[1][1:], truth[1][1:], strict=True):
        assert mine.shape == wanted.shape
        assert mine.dtype == torch.float32
        assert_sums_are_near(mine, wanted)


def test_embedding_kept_patches_equals_embedding_all_and_dropping() -> None:
    images = torch.rand(3, 3, 32, 128) * 2 - 1
    weight, bias = torch.randn(24, 3, 4, 4, requires_grad=True), torch.randn(24)
    position, cls = torch.randn(1, 257, 24), torch.randn(1, 1, 24)
    ids, _ = select_patches(torch.rand(3, 256), 51)
    full = F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2) + position[:, 1:]
    kept = torch.stack([full[b, ids[b]] for b in range(3)])
    first = (cls + position[:, :1]).expand(3, -1, -1)
    for ours, theirs in (
        (patch_embed(images, weight, bias, position, cls), torch.cat([first, full], 1)),
        (patch_embed(images, weight, bias, position, cls, ids), torch.cat([first, kept], 1)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        upstream = torch.randn_like(theirs)
        (mine,) = torch.autograd.grad(ours, weight, upstream)
        (expected,) = torch.autograd.grad(theirs, weight, upstream, retain_graph=True)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


def test_normalised_uint8_covers_minus_one_to_one() -> None:
    corners = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    assert normalise_images(corners).flatten().tolist() == [-1.0, 1.0] * 3


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_packed_call_holds_the_rows_of_the_single_calls(backend: str) -> None:
    views, given = example_views(torch.uint8), parameters(24, 12, 4)
    with dispatch.backend(backend):
        packed = patch_embed_packed(views, *given, dtype=HALF)
        single = [patch_embed(images, *given, ids, dtype=HALF) for images, ids in views]
    assert [tuple(tokens.shape) for tokens in single] == [(3, 6, 24), (3, 13, 24)]
    assert torch.equal(packed, torch.cat([tokens.flatten(0, 1) for tokens in single]))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_tokens_are_of_the_dtype_asked_for_or_of_the_positions(backend: str) -> None:
    (view, _), given = example_views(torch.float32), parameters(24, 12, 4)
    with dispatch.backend(backend):
        full = patch_embed(view[0], *given)
        half = patch_embed(view[0], *given, dtype=torch.float16)
        from_half = patch_embed(view[0], *given._replace(position=given.position.half()))
    assert (full.dtype, half.dtype, from_half.dtype) == (torch.float32, torch.float16, torch.float16)
    assert torch.equal(half, full.half())
    torch.testing.assert_close(from_half, half, rtol=0, atol=2e-2)


def test_eager_gradients_are_right_for_every_input() -> None:
    (images, ids), _ = example_views(torch.float64, batch=2, patch=2, grid=(1, 3), kept=2)
    images, ids = images.cpu().requires_grad_(), None if ids is None else ids.cpu()
    given = parameters(3, 3, 2, torch.device("cpu"))
    inputs = [images, *(tensor.double().requires_grad_() for tensor in given)]

    def form(images: Tensor, *parameters: Tensor) -> Tensor:
        return patch_embed_packed([(images, ids), (images, None)], *parameters)

    assert torch.autograd.gradcheck(form, inputs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("images", "compute", "dtype"),
    every_second([torch.uint8, torch.float32], [torch.float32, HALF], [torch.float32, HALF]),
)
def test_kernel_is_as_accurate_as_the_eager_form(
    images: torch.dtype, compute: torch.dtype, dtype: torch.dtype
) -> None:
    assert_kernel_is_accurate(example_views(images), parameters(40, 12, 4), compute, dtype)


@pytest.mark.parametrize(
    ("patch", "width", "images"), every_second([(1, 24), (2, 100), (3, 16), (8, 20)], [torch.uint8, HALF])
)
def test_other_patches_and_widths_are_as_accurate(images: torch.dtype, patch: int, width: int) -> None:
    views = example_views(images, batch=2, patch=patch, grid=(2, 3), kept=3)
    assert_kernel_is_accurate(views, parameters(width, 6, patch), HALF, HALF)


def test_more_patches_and_columns_than_a_tile_are_as_accurate() -> None:
    views = example_views(torch.uint8, batch=2, patch=2, grid=(7, 11), kept=70)
    assert_kernel_is_accurate(views, parameters(130, 77, 2), HALF, HALF)


def test_images_of_all_layouts_give_the_same() -> None:
    given, upstream = parameters(24, 12, 4), torch.randn(3 * 13, 24, device=DEVICE)
    bytes_of = pixels(3, 8, 24, torch.uint8)
    floats = normalise_images(bytes_of)
    wide = torch.zeros(3, 3, 9, 31, device=DEVICE)
    wide[:, :, 1:, 3:27] = floats
    planes = bytes_of.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    layouts = [bytes_of, planes, floats.contiguous(), wide[:, :, 1:, 3:27]]
    layouts.append(floats.contiguous(memory_format=torch.channels_last))
    tokens, gradients = differentiate("eager", [(floats, None)], given, upstream)
    for images in layouts:
        ours = differentiate("triton", [(images, None)], given, upstream)
        for mine, other in zip([ours[0], *ours[1]], [tokens, *gradients], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_strides_of_parameters_ids_and_gradients_do_not_matter() -> None:
    (images, ids), _ = example_views(torch.float32)
    given = parameters(24, 12, 4)
    turned = Parameters(
        given.weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        given.bias.repeat_interleave(2)[::2],
        given.position.transpose(1, 2).contiguous().transpose(1, 2),
        given.cls_token.repeat_interleave(2, dim=2)[:, :, ::2],
    )
    assert ids is not None
    ids_turned = ids.t().contiguous().t()
    upstream = torch.randn(1, 24, device=DEVICE).expand(18, 24)
    across = upstream.t().contiguous().t()
    ours = differentiate("triton", [(images, ids_turned)], turned, across)
    theirs = differentiate("triton", [(images, ids)], given, upstream.contiguous())
    expanded = differentiate("triton", [(images, ids)], given, upstream)
    for other in (ours, expanded):
        for mine, straight in zip([other[0], *other[1]], [theirs[0], *theirs[1]], strict=True):
            assert torch.equal(mine, straight)


@pytest.mark.usefixtures("kernels")
def test_summed_tokens_count_their_rows_in_the_gradients() -> None:
    views, given = example_views(torch.uint8), parameters(24, 12, 4)
    bias, cls = given.bias.requires_grad_(), given.cls_token.requires_grad_()
    patch_embed_packed(views, given.weight, bias, given.position, cls).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 3 * (5 + 12)))
    torch.testing.assert_close(cls.grad, torch.full_like(cls, 6))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_parameters_are_those_of_all(wanted: tuple[int, ...]) -> None:
    views, given = example_views(torch.uint8), parameters(24, 12, 4)
    upstream = torch.randn(57, 24, device=DEVICE)
    _, everything = differentiate("triton", views, given, upstream)
    learned = [given.weight, given.bias, given.cls_token]
    leaves = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(learned)]
    patch_embed_packed(views, *leaves[:2], given.position, leaves[2]).backward(upstream)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, everything[i])


@pytest.mark.parametrize("compute", [torch.float32, HALF])
def test_two_runs_give_the_same_bits(compute: torch.dtype) -> None:
    views, given = example_views(torch.uint8), parameters(40, 12, 4)
    upstream = torch.randn(57, 40, device=DEVICE)
    runs = [differentiate("triton", views, given, upstream, compute=compute) for _ in range(2)]
    for first, second in zip([runs[0][0], *runs[0][1]], [runs[1][0], *runs[1][1]], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_images_give_no_tokens_and_zero_gradients(backend: str) -> None:
    views = [(pixels(0, 8, 24, torch.uint8), torch.zeros(0, 5, dtype=torch.int64, device=DEVICE))]
    tokens, gradients = differentiate(
        backend, views, parameters(24, 12, 4), torch.zeros(0, 24, device=DEVICE)
    )
    assert tokens.shape == (0, 24)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)
    with dispatch.backend(backend):
        assert patch_embed(views[0][0], *parameters(24, 12, 4)).shape == (0, 13, 24)


@pytest.mark.usefixtures("kernels")
def test_an_id_that_is_no_patch_makes_its_own_token_nan() -> None:
    images, given = pixels(2, 8, 24, torch.uint8), parameters(24, 12, 4)
    ids = torch.tensor([[0, 11, 12], [-1, 3, 2**40]], device=DEVICE)
    tokens = patch_embed(images, *given, ids)
    wrong = tokens.isnan().all(dim=2)
    assert torch.equal(wrong, tokens.isnan().any(dim=2))
    assert wrong.tolist() == [[False, False, False, True], [False, True, False, True]]


def test_custom_ops_keep_the_rules_of_torch() -> None:
    (images, ids), (other, _) = example_views(torch.uint8)
    given = parameters(24, 12, 4)
    weight, bias, cls = (tensor.requires_grad_() for tensor in (given.weight, given.bias, given.cls_token))
    views = [images, other], [ids], [True, False]
    kinds = torch.float16, torch.float32
    forward = torch.ops.lmim_fast.patch_embed.default
    torch.library.opcheck(forward, (*views, weight, bias, given.position, cls, *kinds))
    torch.library.opcheck(forward, ([other], [], [False], weight, bias, given.position, cls, *kinds))
    backward = torch.ops.lmim_fast.patch_embed_backward.default
    torch.library.opcheck(backward, (torch.randn(57, 24, device=DEVICE), *views, 4, torch.float32))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    (images, ids), (other, _) = example_views(torch.uint8)
    given, upstream = parameters(24, 12, 4), torch.randn(57, 24, device=DEVICE)

    def form(images: Tensor, ids: Tensor, other: Tensor, *parameters: Tensor) -> Tensor:
        return patch_embed_packed([(images, ids), (other, None)], *parameters)

    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    learned = [given.weight, given.bias, given.cls_token]
    weight, bias, cls = (tensor.detach().requires_grad_() for tensor in learned)
    with dispatch.backend(backend):
        ours = compiled(images, ids, other, weight, bias, given.position, cls)
    gradients = torch.autograd.grad(ours, [weight, bias, cls], upstream)
    theirs = differentiate(backend, [(images, ids), (other, None)], given, upstream)
    for mine, plain in zip([ours, *gradients], [theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.usefixtures("kernels")
def test_gradients_of_images_and_positions_are_left_to_the_eager_form() -> None:
    (images, _), given = example_views(torch.float32)[1], parameters(24, 12, 4)
    wanted = given._replace(position=given.position.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no kernel for gradients of images or positions"):
        patch_embed(images, *wanted)
    with pytest.raises(RuntimeError, match="no kernel for gradients of images or positions"):
        patch_embed(images.clone().requires_grad_(), *given)
    with torch.no_grad():
        assert torch.equal(patch_embed(images, *wanted), patch_embed(images, *given))


@pytest.mark.usefixtures("kernels")
def test_what_the_kernel_does_not_take_is_named() -> None:
    images, given = pixels(2, 8, 24, torch.uint8), parameters(24, 12, 4)
    with pytest.raises(RuntimeError, match=r"results in torch\.float64"):
        patch_embed(images, *given, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="at least one patch of an image, got none"):
        patch_embed(images, *given, torch.zeros(2, 0, dtype=torch.int64, device=DEVICE))
    if not CUDA:
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="interpreter"):
            patch_embed(images, *given)


def test_wrong_inputs_are_named() -> None:
    given = parameters(24, 12, 4, torch.device("cpu"))
    images = torch.zeros(2, 3, 8, 24)
    with pytest.raises(ValueError, match="views must hold at least one"):
        patch_embed_packed([], *given)
    with pytest.raises(ValueError, match=r"got torch\.uint8 of shape \(2, 3, 8, 24\)"):
        patch_embed(images.byte(), *given)
    with pytest.raises(ValueError, match="gives 10 patches, not 12"):
        patch_embed(images[:, :, :, :20], *given)
    with pytest.raises(ValueError, match="does not divide into patches of 4 x 4"):
        patch_embed(torch.zeros(2, 3, 9, 24), *given)
    for ids in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"ids must be \(2, K\) int64"):
            patch_embed(images, *given, ids)
    with pytest.raises(ValueError, match=r"got \(2, 2\) of torch\.int32"):
        patch_embed(images, *given, torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight must be \(D, 3, patch, patch\), got \(24, 3, 4, 5\)"):
        patch_embed(images, *given._replace(weight=torch.zeros(24, 3, 4, 5)))
    with pytest.raises(ValueError, match=r"bias must be \(24,\), got \(23,\)"):
        patch_embed(images, *given._replace(bias=given.bias[:23]))
    with pytest.raises(ValueError, match=r"position must be \(1, 1 \+ L, 24\), got \(1, 13, 23\)"):
        patch_embed(images, *given._replace(position=given.position[:, :, :23]))
    with pytest.raises(ValueError, match=r"cls_token must be \(1, 1, 24\), got \(24,\)"):
        patch_embed(images, *given._replace(cls_token=given.cls_token[0, 0]))
    with pytest.raises(ValueError, match=r"bias must be floating-point, got torch\.int64"):
        patch_embed(images, *given._replace(bias=given.bias.long()))
    with pytest.raises(ValueError, match=r"dtype must be floating-point, got torch\.int32"):
        patch_embed(images, *given, dtype=torch.int32)
    with pytest.raises(ValueError, match="one device, got images on meta, weight on cpu"):
        patch_embed(images.to("meta"), *given)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("images", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [384, 768])
def test_real_sizes_in_bf16(width: int, images: torch.dtype, dtype: torch.dtype) -> None:
    views = example_views(images, batch=64, grid=(8, 32), kept=51)
    assert_kernel_is_accurate(views, parameters(width, 256, 4), torch.bfloat16, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [2, 8, 16])
def test_real_sizes_of_other_patches(patch: int, compute: torch.dtype) -> None:
    grid = 32 // patch, 128 // patch
    views = example_views(torch.uint8, batch=16, patch=patch, grid=grid, kept=max(1, grid[0] * grid[1] // 5))
    assert_kernel_is_accurate(views, parameters(100, grid[0] * grid[1], patch), compute, torch.float32)


@pytest.mark.gpu
def test_cuda_graph_replay_is_equal() -> None:
    views = example_views(torch.uint8, batch=64, grid=(8, 32), kept=51)
    given = parameters(384, 256, 4)
    upstream = torch.randn(64 * 309, 384, device=DEVICE).bfloat16()
    run = partial(differentiate, "triton", views, given, upstream, compute=torch.bfloat16)
    plain = run()
    side = torch.cuda.Stream()  # autograd's own warm-up, as a capture demands
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip([captured[0], *captured[1]], [plain[0], *plain[1]], strict=True):
        assert torch.equal(mine, other)
