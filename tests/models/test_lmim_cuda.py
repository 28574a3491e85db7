"""The fast LMIM on a CUDA device in bf16."""

import pytest
import torch
from torch import Tensor, nn

from lmim_fast.config import preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.reference import ReferenceLMIM

pytestmark = pytest.mark.gpu


def gradients(model: nn.Module, batch: tuple[Tensor, ...], low: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=low):
        loss = model(*batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("setting", ["off", "on"])
def test_bf16_loss_and_gradients_are_as_good_as_the_oracle_in_bf16(setting: str) -> None:
    config = preset("small", decoder_dropout=0.0, gelu_epilogue=setting)
    oracle, fast = ReferenceLMIM(config).cuda(), LMIM(config).cuda()
    fast.load_state_dict(oracle.state_dict())
    images, guidance = (torch.rand(64, 3, 32, 128, device="cuda") * 2 - 1 for _ in range(2))
    batch = images, guidance, torch.rand(64, 256, device="cuda")
    true_loss, truth = gradients(oracle, batch, low=False)
    plain_loss, plain = gradients(oracle, batch, low=True)
    loss, ours = gradients(fast, batch, low=True)
    assert (loss - true_loss).abs() <= 2 * (plain_loss - true_loss).abs() + 1e-3 * true_loss
    for name, expected in truth.items():
        if name.endswith(("qkv.bias", "in_proj_bias")):
            continue  # the key third is rounding noise around zero
        allowed = 3 * (plain[name] - expected).norm() + 1e-3 * expected.norm()
        assert (ours[name] - expected).norm() <= allowed, name


def test_fp32_loss_on_the_device_is_that_of_the_cpu() -> None:
    config = preset("tiny", decoder_dropout=0.0)
    model = LMIM(config)
    images, guidance, noise = torch.rand(2, 3, 32, 128), torch.rand(2, 3, 32, 128), torch.rand(2, 256)
    expected = model(images, guidance, noise).loss
    ours = model.cuda()(images.cuda(), guidance.cuda(), noise.cuda()).loss
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=0)


def test_dropout_gives_the_oracle_loss_in_distribution() -> None:
    config = preset("small", depth=1, decoder_dropout=0.3)
    oracle, fast = ReferenceLMIM(config).cuda().train(), LMIM(config).cuda().train()
    fast.load_state_dict(oracle.state_dict())
    images, guidance = (torch.rand(16, 3, 32, 128, device="cuda") * 2 - 1 for _ in range(2))
    noise = torch.rand(16, 256, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        expected, ours = (
            torch.stack([model(images, guidance, noise).loss_recon for _ in range(100)]).double()
            for model in (oracle, fast)
        )
    deviation = (expected.var() / 100 + ours.var() / 100).sqrt()
    # p = 0.3 is 77 / 256 in kernels, which moves the mean by far less than bf16 does
    assert (expected.mean() - ours.mean()).abs() < 4 * deviation + 2e-3 * expected.mean()
    assert 0.5 < (ours.std() / expected.std()) < 2.0
    assert ours.std() > 0


def test_two_hundred_bf16_steps_follow_the_oracle_within_the_noise_of_bf16() -> None:
    config = preset("tiny", decoder_dropout=0.0)
    start = ReferenceLMIM(config)
    batches = torch.Generator("cuda").manual_seed(5)
    crops = torch.rand(256, 3, 32, 128, device="cuda", generator=batches) * 2 - 1
    curves = {}
    for name, kind, low in (
        ("truth", ReferenceLMIM, False),
        ("plain", ReferenceLMIM, True),
        ("ours", LMIM, True),
    ):
        model = kind(config)
        model.load_state_dict(start.state_dict())
        model.cuda()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        batches.manual_seed(6)
        losses = []
        for _ in range(200):
            images = crops[torch.randint(256, (32,), device="cuda", generator=batches)]
            noise = torch.rand(32, 256, device="cuda", generator=batches)
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=low):
                loss = model(images, (0.8 * images + 0.1).clamp(-1, 1), noise).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[name] = torch.stack(losses).view(10, 20).mean(1)
    plain, ours = ((curves[name] - curves["truth"]).abs() / curves["truth"] for name in ("plain", "ours"))
    assert (ours <= 3 * plain.max() + 5e-3).all(), f"{ours.tolist()} against {plain.tolist()}"
    assert curves["ours"][-1] < 0.5 * curves["ours"][0]
