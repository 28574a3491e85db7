"""What the drop-in layers do not take: named, never ignored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_pairs import HEADS, MEMORY, QUERIES, WIDTH, our_multihead
from torch import nn

from lmim_fast.layers import Attention, Block, DecoderLayer, DropoutAddLayerNorm, Mlp, MultiheadAttention

LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[..., object]]]] = {
    "Attention": lambda: (layer := Attention(WIDTH, HEADS), layer),
    "Block": lambda: (layer := Block(WIDTH, HEADS), layer),
    "MultiheadAttention": lambda: (layer := our_multihead(), lambda x: layer(x, x, x)),
    "DecoderLayer": lambda: (layer := DecoderLayer(WIDTH, HEADS), lambda x: layer(torch.ones(QUERIES), x)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, WIDTH), r"\(5, 24\) must be \(B, N, 24\)"),
        ((2, 5, 25), r"\(2, 5, 25\) must have 24 features in its last dimension"),
        ((0, 5, WIDTH), r"\(0, 5, 24\) must have at least one sequence and one token"),
        ((2, 0, WIDTH), r"\(2, 0, 24\) must have at least one sequence and one token"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    _, run = LAYERS[name]()
    with pytest.raises(ValueError, match=message):
        run(torch.ones(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_and_devices_that_do_not_fit_the_weights_are_named(name: str) -> None:
    _, run = LAYERS[name]()
    with pytest.raises(
        ValueError, match=r"is torch.float16, the layer's parameters are torch.float32.*autocast"
    ):
        run(torch.ones(QUERIES, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"is torch.int64"):
        run(torch.ones(QUERIES, dtype=torch.int64))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"is torch.float64"):
        run(torch.ones(QUERIES, dtype=torch.float64))
    with pytest.raises(ValueError, match="is on meta, the layer's parameters on cpu"):
        run(torch.ones(QUERIES, device="meta"))


def test_inputs_that_do_not_fit_each_other_are_named() -> None:
    attention, layer = our_multihead(), DecoderLayer(WIDTH, HEADS)
    x, memory, other = torch.ones(QUERIES), torch.ones(MEMORY), torch.ones(3, 7, WIDTH)
    with pytest.raises(ValueError, match=r"query \(2, 5, 24\), key \(3, 7, 24\), value \(3, 7, 24\)"):
        attention(x, other, other)
    with pytest.raises(ValueError, match=r"key \(2, 7, 24\), value \(2, 5, 24\)"):
        attention(x, memory, x)
    with pytest.raises(ValueError, match=r"x \(2, 5, 24\) and memory \(3, 7, 24\)"):
        layer(x, other)
    with pytest.raises(ValueError, match=r"\(2, 5, 24\) and residual \(2, 7, 24\)"):
        DropoutAddLayerNorm(WIDTH)(x, memory)
    with pytest.raises(ValueError, match=r"x \(2, 25\) must have 24 features"):
        Mlp(WIDTH)(torch.ones(2, 25))


def test_wrong_options_are_named() -> None:
    for make in (Attention, MultiheadAttention, Block, DecoderLayer):
        with pytest.raises(ValueError, match="width 24 must be a multiple of the number of heads, got 5"):
            make(24, 5)
        with pytest.raises(ValueError, match="got 0 heads"):
            make(24, 0)
    for probability in ("attn_drop", "proj_drop"):
        for make in (Attention, Block):
            with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
                make(24, 3, **{probability: 1.5})
    with pytest.raises(ValueError, match=r"\[0, 1\), got -1"):
        Mlp(24, drop=-1)
    with pytest.raises(ValueError, match="one of sa_ca, ca_sa, got 'casa'"):
        DecoderLayer(24, 3, order="casa")


def test_options_of_timm_that_are_not_supported_are_not_swallowed() -> None:
    for make in (Attention, Block):
        with pytest.raises(TypeError, match="qk_norm"):
            make(24, 3, qk_norm=True)
    with pytest.raises(TypeError, match="act_layer"):
        Mlp(24, act_layer=nn.ReLU)
    with pytest.raises(TypeError, match="positional"):
        Mlp(24, 24, 24, nn.ReLU)
    with pytest.raises(TypeError, match="positional"):
        Attention(24, 3, True, True)


@pytest.mark.parametrize(
    "option",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12}, {"vdim": 12}, {"batch_first": False}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_torch_attention_that_are_not_supported_say_what_to_use(option: dict[str, object]) -> None:
    name = next(iter(option))
    with pytest.raises(
        NotImplementedError, match=rf"{name}.*(use torch.nn.MultiheadAttention|set batch_first=True)"
    ):
        MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | option)
    our_multihead(kdim=WIDTH, vdim=WIDTH)


def test_masks_and_weights_are_refused_with_what_to_use() -> None:
    layer, x = our_multihead(), torch.ones(QUERIES)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"key_padding_mask of shape \(2, 5\).*leave padding out"):
        layer(x, x, x, key_padding_mask=mask)
    with pytest.raises(NotImplementedError, match=r"attn_mask of shape \(5, 5\)"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(NotImplementedError, match="is_causal"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(NotImplementedError, match=r"need_weights.*attention_weights"):
        layer(x, x, x, need_weights=True)
    assert layer(x, x, x)[1] is None
