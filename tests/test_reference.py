"""The oracle against tensors recorded from the released code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lmim_fast.config import ModelConfig, preset
from lmim_fast.reference import ReferenceLMIM, ReferenceMAE, normalise_patches, patchify, to_float

TINY = ModelConfig(
    width=64, depth=2, heads=2, decoder_width=64, decoder_depth=2, decoder_heads=2, decoder_ffn=2048
)


@pytest.fixture(scope="module")
def model(recorded: Path) -> ReferenceLMIM:
    model = ReferenceLMIM(TINY).eval()
    weights = {}
    for part in ("enc", "dec"):
        weights |= load_file(recorded / f"pretrain_tiny_seed11_weights_{part}.safetensors")
    model.load_state_dict(weights, strict=True)
    return model


@pytest.fixture(scope="module")
def truth(recorded: Path) -> dict[str, Tensor]:
    return load_file(recorded / "pretrain_tiny_seed11.safetensors")


def test_outputs_equal_the_release(model: ReferenceLMIM, truth: dict[str, Tensor]) -> None:
    output = model(truth["imgs"], truth["imgs_aug"], truth["noise"])
    assert torch.equal(output.ids_keep, truth["ids_keep"])
    assert torch.equal(output.ids_restore, truth["ids_restore"])
    assert torch.equal(output.mask, truth["mask"])
    losses = {"loss": "loss", "loss_recon": "loss_recon", "loss_align": "loss_cls"}
    for ours, theirs in losses.items():
        torch.testing.assert_close(getattr(output, ours), truth[theirs], rtol=1e-5, atol=0)
    activations = {"latent": "latent", "memory": "latent_nomask", "target": "target", "pred": "pred"}
    for ours, theirs in activations.items():
        torch.testing.assert_close(getattr(output, ours), truth[theirs], rtol=0, atol=3e-5)


def test_every_gradient_equals_the_release(
    model: ReferenceLMIM, truth: dict[str, Tensor], recorded: Path
) -> None:
    gradients = load_file(recorded / "pretrain_tiny_seed11_grads.safetensors")
    model.zero_grad()
    model(truth["imgs"], truth["imgs_aug"], truth["noise"]).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(gradients)
    for name, expected in gradients.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 2e-5, f"{name}: relative L2 {error:.2e}"


def test_twenty_training_steps_equal_the_release(model: ReferenceLMIM, recorded: Path) -> None:
    trajectory = load_file(recorded / "pretrain_tiny_seed11_traj20.safetensors")
    learner = ReferenceLMIM(TINY).eval()
    learner.load_state_dict(model.state_dict())
    trainable = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trainable if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for _, p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        output = learner(trajectory["imgs"], trajectory["imgs_aug"], trajectory["noise"][step])
        assert output.loss.item() == pytest.approx(trajectory["loss"][step].item(), rel=1e-5), step
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    width = TINY.width
    for name, p in trainable:
        final = trajectory.get(f"final.{name}")
        if final is None:
            continue
        ours = p.detach()
        if name.endswith(("qkv.bias", "in_proj_bias")):  # the key third has a mathematically zero gradient
            ours, final = (torch.cat([t[:width], t[2 * width :]]) for t in (ours, final))
        assert (ours - final).norm() / final.norm() < 2e-5, name


@pytest.mark.parametrize(
    ("size", "file"),
    [("small", "official_pretrain_keys.json"), ("base", "official_pretrain_keys_base.json")],
)
def test_names_shapes_and_counts_equal_the_release(size: str, file: str, recorded: Path) -> None:
    official = json.loads((recorded / file).read_text())
    with torch.device("meta"):
        model = ReferenceLMIM(preset(size))
    ours = [(name, list(value.shape)) for name, value in model.state_dict().items()]
    assert ours == [(entry["key"], entry["shape"]) for entry in official["state_dict"]]
    assert sum(p.numel() for p in model.parameters()) == official["params_total"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == official["params_trainable"]


def test_uint8_images_are_the_float_images() -> None:
    pixels = torch.randint(0, 256, (2, 32, 128, 3), dtype=torch.uint8)
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(to_float(pixels), floats)
    model = ReferenceLMIM(preset("tiny", depth=1, decoder_depth=1)).eval()
    noise = torch.rand(2, 256)
    assert torch.equal(model(pixels, pixels, noise).loss, model(floats, floats, noise).loss)


def test_pixel_targets_are_patches_in_reading_order() -> None:
    images = torch.arange(3 * 32 * 128).float().view(1, 3, 32, 128)
    patches = patchify(images, 4)
    assert patches.shape == (1, 256, 48)
    expected = images[0, :, 4:8, 8:12].permute(1, 2, 0).flatten()  # patch row 1, column 2
    assert torch.equal(patches[0, 32 + 2], expected)
    normal = normalise_patches(patches)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(1, 256), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.var(-1), torch.ones(1, 256), atol=1e-4, rtol=0)


def test_mae_reads_only_visible_patches_and_scores_only_masked_ones() -> None:
    model = ReferenceMAE(preset("tiny", depth=1, mae_decoder_depth=1)).eval()
    images, noise = torch.rand(1, 3, 32, 128), torch.rand(1, 256)
    output = model(images, noise)
    assert output.latent.shape == (1, 1 + 64, 96)
    assert output.mask.sum() == 192
    hidden = output.mask[0].view(8, 32).repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    changed = torch.where(hidden, torch.rand_like(images), images)
    again = model(changed, noise)
    assert torch.equal(again.pred, output.pred)
    assert not torch.equal(again.loss, output.loss)


def test_training_mode_drops_and_eval_mode_does_not() -> None:
    model = ReferenceLMIM(preset("tiny", depth=1, decoder_depth=1))
    images, noise = torch.rand(1, 3, 32, 128), torch.rand(1, 256)
    losses = [model.train()(images, images, noise).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses = [model.eval()(images, images, noise).loss for _ in range(2)]
    assert losses[0] == losses[1]
