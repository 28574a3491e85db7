"""Stand-ins for layers of open_clip, torchvision, transformers (ViT's of 5) and LMIM: what they compute,
and the names of their parts."""

from __future__ import annotations

from types import SimpleNamespace

import timm_like
import torch.nn.functional as F
from torch import Tensor, nn

SDPA = SimpleNamespace(_attn_implementation="sdpa")


class CastingNorm(nn.LayerNorm):
    """open_clip's; its name says that it casts."""

    __module__, __qualname__ = "open_clip.transformer", "LayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class MlpBlock(nn.Sequential):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0, act: type[nn.Module] = nn.GELU) -> None:
        first, second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        super().__init__(first, act(), nn.Dropout(drop), second, nn.Dropout(drop))


class SelfAttention(nn.Module):
    """What the attentions of ViT and BERT share."""

    names: tuple[str, str, str]

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.config, self.num_attention_heads = SDPA, heads
        for name in self.names:
            self.add_module(name, nn.Linear(dim, dim))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = (self.get_submodule(name)(x) for name in self.names)
        q, k, v = (each.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for each in projections)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ViTAttention(SelfAttention):
    names = "q_proj", "k_proj", "v_proj"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attention_dropout, self.o_proj = 0.0, nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.o_proj(self.attend(hidden_states, attention_mask)), None


class ViTMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.activation_fn, self.fc1, self.fc2 = nn.GELU(), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class ViTLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = ViTAttention(dim, heads), ViTMlp(dim, 48)
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **options: object) -> Tensor:
        x = self.dropout(self.attention(self.layernorm_before(x), attention_mask)[0]) + x
        return self.dropout(self.mlp(self.layernorm_after(x))) + x


class BertSelfAttention(SelfAttention):
    """And that of transformers 4's ViT."""

    names = "query", "key", "value"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.attend(hidden_states, attention_mask), None


class BertIntermediate(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(dim, hidden), nn.GELU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(hidden, dim), nn.LayerNorm(dim), nn.Dropout(0.0)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Bert(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attended = BertSelfAttention(dim, heads), BertOutput(dim, dim)
        self.intermediate, self.output = BertIntermediate(dim, 48), BertOutput(48, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attended(self.attention(x)[0], x)
        return self.output(self.intermediate(x), x)


class LMIMDecoder(nn.TransformerDecoderLayer):
    """The released LMIM's: torch's post-norm layer with exact GELU, whatever `norm_first` says."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__(dim, heads, hidden, 0.0, F.gelu, batch_first=True)

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:
        first, self.norm_first = self.norm_first, False
        try:
            return super().forward(tgt, memory)
        finally:
            self.norm_first = first


LIKE: dict[type[nn.Module], str] = {
    timm_like.Attention: "timm.Attention",
    timm_like.Mlp: "timm.Mlp",
    timm_like.Block: "timm.Block",
    timm_like.LayerScale: "LayerScale",
    timm_like.DropPath: "drop path",
    CastingNorm: "torch.LayerNorm",
    MlpBlock: "torchvision.MLPBlock",
    ViTAttention: "transformers.Attention",
    ViTMlp: "transformers.Mlp",
    ViTLayer: "transformers.Layer",
    BertSelfAttention: "transformers.SelfAttention",
    BertIntermediate: "transformers.Intermediate",
    BertOutput: "transformers.Output",
    LMIMDecoder: "lmim.DecoderLayer",
}
