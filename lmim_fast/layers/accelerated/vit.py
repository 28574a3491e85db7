"""Fast forms of ViT layers in timm's structure, whoever wrote them, and of MAE's random_masking.

They are known by their parts and by giving the same results (`check.py`), not by their class. The
layers of `lmim_fast.reference` have the same parts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.accelerated.base import (
    Accelerated,
    Form,
    bind,
    call_original,
    dropout_of,
    example,
    note,
    refusal,
)
from lmim_fast.layers.accelerated.record import changed_itself
from lmim_fast.layers.accelerated.torch_layers import (
    attend_self,
    unlike_dropout,
    unlike_layer_norm,
    unlike_linear,
)
from lmim_fast.layers.accelerated.transformer import add_branch
from lmim_fast.layers.norm import norm_linear, norm_mlp
from lmim_fast.ops.attention import self_attention
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.masking import gather_rows, select_patches
from lmim_fast.ops.mlp import mlp

# Children that a fast form knows; each but the first two is optional.
ATTENTION_PARTS = ("qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "norm")
MLP_PARTS = ("fc1", "fc2", "act", "drop", "drop1", "drop2", "norm")
BLOCK_PARTS = ("norm1", "norm2", "attn", "mlp", "ls1", "ls2", "drop_path", "drop_path1", "drop_path2")
IDENTITIES = ("q_norm", "k_norm", "norm", "ls1", "ls2", "drop_path", "drop_path1", "drop_path2")


class FastAttention(Accelerated):
    """Self-attention with `qkv` and `proj`."""

    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """(B, N, D) to (B, N, D); a mask or any other argument is the original's."""
        inputs, reason = bind(self, 1, arguments, named)
        reason = reason or refusal(self, self.qkv.in_features, *inputs)
        if reason:
            return call_original(self, reason, *arguments, **named)
        (x,) = inputs
        p = dropout_of(self, "attn_drop")
        context = attend_self(x, self.qkv.weight, self.qkv.bias, _heads(self), p)
        return F.dropout(self.proj(context), dropout_of(self, "proj_drop"))


class FastMlp(Accelerated):
    """Two linears with exact GELU between."""

    fc1: nn.Linear
    fc2: nn.Linear

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """(..., D) to (..., D); any other argument is the original's."""
        inputs, reason = bind(self, 1, arguments, named)
        reason = reason or refusal(self, self.fc1.in_features, *inputs, batched=False)
        if reason:
            return call_original(self, reason, *arguments, **named)
        (x,) = inputs
        x = x.to(compute_dtype(self.fc1.weight))
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight
        product = mlp(x, *weights, p=dropout_of(self, "drop1", "drop"))
        if self.fc2.bias is not None:
            product = product + self.fc2.bias.to(product.dtype)
        return F.dropout(product, dropout_of(self, "drop2", "drop"))


class FastBlock(Accelerated):
    """Pre-norm block of attention and MLP, without LayerScale and stochastic depth."""

    norm1: nn.LayerNorm
    attn: FastAttention
    norm2: nn.LayerNorm
    mlp: FastMlp

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """(B, N, D) to (B, N, D); a mask or any other argument is the original's."""
        inputs, reason = bind(self, 1, arguments, named)
        reason = reason or refusal(self, self.attn.qkv.in_features, *inputs)
        if reason:
            return call_original(self, reason, *arguments, **named)
        (x,) = inputs
        attn, segments = self.attn, [(x.shape[0], x.shape[1])]
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        qkv, residual = norm_linear(x.flatten(0, 1), None, None, self.norm1, attn.qkv.weight)
        context = self_attention(qkv, attn.qkv.bias, _heads(attn), segments, p=dropout_of(attn, "attn_drop"))
        branch = linear(context, attn.proj.weight)
        branch, residual = norm_mlp(
            *(residual, branch, attn.proj.bias, self.norm2, fc1, fc2),
            p=dropout_of(attn, "proj_drop"),
            drop=dropout_of(self.mlp, "drop1", "drop"),
        )
        p = dropout_of(self.mlp, "drop2", "drop")
        # no view of a result
        return add_branch(residual.view(x.shape), branch.view(x.shape), fc2.bias, p)


