"""The oracle of the recogniser in plain PyTorch, names as released.

Slow on purpose: explicit softmax attention, and greedy reading that runs the decoder again for every token.
Source: LMIM (CVPR 2025, arXiv 2503.18746) and its released code, whose decoder is MMOCR's TFDecoder.
Dims: B batch, T target tokens, M memory tokens, D decoder width, H heads, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.reference import Encoder, initialise, to_float

LAYER_NORM_EPS = 1e-5  # torch's default; the last norm of the decoder has LAST_NORM_EPS
LAST_NORM_EPS = 1e-6
POSITIONS = 200  # rows of the released position table


@dataclass
class ReferenceRecognition:
    """What a forward pass under given targets computes."""

    logits: Tensor  # (B, T, C)
    loss: Tensor  # ()


@dataclass
class ReferenceReading:
    """What greedy reading gives, up to the longest target and behind EOS too."""

    ids: Tensor  # (B, T)
    probabilities: Tensor  # (B, T, C)
    maps: Tensor  # (B, T, M) cross-attention of the last layer, mean of the heads


def position_table(width: int, positions: int) -> Tensor:
    """(1, positions, width): sin in even and cos in odd features, wavelengths as in Vaswani et al. 2017."""
    frequency = 10000.0 ** -(2 * (torch.arange(width) // 2).double() / width)
    angle = torch.arange(positions).double()[:, None] * frequency
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()[None]


class Attention(nn.Module):
    """Multi-head attention without biases, q from x, k and v from memory."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        width, inner = config.decoder_width, config.decoder_heads * config.decoder_head_dim
        self.heads, self.dropout = config.decoder_heads, nn.Dropout(config.dropout)
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.fc = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), memory (B, M, D), mask (T, M) True where attended: (B, T, D), weights (B, H, T, M)."""
        split = (
            linear(source).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, source in ((self.linear_q, x), (self.linear_k, memory), (self.linear_v, memory))
        )
        q, k, v = split  # (B, H, T or M, D / H)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(dim=-1)
        context = (self.dropout(weights) @ v).transpose(1, 2).flatten(2)
        return self.dropout(self.fc(context)), weights


class FeedForward(nn.Module):
    """Two linears with exact GELU between."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.dropout(self.w_2(F.gelu(self.w_1(x))))


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and FFN."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.self_attn = Attention(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(3))
        self.enc_attn = Attention(config)
        self.mlp = FeedForward(width, config.decoder_ffn, config.dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), memory (B, M, D), mask (T, T): (B, T, D), cross-attention weights (B, H, T, M)."""
        rows = self.norm1(x)
        x = x + self.self_attn(rows, rows, mask)[0]
        attended, weights = self.enc_attn(self.norm2(x), memory)
        x = x + attended
        return x + self.mlp(self.norm3(x)), weights


class PositionEncoding(nn.Module):
    """The position table; a module of its own for the released name."""

    position_table: Tensor

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("position_table", position_table(width, positions))

    def forward(self, x: Tensor) -> Tensor:
        """Add positions to (B, T, D)."""
        return x + self.position_table[:, : x.shape[1]]


class Decoder(nn.Module):
    """Autoregressive decoder: class numbers and a memory to logits."""

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.trg_word_emb = nn.Embedding(config.classes + 1, width)
        self.position_enc = PositionEncoding(width, max(POSITIONS, config.max_length))
        self.dropout = nn.Dropout(config.dropout)
        self.layer_stack = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_depth))
        self.layer_norm = nn.LayerNorm(width, eps=LAST_NORM_EPS)
        self.classifier = nn.Linear(width, config.classes)

    def forward(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (B, T), memory (B, M, D): logits (B, T, C), last cross-attention weights (B, H, T, M)."""
        x = self.dropout(self.position_enc(self.trg_word_emb(inputs)))
        tokens = inputs.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        for layer in self.layer_stack:
            x, weights = layer(x, memory, mask)
        return self.classifier(self.layer_norm(x)), weights


class ReferenceRecognizer(nn.Module):
    """Encoder, a linear with LayerNorm, and the autoregressive decoder.

    Args:
        config: sizes; drop_path must be 0, because this encoder has no stochastic depth.
    Raises:
        ValueError: config.drop_path is not 0.
    """

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        if config.drop_path:
            raise ValueError(
                f"the oracle has no stochastic depth: drop_path must be 0, got {config.drop_path}"
            )
        self.config = config
        encoder, width = Encoder(config.encoder), config.decoder_width
        self.pos_embed = encoder.pos_embed  # two released names each for the positions and the projection
        self.encoder = encoder
        self.decoder = Decoder(config)
        self.linear_norm = nn.Sequential(
            nn.Linear(config.encoder.width, width), nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        )
        self.patch_embed = encoder.patch_embed
        self.apply(initialise)
        nn.init.normal_(self.decoder.trg_word_emb.weight, std=0.02)

    def encode(self, images: Tensor) -> Tensor:
        """Images, as `forward` takes them, to the memory (B, M, D)."""
        return self.linear_norm(self.encoder.forward_encoder(to_float(images)))

    def forward(self, images: Tensor, targets: Tensor, lengths: Tensor | None = None) -> ReferenceRecognition:
        """Logits under the targets, and the loss.

        Args:
            images:  float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            targets: (B, T) int64: characters, EOS, then PAD.
            lengths: (B,) tokens with EOS; None counts them up to EOS.
        """
        config = self.config
        if lengths is None:
            lengths = torch.tensor([row.index(config.eos) + 1 for row in targets.tolist()])
        start = torch.full_like(targets[:, :1], config.start)
        logits = self.decoder(torch.cat([start, targets[:, :-1]], dim=1), self.encode(images))[0]
        loss = logits.new_zeros(())
        for row, target, length in zip(logits, targets, lengths.tolist(), strict=True):
            loss = loss + self.cross_entropy(row[:length], target[:length])
        return ReferenceRecognition(logits, loss / len(targets))

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed over tokens; logits (T, C), targets (T,). Smoothing spreads over all classes but PAD."""
        smoothing, config = self.config.label_smoothing, self.config
        truth = torch.full_like(logits, smoothing / (config.classes - 1))
        truth[:, config.pad] = 0
        truth[torch.arange(len(targets)), targets] += 1 - smoothing
        return -(truth * logits.log_softmax(dim=-1)).sum()

    @torch.no_grad()
    def greedy(self, images: Tensor) -> ReferenceReading:
        """The likeliest token at each place; the decoder reads all earlier ones again. Ignores EOS."""
        memory, steps = self.encode(images), self.config.max_length
        ids = torch.full((len(images), 1), self.config.start)
        for _ in range(steps):
            logits, weights = self.decoder(ids, memory)
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        return ReferenceReading(ids[:, 1:], logits.softmax(dim=-1), weights.mean(dim=1))
