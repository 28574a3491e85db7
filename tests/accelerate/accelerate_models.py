"""Models of third-party layers (torch's, and stand-ins for those of other packages), and their runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import timm_like
import torch
import torch.nn.functional as F
from foreign_layers import LIKE as FOREIGN
from foreign_layers import Bert, DropPath, HuggingFaceViT, LayerScale, LMIMDecoder, MlpBlock
from timm_like import Block
from torch import Tensor, nn

from lmim_fast.layers.accelerate import AccelerationReport, accelerate

WIDTH, HEADS, DEPTH = 64, 2, 2


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """timm's VisionTransformer."""

    def __init__(
        self, dim: int = WIDTH, heads: int = HEADS, depth: int = DEPTH, patches: int = 16, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, dim) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, proj_drop=drop, attn_drop=drop) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class MaskedAutoencoder(nn.Module):
    """The public MAE: mask by random noise, encode what is kept, decode all."""

    def __init__(self, dim: int = WIDTH, heads: int = HEADS, depth: int = DEPTH, patches: int = 16) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, dim) * 0.02, requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.decoder_blocks = nn.ModuleList([Block(dim, heads)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, 48)

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

    def forward(self, images: Tensor, mask_ratio: float = 0.75) -> Tensor:
        x, mask, restore = self.random_masking(self.patch_embed(images) + self.pos_embed, mask_ratio)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        masked = self.mask_token.repeat(x.shape[0], restore.shape[1] - x.shape[1], 1)
        x = torch.cat([x, masked.to(x.dtype)], dim=1)
        x = torch.gather(x, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))
        target = F.unfold(images, 4, stride=4).transpose(1, 2)
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


class TextTransformer(nn.Module):
    """torch's encoder and decoder stacks as a recogniser has them: features in, characters out."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        options = dict(dropout=0.0, batch_first=True, activation="gelu", norm_first=False) | options
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **options), DEPTH, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 48, **options), DEPTH, nn.LayerNorm(WIDTH)
        )
        self.queries = nn.Parameter(torch.randn(5, WIDTH))
        self.batch_first = options["batch_first"]
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1).to(x.dtype)
        if not self.batch_first:
            x, queries = x.transpose(0, 1), queries.transpose(0, 1)
        return self.head(self.decoder(queries, self.encoder(x)))


@dataclass(frozen=True)
class Family:
    """A model and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self) -> nn.Module:
        """With weights away from where they start, norms and biases too."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def scaled_and_normed() -> VisionTransformer:
    """With LayerScale, stochastic depth that is idle, and norms of queries and keys."""
    model = VisionTransformer()
    for block in model.blocks:
        block.ls1, block.ls2 = LayerScale(WIDTH), LayerScale(WIDTH)
        block.drop_path1 = block.drop_path2 = DropPath(0.0)
        block.attn.q_norm, block.attn.k_norm = (nn.LayerNorm(WIDTH // HEADS) for _ in range(2))
    return model


class ReleasedDecoder(nn.Module):
    """A decoder layer of the released LMIM over features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LMIMDecoder(WIDTH, HEADS, 48, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :5], x)


IMAGES, FEATURES = (2, 3, 16, 16), (2, 9, WIDTH)
FAMILIES = {
    "torch Transformer": Family(TextTransformer, FEATURES),
    "torch Transformer, pre-norm": Family(lambda: TextTransformer(norm_first=True), FEATURES),
    "torch Transformer, relu": Family(lambda: TextTransformer(activation="relu"), FEATURES),
    "torch Transformer, sequence first": Family(lambda: TextTransformer(batch_first=False), FEATURES),
    "timm's ViT": Family(VisionTransformer, IMAGES),
    "ViT with LayerScale and q/k norms": Family(scaled_and_normed, IMAGES),
    "public MAE": Family(MaskedAutoencoder, IMAGES),
    "transformers' ViT": Family(
        lambda: nn.Sequential(*(HuggingFaceViT(WIDTH, HEADS) for _ in "ab")), FEATURES
    ),
    "transformers' BERT": Family(lambda: nn.Sequential(*(Bert(WIDTH, HEADS) for _ in "ab")), FEATURES),
    "torchvision's MLP": Family(lambda: MlpBlock(WIDTH, 48), FEATURES),
    "LMIM's decoder": Family(ReleasedDecoder, FEATURES),
}
LIKE = FOREIGN | {
    timm_like.Attention: "timm.Attention",
    timm_like.Mlp: "timm.Mlp",
    timm_like.Block: "timm.Block",
    MaskedAutoencoder: "mae.random_masking",
}


def accelerated(model: nn.Module, **options: object) -> AccelerationReport:
    """`accelerate`, which takes the stand-ins for what they stand for."""
    return accelerate(model, like=LIKE, **options)


def encoder_layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **dict(dropout=0.0, batch_first=True) | options)


def attention(**options: object) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, **dict(batch_first=True) | options)


Run = tuple[Tensor, dict[str, Tensor]]


def without_keys(name: str, value: Tensor) -> Tensor:
    """The bias of the keys has no effect: softmax does not see it, and its gradient is rounding alone."""
    if name.endswith(("qkv.bias", "in_proj_bias")):
        q, _, v = value.chunk(3)
        return torch.cat([q, v])
    return value[:0] if name.endswith(("key.bias", "k_proj.bias", "k_norm.bias")) else value


def run(model: nn.Module, x: Tensor, *, masking_seed: int = 3) -> Run:
    """Output and the gradients of all trained parameters, and of the input."""
    x = x.clone().requires_grad_()
    torch.manual_seed(masking_seed)
    output = model(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(output, [x, *named.values()], upstream)
    return output.detach(), {
        name: without_keys(name, gradient)
        for name, gradient in zip(["input", *named], gradients, strict=True)
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_same(found: Run, expected: Run, tolerance: float) -> None:
    assert found[0].dtype == expected[0].dtype
    assert (found[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    for name, gradient in expected[1].items():
        assert distance(found[1][name], gradient) <= tolerance, name


def swapped(family: Family, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model with its fast forms, and one without, of the same weights."""
    model = family.model()
    original = copy.deepcopy(model)
    accelerated(model, **options)
    return model, original
