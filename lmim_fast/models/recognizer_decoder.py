"""The recogniser's autoregressive decoder under the released names: whole targets, and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.layers.norm import add_norm
from lmim_fast.layers.reader_layer import ReaderLayer
from lmim_fast.ops.linear import compute_dtype, linear, shared_input_linears

LAST_NORM_EPS = 1e-6
POSITIONS = 200  # rows of the released position table


class PositionEncoding(nn.Module):
    """The position table, under the released name."""

    position_table: Tensor

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("position_table", line_positions(width, positions))


class RecognizerDecoder(nn.Module):
    """Embedding, pre-norm layers and classifier.

    Source: MMOCR's TFDecoder, as LMIM's released recogniser has it.
    """

    def __init__(self, config: RecognizerConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.p = config.dropout
        self.trg_word_emb = nn.Embedding(config.classes + 1, width)
        self.position_enc = PositionEncoding(width, max(POSITIONS, config.max_length))
        sizes = width, config.decoder_heads, config.decoder_head_dim, config.decoder_ffn, config.dropout
        self.layer_stack = nn.ModuleList(
            ReaderLayer(*sizes, epilogue=config.encoder.gelu_epilogue) for _ in range(config.decoder_depth)
        )
        self.layer_norm = nn.LayerNorm(width, eps=LAST_NORM_EPS)
        self.classifier = nn.Linear(width, config.classes)

    @property
    def layers(self) -> list[ReaderLayer]:
        """The decoder layers in order."""
        return [cast(ReaderLayer, layer) for layer in self.layer_stack]

    def forward(self, inputs: Tensor, memory: Tensor, keys: Sequence[Tensor] | None = None) -> Tensor:
        """Logits of whole targets.

        Args:
            inputs: (B, T) int64: start token, then the target without its last token.
            memory: (B, M, D) in the compute dtype.
            keys:   those of `memory_keys`, if they are made already.
        Returns:
            (B, T, classes) in the compute dtype.
        """
        p = self.p if self.training else 0.0
        table = self.position_enc.position_table[:, : inputs.shape[1]]
        residual = F.dropout(self.trg_word_emb(inputs) + table, p).flatten(0, 1)
        branch, branch_bias = None, None
        keys = self.memory_keys(memory) if keys is None else keys
        for layer, kv in zip(self.layers, keys, strict=True):
            residual, branch, branch_bias = layer(residual, branch, branch_bias, kv)
        dtype, weight = memory.dtype, self.classifier.weight
        rows, _ = add_norm(residual, branch, branch_bias, self.layer_norm, dtype, p=p)
        logits = linear(rows, weight) + self.classifier.bias.to(dtype)
        return logits.unflatten(0, inputs.shape)

    def memory_keys(self, memory: Tensor) -> list[Tensor]:
        """Keys and values (B, M, 2 * heads * head_dim) of the memory (B, M, D) for each layer."""
        return shared_input_linears(memory, [layer.enc_attn.kv_weight for layer in self.layers])


class StepDecoder:
    """The decoder for reading token by token: weights in the compute dtype, and a cache of static shape.

    Args:
        decoder: whose weights are used, without dropout; make and use it under `torch.no_grad`.
        keys:    of each layer, from `memory_keys`, for B images.
        beams:   rows of an image; R = B * beams.
        longest: tokens that the cache has room for.
    """

    def __init__(self, decoder: RecognizerDecoder, keys: Sequence[Tensor], beams: int, longest: int) -> None:
        self.decoder, self.keys = decoder, keys
        self.weights = [layer.step_weights() for layer in decoder.layers]
        weight = decoder.classifier.weight
        self.dtype = compute_dtype(weight)
        self.classifier = weight.to(self.dtype)
        rows = len(keys[0]) * beams
        self.cache = keys[0].new_zeros(len(keys), rows, longest, keys[0].shape[-1])
        self.lengths = torch.arange(1, longest + 1, device=weight.device, dtype=torch.int32)

    def step(self, tokens: Tensor, number: int) -> Tensor:
        """Log probabilities (R, classes) fp32 of token `number`, after the `tokens` (R,) before it."""
        decoder = self.decoder
        embedded = decoder.trg_word_emb(tokens) + decoder.position_enc.position_table[0, number]
        stream: tuple[Tensor, Tensor | None, Tensor | None] = (embedded, None, None)
        lengths = self.lengths[number].expand(len(tokens)).contiguous()
        for layer, weights, kv, cache in zip(
            decoder.layers, self.weights, self.keys, self.cache, strict=True
        ):
            stream = layer.step(stream, weights, kv, cache, number, lengths)
        rows, _ = add_norm(*stream, decoder.layer_norm, self.dtype)
        logits = linear(rows, self.classifier) + decoder.classifier.bias.to(self.dtype)
        return logits.float().log_softmax(dim=-1)

    def reorder(self, rows: Tensor, number: int) -> None:
        """Let row r go on from the tokens 0 .. number of row `rows[r]` (R,)."""
        written = self.cache[:, :, : number + 1]
        written.copy_(written.index_select(1, rows))


def line_positions(width: int, positions: int) -> Tensor:
    """(1, positions, width) fp32: sin in even features, cos in odd ones; Vaswani et al. 2017."""
    feature = torch.arange(width, dtype=torch.float64)
    frequency = 10000.0 ** -(2 * (feature // 2) / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.where(feature % 2 == 0, angle.sin(), angle.cos()).float()[None]
