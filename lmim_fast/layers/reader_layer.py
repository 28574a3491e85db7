"""Pre-norm decoder layer of the recogniser under the released names: for whole targets and token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmim_fast.layers.norm import add_norm, norm_linear, norm_mlp
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.epilogue import check_setting
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.mlp import gelu_linear

LAYER_NORM_EPS = 1e-5


class ReaderAttention(nn.Module):
    """The projections of an attention, without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(width, inner, bias=False)
        self.linear_k = nn.Linear(width, inner, bias=False)
        self.linear_v = nn.Linear(width, inner, bias=False)
        self.fc = nn.Linear(inner, width, bias=False)

    @property
    def kv_weight(self) -> Tensor:
        """(2 * inner, width): keys, then values."""
        return torch.cat([self.linear_k.weight, self.linear_v.weight])

    @property
    def qkv_weight(self) -> Tensor:
        """(3 * inner, width): queries, keys, values."""
        return torch.cat([self.linear_q.weight, self.linear_k.weight, self.linear_v.weight])


class ReaderMlp(nn.Module):
    """The two linears of the FFN."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)


class StepWeights(NamedTuple):
    """Weights of a layer in the compute dtype, made once for all steps of a reading."""

    self_qkv: Tensor
    self_out: Tensor
    memory_q: Tensor
    memory_out: Tensor
    first: Tensor
    second: Tensor


class ReaderLayer(nn.Module):
    """Causal self-attention, cross-attention over a memory and FFN with exact GELU, each after a norm.

    Its last residual add is left to the next norm, as in `PackedBlock`.

    Args:
        width:    D.
        heads:    H of both attentions.
        head_dim: features of a head; H * head_dim may differ from D.
        hidden:   hidden features of the FFN.
        dropout:  probability for attention weights and branches, in training mode.
        epilogue: "auto", "on" or "off": GELU in the epilogue of the FFN's matmuls (`ops/epilogue.py`).
    Raises:
        ValueError: dropout is outside [0, 1), or the epilogue is unknown.
    Source: the decoder layer of MMOCR's TFDecoder, as LMIM's released recogniser has it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        hidden: int,
        dropout: float = 0.1,
        *,
        epilogue: str = "auto",
    ) -> None:
        super().__init__()
        check_probability(dropout)
        self.heads, self.p, self.epilogue = heads, dropout, check_setting(epilogue)
        self.self_attn = ReaderAttention(width, heads * head_dim)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.enc_attn = ReaderAttention(width, heads * head_dim)
        self.mlp = ReaderMlp(width, hidden)

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        memory_kv: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over whole targets.

        Args:
            residual:    (B * T, D) residual stream, image after image.
            branch:      (B * T, D) matmul result that is still to be added to it; None at the first layer.
            branch_bias: (D,) bias of the branch, or None.
            memory_kv:   (B, M, 2 * H * head_dim) keys and values of the memory.
        Returns:
            new residual, branch and branch_bias.
        """
        q, residual = self.memory_queries(residual, branch, branch_bias, len(memory_kv))
        context = cross_attention(q, None, memory_kv, None, self.heads, p=self.dropout)
        branch = linear(context.flatten(0, 1), self.enc_attn.fc.weight)
        branch, residual = norm_mlp(
            *(residual, branch, None, self.norm3, self.mlp.w_1, self.mlp.w_2),
            p=self.dropout,
            epilogue=self.epilogue,
        )
        return residual, branch, self.mlp.w_2.bias

    def memory_queries(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Self-attention, then the queries of the cross-attention (B, T, H * head_dim); and the residual."""
        p, segments = self.dropout, [(batch, len(residual) // batch)]
        weight = self.self_attn.qkv_weight
        qkv, residual = norm_linear(residual, branch, branch_bias, self.norm1, weight, p=p)
        context = self_attention(qkv, None, self.heads, segments, p=p, causal=True)
        branch = linear(context, self.self_attn.fc.weight)
        q, residual = norm_linear(residual, branch, None, self.norm2, self.enc_attn.linear_q.weight, p=p)
        return q.unflatten(0, segments[0]), residual

    def step_weights(self) -> StepWeights:
        """The weights that `step` multiplies by."""
        weights = (
            self.self_attn.qkv_weight,
            self.self_attn.fc.weight,
            self.enc_attn.linear_q.weight,
            self.enc_attn.fc.weight,
            self.mlp.w_1.weight,
            self.mlp.w_2.weight,
        )
        return StepWeights(*(weight.to(compute_dtype(weight)) for weight in weights))

    def step(
        self,
        stream: tuple[Tensor, Tensor | None, Tensor | None],
        weights: StepWeights,
        memory_kv: Tensor,
        cache: Tensor,
        number: int,
        key_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer for the next token of every row, without dropout and gradients.

        Args:
            stream:      residual (R, D), branch (R, D) and branch_bias (D,), as `forward` takes them; R is B
                         images times their beams.
            weights:     from `step_weights`.
            memory_kv:   (B, M, 2 * H * head_dim).
            cache:       (R, longest, 2 * H * head_dim) keys and values of all tokens; written at `number`.
            number:      place of the token, from 0.
            key_lengths: (R,) int32, all number + 1.
        Returns:
            new residual, branch and branch_bias.
        """
        dtype, inner = weights.self_qkv.dtype, cache.shape[-1] // 2
        rows, residual = add_norm(*stream, self.norm1, dtype)
        q, kv = linear(rows, weights.self_qkv).split([inner, 2 * inner], dim=-1)
        cache[:, number] = kv
        keys, seen = cache, None
        if cache.device.type == "cuda":  # one shape for all tokens: one kernel
            seen = key_lengths
        else:
            keys = cache[:, : number + 1]
        context = cross_attention(q[:, None], None, keys, None, self.heads, key_lengths=seen)
        branch = linear(context[:, 0], weights.self_out)
        rows, residual = add_norm(residual, branch, None, self.norm2, dtype)
        q = linear(rows, weights.memory_q).unflatten(0, (len(memory_kv), -1))  # beams are queries of an image
        context = cross_attention(q, None, memory_kv, None, self.heads)
        branch = linear(context.flatten(0, 1), weights.memory_out)
        rows, residual = add_norm(residual, branch, None, self.norm3, dtype)
        branch = gelu_linear(linear(rows, weights.first), self.mlp.w_1.bias, weights.second)
        return residual, branch, self.mlp.w_2.bias

    @property
    def dropout(self) -> float:
        """Dropout probability: 0 in eval mode."""
        return self.p if self.training else 0.0
