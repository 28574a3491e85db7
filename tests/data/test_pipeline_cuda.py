"""The view pipeline with its views made on a CUDA device, against the CPU form, on drawn words."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the input pipeline needs DALI: lmim_fast[cuda12] or [cuda13]")

from crop_views import as_bytes, psnr

from lmim_fast.config import DataConfig, GuidanceConfig, RenderConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.render.database import render
from lmim_fast.data.store.records import RecordStore

pytestmark = pytest.mark.gpu

COUNT = 96
BATCH = 32
STEPS = 5  # into the second epoch


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    output = tmp_path_factory.mktemp("words") / "lmdb"
    return render(RenderConfig(output=str(output), count=COUNT, processes=1))


def pipeline(folder, device, **options):
    store = RecordStore([folder])
    options = dict(guidance=GuidanceConfig(), loader=DataConfig(threads=2), end_step=STEPS) | options
    return ViewPipeline(store, SampleOrder(COUNT, BATCH, 3), seed=3, device=device, **options)


def batches_of(folder, device, **options):
    with pipeline(folder, device, **options) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def on_cpu(words):
    return batches_of(words, "cpu")


@pytest.fixture(scope="module")
def on_cuda(words):
    return batches_of(words, "cuda")


def test_cuda_batches_come_in_the_order_of_the_cpu_and_lie_on_the_device(on_cpu, on_cuda):
    assert [(batch.step, batch.micro) for batch in on_cuda] == [(step, 0) for step in range(STEPS)]
    assert {int(epoch) for batch in on_cuda for epoch in batch.epochs} == {0, 1}
    for ours, expected in zip(on_cuda, on_cpu, strict=True):
        assert ours.indices.tolist() == expected.indices.tolist()
        assert ours.epochs.tolist() == expected.epochs.tolist()
        assert not ours.indices.is_cuda
        assert not ours.epochs.is_cuda
        for tensor in (ours.plain, ours.warped, ours.program.coverage, *ours.views(torch.bfloat16)):
            assert tensor.is_cuda
        assert ours.plain.dtype == ours.warped.dtype == torch.uint8
        assert ours.plain.shape == ours.warped.shape == (BATCH, 32, 128, 3)


def test_plain_views_of_the_gpu_are_those_of_the_cpu(on_cpu, on_cuda):
    result = agreement(on_cuda, on_cpu, lambda batch: as_bytes(batch.views()[0]))
    assert np.median(result) > 40.0, result
    assert result.min() > 30.0, result


def test_filtered_and_warped_crops_of_the_gpu_are_those_of_the_cpu(on_cpu, on_cuda):
    result = agreement(on_cuda, on_cpu, lambda batch: batch.warped.cpu().numpy())
    assert np.median(result) > 40.0, result  # OpenCV's map has 32 places between two pixels
    assert result.min() > 28.0, result


def test_guidance_views_of_the_gpu_are_those_of_the_cpu(on_cpu, on_cuda):
    result = agreement(on_cuda, on_cpu, lambda batch: as_bytes(batch.views()[1]))
    assert np.median(result) > 35.0, result  # solarize inverts a pixel that differs by one at the threshold
    assert np.percentile(result, 5) > 22.0, result


def test_strong_blurs_on_the_gpu_are_those_of_the_cpu(words):
    options = dict(guidance=GuidanceConfig(min_operations=10, blur_sigma=(3.0, 5.0)), end_step=1)
    parts = [batches_of(words, device, **options) for device in ("cuda", "cpu")]
    result = agreement(*parts, lambda batch: batch.warped.cpu().numpy())
    assert np.median(result) > 40.0, result


def test_views_made_on_the_cpu_for_a_cuda_run_are_bit_equal_to_a_cpu_run(words, on_cpu):
    actual = batches_of(words, "cuda", loader=DataConfig(threads=2, device="cpu"))
    for ours, expected in zip(actual, on_cpu, strict=True):
        assert ours.plain.is_cuda
        assert ours.warped.is_cuda
        assert torch.equal(ours.plain.cpu(), expected.plain)
        assert torch.equal(ours.warped.cpu(), expected.warped)


def test_two_cuda_runs_are_bit_equal_while_the_consumer_uses_its_own_stream(words, on_cuda):
    """A batch that is handed over too early, or whose memory is reused too soon, differs."""
    actual = []
    with torch.cuda.stream(torch.cuda.Stream()), pipeline(words, "cuda") as batches:
        weights = torch.rand(2048, 2048, device="cuda")
        for batch in batches:
            for _ in range(20):  # the views are read late, when the batch is gone and later ones are made
                weights = (weights @ weights).clamp_(0.0, 1.0)
            actual.append(batch.views())
            del batch
    torch.cuda.synchronize()
    for views, expected in zip(actual, on_cuda, strict=True):
        for ours, theirs in zip(views, expected.views(), strict=True):
            assert torch.equal(ours, theirs)


def agreement(left, right, images):
    """PSNR of every view of two runs; `images` takes it from a batch, (B, H, W, 3) uint8 on the host."""
    return np.concatenate([psnr(images(a), images(b)) for a, b in zip(left, right, strict=True)])
