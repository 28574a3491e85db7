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


def test_bf16_loss_and_gradients_are_as_good_as_the_oracle_in_bf16() -> None:
    config = preset("small", decoder_dropout=0.0)
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
