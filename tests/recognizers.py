"""Small recognisers of the tests, and the recorded one."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.config.recognizer import RecognizerConfig

RECORDED = RecognizerConfig(
    encoder=ModelConfig(width=64, depth=2, heads=2),
    decoder_width=64,
    decoder_depth=2,
    decoder_heads=2,
    decoder_head_dim=32,
    decoder_ffn=32,
)
# The attention of 96 features is wider than the decoder.
ODD = RecognizerConfig(
    encoder=ModelConfig(image_size=(16, 64), width=100, depth=3, heads=5, mlp_ratio=3.0, pos_grid="true"),
    classes=14,
    max_length=9,
    decoder_width=70,
    decoder_depth=3,
    decoder_heads=3,
    decoder_head_dim=32,
    decoder_ffn=44,
    dropout=0.0,
)


def tensors(recorded: Path) -> dict[str, Tensor]:
    return load_file(recorded / "recmodel_tiny_seed11.safetensors")


def load_recorded(model: nn.Module, recorded: Path) -> None:
    model.load_state_dict(load_file(recorded / "recmodel_tiny_seed11_weights.safetensors"), strict=True)


def assert_recorded_gradients(model: nn.Module, recorded: Path) -> None:
    gradients = load_file(recorded / "recmodel_tiny_seed11_grads.safetensors")
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(gradients)
    for name, expected in gradients.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 2e-5, f"{name}: relative L2 {error:.2e}"


def counted(lengths: Tensor, tokens: int) -> Tensor:
    """(B, T) True at the characters and EOS."""
    return torch.arange(tokens) < lengths[:, None]


def batch_of(config: RecognizerConfig, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, targets of various lengths (the longest has no place for PAD), and the lengths."""
    images = torch.rand(size, 3, *config.encoder.image_size) * 2 - 1
    longest = config.max_length
    lengths = torch.tensor([longest, *(2 + 3 * number % (longest - 1) for number in range(size - 1))])
    targets = torch.randint(config.characters, (size, longest))
    targets[torch.arange(size), lengths - 1] = config.eos
    targets[~counted(lengths, longest)] = config.pad
    return images, targets, lengths
