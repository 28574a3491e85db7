"""Post-norm decoder layer with the names of torch and of the release: for LMIM's rows, and as a drop-in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.attention import MultiheadAttention, reads_weights
from lmim_fast.layers.decoder_rows import Memory, PlainRows
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.norm import LAYER_NORM_EPS, DropoutAddLayerNorm
from lmim_fast.layers.parts import has_tensors, hooks_on_all, is_biased_linear, is_plain
from lmim_fast.ops.attention import cross_attention, product_bias, self_attention
from lmim_fast.ops.epilogue import check_setting
from lmim_fast.ops.linear import linear
from lmim_fast.ops.mlp import mlp

ORDERS = ("sa_ca", "ca_sa")


class PackedDecoderLayer(nn.Module):
    """Decoder layer over rows and a memory that is already projected.

    This form is `forward` because hooks (FSDP's, checkpointing's) act on calls only. Arguments and errors are
    those of `DecoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        *,
        order: str = "sa_ca",
        layer_norm_eps: float = LAYER_NORM_EPS,
        epilogue: str = "auto",
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        self.num_heads, self.p, self.order = nhead, dropout, order
        self.epilogue = check_setting(epilogue)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = DropoutAddLayerNorm(d_model, dropout, layer_norm_eps)  # after self-attention
        self.norm2 = DropoutAddLayerNorm(d_model, dropout, layer_norm_eps)  # after cross-attention
        self.norm3 = DropoutAddLayerNorm(d_model, dropout, layer_norm_eps)  # after the FFN

    def forward(
        self, x: PlainRows, memory: Memory | Tensor, *, masked_only: bool, next_masked_only: bool = False
    ) -> PlainRows:
        """One layer.

        Args:
            x:                rows (B, N, D): cls, visible, masked.
            memory:           of this layer: projected if it `reads_weights`, else the rows (B, M, D).
            masked_only:      compute only the masked rows (the last layer).
            next_masked_only: the layer that reads the result does so.
        Returns:
            rows (B, N, D), or (B, masked, D), in the compute dtype.
        """
        shown = 0 if masked_only else x.num_visible_rows
        if isinstance(memory, Tensor):
            first = x.num_visible_rows if masked_only else 0
            return PlainRows(shown, self.forward_parts(x.rows, memory, first).to(x.rows.dtype))
        if self.order == "sa_ca":
            x = self.attend_memory(self.attend_self(x, masked_only), memory)
        else:  # norm2, not the norm3 of the layer before, is read by queries at masked rows
            x = self.attend_self(self.attend_memory(x, memory, next_masked_only=masked_only), masked_only)
            next_masked_only = False
        weights = self.linear1.weight, self.linear1.bias, self.linear2.weight
        branch = mlp(x.rows, *weights, p=self.dropout, epilogue=self.epilogue)
        first = shown if next_masked_only else 0
        return PlainRows(shown, *self.norm3.shared(branch, x.residual, self.linear2.bias, first))

    def attend_self(self, x: PlainRows, masked_only: bool) -> PlainRows:
        """Self-attention, residual add and norm1; of all rows, or with queries at masked rows only."""
        attention, shown = self.self_attn, x.num_visible_rows
        heads, p = attention.num_heads, attention.attn_drop
        if masked_only:
            q_weight, kv_weight, q_bias, kv_bias = attention.projections()
            added = product_bias(q_bias)
            q = x.project(q_weight, masked_only=True, added=added)
            kv = x.project(kv_weight, added=product_bias(kv_bias))
            context = cross_attention(q, q_bias, kv, kv_bias, heads, p=p, added=added is not None)
            residual, shown = x.masked_residual, 0
        else:
            residual = x.residual
            added = product_bias(attention.in_proj_bias)
            qkv = x.project(attention.in_proj_weight, added=added)
            segments = [(qkv.shape[0], qkv.shape[1])]
            qkv = qkv.flatten(0, 1)
            context = self_attention(
                qkv, attention.in_proj_bias, heads, segments, p=p, added=added is not None
            )
            context = context.view_as(residual)
        branch = linear(context, attention.out_proj.weight)
        return PlainRows(shown, *self.norm1.shared(branch, residual, attention.out_proj.bias))

    def attend_memory(self, x: PlainRows, memory: Memory, *, next_masked_only: bool = False) -> PlainRows:
        """Cross-attention over the memory, residual add and norm2."""
        kv, kv_bias, q_weight, q_bias, added = memory
        q = x.project(q_weight, added=q_bias.detach() if added and q_bias is not None else None)
        attention, shown = self.multihead_attn, x.num_visible_rows
        heads, p, out = attention.num_heads, attention.attn_drop, attention.out_proj
        context = cross_attention(q, q_bias, kv, kv_bias, heads, p=p, added=added)
        first = shown if next_masked_only else 0
        return PlainRows(shown, *self.norm2.shared(linear(context, out.weight), x.residual, out.bias, first))

    def reads_weights(self) -> bool:
        """True if all parts are plain, and theirs; others are called (`layers/parts.py`)."""
        parts = self._modules  # faster than attributes
        return (
            reads_weights(parts["self_attn"])
            and reads_weights(parts["multihead_attn"])
            and is_biased_linear(parts["linear1"])
            and is_biased_linear(parts["linear2"])
            and _is_add_norm(parts["norm1"])
            and _is_add_norm(parts["norm2"])
            and _is_add_norm(parts["norm3"])
            and not hooks_on_all()
        )

    def forward_parts(self, x: Tensor, memory: Tensor, first: int = 0) -> Tensor:
        """One layer by calls of the parts, x (B, N, D) over a memory (B, M, D), from token `first` on."""
        for sublayer in self.order.split("_"):
            if sublayer == "sa":
                query = x[:, first:] if first else x
                x = self._add_norm(self.norm1, _attend(self.self_attn, query, x), query)
            else:
                x = self._add_norm(self.norm2, _attend(self.multihead_attn, x, memory), x)
        return self._add_norm(self.norm3, plain.mlp(x, self.linear1, self.linear2, self.dropout), x)

    def _add_norm(self, norm: nn.Module, branch: Tensor, residual: Tensor) -> Tensor:
        """One of our norms, or what holds one, drops and adds the branch itself; another one gets the sum."""
        if isinstance(norm, DropoutAddLayerNorm) or _holds_add_norm(norm):
            return _first(norm(branch, residual))
        normalised: Tensor = norm(residual + plain.dropped(branch, self.dropout).to(residual.dtype))
        return normalised

    @property
    def dropout(self) -> float:
        """Dropout probability: 0 in eval mode."""
        return self.p if self.training else 0.0


class DecoderLayer(PackedDecoderLayer):
    """Self-attention, cross-attention over a memory and FFN with exact GELU, each followed by add and norm.

    In the order "sa_ca" it is torch.nn.TransformerDecoderLayer(activation="gelu", batch_first=True,
    norm_first=False); norm1 belongs to the self-attention and norm2 to the cross-attention in both orders.

    Args:
        d_model:         D.
        nhead:           H.
        dim_feedforward: hidden features of the FFN.
        dropout:         probability for attention weights, branches and hidden features, in training mode.
        order:           "sa_ca", or "ca_sa" for cross-attention first.
        layer_norm_eps:  of the three norms.
        epilogue:        "auto", "on" or "off": GELU in the epilogue of the FFN's matmuls
                         (`ops/epilogue.py`), unless dropout is between them.
    Raises:
        ValueError: D is no multiple of H, dropout is outside [0, 1), or the order or epilogue is unknown.
    """

    # The signature differs on purpose: it has the parameters of a PackedDecoderLayer, not its interface.
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """One layer.

        Args:
            x:      (B, N, D).
            memory: (B, M, D).
        Returns:
            (B, N, D) in x's dtype.
        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        attention = self.multihead_attn
        weight = attention._parameters.get("in_proj_weight")
        if plain.fits(x, weight) and plain.fits(memory, weight) and len(x) == len(memory):
            return self.forward_parts(x, memory)
        if not self.reads_weights():
            return self.forward_parts(x, memory).to(x.dtype)
        weight = attention.in_proj_weight
        tokens("x", x, weight)
        keys = tokens("memory", memory, weight)
        if len(x) != len(keys):
            raise ValueError(f"x {tuple(x.shape)} and memory {tuple(memory.shape)} must have one batch size")
        q_weight, kv_weight, q_bias, kv_bias = attention.projections()
        own = Memory(linear(keys, kv_weight), kv_bias, q_weight, q_bias, added=False)
        return super().forward(PlainRows(0, x), own, masked_only=False).rows.to(x.dtype)


def _is_add_norm(part: Any) -> bool:
    return is_plain(part, DropoutAddLayerNorm) and has_tensors(part)


def _holds_add_norm(part: nn.Module) -> bool:
    return any(isinstance(inner, DropoutAddLayerNorm) for inner in part.modules())


def _attend(attention: nn.Module, query: Tensor, keys: Tensor) -> Tensor:
    if is_plain(attention, MultiheadAttention) and not hooks_on_all():  # less than a call costs the host
        return plain.linear(attention.context(query, keys, keys), attention.out_proj)
    return _first(attention(query, keys, keys, need_weights=False))


def _first(result: Any) -> Tensor:
    """The result of a part that may return another beside it."""
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first
