"""The recogniser's autoregressive decoder under the released names: whole targets, and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.layers.norm import add_norm
from lmim_fast.layers.parts import hooks_on_all, is_biased_linear
from lmim_fast.layers.plain import product_and_bias
from lmim_fast.layers.reader_layer import ReaderLayer
from lmim_fast.ops.linear import linear, shared_input_linears

LAST_NORM_EPS = 1e-6
POSITIONS = 200  # rows of the released position table


class PositionEncoding(nn.Module):
    """Fixed positions, under the released name."""

    position_table: Tensor

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.register_buffer("position_table", line_positions(width, positions))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Tokens (B, T, D), and the positions from `first` on added to them."""
        return x + self.position_table[:, first : first + x.shape[1]]


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
        residual = F.dropout(self.position_enc(self.trg_word_emb(inputs)), p).flatten(0, 1)
        branch, branch_bias = None, None
        keys = self.memory_keys(memory) if keys is None else keys
        for layer, kv in zip(self.layers, keys, strict=True):
            residual, branch, branch_bias = layer(residual, branch, branch_bias, kv)
        rows, _ = add_norm(residual, branch, branch_bias, self.layer_norm, memory.dtype, p=p)
        logits, bias = product_and_bias(rows, self.classifier)
        return (logits + bias.to(logits.dtype)).unflatten(0, inputs.shape)

    def memory_keys(self, memory: Tensor) -> list[Tensor]:
        """Keys and values (B, M, 2 * heads * head_dim) of the memory (B, M, D) for each layer."""
        reads = [layer.reads_weights() for layer in self.layers]
        weights = [layer.enc_attn.kv_weight for layer, read in zip(self.layers, reads, strict=True) if read]
        keys = iter(shared_input_linears(memory, weights) if weights else [])
        return [
            next(keys) if read else layer.enc_attn.memory_keys(memory)
            for layer, read in zip(self.layers, reads, strict=True)
        ]


class StepDecoder:
    """The decoder for reading token by token: weights in the compute dtype, and a cache of static shape.

    Weights are read, and parts that are called are chosen, where it is made: make one for each reading.

    Args:
        decoder: whose weights are used, without dropout; make and use it under `torch.no_grad`.
        keys:    of each layer, from `memory_keys`, for B images.
        beams:   rows of an image; R = B * beams.
        longest: tokens that the cache has room for.
    """

    def __init__(self, decoder: RecognizerDecoder, keys: Sequence[Tensor], beams: int, longest: int) -> None:
        self.decoder, self.keys = decoder, keys
        self.maps = [layer.step_maps(keys[0].dtype) for layer in decoder.layers]
        classifier = decoder.classifier
        if is_biased_linear(classifier) and not hooks_on_all():  # cast once; the bias is added in this dtype
            weight = classifier.weight.to(keys[0].dtype)
            self.classify = lambda rows: linear(rows, weight) + classifier.bias.to(rows.dtype)
        else:
            self.classify = classifier
        rows = len(keys[0]) * beams
        self.cache = keys[0].new_zeros(len(keys), rows, longest, keys[0].shape[-1])
        self.lengths = torch.arange(1, longest + 1, device=keys[0].device, dtype=torch.int32)

    def step(self, tokens: Tensor, number: int) -> Tensor:
        """Log probabilities (R, classes) fp32 of token `number`, after the `tokens` (R,) before it."""
        decoder = self.decoder
        embedded = decoder.position_enc(decoder.trg_word_emb(tokens)[:, None], number)[:, 0]
        stream: tuple[Tensor, Tensor | None, Tensor | None] = (embedded, None, None)
        lengths = self.lengths[number].expand(len(tokens)).contiguous()
        for layer, maps, kv, cache in zip(decoder.layers, self.maps, self.keys, self.cache, strict=True):
            stream = layer.step(stream, maps, kv, cache, number, lengths)
        rows, _ = add_norm(*stream, decoder.layer_norm, self.cache.dtype)
        return self.classify(rows).float().log_softmax(dim=-1)

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
