"""Pre-norm decoder layer of the recogniser under the released names: for whole targets and token by token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.norm import add_norm, fused_add_norm, norm_linear, norm_mlp
from lmim_fast.layers.parts import hooks_on_all, is_biased_linear, is_linear, is_norm, is_plain
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.epilogue import check_setting
from lmim_fast.ops.linear import linear
from lmim_fast.ops.mlp import gelu_linear

LAYER_NORM_EPS = 1e-5


class ReaderAttention(nn.Module):
    """The projections of an attention, without biases.

    The layer uses them one by one: hooks on a ReaderAttention do not fire, those on its projections do.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(width, inner, bias=False)
        self.linear_k = nn.Linear(width, inner, bias=False)
        self.linear_v = nn.Linear(width, inner, bias=False)
        self.fc = nn.Linear(inner, width, bias=False)

    def reads_weights(self) -> bool:
        """True if all projections are plain and without biases; others are called (`layers/parts.py`)."""
        parts = self._modules.values()  # faster than attributes
        return all(is_linear(part) and part._parameters["bias"] is None for part in parts)

    @property
    def kv_weight(self) -> Tensor:
        """(2 * inner, width): keys, then values."""
        return torch.cat([self.linear_k.weight, self.linear_v.weight])

    @property
    def qkv_weight(self) -> Tensor:
        """(3 * inner, width): queries, keys, values."""
        return torch.cat([self.linear_q.weight, self.linear_k.weight, self.linear_v.weight])

    def memory_keys(self, memory: Tensor) -> Tensor:
        """Keys and values (B, M, 2 * inner) of a memory (B, M, D), by calls."""
        return torch.cat([self.linear_k(memory), self.linear_v(memory)], dim=-1).to(memory.dtype)

    def project(self, rows: Tensor) -> Tensor:
        """Queries, keys and values (..., 3 * inner) of rows (..., D), by calls."""
        return torch.cat([self.linear_q(rows), self.linear_k(rows), self.linear_v(rows)], dim=-1)


