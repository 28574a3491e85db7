"""accelerate(model): which calls a fast form takes, and what is left to the layer's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_models import FAMILIES, HEADS, WIDTH, X, attention, block, decoder_layer, encoder_layer
from before_and_after import Swapped, accelerated
from foreign_layers import BertSelfAttention, CastingNorm, LMIMDecoder, MlpBlock, ViTLayer
from timm_like import Attention, Block, LayerScale, Mlp
from torch import Tensor, nn

from lmim_fast.ops import dispatch

CAUSAL = nn.Transformer.generate_square_subsequent_mask(9)
PADDING = torch.arange(9)[None] >= torch.tensor([[6], [9]])
UNSEEN = torch.tensor([[True] * 9, [False] * 9])  # a sequence without a key
HOLES = torch.arange(9)[None] % torch.tensor([[3], [4]]) == 1  # padding that is not at the end
CAUSAL_MASK = {"attn_mask": CAUSAL.isinf(), "is_causal": True}
LONG = torch.ones(1, 70, WIDTH)


def scaled_block() -> Block:
    layer = block()
    layer.ls1 = LayerScale(WIDTH)
    return layer


def masked(mask: Tensor | None = None, **options: object) -> dict[str, object]:
    """Options of an nn.MultiheadAttention."""
    return ({} if mask is None else {"key_padding_mask": mask}) | options | {"need_weights": False}


def vit_layer(**changes: object) -> ViTLayer:
    layer = ViTLayer(WIDTH, HEADS)
    vars(layer).update(changes)
    return layer


LEFT = [
    ("need_weights is True", attention, (X, X, X), {}),
    ("attn_mask is given", attention, (X, X, X), masked(attn_mask=CAUSAL)),
    ("2 dimensions", attention, (X[0], X[0], X[0]), masked()),
    ("a causal mask and key_padding_mask", attention, (X, X, X), masked(PADDING, **CAUSAL_MASK)),
    ("key_padding_mask is no bool tensor", attention, (X, X, X), masked(PADDING * 0.5)),
    ("more than 64 keys", attention, (LONG, LONG, LONG), masked(torch.arange(70)[None] > 60)),
    ("src_mask is given", encoder_layer, (X,), {"src_mask": CAUSAL}),
    ("tgt_mask is given", decoder_layer, (X, X), {"tgt_mask": CAUSAL}),
    ("memory_mask is given", decoder_layer, (X, X), {"memory_mask": CAUSAL}),
    ("a mask or an option is given", block, (X, CAUSAL), {}),
    ("a mask or an option is given", block, (X,), {"attn_mask": CAUSAL}),
    ("a mask or an option is given", vit_layer, (X,), {"attention_mask": CAUSAL}),
    ("a mask or an option is given", lambda: BertSelfAttention(WIDTH, HEADS), (X, CAUSAL), {}),
    ("output_attentions is given", vit_layer, (X,), {"output_attentions": True}),
    ("gradient checkpointing", lambda: vit_layer(gradient_checkpointing=True), (X,), {}),
    (f"shape (0, 9, {WIDTH})", lambda: nn.LayerNorm(WIDTH), (X[:0],), {}),
    ("2049 values", lambda: nn.LayerNorm(2049), (torch.randn(1, 2049),), {}),
]


@pytest.mark.parametrize(("reason", "make", "inputs", "options"), LEFT)
def test_a_call_that_is_not_covered_runs_the_original_and_the_table_says_so(
    reason: str, make: Callable[[], nn.Module], inputs: tuple[object, ...], options: dict[str, Any]
) -> None:
    layer = make()
    swapped = Swapped(layer, only=type(layer))
    swapped.check(*inputs, tolerance=0.0, **options)
    assert swapped.note.startswith("runs its own forward: ")
    assert reason in swapped.note


Case = tuple[Callable[[], nn.Module], tuple[object, ...], dict[str, Any]]
TAKEN: dict[str, Case] = {
    "causal attention": (attention, (X, X, X), masked(**CAUSAL_MASK)),
    "padded attention": (attention, (X, X, X), masked(HOLES)),
    "padded memory": (attention, (X[:, :5], X, X), masked(HOLES)),
    "no key": (attention, (X, X, X), masked(UNSEEN)),
    "values of their own": (attention, (X, X, 2 * X), masked()),
    "sequence first": (lambda: attention(batch_first=False), (X.transpose(0, 1),) * 3, masked(HOLES)),
    "causal layer": (encoder_layer, (X,), {"src_mask": CAUSAL, "is_causal": True}),
    "causal stack": (lambda: nn.TransformerDecoder(decoder_layer(), 2), (X, X), {"tgt_mask": CAUSAL}),
    "padded layer": (encoder_layer, (X,), {"src_key_padding_mask": PADDING}),
    "causal decoder over padding": (
        lambda: decoder_layer(norm_first=True),
        (X, X),
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": HOLES},
    ),
    "tanh GELU": (lambda: Mlp(WIDTH, 40, act_layer=lambda: nn.GELU("tanh")), (X,), {}),
    "tanh GELU in a block": (lambda: block(act_layer=lambda: nn.GELU("tanh")), (X,), {}),
    "another activation": (lambda: encoder_layer(activation=torch.tanh), (X,), {}),
    "ReLU in torchvision's": (lambda: MlpBlock(WIDTH, 40, act=nn.ReLU), (X,), {}),
    "names of the original": (lambda: nn.LayerNorm(WIDTH), (), {"input": X}),
    "rows": (lambda: Mlp(WIDTH, 40), (X[0, 0],), {}),
    "frozen": (lambda: block().requires_grad_(False), (X,), {}),
    "another layout": (decoder_layer, (X.transpose(0, 2).contiguous().transpose(0, 2), X), {}),
    "hidden states": (vit_layer, (X,), {"output_hidden_states": True}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_masks_that_the_op_has_and_any_activation_are_taken(case: str) -> None:
    make, inputs, options = TAKEN[case]
    swapped = Swapped(make())
    swapped.check(*inputs, **options)
    assert not swapped.notes


def test_a_casting_norm_takes_another_type_than_that_of_its_weights() -> None:
    swapped = Swapped(CastingNorm(WIDTH))
    swapped.check(X.bfloat16(), tolerance=1e-2)
    assert not swapped.note


def test_a_layer_scale_is_not_multiplied_into_weights_of_float16() -> None:
    swapped = Swapped(scaled_block(), only=Block).both(lambda block: block.half())
    swapped.check(X.half(), tolerance=0.0)
    assert "LayerScale in float16" in swapped.note


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_padded_batches_through_torchs_encoder_are_as_before(training: bool) -> None:
    """In evaluation the stack turns them into nested tensors and reads the weights of its first layer."""
    with torch.set_grad_enabled(training):
        swapped = Swapped(nn.TransformerEncoder(encoder_layer(), 2).train(training))
        swapped.check(X, src_key_padding_mask=PADDING)


@torch.no_grad()
def test_torchs_own_inference_path_stays_for_self_attention() -> None:
    for layer, inputs, options in ((encoder_layer(), [X], {}), (attention(), [X, X, X], masked())):
        swapped = Swapped(layer.eval())
        swapped.check(*inputs, tolerance=0.0, **options)
        assert swapped.note.endswith("torch's own inference path")
    swapped = Swapped(attention().eval())
    swapped.check(X, X[:, :5], X[:, :5], **masked())
    assert not swapped.note


class Scaling(Attention):
    """The name of the last argument is that of a form's first."""

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None, x: float = 1.0) -> Tensor:
        return x * super().forward(tokens)


