"""Attention maps against weights written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from lmim_fast.config import preset
from lmim_fast.models.attention_maps import decoder_cross_attention, encoder_cls_attention
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops.masking import select_patches
from lmim_fast.reference import ReferenceLMIM


@pytest.mark.parametrize("kind", [LMIM, MAE])
def test_cls_map_is_the_softmax_of_the_last_block(kind: type) -> None:
    model = kind(preset("tiny", depth=2, decoder_depth=1)).eval()
    images = torch.rand(2, 3, 32, 128) * 2 - 1
    encoder = model.model_maeenc if kind is LMIM else model
    maps = encoder_cls_attention(encoder, images)
    assert maps.shape == (2, 3, 8, 32)
    oracle = ReferenceLMIM(model.config).model_maeenc
    oracle.load_state_dict({name: encoder.state_dict()[name] for name in oracle.state_dict()})
    with torch.no_grad():
        x = oracle.patch_embed(images) + oracle.pos_embed[:, 1:]
        x = torch.cat([oracle.cls_token.expand(2, -1, -1), x], dim=1)
        x = oracle.blocks[0](x)
        q, k, _ = oracle.blocks[1].attn.qkv(oracle.blocks[1].norm1(x)).view(2, 257, 3, 3, 32).unbind(2)
    weights = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).div(32**0.5).softmax(-1)[:, :, 1:]
    torch.testing.assert_close(maps.flatten(2), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["sa_ca", "ca_sa"])
@pytest.mark.parametrize("depth", [1, 2])
def test_cross_attention_maps_are_the_softmax_of_the_oracle(order: str, depth: int) -> None:
    model = LMIM(preset("tiny", depth=1, decoder_depth=depth, decoder_order=order))
    images, guidance = torch.rand(2, 2, 3, 32, 128).unbind(0)
    noise = torch.rand(2, 256)
    patches = select_patches(noise, model.num_visible)
    ids_masked = patches[1]
    maps = decoder_cross_attention(model, images, guidance, patches)
    assert model.training, "the mode is restored"
    assert maps.shape == (2, 3, 205, 8, 32)

    oracle = ReferenceLMIM(model.config).eval()
    oracle.load_state_dict(model.state_dict())
    seen = {}
    attention = oracle.decoder_blocks[-1].multihead_attn
    attention.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0], memory=inputs[1]))
    with torch.no_grad():
        oracle(images, guidance, noise)
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q = F.linear(seen["x"], weights[0], biases[0]).view(2, 257, 3, 32)
        k = F.linear(seen["memory"], weights[1], biases[1]).view(2, 257, 3, 32)
        truth = torch.einsum("bnhd,bmhd->bhnm", q, k).div(32**0.5).softmax(-1)
    for image in range(2):
        expected = truth[image][:, 1 + ids_masked[image], 1:]
        torch.testing.assert_close(maps[image].flatten(2), expected, rtol=0, atol=1e-5)


def test_a_model_without_guidance_has_no_cross_attention_map() -> None:
    model = LMIM(preset("tiny", depth=1, decoder_depth=1, guidance=False))
    images = torch.rand(1, 3, 32, 128)
    with pytest.raises(ValueError, match="guidance off"):
        decoder_cross_attention(model, images, images, select_patches(torch.rand(1, 256), 51))
