"""Attention weights for pictures: fast models never write them, so they are recomputed for a few crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.block import PackedBlock
from lmim_fast.layers.decoder_layer import PackedDecoderLayer
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.models.reading import Reading
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.ops.attention import attention_weights


@dataclass(frozen=True)
class AttentionMaps:
    """What a model looks at in B crops; None for what it lacks."""

    encoder: Tensor
    """(B, heads, rows, columns) fp32: cls over patches, last block."""
    ids_masked: Tensor | None
    """(B, M) masked patches."""
    decoder: Tensor | None = None
    """(B, heads, M, rows, columns) fp32: masked patches over the guidance view, last layer."""
    readings: list[str] | None = None
    """What a recogniser reads."""
    characters: Tensor | None = None
    """(B, T, rows, columns) fp32: each token of the readings over the crop, last layer, mean of heads."""
    pred: Tensor | None = None
    """(B, M, P) predicted pixels of the masked patches, normalised per patch."""


@torch.no_grad()
def lmim_maps(
    model: LMIM, images: Tensor, guidance: Tensor | None, patches: tuple[Tensor, Tensor]
) -> AttentionMaps:
    """Attention of LMIM in views (B, 3, height, width), under the ids of visible and masked patches."""
    encoder = encoder_cls_attention(model.model_maeenc, images)
    if guidance is None:
        return AttentionMaps(encoder, None)
    return AttentionMaps(
        encoder, patches[1], decoder=decoder_cross_attention(model, images, guidance, patches)
    )


@torch.no_grad()
def mae_maps(model: MAE, images: Tensor, patches: tuple[Tensor, Tensor]) -> AttentionMaps:
    """Attention and prediction of MAE in images (B, 3, height, width)."""
    pred = model(images, patches=patches).pred
    return AttentionMaps(encoder_cls_attention(model, images), patches[1], pred=pred.float())


def _first_calls(modules: Sequence[nn.Module], run: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Positional inputs and output of the first call of each module during `run()`.

    A layer calls the parts that have such a hook, and else reads their weights.
    """
    calls: list[list[tuple[tuple[Any, ...], Any]]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _, inputs, output, own=own: own.append((inputs, output)))
        for module, own in zip(modules, calls, strict=True)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [own[0] for own in calls]


@torch.no_grad()
def encoder_cls_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of cls to all patches, in the last block.

    Args:
        encoder: LMIM's student (`model_maeenc`) or MAE.
        images:  (B, 3, height, width) float or (B, height, width, 3) uint8, unmasked.
    Returns:
        (B, heads, rows, columns) fp32; a map sums to 1 minus the weight of cls on itself.
    """
    block = cast(PackedBlock, encoder.blocks[-1])
    ((_, qkv),) = _first_calls([block.attn.qkv], lambda: encoder.encode(images))
    q, k, _ = qkv.view(
        len(images), -1, 3, block.attn.num_heads, qkv.shape[-1] // (3 * block.attn.num_heads)
    ).unbind(2)
    weights = attention_weights(q[:, :1], k)[:, :, 0, 1:]
    return weights.unflatten(2, encoder.grid)


@torch.no_grad()
def decoder_cross_attention(
    model: LMIM, images: Tensor, guidance: Tensor, patches: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention of the masked patches to the guidance view, in the last decoder layer.

    Args:
        model:    LMIM with config.guidance on; it runs in eval mode, then its mode is restored.
        images:   plain views, as LMIM takes them.
        guidance: guidance views.
        patches:  ids of the visible (B, K) and of the masked patches (B, M).
    Returns:
        (B, heads, M, rows, columns) fp32, without the guidance cls.
    Raises:
        ValueError: the model was built without guidance.
    """
    if not model.config.guidance:
        raise ValueError(
            "this model was built with guidance off: its decoder does not look at a guidance view"
        )
    training = model.training
    model.eval()
    try:
        ids_visible, ids_masked = patches
        latent, memory, _ = model.encode_views(images, guidance, ids_visible)
        layer = cast(PackedDecoderLayer, model.decoder_blocks[-1])
        attention = layer.multihead_attn
        (((query, keys, _), _),) = _first_calls(
            [attention], lambda: model.decode_rows(latent, cast(Tensor, memory), ids_visible, ids_masked)
        )
        q_weight, kv_weight, q_bias, kv_bias = attention.projections()
        q = plain.project(query[:, -ids_masked.shape[1] :], q_weight, q_bias)
        k = plain.project(keys, kv_weight, kv_bias).chunk(2, dim=-1)[0]
        heads = (attention.num_heads, -1)
        weights = attention_weights(q.unflatten(2, heads), k.unflatten(2, heads))
    finally:
        model.train(training)
    return weights[..., 1:].unflatten(3, model.config.grid)


@torch.no_grad()
def recognizer_maps(model: Recognizer, images: Tensor) -> tuple[Reading, Tensor]:
    """Greedy reading, and where the decoder looks for each token: last layer, mean of the heads.

    Args:
        model:  it runs in eval mode, then its mode is restored.
        images: (B, 3, height, width) float or (B, height, width, 3) uint8.
    Returns:
        the reading, and maps (B, longest, rows, columns) fp32 without cls, 0 behind a word; a map sums to 1
        minus the weight of cls.
    """
    training = model.training
    model.eval()
    try:
        reading = model.greedy(images)
        memory, layer = model.encode(images), model.decoder.layers[-1]
        start = torch.full_like(reading.ids[:, :1], model.config.start)
        inputs = torch.cat([start, reading.ids[:, :-1]], dim=1)
        attention = layer.enc_attn
        (_, q), (_, k) = _first_calls(
            [attention.linear_q, attention.linear_k], lambda: model.decoder(inputs, memory)
        )
        q, heads = q.view(*inputs.shape, -1), (layer.heads, -1)
        weights = attention_weights(q.unflatten(2, heads), k.unflatten(2, heads)).mean(dim=1)
    finally:
        model.train(training)
    places = torch.arange(weights.shape[1], device=weights.device)
    weights = weights * (places < reading.lengths[:, None])[:, :, None]
    return reading, weights[..., 1:].unflatten(2, model.encoder.grid)
