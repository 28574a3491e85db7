"""Patch selection as kernels: the ids of the eager forms, bit by bit."""

import pytest
import torch
from accuracy import CUDA, DEVICE, DTYPES
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.masking import draw_patches, mask_noise, select_patches
from lmim_fast.ops.philox import Stream

SIZES = [(2, 1), (5, 3), (16, 15), (37, 8), (64, 51), (256, 51), (257, 64), (1024, 205)]
SEEDS = [0, 1, -5, 2**31, 2**40 + 77, 2**63 + 9, 2**64 - 1]


def both(form, *arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the kernel and of the eager form."""
    results = []
    for backend in ("triton", "eager"):
        with dispatch.backend(backend):
            results.append(list(form(*arguments)))
    return results[0], results[1]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("patches", "num_visible"), SIZES)
def test_selected_patches_are_those_of_the_eager_form(patches: int, num_visible: int) -> None:
    for dtype in {torch.float32, *DTYPES}:
        noise = torch.randn(3, patches, device=DEVICE).to(dtype)
        assert_equal(*both(select_patches, noise, num_visible))


@pytest.mark.parametrize("num_visible", [1, 7, 20, 39])
def test_ties_and_values_that_are_no_numbers_rank_as_in_a_stable_sort(num_visible: int) -> None:
    noise = torch.randint(-3, 4, (4, 40), device=DEVICE) / 2
    noise[noise == 1.5] = float("nan")
    noise[noise == 1.0] = float("inf")
    noise[noise == -1.5] = -float("inf")
    noise[0, ::2] = -0.0
    noise[1, ::3] = -noise.new_tensor(float("nan"))
    noise[2, :8] = 1e-40  # not a normal number
    noise[3] = float("nan")
    with dispatch.backend("triton"):
        ours = select_patches(noise, num_visible)
    theirs = select_patches(noise.cpu(), num_visible)
    assert_equal([ids.cpu() for ids in ours], list(theirs))


@pytest.mark.usefixtures("kernels")
def test_zero_and_minus_zero_are_ranked_by_position() -> None:
    ids_visible, _ = select_patches(torch.tensor([[0.0, -0.0, 0.0, -0.0]], device=DEVICE), 2)
    assert ids_visible.tolist() == [[0, 1]]


@pytest.mark.parametrize(("patches", "num_visible"), SIZES)
def test_drawn_patches_are_those_of_the_eager_noise(patches: int, num_visible: int) -> None:
    indices = torch.tensor([0, 2**32 - 1, 5], device=DEVICE)
    epochs = torch.tensor([2**32 - 1, 0, 2**31], device=DEVICE)
    ours, theirs = both(draw_patches, 2**40 + 77, epochs, indices, patches, num_visible)
    assert_equal(ours, theirs)
    noise = mask_noise(2**40 + 77, epochs, indices, patches)
    assert_equal(ours, list(select_patches(noise, num_visible)))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_epoch_and_stream_is_drawn_alike(seed: int) -> None:
    indices = torch.tensor([7, 7, 8], device=DEVICE)
    for epoch in (0, 3, 2**32 - 1):
        for stream in (Stream.MASK, Stream.MAE_MASK):
            assert_equal(*both(draw_patches, seed, epoch, indices, 40, 11, stream))


@pytest.mark.usefixtures("kernels")
def test_r20_a_drawn_mask_depends_on_seed_epoch_index_and_stream_alone() -> None:
    indices, epochs = torch.tensor([4, 9, 4], device=DEVICE), torch.tensor([0, 0, 1], device=DEVICE)
    together, _ = draw_patches(3, epochs, indices, 64, 20)
    alone, _ = draw_patches(3, 0, indices[1:2], 64, 20)
    assert torch.equal(alone[0], together[1])
    others = (together[2:3], draw_patches(4, 0, indices[:1], 64, 20)[0])
    others += (draw_patches(3, 0, indices[:1], 64, 20, Stream.MAE_MASK)[0],)
    assert not any(torch.equal(other, together[:1]) for other in others)


def test_strides_of_noise_indices_and_epochs_do_not_matter() -> None:
    noise = torch.rand(40, 6, device=DEVICE).t()[::2]
    assert_equal(*both(select_patches, noise, 9))
    assert_equal(*both(select_patches, torch.rand(1, 40, device=DEVICE).expand(3, 40), 9))
    indices, epochs = torch.arange(12, device=DEVICE)[::4], torch.tensor([5], device=DEVICE).expand(3)
    assert_equal(*both(draw_patches, 1, epochs, indices, 40, 9))


@pytest.mark.usefixtures("kernels")
def test_no_samples_give_no_ids() -> None:
    ids_visible, ids_masked = select_patches(torch.rand(0, 10, device=DEVICE), 4)
    assert (ids_visible.shape, ids_masked.shape) == ((0, 4), (0, 6))
    ids_visible, ids_masked = draw_patches(1, 0, torch.arange(0, device=DEVICE), 10, 4)
    assert (ids_visible.shape, ids_masked.shape) == ((0, 4), (0, 6))


def test_custom_ops_keep_the_rules_of_torch() -> None:
    indices = torch.arange(3, device=DEVICE)
    torch.library.opcheck(torch.ops.lmim_fast.select_patches.default, (torch.rand(3, 20, device=DEVICE), 5))
    for epochs in (indices, None):
        arguments = (-7, epochs, 2, indices, 20, 5, int(Stream.MASK))
        torch.library.opcheck(torch.ops.lmim_fast.draw_patches.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    def form(noise: Tensor, epochs: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return *select_patches(noise, 5), *draw_patches(2**63, epochs, indices, 20, 7, Stream.MAE_MASK)

    inputs = torch.rand(3, 20, device=DEVICE), torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE)
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    with dispatch.backend(backend):
        assert_equal(list(compiled(*inputs)), list(form(*inputs)))


def test_more_patches_than_a_program_holds_are_refused_by_the_kernel() -> None:
    with dispatch.backend("triton"):
        with pytest.raises(RuntimeError, match="at most 1024 patches, got 1025"):
            select_patches(torch.rand(1, 1025, device=DEVICE), 5)
        with pytest.raises(RuntimeError, match="at most 1024 patches, got 1025"):
            draw_patches(0, 0, torch.arange(2, device=DEVICE), 1025, 5)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_real_batch_is_selected_as_on_a_cpu(dtype: torch.dtype) -> None:
    assert CUDA
    noise = torch.rand(512, 256, device=DEVICE).to(dtype)  # bf16 has many ties
    with dispatch.backend("triton"):
        ours = select_patches(noise, 51)
    theirs = select_patches(noise.cpu(), 51)
    assert_equal([ids.cpu() for ids in ours], list(theirs))


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
def test_cuda_graph_replay_draws_for_the_epochs_and_indices_of_the_moment() -> None:
    epochs, indices = torch.zeros(64, dtype=torch.int64, device=DEVICE), torch.arange(64, device=DEVICE)
    draw_patches(5, epochs, indices, 256, 51)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw_patches(5, epochs, indices, 256, 51)
    for step in range(2):
        epochs.fill_(3 + step)
        indices.copy_(torch.randint(2**32, (64,), device=DEVICE))
        graph.replay()
        with dispatch.backend("eager"):
            assert_equal(list(captured), list(draw_patches(5, epochs, indices, 256, 51)))
