"""Post-norm decoder layer with the names of torch and of the release: for LMIM's rows, and as a drop-in."""

from __future__ import annotations

from torch import Tensor, nn

from lmim_fast.layers.attention import MultiheadAttention
from lmim_fast.layers.decoder_rows import PlainRows
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.norm import LAYER_NORM_EPS, DropoutAddLayerNorm
from lmim_fast.ops.attention import cross_attention, self_attention
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

    def forward(self, x: PlainRows, kv: Tensor, kv_bias: Tensor | None, *, masked_only: bool) -> Tensor:
        """One layer.

        Args:
            x:           rows (B, N, D): cls, visible, masked.
            kv:          (B, M, 2D) keys and values of the memory, without bias.
            kv_bias:     (2D,) or None.
            masked_only: return only the masked rows (the last layer).
        Returns:
            (B, N, D), or (B, masked, D), in the compute dtype.
        """
        rows: Tensor = x.rows
        if self.order == "sa_ca":
            rows = self.attend_self(x, masked_only)
            rows = self.attend_memory(PlainRows(rows, 0), kv, kv_bias)
        else:
            rows = self.attend_memory(x, kv, kv_bias)
            rows = self.attend_self(PlainRows(rows, x.num_visible_rows), masked_only)
        return self.feed_forward(rows)

    def attend_self(self, x: PlainRows, masked_only: bool) -> Tensor:
        """Self-attention, residual add and norm1; of all rows, or with queries at masked rows only."""
        attention, p = self.self_attn, self.dropout
        if masked_only:
            q, kv = x.project(attention.q_weight, masked_only=True), x.project(attention.kv_weight)
            context = cross_attention(q, attention.q_bias, kv, attention.kv_bias, self.num_heads, p=p)
            residual = x.masked
        else:
            residual = x.rows
            qkv = x.project(attention.in_proj_weight)
            segments = [(qkv.shape[0], qkv.shape[1])]
            qkv = qkv.flatten(0, 1)
            context = self_attention(qkv, attention.in_proj_bias, self.num_heads, segments, p=p)
            context = context.view_as(residual)
        branch = linear(context, attention.out_proj.weight)
        return self.norm1(branch, residual, attention.out_proj.bias)[0]

    def attend_memory(self, x: PlainRows, kv: Tensor, kv_bias: Tensor | None) -> Tensor:
        """Cross-attention over the memory, residual add and norm2."""
        attention = self.multihead_attn
        q = x.project(attention.q_weight)
        context = cross_attention(q, attention.q_bias, kv, kv_bias, self.num_heads, p=self.dropout)
        branch = linear(context, attention.out_proj.weight)
        return self.norm2(branch, x.rows, attention.out_proj.bias)[0]

    def feed_forward(self, rows: Tensor) -> Tensor:
        """FFN, residual add and norm3."""
        weights = self.linear1.weight, self.linear1.bias, self.linear2.weight
        branch = mlp(rows, *weights, p=self.dropout, epilogue=self.epilogue)
        return self.norm3(branch, rows, self.linear2.bias)[0]

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
        tokens("x", x, attention.in_proj_weight)
        keys = tokens("memory", memory, attention.in_proj_weight)
        if len(x) != len(keys):
            raise ValueError(f"x {tuple(x.shape)} and memory {tuple(memory.shape)} must have one batch size")
        kv = linear(keys, attention.kv_weight)
        return super().forward(PlainRows(x, 0), kv, attention.kv_bias, masked_only=False).to(x.dtype)
