"""accelerate(model): which calls a fast form takes, and what is left to the layer's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accelerate_models import FAMILIES, FEATURES, HEADS, WIDTH, accelerated, attention, encoder_layer
from foreign_layers import BertSelfAttention, HuggingFaceViT, LayerScale
from timm_like import Attention, Block, Mlp
from torch import Tensor, nn

from lmim_fast import accelerate
from lmim_fast.ops import dispatch

X = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(9)
PADDING = torch.arange(9)[None] >= torch.tensor([[6], [9]])
UNSEEN = torch.tensor([[True] * 9, [False] * 9])  # a sequence without a key
HOLES = torch.arange(9)[None] % torch.tensor([[3], [4]]) == 1  # padding that is not at the end
UNWEIGHTED = {"need_weights": False}


def block() -> nn.Module:
    return Block(WIDTH, HEADS)


def decoder_layer(**options: object) -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, **options)


def scaled_block() -> nn.Module:
    layer = block()
    layer.ls1 = LayerScale(WIDTH)
    return layer


def both(layer: nn.Module, *arguments: object, **options: object) -> tuple[Tensor, Tensor, str]:
    """Results of a call after and before, and what the report says of it."""
    original = copy.deepcopy(layer)
    report = accelerated(layer, only=type(layer))
    found, expected = layer(*arguments, **options), original(*arguments, **options)
    if isinstance(found, tuple):
        assert len(found) == len(expected)
        found, expected = found[0], expected[0]
    return found, expected, report.swapped[0].note


Case = tuple[Callable[[], nn.Module], tuple[object, ...], dict[str, object], str]
LEFT: dict[str, Case] = {
    "weights": (attention, (X, X, X), {}, "need_weights is True, the default"),
    "mask": (attention, (X, X, X), {"attn_mask": CAUSAL} | UNWEIGHTED, "attn_mask is given"),
    "one sequence": (attention, (X[0], X[0], X[0]), UNWEIGHTED, "2 dimensions"),
    "both masks": (
        attention,
        (X, X, X),
        dict(key_padding_mask=PADDING, attn_mask=CAUSAL.isinf(), is_causal=True) | UNWEIGHTED,
        "a causal mask and key_padding_mask are given",
    ),
    "many padded keys": (
        attention,
        (torch.ones(1, 70, WIDTH),) * 3,
        {"key_padding_mask": torch.arange(70)[None] > 60} | UNWEIGHTED,
        "more than 64 keys",
    ),
    "src_mask": (encoder_layer, (X,), {"src_mask": CAUSAL}, "src_mask is given"),
    "tgt_mask": (decoder_layer, (X, X), {"tgt_mask": CAUSAL}, "tgt_mask is given"),
    "memory_mask": (decoder_layer, (X, X), {"memory_mask": CAUSAL}, "memory_mask is given"),
    "attn_mask of timm": (block, (X, CAUSAL), {}, "a mask or an option is given"),
    "its name": (block, (X,), {"attn_mask": CAUSAL}, "a mask or an option is given"),
    "attention_mask of transformers": (
        lambda: HuggingFaceViT(WIDTH, HEADS),
        (X,),
        {"attention_mask": CAUSAL},
        "a mask or an option is given",
    ),
    "LayerScale in float16": (
        lambda: scaled_block().half(),
        (X.half(),),
        {},
        "LayerScale in float16, in which weights times it vanish",
    ),
    "attention_mask of BERT": (
        lambda: BertSelfAttention(WIDTH, HEADS),
        (X, CAUSAL),
        {},
        "a mask or an option is given",
    ),
    "no rows": (lambda: nn.LayerNorm(WIDTH), (X[:0],), {}, f"shape (0, 9, {WIDTH})"),
    "wide rows": (lambda: nn.LayerNorm(2049), (torch.randn(1, 2049),), {}, "2049 values, more than 2048"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_call_that_is_not_covered_runs_the_original_and_the_table_says_so(case: str) -> None:
    make, arguments, options, expected_note = LEFT[case]
    found, expected, note = both(make(), *arguments, **options)
    assert torch.equal(found, expected)
    assert note.startswith("runs its own forward: ")
    assert note.endswith(expected_note)


TAKEN: dict[str, Case] = {
    "causal attention": (attention, (X, X, X), dict(attn_mask=CAUSAL, is_causal=True) | UNWEIGHTED, ""),
    "padded attention": (attention, (X, X, X), {"key_padding_mask": HOLES} | UNWEIGHTED, ""),
    "padded memory": (attention, (X[:, :5], X, X), {"key_padding_mask": HOLES} | UNWEIGHTED, ""),
    "no key": (attention, (X, X, X), {"key_padding_mask": UNSEEN} | UNWEIGHTED, ""),
    "values of their own": (attention, (X, X, 2 * X), UNWEIGHTED, ""),
    "sequence first": (
        lambda: attention(batch_first=False),
        (X.transpose(0, 1),) * 3,
        {"key_padding_mask": HOLES} | UNWEIGHTED,
        "",
    ),
    "causal layer": (encoder_layer, (X,), dict(src_mask=CAUSAL, is_causal=True), ""),
    "padded layer": (encoder_layer, (X,), dict(src_key_padding_mask=PADDING), ""),
    "causal decoder over padding": (
        lambda: decoder_layer(norm_first=True),
        (X, X),
        dict(tgt_mask=CAUSAL, tgt_is_causal=True, memory_key_padding_mask=HOLES),
        "",
    ),
    "tanh GELU": (lambda: Mlp(WIDTH, 40, act_layer=lambda: nn.GELU("tanh")), (X,), {}, ""),
    "tanh GELU in a block": (lambda: Block(WIDTH, HEADS, act_layer=lambda: nn.GELU("tanh")), (X,), {}, ""),
    "another activation": (lambda: encoder_layer(activation=torch.tanh), (X,), {}, ""),
    "names of the original": (lambda: nn.LayerNorm(WIDTH), (), {"input": X}, ""),
    "rows": (lambda: Mlp(WIDTH, 40), (X[0, 0],), {}, ""),
    "hidden states": (lambda: HuggingFaceViT(WIDTH, HEADS), (X,), {"output_hidden_states": True}, ""),
}


@pytest.mark.parametrize("case", TAKEN)
def test_masks_that_the_op_has_and_any_activation_are_taken(case: str) -> None:
    make, arguments, options, _ = TAKEN[case]
    found, expected, note = both(make(), *arguments, **options)
    assert note == ""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_stacks_of_torch_tell_their_layers_that_a_mask_is_causal() -> None:
    stack = nn.TransformerDecoder(decoder_layer(), 2)
    expected = stack(X, X, tgt_mask=CAUSAL)
    report = accelerated(stack)
    torch.testing.assert_close(stack(X, X, tgt_mask=CAUSAL), expected, rtol=1e-5, atol=1e-5)
    assert not [row for row in report.swapped if row.note]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_padded_batches_through_torchs_encoder_are_as_before(training: bool) -> None:
    """In evaluation the stack turns them into nested tensors and reads the weights of its first layer."""
    model = nn.TransformerEncoder(encoder_layer(), 2).train(training)
    with torch.set_grad_enabled(training):
        expected = model(X, src_key_padding_mask=PADDING)
        accelerated(model)
        torch.testing.assert_close(model(X, src_key_padding_mask=PADDING), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [encoder_layer, attention])
def test_torchs_own_inference_path_stays(layer: Callable[[], nn.Module]) -> None:
    arguments = ((X, X, X), UNWEIGHTED) if layer is attention else ((X,), {})
    with torch.no_grad():
        found, expected, note = both(layer().eval(), *arguments[0], **arguments[1])
    assert torch.equal(found, expected)
    assert note.endswith("torch's own inference path")


def test_attention_over_another_sequence_has_no_path_of_torchs_own() -> None:
    with torch.no_grad():
        found, expected, note = both(attention().eval(), X, X[:, :5], X[:, :5], **UNWEIGHTED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not note


def test_an_attention_function_of_the_users_that_transformers_is_told_to_call_is_called() -> None:
    layer = HuggingFaceViT(WIDTH, HEADS)
    report = accelerated(layer)
    layer.attention.config = SimpleNamespace(_attn_implementation="mine")
    layer(X)
    assert report.rows[0].note.endswith("attention: attn_implementation is mine")


def test_arguments_of_a_class_of_the_users_keep_their_meaning() -> None:
    class Scaling(Attention):
        def forward(self, tokens: Tensor, attn_mask: Tensor | None = None, x: float = 1.0) -> Tensor:
            return x * super().forward(tokens)

    layer = Scaling(WIDTH, HEADS)
    original = copy.deepcopy(layer)
    report = accelerate(layer, like={Scaling: "timm.Attention"})
    for call in (lambda each: each(X, None, 2.0), lambda each: each(tokens=X, x=3.0)):
        assert torch.equal(call(layer), call(original))
    assert report.rows[0].note == "runs its own forward: is_causal is 2.0; runs its own forward: x is given"


def test_an_argument_that_a_form_does_not_know_is_left_to_the_original() -> None:
    class Spatial(Mlp):
        def forward(self, x: Tensor, height: int, width: int = 1) -> Tensor:
            return height * width * super().forward(x)

    layer = Spatial(WIDTH, 40)
    original = copy.deepcopy(layer)
    report = accelerate(layer, like={Spatial: "timm.Mlp"})
    assert torch.equal(layer(X, 3, width=2), original(X, 3, width=2))
    assert report.rows[0].note.endswith("a mask or an option is given")


def test_on_a_cpu_the_original_runs_bit_by_bit_unless_a_backend_is_asked_for() -> None:
    if torch.cuda.is_available():
        pytest.skip("about machines without a device")
    for family in FAMILIES.values():
        model = family.model()
        outputs = []
        for _ in range(2):
            with dispatch.backend("auto"):
                torch.manual_seed(0)
                outputs.append(model(family.input()))
            report = accelerated(model)  # bound, as a backend is asked for
        assert torch.equal(*outputs)
        assert not [row for row in report.rows if row.note.startswith("runs")]


def test_wrong_inputs_raise_what_the_original_raises() -> None:
    layer = block()
    accelerated(layer)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer(torch.randn(2, 5, WIDTH + 1))
    with pytest.raises(RuntimeError):
        layer(X.double())
    with pytest.raises(TypeError, match="multiple values"):
        layer(X, x=X)
    with pytest.raises(TypeError, match="missing"):
        layer()
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(X, other=1)


def test_tensors_without_memory_and_other_types_take_the_original_forward() -> None:
    layer = nn.LayerNorm(WIDTH)
    report = accelerated(layer)
    assert layer.to("meta")(X.to("meta")).shape == X.shape
    assert report.rows[0].note.endswith("input on meta")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "attention": attention,
    "post-norm layer": encoder_layer,
    "pre-norm layer": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "decoder layer": decoder_layer,
    "block": block,
}


def arguments_of(layer: nn.Module, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """What a layer of any kind is called with."""
    if isinstance(layer, nn.MultiheadAttention):
        return (x, x, x), {"need_weights": False}
    return ((x, x) if isinstance(layer, nn.TransformerDecoderLayer) else (x,)), {}


def autocast_types(layer: nn.Module, device: str, dtype: torch.dtype) -> None:
    """The dtype of a result under autocast is the one that torch gives, in both modes."""
    layer, x = layer.to(device), X.to(device, dtype)
    arguments, options = arguments_of(layer, x)
    for training in (True, False):
        layer.train(training)
        with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(training):
            expected = layer(*arguments, **options)
            with accelerated(layer):
                found = layer(*arguments, **options)
        found, expected = (each[0] if isinstance(each, tuple) else each for each in (found, expected))
        assert found.dtype == expected.dtype, f"training {training}"
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_results_under_autocast_have_the_type_they_had(name: str) -> None:
    autocast_types(LAYERS[name](), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_results_under_autocast_on_a_device_have_the_type_they_had(name: str, dtype: torch.dtype) -> None:
    autocast_types(LAYERS[name](), "cuda", dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_any_layout_and_frozen_weights_are_taken(name: str) -> None:
    """Frozen layers are swapped like the others."""
    layer = LAYERS[name]()
    for number, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    strided = X.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    for frozen in (False, True):
        layer.requires_grad_(False) if frozen else None
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        found = []
        for _ in range(2):
            arguments, options = arguments_of(layer, strided)
            output = layer(*arguments, **options)
            output = output[0] if isinstance(output, tuple) else output
            found.append([output, *torch.autograd.grad(output.sum(), [strided, *trained])])
            report = accelerated(layer)
        report.undo()
        for mine, expected in zip(*found, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