def test_arguments_of_a_class_of_the_users_keep_their_meaning() -> None:
    swapped = Swapped(Scaling(WIDTH, HEADS), like={Scaling: "timm.Attention"})
    swapped.check(X, None, 2.0, tolerance=0.0)
    swapped.check(tokens=X, x=3.0, tolerance=0.0)
    assert "is_causal is 2.0" in swapped.note
    assert "x is given" in swapped.note


def test_the_released_decoder_layer_ignores_norm_first_as_before() -> None:
    swapped = Swapped(LMIMDecoder(WIDTH, HEADS, 48))
    swapped.both(lambda layer: setattr(layer, "norm_first", True)).check(X, X)
    assert "norm_first is set" in swapped.note


def test_on_a_cpu_the_original_runs_bit_by_bit_unless_a_backend_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("about machines without a device")
    for family in FAMILIES.values():
        swapped = Swapped(family.model())  # bound, as a backend is asked for
        with dispatch.backend("auto"):
            swapped.check(*family.inputs(), tolerance=0.0)
        assert not swapped.notes


WRONG = {
    "normalized_shape": lambda layer: layer(torch.randn(2, 5, WIDTH + 1)),
    "dtype": lambda layer: layer(X.double()),
    "multiple values": lambda layer: layer(X, x=X),
    "missing": lambda layer: layer(),
    "unexpected keyword": lambda layer: layer(X, other=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_inputs_raise_what_the_original_raises(message: str) -> None:
    layer = Swapped(block()).layer
    with pytest.raises((RuntimeError, TypeError), match=message):
        WRONG[message](layer)


def test_tensors_without_memory_take_the_original_forward() -> None:
    norm = nn.LayerNorm(WIDTH)
    report = accelerated(norm)
    assert norm.to("meta")(X.to("meta")).shape == X.shape
    assert report.rows[0].note.endswith("input on meta")


LAYERS: dict[str, Case] = {
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH), (X,), {}),
    "attention": (attention, (X, X, X), masked()),
    "post-norm layer": (encoder_layer, (X,), {}),
    "pre-norm layer": (lambda: encoder_layer(norm_first=True, activation="gelu"), (X,), {}),
    "decoder layer": (decoder_layer, (X, X), {}),
    "block": (block, (X,), {}),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_results_under_autocast_have_the_type_they_had(name: str, device: str, dtype: torch.dtype) -> None:
    """In both modes."""
    make, inputs, options = LAYERS[name]
    swapped, x = Swapped(make().to(device)), X.to(device, dtype)
    for training in (True, False):
        swapped.both(lambda layer, mode=training: layer.train(mode))
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(training):
            swapped.check(*[x] * len(inputs), tolerance=0.05, **options)
        assert not (training and swapped.note)
