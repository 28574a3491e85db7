"""The oracle and a fast model with the same weights, and how their gradients are compared."""

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig


def twins(oracle: nn.Module, fast: nn.Module) -> None:
    """Give both the same weights, away from the symmetric start (biases and norms too)."""
    with torch.no_grad():
        for p in oracle.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    fast.load_state_dict(oracle.state_dict(), strict=True)
    assert list(fast.state_dict()) == list(oracle.state_dict())
    oracle.load_state_dict(fast.state_dict(), strict=True)


def assert_same_gradients(oracle: nn.Module, fast: nn.Module) -> None:
    ours = dict(fast.named_parameters())
    for name, p in oracle.named_parameters():
        if p.grad is None:
            assert ours[name].grad is None, name
            continue
        mine, theirs = ours[name].grad, p.grad
        assert mine is not None, name
        if name.endswith(("qkv.bias", "in_proj_bias")):  # the key third has a mathematically zero gradient
            third = len(theirs) // 3
            mine, theirs = (torch.cat([t[:third], t[2 * third :]]) for t in (mine, theirs))
        error = (mine - theirs).norm() / theirs.norm()
        # Most are below 1e-6; weights of a query whose scores hardly differ come to 7e-5 on some CPUs.
        assert error < 2e-4, f"{name}: relative L2 {error:.2e}"


def batch_of(config: ModelConfig, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.rand(size, 3, *config.image_size) * 2 - 1
    guidance = (images + 0.3 * torch.randn_like(images)).clamp(-1, 1)
    return images, guidance, torch.rand(size, config.num_patches)