class ReaderMlp(nn.Module):
    """The two linears of the FFN, with exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return plain.mlp(x, self.w_1, self.w_2, 0.0)


class StepMaps(NamedTuple):
    """The maps of a layer for reading: of weights in the compute dtype, cast once, or of parts to call."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    self_qkv: Callable[[Tensor], Tensor]
    self_out: Callable[[Tensor], Tensor]
    memory_q: Callable[[Tensor], Tensor]
    memory_out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Its result, and a bias that is still to be added."""


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
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer over whole targets.

        Args:
            residual:    (B * T, D) residual stream, image after image.
            branch:      (B * T, D) matmul result that is still to be added to it; None at the first layer.
            branch_bias: (D,) bias of the branch, or None.
            memory_kv:   (B, M, 2 * H * head_dim) keys and values of the memory.
        Returns:
            new residual, branch and branch_bias.
        """
        p, dtype, reads = self.dropout, memory_kv.dtype, self.reads_weights()
        q, residual = self._memory_queries(residual, branch, branch_bias, len(memory_kv), dtype, reads)
        context = cross_attention(q, None, memory_kv, None, self.heads, p=p).flatten(0, 1)
        if not reads:
            branch = plain.linear(context, self.enc_attn.fc).to(dtype)
            rows, residual = add_norm(residual, branch, None, self.norm3, dtype, p=p)
            return residual, self.mlp(rows).to(dtype), None
        branch = linear(context, self.enc_attn.fc.weight)
        branch, residual = norm_mlp(
            *(residual, branch, None, self.norm3, self.mlp.w_1, self.mlp.w_2), p=p, epilogue=self.epilogue
        )
        return residual, branch, self.mlp.w_2.bias

    def _memory_queries(
        self,
        residual: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        batch: int,
        dtype: torch.dtype,
        reads: bool,
    ) -> tuple[Tensor, Tensor]:
        """Self-attention, then the queries of the cross-attention (B, T, H * head_dim); and the residual."""
        p, segments = self.dropout, [(batch, len(residual) // batch)]
        own, norm2 = self.self_attn, self.norm2
        if reads:
            qkv, residual = norm_linear(residual, branch, branch_bias, self.norm1, own.qkv_weight, p=p)
        else:
            rows, residual = add_norm(residual, branch, branch_bias, self.norm1, dtype, p=p)
            qkv = own.project(rows).to(dtype)
        context = self_attention(qkv, None, self.heads, segments, p=p, causal=True)
        if reads:
            branch = linear(context, own.fc.weight)
            q, residual = norm_linear(residual, branch, None, norm2, self.enc_attn.linear_q.weight, p=p)
        else:
            branch = plain.linear(context, own.fc).to(dtype)
            rows, residual = add_norm(residual, branch, None, norm2, dtype, p=p)
            q = plain.linear(rows, self.enc_attn.linear_q).to(dtype)
        return q.unflatten(0, segments[0]), residual

    def reads_weights(self) -> bool:
        """True if all parts are plain, and theirs; others are called (`layers/parts.py`)."""
        parts: dict[str, Any] = self._modules  # faster than attributes
        mlp = parts["mlp"]
        return (
            parts["self_attn"].reads_weights()
            and parts["enc_attn"].reads_weights()
            and is_plain(mlp, ReaderMlp)
            and is_biased_linear(mlp.w_1)
            and is_biased_linear(mlp.w_2)
            and is_norm(parts["norm1"])
            and is_norm(parts["norm2"])
            and is_norm(parts["norm3"])
            and not hooks_on_all()
        )

    def step_maps(self, dtype: torch.dtype) -> StepMaps:
        """What `step` calls; where all parts are plain, products by copies of their weights in `dtype`."""
        own, memory, mlp = self.self_attn, self.enc_attn, self.mlp
        if not self.reads_weights():
            return StepMaps(
                add_norm,
                lambda rows: own.project(rows).to(dtype),
                lambda rows: plain.linear(rows, own.fc).to(dtype),
                lambda rows: plain.linear(rows, memory.linear_q).to(dtype),
                lambda rows: plain.linear(rows, memory.fc).to(dtype),
                lambda rows: (mlp(rows).to(dtype), None),
            )
        weights = own.qkv_weight, own.fc.weight, memory.linear_q.weight, memory.fc.weight
        qkv, out, q, memory_out = (partial(linear, weight=weight.to(dtype)) for weight in weights)
        first, second = mlp.w_1.weight.to(dtype), mlp.w_2.weight.to(dtype)

        def hidden(rows: Tensor) -> tuple[Tensor, Tensor]:
            return gelu_linear(linear(rows, first), mlp.w_1.bias, second), mlp.w_2.bias

        return StepMaps(fused_add_norm, qkv, out, q, memory_out, hidden)

    def step(
        self,
        stream: tuple[Tensor, Tensor | None, Tensor | None],
        maps: StepMaps,
        memory_kv: Tensor,
        cache: Tensor,
        number: int,
        key_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer for the next token of every row, without dropout and gradients.

        Args:
            stream:      residual (R, D), branch (R, D) and branch_bias (D,), as `forward` takes them; R is B
                         images times their beams.
            maps:        from `step_maps`.
            memory_kv:   (B, M, 2 * H * head_dim).
            cache:       (R, longest, 2 * H * head_dim) keys and values of all tokens; written at `number`.
            number:      place of the token, from 0.
            key_lengths: (R,) int32, all number + 1.
        Returns:
            new residual, branch and branch_bias.
        """
        dtype, inner = cache.dtype, cache.shape[-1] // 2
        rows, residual = maps.add_norm(*stream, self.norm1, dtype)
        q, kv = maps.self_qkv(rows).split([inner, 2 * inner], dim=-1)
        cache[:, number] = kv
        keys, seen = cache, None
        if cache.device.type == "cuda":  # one shape for all tokens: one kernel
            seen = key_lengths
        else:
            keys = cache[:, : number + 1]
        context = cross_attention(q[:, None], None, keys, None, self.heads, key_lengths=seen)
        branch = maps.self_out(context[:, 0])
        rows, residual = maps.add_norm(residual, branch, None, self.norm2, dtype)
        q = maps.memory_q(rows).unflatten(0, (len(memory_kv), -1))  # beams are queries of an image
        context = cross_attention(q, None, memory_kv, None, self.heads)
        branch = maps.memory_out(context.flatten(0, 1))
        rows, residual = maps.add_norm(residual, branch, None, self.norm3, dtype)
        return residual, *maps.mlp(rows)

    @property
    def dropout(self) -> float:
        """Dropout probability: 0 in eval mode."""
        return self.p if self.training else 0.0
