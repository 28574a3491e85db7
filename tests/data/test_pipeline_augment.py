"""Augmented views from the pipeline: each image's own, reproducible, and finished before the hand-over."""

import pytest
import torch
from pipeline_runs import pipeline

from lmim_fast.config import AugmentConfig, DataConfig, GuidanceConfig

KINDS = ("abinet", "parseq")
# What is drawn with a probability is drawn often, so that few images show it.
OFTEN = dict(geometry_probability=0.8, deterioration_probability=0.8, jitter_probability=0.8)


def images(folder, kind, **options):
    """The bytes of every augmented view by (epoch, index)."""
    config = AugmentConfig(kind=kind, **OFTEN)
    views = {}
    with pipeline(folder, guidance=None, augment=config, **options) as batches:
        for batch in batches:
            assert batch.warped is None
            assert batch.program is None
            for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
                views[key] = batch.plain[row]
    return views


@pytest.mark.parametrize("kind", KINDS)
def test_r20_views_are_bit_equal_for_any_batch_size_and_thread_count(folder, kind):
    expected = images(folder, kind, batch_size=8, end_step=6)
    for size, threads in ((1, 1), (16, 2)):
        loader = DataConfig(threads=threads, prefetch=1)
        actual = images(folder, kind, batch_size=size, end_step=48 // size, loader=loader)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_r20_ranks_make_the_views_that_one_process_makes(folder, kind):
    expected = images(folder, kind, end_step=3)
    parts = [images(folder, kind, end_step=3, rank=rank, world_size=2) for rank in (0, 1)]
    actual = parts[0] | parts[1]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_views_change_with_the_epoch_and_the_seed(folder, kind):
    first = images(folder, kind, end_step=6)
    pairs = [(first[0, index], first[1, index]) for index in range(23) if (1, index) in first]
    assert sum(not torch.equal(a, b) for a, b in pairs) > 0.7 * len(pairs)
    other = images(folder, kind, end_step=6, seed=4)
    both = [key for key in first if key in other]
    assert sum(not torch.equal(first[key], other[key]) for key in both) > 0.7 * len(both)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_finished_view_in_one_tensor(folder, kind):
    with pipeline(folder, guidance=None, augment=AugmentConfig(kind=kind, **OFTEN)) as batches:
        batch = next(batches)
        values = batch.images(torch.float32)
        assert values.shape == (8, 3, 32, 128)
        torch.testing.assert_close(values, batch.plain.permute(0, 3, 1, 2) / 127.5 - 1)
        blank = batch.blank(8, (32, 128), torch.device("cpu"), guided=False)
        assert [item.shape for item in blank.tensors()] == [item.shape for item in batch.tensors()]
        assert torch.equal(blank.with_tensors(batch.tensors()).images(), values)


def test_without_augmentation_there_is_the_plain_view(folder):
    config = AugmentConfig(kind="none")
    with (
        pipeline(folder, guidance=None, augment=config) as none,
        pipeline(folder) as guided,
    ):
        for ours, theirs in zip(none, guided, strict=True):
            assert torch.equal(ours.plain, theirs.plain)
            assert torch.equal(ours.images(), theirs.views()[0])


def test_guidance_and_augmented_views_in_one_pipeline_are_refused(folder):
    with pytest.raises(ValueError, match="not both"):
        pipeline(folder, guidance=GuidanceConfig(), augment=AugmentConfig())
