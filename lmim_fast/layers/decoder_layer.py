"""Post-norm decoder layer with the names of torch and of the release: for LMIM's rows, and as a drop-in."""

from __future__ import annotations

from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.attention import MultiheadAttention
from lmim_fast.layers.decoder_rows import Memory, PlainRows
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.norm import LAYER_NORM_EPS, DropoutAddLayerNorm
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
        self, x: PlainRows, memory: Memory, *, masked_only: bool, next_masked_only: bool = False
    ) -> PlainRows:
        """One layer.

        Args:
            x:                rows (B, N, D): cls, visible, masked.
            memory:           of this layer.
            masked_only:      compute only the masked rows (the last layer).
            next_masked_only: the layer that reads the result does so.
        Returns:
            rows (B, N, D), or (B, masked, D), in the compute dtype.
        """
        shown = 0 if masked_only else x.num_visible_rows
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
        attention, p, shown = self.self_attn, self.dropout, x.num_visible_rows
        if masked_only:
            q_weight, kv_weight, q_bias, kv_bias = attention.projections()
            added = product_bias(q_bias)
            q = x.project(q_weight, masked_only=True, added=added)
            kv = x.project(kv_weight, added=product_bias(kv_bias))
            context = cross_attention(q, q_bias, kv, kv_bias, self.num_heads, p=p, added=added is not None)
            residual, shown = x.masked_residual, 0
        else:
            residual = x.residual
            added = product_bias(attention.in_proj_bias)
            qkv = x.project(attention.in_proj_weight, added=added)
            segments = [(qkv.shape[0], qkv.shape[1])]
            qkv = qkv.flatten(0, 1)
            context = self_attention(
                qkv, attention.in_proj_bias, self.num_heads, segments, p=p, added=added is not None
            )
            context = context.view_as(residual)
        branch = linear(context, attention.out_proj.weight)
        return PlainRows(shown, *self.norm1.shared(branch, residual, attention.out_proj.bias))

    def attend_memory(self, x: PlainRows, memory: Memory, *, next_masked_only: bool = False) -> PlainRows:
        """Cross-attention over the memory, residual add and norm2."""
        kv, kv_bias, q_weight, q_bias, added = memory
        q = x.project(q_weight, added=q_bias.detach() if added and q_bias is not None else None)
        context = cross_attention(q, q_bias, kv, kv_bias, self.num_heads, p=self.dropout, added=added)
        out, shown = self.multihead_attn.out_proj, x.num_visible_rows
        first = shown if next_masked_only else 0
        return PlainRows(shown, *self.norm2.shared(linear(context, out.weight), x.residual, out.bias, first))

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
        attention, weight = self.multihead_attn, self.multihead_attn.in_proj_weight
        if plain.is_plain(x, weight) and plain.is_plain(memory, weight) and len(x) == len(memory):
            return self._plain(x, memory)
        tokens("x", x, attention.in_proj_weight)
        keys = tokens("memory", memory, attention.in_proj_weight)
        if len(x) != len(keys):
            raise ValueError(f"x {tuple(x.shape)} and memory {tuple(memory.shape)} must have one batch size")
        q_weight, kv_weight, q_bias, kv_bias = attention.projections()
        own = Memory(linear(keys, kv_weight), kv_bias, q_weight, q_bias, added=False)
        return super().forward(PlainRows(0, x), own, masked_only=False).rows.to(x.dtype)

    def _plain(self, x: Tensor, memory: Tensor) -> Tensor:
        p = self.dropout
        for part in self.order.split("_"):
            attention, norm = (
                (self.self_attn, self.norm1) if part == "sa" else (self.multihead_attn, self.norm2)
            )
            context = attention.context_plain(x, None if part == "sa" else memory)
            branch = plain.linear(context, attention.out_proj.weight, attention.out_proj.bias)
            x = plain.norm(x + plain.dropped(branch, p), norm)
        return plain.norm(x + plain.dropped(plain.mlp(x, self.linear1, self.linear2, p), p), self.norm3)
