"""Dropout masks of kernels and eager forms."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE

from lmim_fast.kernels.dropout import keep_column, keep_tile, keep_tile_transposed
from lmim_fast.ops import dropout


@triton.jit
def write_mask(
    seed_ptr, mask_ptr, row, group, sequence, threshold: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    rows, groups = row + tl.arange(0, R), group + tl.arange(0, G)
    keep = keep_tile(tl.load(seed_ptr), rows, groups, sequence, threshold, R, G)
    at = tl.arange(0, R)[:, None] * (16 * G) + tl.arange(0, 16 * G)[None, :]
    tl.store(mask_ptr + at, keep.to(tl.int8))


@triton.jit
def write_turned(seed_ptr, mask_ptr, column_ptr, sequence, threshold: tl.constexpr, column: tl.constexpr):
    seed, rows = tl.load(seed_ptr), tl.arange(0, 8)
    keep = keep_tile_transposed(seed, rows, tl.arange(0, 2), sequence, threshold, 8, 2)
    tl.store(mask_ptr + tl.arange(0, 32)[:, None] * 8 + rows[None, :], keep.to(tl.int8))
    tl.store(column_ptr + rows, keep_column(seed, rows, column, sequence, threshold).to(tl.int8))


@pytest.mark.parametrize("column", [0, 5, 10, 15, 16, 31])
def test_masks_turned_or_of_one_column_are_the_same(column: int) -> None:
    seed = dropout.draw_seed(DEVICE)
    mask = torch.empty(32, 8, dtype=torch.int8, device=DEVICE)
    one = torch.empty(8, dtype=torch.int8, device=DEVICE)
    write_turned[(1,)](seed, mask, one, 3, 128, column)
    truth = dropout.keep_mask(seed, torch.tensor([3], device=DEVICE), 8, 32, 0.5)[0]
    assert torch.equal(mask.T.bool(), truth)
    assert torch.equal(one.bool(), truth[:, column])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.996])
def test_kernel_and_eager_masks_are_one(p: float) -> None:
    seed = dropout.draw_seed(DEVICE)
    mask = torch.empty(8, 64, dtype=torch.int8, device=DEVICE)
    write_mask[(1,)](seed, mask, 4, 2, 7, dropout.threshold(p), 8, 4)
    truth = dropout.keep_mask(seed, torch.tensor([7], device=DEVICE), 12, 96, p)[0, 4:, 32:]
    assert torch.equal(mask.bool(), truth)


def test_masks_drop_the_share_asked_for_and_differ_by_seed_and_sequence() -> None:
    sequences = torch.arange(3)
    mask = dropout.keep_mask(torch.tensor([5]), sequences, 200, 333, 0.1)
    assert mask.shape == (3, 200, 333)
    assert 1 - mask.float().mean().item() == pytest.approx(26 / 256, abs=0.003)
    other = dropout.keep_mask(torch.tensor([6]), sequences, 200, 333, 0.1)
    rows = (mask[0, 1:], mask[0, :-1])
    for first, second in [(mask[0], mask[1]), (mask[0], mask[2]), (mask[0], other[0]), rows]:
        together = (~first & ~second).float().mean().item()
        assert together == pytest.approx((26 / 256) ** 2, abs=0.01)
        assert not torch.equal(first, second)


def test_kept_values_are_scaled_so_that_the_mean_stays() -> None:
    for p in (1e-6, 0.1, 0.5, 0.9999):
        assert 1 <= dropout.threshold(p) <= 255
        assert dropout.scale(p) * (1 - dropout.threshold(p) / 256) == pytest.approx(1)
    assert (dropout.threshold(0.0), dropout.scale(0.0)) == (0, 1.0)
    x = torch.ones(4, 50, 100)
    dropped = dropout.dropout(x, 0.3, torch.tensor([3]))
    assert dropped.unique().tolist() == pytest.approx([0, dropout.scale(0.3)])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_wrong_seeds_and_probabilities_are_named() -> None:
    with pytest.raises(ValueError, match=r"one int64, got torch.int64 of shape \(2,\)"):
        dropout.check(0.1, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"one int64, got torch.float32"):
        dropout.check(0.1, torch.ones(1))
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        dropout.check_probability(1.0)
