"""Layers and models of torch's classes and of stand-ins for those of other packages, and their inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from foreign_layers import Bert, LMIMDecoder, MlpBlock, ViTLayer
from timm_like import Block, DropPath, LayerScale
from torch import Tensor, nn

WIDTH, HEADS = 64, 2
X = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def block(**options: object) -> Block:
    return Block(WIDTH, HEADS, **options)


def attention(**options: object) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, **dict(batch_first=True) | options)


def encoder_layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **dict(dropout=0.0, batch_first=True) | options)


def decoder_layer(**options: object) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 48, **dict(dropout=0.0, batch_first=True) | options)


def transformer(**options: object) -> nn.Transformer:
    with warnings.catch_warnings(action="ignore"):  # some of its encoders take no nested tensors
        return nn.Transformer(WIDTH, HEADS, 2, 2, 48, 0.0, **options)


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels, timm's blocks, a norm and a head."""

    def __init__(self, dim: int = WIDTH, heads: int = HEADS, patches: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, dim) * 0.02)
        self.blocks = nn.Sequential(Block(dim, heads), Block(dim, heads))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def embed(self, images: Tensor) -> Tensor:
        return self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(images))).mean(1))


class MaskedAutoencoder(VisionTransformer):
    """The public MAE: mask by random noise, encode what is kept, put a token in the place of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.decoder_block = block()

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        batch, patches, width = x.shape
        kept = int(patches * (1 - mask_ratio))
        noise = torch.rand(batch, patches, device=x.device)
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x_masked = torch.gather(x, 1, shuffle[:, :kept].unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones([batch, patches], device=x.device)
        mask[:, :kept] = 0
        return x_masked, torch.gather(mask, 1, restore), restore

    def forward(self, images: Tensor) -> Tensor:
        x, mask, restore = self.random_masking(self.embed(images), 0.75)
        x = self.norm(self.blocks(x))
        masked = self.mask_token.repeat(x.shape[0], restore.shape[1] - x.shape[1], 1).to(x.dtype)
        x = torch.cat([x, masked], dim=1)
        x = self.decoder_block(torch.gather(x, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2])))
        return (self.head(x).square().mean(-1) * mask).sum() / mask.sum()


def scaled_and_normed() -> VisionTransformer:
    """With LayerScale, stochastic depth that is idle, and norms of queries and keys."""
    model = VisionTransformer()
    for each in model.blocks:
        each.ls1, each.ls2 = LayerScale(WIDTH), LayerScale(WIDTH)
        each.drop_path1 = each.drop_path2 = DropPath(0.0)
        each.attn.q_norm, each.attn.k_norm = (nn.LayerNorm(WIDTH // HEADS) for _ in range(2))
    return model


class Family:
    """A model and the shapes of its inputs."""

    def __init__(self, make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> None:
        self.make, self.shapes = make, shapes

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return perturbed(self.make())

    def inputs(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for shape in self.shapes]


def perturbed(model: nn.Module) -> nn.Module:
    """With weights away from where they start, norms and biases too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


IMAGES, TOKENS, FEWER = (2, 3, 16, 16), (2, 9, WIDTH), (2, 5, WIDTH)
FAMILIES = {
    "torch": Family(lambda: transformer(activation="gelu", batch_first=True), TOKENS, FEWER),
    "torch, pre-norm": Family(lambda: transformer(norm_first=True), (9, 2, WIDTH), (5, 2, WIDTH)),
    "timm's ViT": Family(VisionTransformer, IMAGES),
    "scaled ViT": Family(scaled_and_normed, IMAGES),
    "public MAE": Family(MaskedAutoencoder, IMAGES),
    "transformers' ViT": Family(lambda: nn.Sequential(*(ViTLayer(WIDTH, HEADS) for _ in "ab")), TOKENS),
    "transformers' BERT": Family(lambda: nn.Sequential(*(Bert(WIDTH, HEADS) for _ in "ab")), TOKENS),
    "torchvision's MLP": Family(lambda: MlpBlock(WIDTH, 48), TOKENS),
    "LMIM's decoder": Family(lambda: LMIMDecoder(WIDTH, HEADS, 48), FEWER, TOKENS),
}
VIT = FAMILIES["timm's ViT"]
