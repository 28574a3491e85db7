"""Our models call every part that was replaced, hooked or adapted, as the oracle with the same attached."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from attachments import OF_LINEARS, lora
from micro import MICRO
from recognizers import ODD
from recognizers import batch_of as words_of
from torch import Tensor, nn
from twins import assert_same_gradients, batch_of, twins

from lmim_fast.layers import block, decoder_layer
from lmim_fast.models import encoder, lmim
from lmim_fast.models.attention_maps import decoder_cross_attention, encoder_cls_attention, recognizer_maps
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.ops.masking import select_patches
from lmim_fast.reference import ReferenceLMIM, ReferenceMAE
from lmim_fast.reference_recognizer import ReferenceRecognizer

OF_LMIM = [
    ("model_maeenc.patch_embed.proj", "forward hook"),
    ("model_maeenc.patch_embed.proj", "pruning"),
    ("model_maeenc.patch_embed", "patched forward"),
    ("model_maeenc.blocks.0.attn.qkv", "lora"),
    ("model_maeenc.blocks.0.attn", "lora"),
    ("model_maeenc.blocks.1.mlp.fc2", "weight norm"),
    ("model_maeenc.norm", "lora"),
    ("model_maeenc_momentum.blocks.1.mlp", "forward hook"),
    ("decoder_embed", "lora"),
    ("decoder_embed", "pruning"),
    ("decoder_embed2", "lora"),
    ("decoder_embed2", "spectral norm"),
    ("decoder_norm", "lora"),
    ("decoder_pred", "lora"),
    ("decoder_pred", "weight norm"),
    ("decoder_blocks.0.self_attn", "forward hook"),
    ("decoder_blocks.0.multihead_attn", "lora"),
    ("decoder_blocks.0.linear1", "pruning"),
    ("decoder_blocks.1.multihead_attn.out_proj", "lora"),
    ("decoder_blocks.1.self_attn", "lora"),
    ("decoder_blocks.1.linear2", "backward hook"),
    ("decoder_blocks.1.linear2", "hook on all"),
]
OF_MAE = [
    ("blocks.0.attn", "forward hook"),
    ("blocks.1.mlp.fc1", "backward pre-hook"),
    ("blocks.1.norm2", "forward hook"),
    ("norm", "lora"),
    ("decoder_embed", "lora"),
    ("decoder_blocks.0.attn.proj", "spectral norm"),
    ("decoder_norm", "sequential"),
    ("decoder_pred", "lora"),
]
OF_RECOGNIZER = [
    ("encoder.patch_embed.proj", "forward hook"),
    ("linear_norm", "forward hook"),
    ("linear_norm.0", "lora"),
    ("linear_norm.1", "lora"),
    ("decoder.trg_word_emb", "forward hook"),
    ("decoder.position_enc", "forward hook"),
    ("decoder.layer_stack.0.self_attn.linear_q", "lora"),
    ("decoder.layer_stack.1.self_attn.fc", "pruning"),
    ("decoder.layer_stack.1.enc_attn.linear_q", "weight norm"),
    ("decoder.layer_stack.1.enc_attn.linear_v", "lora"),
    ("decoder.layer_stack.2.enc_attn.fc", "spectral norm"),
    ("decoder.layer_stack.0.mlp", "lora"),
    ("decoder.layer_stack.2.mlp.w_1", "sequential"),
    ("decoder.layer_stack.1.norm2", "lora"),
    ("decoder.layer_norm", "lora"),
    ("decoder.classifier", "lora"),
    ("decoder.classifier", "hook on all"),
]


def attach(kind: str, part: str, oracle: nn.Module, fast: nn.Module) -> list[Any]:
    """Attach to both, and give both the same weights."""
    twins(oracle, fast)
    undos = [OF_LINEARS[kind](model, part) for model in (oracle, fast)]
    fast.load_state_dict(oracle.state_dict(), strict=True)
    return undos


def assert_steps_alike(oracle: nn.Module, fast: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Two steps of training have the same loss and gradients."""
    for _ in range(2):
        losses = [model(*batch).loss for model in (oracle, fast)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for model, loss in zip((oracle, fast), losses, strict=True):
            model.zero_grad()
            loss.backward()
        assert_same_gradients(oracle, fast)
        with torch.no_grad():
            for model in (oracle, fast):
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad


@pytest.mark.parametrize(
    ("part", "kind", "order"),
    [(part, kind, "sa_ca") for part, kind in OF_LMIM]
    + [(part, kind, "ca_sa") for part, kind in OF_LMIM if part.startswith("decoder_blocks")],
)
def test_a_part_of_lmim_acts_and_trains(part: str, kind: str, order: Any) -> None:
    config = dataclasses.replace(MICRO, decoder_order=order)
    oracle, fast = ReferenceLMIM(config), LMIM(config)
    undos = attach(kind, part, oracle, fast)
    assert_steps_alike(oracle, fast, batch_of(config))
    for undo in undos:
        undo()


def test_lmim_reads_weights_again_once_its_parts_are_plain() -> None:
    model = LMIM(MICRO)
    batch = batch_of(MICRO)
    parts = [
        "model_maeenc.patch_embed",
        *(f"model_maeenc.blocks.{number}.mlp" for number in (0, 1)),
        *(f"decoder_blocks.{number}.linear1" for number in (0, 1)),
        "decoder_embed2",
    ]
    forms = [  # what reads the weights of these parts
        (encoder, "patch_embed_packed"),
        (block, "norm_mlp"),
        (decoder_layer, "mlp"),
        (lmim, "memory_projection"),
    ]

    def calls() -> list[int]:
        with ExitStack() as patches:
            spies = [
                patches.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
                for module, name in forms
            ]
            model(*batch)
        return [spy.call_count for spy in spies]

    before = calls()
    hooks = [model.get_submodule(part).register_forward_hook(lambda *_: None) for part in parts]
    hooked = calls()
    for hook in hooks:
        hook.remove()
    assert calls() == before == [2, 4, 2, 1], "patches and blocks are of student and teacher"
    assert hooked == [1, 2, 0, 0]


@pytest.mark.parametrize(("part", "kind"), OF_MAE)
def test_a_part_of_mae_acts_and_trains(part: str, kind: str) -> None:
    oracle, fast = ReferenceMAE(MICRO), MAE(MICRO)
    attach(kind, part, oracle, fast)
    images, _, noise = batch_of(MICRO)
    assert_steps_alike(oracle, fast, (images, noise))


@pytest.mark.parametrize(("part", "kind"), OF_RECOGNIZER)
def test_a_part_of_the_recogniser_acts_trains_and_reads(part: str, kind: str) -> None:
    """Whole targets, then reading token by token with the trained weights."""
    oracle, fast = ReferenceRecognizer(ODD), Recognizer(ODD)
    undos = attach(kind, part, oracle, fast)
    images, targets, _ = words_of(ODD)
    assert_steps_alike(oracle, fast, (images, targets))
    fast.load_state_dict(oracle.state_dict())  # no rounding of the steps decides a token
    expected, reading = oracle.eval().greedy(images), fast.eval().greedy(images, early_stop=False)
    words = torch.arange(ODD.max_length) < reading.lengths[:, None]
    assert torch.equal(reading.ids[words], expected.ids[words])
    likeliest = expected.probabilities.amax(-1)
    torch.testing.assert_close(reading.probabilities[words], likeliest[words], rtol=1e-4, atol=1e-6)
    for undo in undos:
        undo()


def test_a_student_under_bf16_autocast_keeps_its_dtypes_with_parts_that_are_called() -> None:
    fast, truth = LMIM(MICRO), LMIM(MICRO)
    batch = batch_of(MICRO)
    truth.load_state_dict(fast.state_dict())
    for part in ("model_maeenc.blocks.0.norm1", "decoder_blocks.0.linear1", "decoder_embed", "decoder_norm"):
        fast.get_submodule(part).register_forward_hook(lambda _, inputs, output: output.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = fast(*batch), truth(*batch)
    assert output.pred.dtype == expected.pred.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, expected.loss, rtol=5e-3, atol=0)
    output.loss.backward()


@torch.no_grad()
def merge(layer: nn.Module, part: str) -> None:
    """Replace an adapted linear by one with the sum of both weights."""
    adapted: Any = layer.get_submodule(part)
    adapted.base.weight += adapted.up.weight @ adapted.down.weight
    holder, _, name = part.rpartition(".")
    setattr(layer.get_submodule(holder), name, adapted.base)


def test_maps_show_what_an_adapter_does() -> None:
    model = LMIM(MICRO)
    images, guidance, noise = batch_of(MICRO)
    patches = select_patches(noise, model.num_visible)
    parts = ("model_maeenc.blocks.1.attn.qkv", "decoder_blocks.1.self_attn.out_proj", "decoder_embed2")

    def maps() -> list[Tensor]:
        return [
            encoder_cls_attention(model.model_maeenc, images),
            decoder_cross_attention(model, images, guidance, patches),
        ]

    before = maps()
    for part in parts:
        lora(model, part)
    adapted = maps()
    for part in parts:
        merge(model, part)
    for mine, expected, plain in zip(adapted, maps(), before, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(mine, plain)


def test_maps_of_a_recogniser_show_what_an_adapter_does() -> None:
    model = Recognizer(ODD)
    images = words_of(ODD)[0]
    parts = ("decoder.layer_stack.2.enc_attn.linear_q", "decoder.layer_stack.2.self_attn.linear_v")
    for part in parts:
        lora(model, part)
    reading, adapted = recognizer_maps(model, images)
    for part in parts:
        merge(model, part)
    again, expected = recognizer_maps(model, images)
    assert torch.equal(reading.ids, again.ids)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-6)


def test_a_patch_embedding_of_other_images_is_refused() -> None:
    model = MAE(MICRO)
    model.patch_embed.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"give 4 patches, not 8"):
        model.encode(torch.rand(2, 3, 8, 8))
