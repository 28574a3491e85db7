"""Out of memory, with peaks that a test makes up: how many images fit, and the option that makes them fit."""

import weakref

import pytest
import torch

from lmim_fast import faults
from lmim_fast.config import ModelConfig, PretrainConfig
from lmim_fast.train.memory import _measure_on_cuda, explain_out_of_memory
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

SMALL = ModelConfig(width=32, depth=1, heads=2, mae_decoder_depth=1, decoder_width=32, decoder_heads=1)
GB = 10**9


def explained(tmp_path, measure, limit=10 * GB, size=1, **changes):
    """The message for a config of those values, where `measure` gives the peaks."""
    config = PretrainConfig(data=("x",), objective="mae", model=SMALL, precision="fp32", **changes)
    task = make_task(config)
    world = World(0, size, torch.device("cpu"))
    error = torch.OutOfMemoryError("CUDA out of memory")
    return str(
        explain_out_of_memory(
            error, tmp_path, task, task.build(), config, world, measure=measure, limit=limit
        )
    )


def linear(fixed, each):
    """Peaks of so many bytes, and so many more an image; more than 10 GB do not fit."""

    def measure(images):
        if fixed + each * images > 10 * GB:
            raise torch.OutOfMemoryError
        return fixed + each * images

    return measure


def test_the_message_says_how_many_images_fit_and_which_option_keeps_the_batch(tmp_path):
    # 9.5 GB = 2 GB + 300 x 25 MB
    text = explained(tmp_path, linear(2 * GB, 25 * 10**6), batch_size=512)
    assert text == (
        "out of memory with 512 images a pass on cpu: about 300 fit; pass --accumulation 2, which trains the "
        "same in passes of 256; no memory snapshot: cpu has none"
    )


def test_passes_grow_until_they_fit_and_divide_the_share_of_a_process(tmp_path):
    # Each of 2 processes has 96 images; 21 fit, and 96 has no divisor between 4 and 6 but 6: passes of 16.
    text = explained(tmp_path, linear(GB, 400 * 10**6), batch_size=192, size=2, cuda_graph="on")
    assert "with 96 images a pass" in text
    assert (
        "about 21 fit; pass --accumulation 6 --cuda-graph off, which trains the same in passes of 16" in text
    )


def test_measured_passes_that_run_out_of_memory_are_halved(tmp_path):
    asked = []

    def measure(images):
        asked.append(images)
        return linear(GB, 900 * 10**6)(images)

    assert "about 9 fit; pass --accumulation 8" in explained(tmp_path, measure, batch_size=64)
    assert asked == [16, 8, 16, 4, 8]


@pytest.mark.parametrize("each", [9 * GB, 20 * GB])
def test_where_not_even_one_image_fits_other_options_are_named(tmp_path, each):
    text = explained(tmp_path, linear(GB, each), batch_size=64)
    assert "not even one image a pass fits; pass --activation-checkpointing, or --parallel shard" in text


def test_a_pass_of_one_image_needs_no_measuring(tmp_path):
    def measure(images):
        raise AssertionError

    assert "not even one image" in explained(tmp_path, measure, batch_size=4, accumulation=4)


@pytest.mark.parametrize("images", [2, 3])
def test_small_passes_are_measured_by_one_image(tmp_path, images):
    text = explained(tmp_path, linear(GB, 4 * GB), batch_size=images)
    assert f"pass --accumulation {images}, which trains the same in passes of 1" in text


def test_what_goes_wrong_in_the_measuring_is_said_and_not_raised(tmp_path):
    def measure(images):
        raise ValueError("a bad shape\nand more")

    text = explained(tmp_path, measure, batch_size=512)
    assert "how many fit could not be measured (ValueError: a bad shape); pass --accumulation 2" in text
    flat = explained(tmp_path, lambda images: GB, batch_size=512)
    assert "could not be measured (passes of 128 and 256 images took 1,000,000,000 and" in flat


def test_without_cuda_it_is_said_that_nothing_was_measured(tmp_path):
    text = explained(tmp_path, None, batch_size=8, limit=None)
    assert "could not be measured (cpu has no allocator to ask); pass --accumulation 2" in text


def test_gradients_and_what_the_failed_step_held_are_free_before_the_measuring(tmp_path):
    config = PretrainConfig(data=("x",), objective="mae", model=SMALL, precision="fp32", batch_size=8)
    task = make_task(config)
    model = task.build()
    held = []

    def step():
        losses = task.losses(model, task.blank_batch(8, torch.device("cpu")))
        losses[0].backward()
        held.append(weakref.ref(losses))
        faults.point("step")

    def measure(images):
        assert all(parameter.grad is None for parameter in model.parameters())
        assert held[0]() is None
        assert len(task.blank_batch(images, torch.device("cpu")).plain) == images
        return GB * images

    with faults.injected(faults.Fault("step", "memory")):
        try:
            step()
        except torch.OutOfMemoryError as error:
            world = World(0, 1, torch.device("cpu"))
            text = str(
                explain_out_of_memory(
                    error, tmp_path, task, model, config, world, measure=measure, limit=6 * GB
                )
            )
    assert "about 5 fit; pass --accumulation 2" in text


def test_a_measured_pass_is_forward_and_backward_and_leaves_no_gradient(monkeypatch):
    peaks = {"reset": 0}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(reset=1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * peaks["reset"])
    task = make_task(PretrainConfig(data=("x",), objective="mae", model=SMALL, precision="fp32"))
    model = task.build()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.register_hook(lambda gradient: seen.append(float(gradient.norm())))
    assert _measure_on_cuda(task, model, torch.device("cpu"))(3) == 7
    assert len(seen) > 4
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
def test_on_a_gpu_the_peaks_are_measured_and_the_snapshot_is_written(tmp_path):
    device = torch.device("cuda")
    config = PretrainConfig(data=("x",), objective="mae", precision="bf16", batch_size=512)
    task = make_task(config)
    model = task.build().to(device)
    error = torch.OutOfMemoryError("CUDA out of memory")
    world = World(0, 1, device)
    few, many = (
        str(explain_out_of_memory(error, tmp_path, task, model, config, world, limit=limit))
        for limit in (2 * GB, 200 * GB)
    )
    assert "could not be measured" not in few + many
    assert int(few.split("about ")[1].split()[0]) < 511
    assert "about 511 fit; pass --accumulation 2" in many
    assert (tmp_path / "memory-rank0.pickle").stat().st_size > 0
    assert all(parameter.grad is None for parameter in model.parameters())
