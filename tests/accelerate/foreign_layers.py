"""Stand-ins for layers of other packages: their parts, names and mathematics."""

from __future__ import annotations

from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

SDPA = SimpleNamespace(_attn_implementation="sdpa")


class LayerScale(nn.Module):
    """timm's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.5 * nn.init.ones_(nn.Linear(dim, 1).weight[0].detach()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class CastingNorm(nn.LayerNorm):
    """open_clip's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class MlpBlock(nn.Sequential):
    """torchvision's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim), nn.Dropout(0.0)
        )


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class HuggingFaceAttention(nn.Module):
    """ViTAttention of transformers 5."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.config, self.num_attention_heads, self.attention_dropout = SDPA, heads, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: object
    ) -> tuple[Tensor, None]:
        projections = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(*projections, self.num_attention_heads, attention_mask)), None


class HuggingFaceMlp(nn.Module):
    """ViTMLP of transformers 5."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.activation_fn, self.fc1, self.fc2 = nn.GELU(), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class HuggingFaceViT(nn.Module):
    """ViTLayer of transformers 5."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = HuggingFaceAttention(dim, heads), HuggingFaceMlp(dim, 48)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.0)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: object
    ) -> Tensor:
        context, _ = self.attention(self.layernorm_before(hidden_states), attention_mask)
        hidden_states = self.dropout(context) + hidden_states
        return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states


class BertSelfAttention(nn.Module):
    """BERT's, and that of transformers 4's ViT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.config, self.num_attention_heads = SDPA, heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        projections = (layer(hidden_states) for layer in (self.query, self.key, self.value))
        return attend(*projections, self.num_attention_heads, attention_mask), None


class BertIntermediate(nn.Module):
    """BERT's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(dim, hidden), nn.GELU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    """BERT's."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(hidden, dim), nn.LayerNorm(dim), nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Bert(nn.Module):
    """A layer of BERT's parts."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attended = BertSelfAttention(dim, heads), BertOutput(dim, dim)
        self.intermediate, self.output = BertIntermediate(dim, 48), BertOutput(48, dim)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.attended(self.attention(x, attention_mask)[0], x)
        return self.output(self.intermediate(x), x)


class LMIMDecoder(nn.TransformerDecoderLayer):
    """The released LMIM's: torch's post-norm layer with exact GELU, whatever `norm_first` says."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__(dim, heads, hidden, dropout, F.gelu, batch_first=True)

    def forward(self, tgt: Tensor, memory: Tensor, *masks: Tensor | None) -> Tensor:
        first, self.norm_first = self.norm_first, False
        try:
            return super().forward(tgt, memory, *masks)
        finally:
            self.norm_first = first


LIKE: dict[type[nn.Module], str] = {
    LayerScale: "LayerScale",
    DropPath: "drop path",
    CastingNorm: "torch.LayerNorm",
    MlpBlock: "torchvision.MLPBlock",
    HuggingFaceAttention: "transformers.Attention",
    HuggingFaceMlp: "transformers.Mlp",
    HuggingFaceViT: "transformers.Layer",
    BertSelfAttention: "transformers.SelfAttention",
    BertIntermediate: "transformers.Intermediate",
    BertOutput: "transformers.Output",
    LMIMDecoder: "lmim.DecoderLayer",
}