class FastMasking(Accelerated):
    """MAE's random_masking without sorting twice; the kept patches come in reading order."""

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same draw, mask and unshuffled result as the original.

        Args:
            x:          (B, L, D).
            mask_ratio: share of the patches that is masked.
        Returns:
            kept rows (B, K, D), mask (B, L) with 1 for masked, ids_restore (B, L).
        """
        patches = x.shape[1]
        kept = int(patches * (1 - mask_ratio))
        reason = changed_itself(self)
        if reason:
            note(self, reason)
        if reason or not 1 <= kept < patches:
            return super().random_masking(x, mask_ratio)  # type: ignore[misc]
        noise = torch.rand(x.shape[0], patches, device=x.device)
        ids_visible, ids_masked = select_patches(noise, kept)
        places = torch.arange(patches, device=x.device).expand(x.shape[0], -1)
        order = torch.cat([ids_visible, ids_masked], dim=1)
        ids_restore = torch.empty_like(order).scatter_(1, order, places)
        return gather_rows(x, ids_visible), (ids_restore >= kept).to(noise.dtype), ids_restore


def _heads(module: Any) -> int:
    return module.num_heads if hasattr(module, "num_heads") else module.heads


def has(module: nn.Module, *names: str) -> bool:
    """Whether the module has children of these names."""
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def unlike_children(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """A reason where a module has parts beyond those known, or an optional part that does something."""
    for name in (*module._parameters, *module._buffers):
        return f"has {name} of its own"
    for name, child in module.named_children():
        if name not in known:
            return f"has a part {name}, {type(child).__name__}"
        if name in IDENTITIES and type(child) is not nn.Identity:
            return f"{name} is a {type(child).__name__}"
        reason = unlike_dropout(name, child) if "drop" in name else None
        if reason:
            return reason
    return None


def _unlike_attention(module: Any) -> str | None:
    reason = (
        unlike_children(module, ATTENTION_PARTS)
        or unlike_linear("qkv", module.qkv)
        or unlike_linear("proj", module.proj)
    )
    if reason:
        return reason
    width, heads = module.qkv.in_features, _heads(module)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        return f"has {heads} heads for width {width}"
    if module.qkv.out_features != 3 * width or module.proj.weight.shape != (width, width):
        return f"qkv is {tuple(module.qkv.weight.shape)}, proj {tuple(module.proj.weight.shape)}"
    return None


def _unlike_mlp(module: Any) -> str | None:
    reason = (
        unlike_children(module, MLP_PARTS)
        or unlike_linear("fc1", module.fc1, bias=True)
        or unlike_linear("fc2", module.fc2)
    )
    if reason:
        return reason
    if module.fc1.out_features != module.fc2.in_features:
        return f"fc1 gives {module.fc1.out_features} features, fc2 takes {module.fc2.in_features}"
    if has(module, "act") and any(part._parameters or part._buffers for part in module.act.modules()):
        return "act has parameters or buffers"
    return None


def _unlike_block(module: Any) -> str | None:
    reason = unlike_children(module, BLOCK_PARTS)
    if reason:
        return reason
    if not ATTENTION.fits(module.attn) or not MLP.fits(module.mlp):
        return f"attn is a {type(module.attn).__name__}, mlp a {type(module.mlp).__name__}"
    found = dict(
        norm1=unlike_layer_norm(module.norm1),
        attn=_unlike_attention(module.attn),
        norm2=unlike_layer_norm(module.norm2),
        mlp=_unlike_mlp(module.mlp),
    )
    return next((f"{name}: {reason}" for name, reason in found.items() if reason), None)


def _unlike_masking(module: Any) -> str | None:
    if "random_masking" in vars(module):
        return "random_masking is patched"
    signature = inspect.signature(module.random_masking)
    parameters = [(parameter.name, parameter.default) for parameter in signature.parameters.values()]
    known = parameters == [("x", inspect.Parameter.empty), ("mask_ratio", inspect.Parameter.empty)]
    return None if known else f"random_masking takes {signature}"


def tokens(width: int) -> list[tuple[Tensor, ...]]:
    """A few tokens of two images, and more of one than any usual window of local attention has."""
    return [(example(2, 7, width),), (example(1, 320, width),)]


def _mask(module: Any, x: Tensor, mask_ratio: float) -> tuple[Tensor, ...]:
    """Result of random_masking without the order of the kept patches: rows back in place, mask."""
    kept, mask, ids_restore = module.random_masking(x, mask_ratio)
    hidden = kept.new_zeros(x.shape[0], x.shape[1] - kept.shape[1], x.shape[2])
    return gather_rows(torch.cat([kept, hidden], dim=1), ids_restore), mask


ATTENTION = Form(
    "ViT attention",
    FastAttention,
    lambda module: has(module, "qkv", "proj") and (hasattr(module, "num_heads") or hasattr(module, "heads")),
    _unlike_attention,
    lambda module: tokens(module.qkv.in_features),
)
MLP = Form(
    "ViT MLP",
    FastMlp,
    lambda module: has(module, "fc1", "fc2"),
    _unlike_mlp,
    lambda module: [(example(2, 7, module.fc1.in_features, size=size),) for size in (1.0, 1e3)],
)
BLOCK = Form(
    "ViT block",
    FastBlock,
    lambda module: has(module, "norm1", "attn", "norm2", "mlp"),
    _unlike_block,
    lambda module: [
        *tokens(module.attn.qkv.in_features),
        (example(2, 7, module.attn.qkv.in_features, size=1e3),),
    ],
)
MASKING = Form(
    "random_masking",
    FastMasking,
    lambda module: callable(getattr(module, "random_masking", None)),
    _unlike_masking,
    lambda module: [(example(2, 16, 8), 0.75), (example(3, 9, 8), 0.5)],
    run=_mask,
    parts=False,
)
