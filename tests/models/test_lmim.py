"""The fast LMIM and MAE against the oracle."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from twins import assert_same_gradients, batch_of, twins

from lmim_fast.config import ModelConfig, preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.reference import ReferenceLMIM, ReferenceMAE
from lmim_fast.train.parallel import frozen_to_bf16

TINY = preset("tiny", decoder_dropout=0.0)
ODD = ModelConfig(
    image_size=(32, 64),
    width=100,
    depth=3,
    heads=5,
    mlp_ratio=3.0,
    decoder_width=60,
    decoder_depth=8,
    decoder_heads=3,
    decoder_ffn=100,
    decoder_dropout=0.0,
    mask_ratio=0.6,
    pos_grid="true",
)
# One encoder block on crops of 16 x 64 pixels, for tests of what no size changes.
SMALLEST = preset(
    "tiny",
    image_size=(16, 64),
    pos_grid="true",
    width=64,
    depth=1,
    heads=2,
    decoder_width=64,
    decoder_heads=2,
    decoder_ffn=128,
    decoder_dropout=0.0,
)
CASES = {
    "tiny": TINY,
    "small": preset("small", depth=2, decoder_dropout=0.0),
    "odd": ODD,
    "true_grid": dataclasses.replace(TINY, pos_grid="true"),
    "align_weight": dataclasses.replace(TINY, align_weight=0.3),
    "align_stops_masked": dataclasses.replace(TINY, align_stop_gradient="masked"),
    "align_stops_guidance": dataclasses.replace(TINY, align_stop_gradient="guidance"),
    "pixel": dataclasses.replace(TINY, target="pixel"),
    "norm_pixel": dataclasses.replace(TINY, target="norm_pixel"),
    "no_guidance": dataclasses.replace(TINY, guidance=False),
    "ca_sa": dataclasses.replace(TINY, decoder_order="ca_sa"),
    "one_layer": dataclasses.replace(TINY, decoder_depth=1),
    "one_layer_ca_sa": dataclasses.replace(TINY, decoder_depth=1, decoder_order="ca_sa"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_the_oracle(name: str) -> None:
    config = CASES[name]
    oracle, fast = ReferenceLMIM(config), LMIM(config)
    twins(oracle, fast)
    batch = batch_of(config)
    expected, output = oracle(*batch), fast(*batch)
    for loss in ("loss", "loss_recon", "loss_align"):
        torch.testing.assert_close(getattr(output, loss), getattr(expected, loss), rtol=1e-5, atol=1e-7)
    rows = output.ids_masked[:, :, None].expand_as(output.pred)
    torch.testing.assert_close(output.pred, expected.pred.gather(1, rows), rtol=0, atol=3e-5)
    torch.testing.assert_close(output.target, expected.target.gather(1, rows), rtol=0, atol=3e-5)
    assert torch.equal(output.mask, expected.mask)
    expected.loss.backward()
    output.loss.backward()
    assert_same_gradients(oracle, fast)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_mae_loss_and_every_gradient_equal_the_oracle(config: ModelConfig) -> None:
    oracle, fast = ReferenceMAE(config), MAE(config)
    twins(oracle, fast)
    images, _, noise = batch_of(config)
    expected, output = oracle(images, noise), fast(images, noise)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    expected.loss.backward()
    output.loss.backward()
    assert_same_gradients(oracle, fast)


def test_uint8_images_give_the_loss_of_the_float_images() -> None:
    fast = LMIM(TINY)
    pixels = torch.randint(0, 256, (2, 32, 128, 3), dtype=torch.uint8)
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    noise = torch.rand(2, 256)
    torch.testing.assert_close(fast(pixels, pixels, noise).loss, fast(floats, floats, noise).loss)


def test_dropout_gives_the_oracle_loss_in_distribution() -> None:
    config = dataclasses.replace(SMALLEST, decoder_dropout=0.3)
    oracle, fast = ReferenceLMIM(config).train(), LMIM(config).train()
    twins(oracle, fast)
    batch = batch_of(config)
    with torch.no_grad():
        expected, ours = (
            torch.tensor([model(*batch).loss_recon.item() for _ in range(60)]) for model in (oracle, fast)
        )
    deviation = (expected.var() / 60 + ours.var() / 60).sqrt()
    assert (expected.mean() - ours.mean()).abs() < 4 * deviation
    assert 0.5 < (ours.std() / expected.std()) < 2.0
    assert ours.std() > 0


@pytest.mark.parametrize("kind", [LMIM, MAE])
def test_two_threads_give_the_same_bits_every_time(kind: type[nn.Module]) -> None:
    """Enough rows that torch shares every op between the threads; atomics would show in a few repeats."""
    model = kind(preset("tiny", depth=1, decoder_depth=1, mae_decoder_depth=1)).train()
    images, guidance, noise = batch_of(model.config, 16)
    batch = (images, guidance, noise) if kind is LMIM else (images, noise)
    runs = []
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            model.zero_grad()
            torch.manual_seed(1)
            model(*batch).loss.backward()
            runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(1)
    for name, first in runs[0].items():
        assert all(torch.equal(run[name], first) for run in runs[1:]), name


def test_teacher_gets_no_gradient_and_eval_mode_has_no_dropout() -> None:
    fast = LMIM(preset("tiny"))
    batch = batch_of(fast.config)
    fast(*batch).loss.backward()
    assert all(p.grad is None for p in fast.model_maeenc_momentum.parameters())
    fast.eval()
    assert torch.equal(fast(*batch).loss, fast(*batch).loss)


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_bf16_autocast_stays_near_fp32(residual: str) -> None:
    config = dataclasses.replace(TINY, residual=residual)
    oracle, fast = ReferenceLMIM(config), LMIM(config)
    twins(oracle, fast)
    batch = batch_of(config)
    truth = oracle(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = oracle(*batch)
        ours = fast(*batch)
    assert ours.pred.dtype == torch.bfloat16
    assert ours.loss.dtype == torch.float32
    for output in (plain, ours, truth):
        output.loss.backward(
            inputs=[p for p in (*oracle.parameters(), *fast.parameters()) if p.requires_grad]
        )
    error = (ours.loss - truth.loss).abs() / truth.loss
    assert error < max(2 * (plain.loss - truth.loss).abs() / truth.loss, 5e-3), error


def test_bf16_gradients_are_as_good_as_the_oracle_in_bf16() -> None:
    oracle, fast = ReferenceLMIM(TINY), LMIM(TINY)
    twins(oracle, fast)
    batch = batch_of(TINY)

    def gradients(model: nn.Module, low: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            loss = model(*batch).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    truth, plain, ours = gradients(oracle, False), gradients(oracle, True), gradients(fast, True)
    total = {
        key: sum(((value[name] - truth[name]) ** 2).sum() for name in truth).sqrt()
        for key, value in (("plain", plain), ("ours", ours))
    }
    assert total["ours"] < 3 * total["plain"]


def test_wrong_inputs_are_named() -> None:
    fast = LMIM(TINY)
    images, guidance, noise = batch_of(TINY)
    with pytest.raises(ValueError, match="guidance view"):
        fast(images, None, noise)
    with pytest.raises(ValueError, match=r"uint8 \(B, height, width, 3\).*int64"):
        fast(images.long(), guidance, noise)
    with pytest.raises(ValueError, match="gives 128 patches, not 256"):
        fast(images[..., :64], guidance, noise)


def test_a_hundred_steps_follow_the_oracle() -> None:
    """New crops and masks in every step; measured: 2e-7, and a sixth of the first loss at the end."""
    config = dataclasses.replace(SMALLEST, decoder_depth=1)
    oracle, fast = ReferenceLMIM(config), LMIM(config)
    twins(oracle, fast)
    curves = []
    for model in (oracle, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95))
        generator, curve = torch.Generator().manual_seed(5), []
        crops = torch.rand(32, 3, *config.image_size, generator=generator) * 2 - 1
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 20)
            images = crops[torch.randint(32, (4,), generator=generator)]
            guidance = (0.8 * images + 0.1).clamp(-1, 1)
            loss = model(images, guidance, torch.rand(4, config.num_patches, generator=generator)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)
    assert curves[0][-20:].mean() < 0.3 * curves[0][0]


def test_patches_selected_by_noise_give_the_same_loss_as_that_noise() -> None:
    fast = LMIM(TINY)
    images, guidance, noise = batch_of(TINY)
    expected = fast(images, guidance, noise)
    patches = expected.ids_visible, expected.ids_masked
    assert torch.equal(fast(images, guidance, patches=patches).loss, expected.loss)
    with pytest.raises(ValueError, match=r"ids of visible patches must be \(2, 51\), got \(2, 205\)"):
        fast(images, guidance, patches=patches[::-1])


def test_a_teacher_in_bf16_changes_no_bit_of_a_bf16_step() -> None:
    fast = LMIM(TINY)
    batch = batch_of(TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fast(*batch).loss
        frozen_to_bf16(fast)
        loss = fast(*batch).loss
    assert torch.equal(loss, expected)
    teacher = fast.model_maeenc_momentum
    assert teacher.blocks[0].attn.qkv.weight.dtype == teacher.patch_embed.proj.weight.dtype == torch.bfloat16
    assert teacher.norm.weight.dtype == teacher.pos_embed.dtype == torch.float32
    assert fast.model_maeenc.blocks[0].attn.qkv.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [LMIM, MAE])
def test_the_model_compiles_into_one_graph_with_the_same_loss_and_gradients(kind: type[nn.Module]) -> None:
    config = preset("tiny", depth=1, mae_decoder_depth=1, decoder_dropout=0.0)
    model = kind(config)
    images, guidance, noise = batch_of(config)
    batch = (images, guidance, noise) if kind is LMIM else (images, noise)
    expected = model(*batch).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(expected, trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(*batch).loss
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, trained), truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_models_of_other_mask_ratios_compile_one_after_the_other() -> None:
    torch.compiler.reset()
    first = dataclasses.replace(SMALLEST, decoder_depth=1)
    for size, config in ((2, first), (3, dataclasses.replace(first, mask_ratio=0.6))):
        model, batch = LMIM(config), batch_of(config, size)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*batch).loss, model(*batch).loss)
