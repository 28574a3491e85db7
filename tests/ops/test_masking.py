"""Patch selection and its noise."""

import pytest
import torch

from lmim_fast.ops.masking import draw_patches, gather_rows, mask_noise, select_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.reference import random_masking


@pytest.mark.parametrize("num_visible", [1, 51, 64, 255])
def test_kept_patches_are_those_of_the_oracle(num_visible: int) -> None:
    noise = torch.rand(7, 256)
    ids_visible, ids_masked = select_patches(noise, num_visible)
    ids_keep, _, mask = random_masking(noise, noise, noise.shape[1], num_visible)
    assert torch.equal(ids_visible, ids_keep.sort(dim=1).values)
    assert torch.equal(torch.zeros(7, 256).scatter(1, ids_masked, 1.0), mask)
    everything = torch.cat([ids_visible, ids_masked], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(256).expand(7, -1))


def test_ties_are_ranked_by_position() -> None:
    ids_visible, ids_masked = select_patches(torch.zeros(2, 10), 4)
    assert ids_visible.tolist() == [[0, 1, 2, 3]] * 2
    assert ids_masked.tolist() == [[4, 5, 6, 7, 8, 9]] * 2


def test_r20_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    epochs, indices = torch.tensor([3, 3, 4]), torch.tensor([10, 99, 10])
    together = mask_noise(7, epochs, indices, 256)
    for row, (epoch, index) in enumerate([(3, 10), (3, 99), (4, 10)]):
        assert torch.equal(mask_noise(7, epoch, torch.tensor([index]), 256)[0], together[row])
    assert not torch.equal(together[0], together[2]), "a sample gets a new mask each epoch"
    assert not torch.equal(mask_noise(8, epochs, indices, 256), together), "the seed matters"
    assert not torch.equal(mask_noise(7, epochs, indices, 256, Stream.MAE_MASK), together)


def test_drawn_patches_are_those_that_their_noise_selects() -> None:
    epochs, indices = torch.tensor([3, 3, 4]), torch.tensor([10, 99, 10])
    for stream in (Stream.MASK, Stream.MAE_MASK):
        drawn = draw_patches(-7, epochs, indices, 256, 51, stream)
        selected = select_patches(mask_noise(-7, epochs, indices, 256, stream), 51)
        assert torch.equal(drawn[0], selected[0])
        assert torch.equal(drawn[1], selected[1])
    first, _ = draw_patches(-7, 4, indices, 256, 51)
    assert torch.equal(first[2], draw_patches(-7, epochs, indices, 256, 51)[0][2])


def test_every_patch_is_masked_equally_often() -> None:
    noise = mask_noise(0, 0, torch.arange(20_000), 256)
    _, ids_masked = select_patches(noise, 51)
    share = ids_masked.flatten().bincount(minlength=256) / 20_000
    expected, deviation = 205 / 256, (205 * 51 / 256**2 / 20_000) ** 0.5
    assert (share - expected).abs().max() < 5 * deviation


def test_gather_rows_takes_rows() -> None:
    x, ids = torch.rand(3, 9, 5), torch.tensor([[0, 8], [4, 4], [2, 1]])
    assert torch.equal(gather_rows(x, ids), torch.stack([x[b, ids[b]] for b in range(3)]))


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(B, L\), got shape \(4,\)"):
        select_patches(torch.rand(4), 1)
    with pytest.raises(ValueError, match=r"\[1, 3\], got 4"):
        select_patches(torch.rand(1, 4), 4)
    with pytest.raises(ValueError, match=r"noise must be floating-point, got torch\.int64"):
        select_patches(torch.arange(8).view(2, 4), 1)
    indices = torch.arange(3)
    with pytest.raises(ValueError, match=r"\[1, 3\], got 0"):
        draw_patches(0, 0, indices, 4, 0)
    with pytest.raises(ValueError, match=r"indices must be \(B,\) int64, got \(3,\) of torch\.int32"):
        draw_patches(0, 0, indices.int(), 4, 1)
    with pytest.raises(ValueError, match=r"indices must be \(B,\) int64, got \(1, 3\)"):
        draw_patches(0, 0, indices[None], 4, 1)
    with pytest.raises(ValueError, match=r"epochs must be \(3,\) int64, got \(2,\) of torch\.int64"):
        draw_patches(0, indices[:2], indices, 4, 1)
    with pytest.raises(ValueError, match=r"epochs must be in \[0, 2\^32\), got -1"):
        draw_patches(0, -1, indices, 4, 1)
    with pytest.raises(ValueError, match=r"one device, got epochs on cpu, indices on meta"):
        draw_patches(0, indices, indices.to("meta"), 4, 1)
