"""accelerate(model): calls that a fast form does not cover run the layer's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate_models import FEATURES, HEADS, WIDTH, FurtherLinear, attention, encoder_layer
from timm_like import Block, Mlp
from torch import Tensor, nn

from lmim_fast import accelerate

X = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1))

MASK = nn.Transformer.generate_square_subsequent_mask(9)
PADDING = torch.arange(9)[None] >= torch.tensor([[6], [9]])


def note_after(layer: nn.Module, *arguments: object, **options: object) -> str:
    """What the report says after a call that must give exactly what the original gives."""
    original = copy.deepcopy(layer)
    report = accelerate(layer, only=type(layer))
    found, expected = layer(*arguments, **options), original(*arguments, **options)
    for mine, right in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert (mine is None and right is None) or torch.equal(mine, right)
    return report.swapped[0].note


CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...], dict[str, object], str]] = {
    "weights": (attention, (X, X, X), {}, "need_weights given"),
    "mask": (attention, (X, X, X), {"attn_mask": MASK, "need_weights": False}, "attn_mask given"),
    "padding": (
        attention,
        (X, X, X),
        {"key_padding_mask": PADDING, "need_weights": False},
        "key_padding_mask given",
    ),
    "one sequence": (attention, (X[0], X[0], X[0]), {"need_weights": False}, "2 dimensions"),
    "src_mask": (encoder_layer, (X,), {"src_mask": MASK}, "src_mask given"),
    "causal": (encoder_layer, (X,), {"src_mask": MASK, "is_causal": True}, "src_mask given"),
    "src_key_padding_mask": (
        encoder_layer,
        (X,),
        {"src_key_padding_mask": PADDING},
        "src_key_padding_mask given",
    ),
    "tgt_mask": (
        lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True),
        (X, X),
        {"tgt_mask": MASK},
        "tgt_mask given",
    ),
    "attn_mask of timm": (lambda: Block(WIDTH, HEADS), (X, MASK), {}, "attn_mask given"),
    "no rows": (lambda: nn.LayerNorm(WIDTH), (X[:0],), {}, f"shape (0, 9, {WIDTH})"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_not_covered_runs_the_original_and_the_table_says_so(case: str) -> None:
    make, arguments, options, expected = CALLS[case]
    note = note_after(make(), *arguments, **options)
    assert note.startswith("runs its own forward: ")
    assert note.endswith(expected) or expected in note


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_padded_batches_through_torchs_encoder_are_as_before(training: bool) -> None:
    """In evaluation the stack turns them into nested tensors and reads the weights of its first layer."""
    model = nn.TransformerEncoder(encoder_layer(), 2).train(training)
    with torch.set_grad_enabled(training):
        expected = model(X, src_key_padding_mask=PADDING)
        accelerate(model)
        torch.testing.assert_close(model(X, src_key_padding_mask=PADDING), expected)


def test_wrong_inputs_raise_what_the_original_raises() -> None:
    layer = Block(WIDTH, HEADS)
    accelerate(layer)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer(torch.randn(2, 5, WIDTH + 1))
    with pytest.raises(RuntimeError):
        layer(X.double())


class HiddenStatesBlock(Block):
    def forward(
        self, hidden_states: Tensor, last: bool = True, scale: float = 1.0, *, deep: bool = False
    ) -> Tensor:
        """An option that is not given means that it is True."""
        hidden_states = scale * super().forward(hidden_states)
        return hidden_states if last and not deep else hidden_states[:, :1]


def test_arguments_may_be_given_by_the_names_of_the_original() -> None:
    norm = nn.LayerNorm(WIDTH)
    expected = norm(input=X)
    report = accelerate(norm)
    torch.testing.assert_close(norm(input=X), expected)
    assert not report.rows[0].note
    layer = HiddenStatesBlock(WIDTH, HEADS)
    original = copy.deepcopy(layer)
    report = accelerate(layer, only="")
    for options in ({}, {"last": True}, {"scale": 1.0, "deep": False}):
        torch.testing.assert_close(layer(hidden_states=X, **options), original(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(X, **options), original(X), rtol=1e-5, atol=1e-5)
    assert not report.rows[0].note
    for name, value in {"last": False, "scale": 2.0, "deep": True}.items():
        expected = original(X, **{name: value})
        torch.testing.assert_close(layer(X, **{name: value}), expected)
        assert report.rows[0].note.endswith(f"{name} given")
    with pytest.raises(TypeError, match="multiple values"):
        layer(X, hidden_states=X)
    with pytest.raises(TypeError, match="missing"):
        layer()
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(X, other=1)


def test_an_option_that_is_true_by_default_is_given_when_it_is_false() -> None:
    layer = HiddenStatesBlock(WIDTH, HEADS)
    expected = layer(X, False)
    accelerate(layer, only="")
    assert torch.equal(layer(X, False), expected)
    assert expected.shape == (2, 1, WIDTH)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(WIDTH), lambda: Mlp(WIDTH, 40), encoder_layer])
def test_tensors_without_memory_take_the_original_forward(make: Callable[[], nn.Module]) -> None:
    layer = make()
    report = accelerate(layer)
    assert layer.to("meta")(X.to("meta")).shape == X.shape
    assert report.rows[0].note.endswith("input on meta")


def test_transforms_of_torch_func_that_are_compiled_take_the_original_forward() -> None:
    layer = Block(WIDTH, HEADS)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: layer(row[None]).sum()))(x)

    expected = gradient(X)
    accelerate(layer)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(X), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_has_the_arguments_of_the_original(strict: bool) -> None:
    layer = Block(WIDTH, HEADS).eval()
    expected = layer(X)
    accelerate(layer)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(layer, (X,), strict=strict, dynamic_shapes=sizes)
    torch.testing.assert_close(exported.module()(X), expected, rtol=1e-5, atol=1e-5)


def test_parts_that_are_replaced_or_hooked_later_are_obeyed() -> None:
    for change, expected in (
        (lambda block: setattr(block.attn, "qkv", FurtherLinear(WIDTH, 3 * WIDTH)), "a Linear was replaced"),
        (lambda block: block.mlp.register_forward_hook(lambda *_: torch.ones(FEATURES)), "hooks on its Mlp"),
    ):
        block = Block(WIDTH, HEADS)
        original = copy.deepcopy(block)
        report = accelerate(block, only="")
        before = block(X)
        for each in (block, original):
            torch.manual_seed(0)
            change(each)
        assert torch.equal(block(X), original(X))
        assert not torch.allclose(block(X), before, atol=0.1)
        assert report.swapped[0].note == f"runs its own forward: {expected}"


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning")
def test_tracing_takes_the_original_forward() -> None:
    block = Block(WIDTH, HEADS)
    expected = block(X)
    report = accelerate(block, only="")
    traced = torch.jit.trace(block, X, check_trace=False)
    torch.testing.assert_close(traced(X), expected)
    assert report.swapped[0].note.endswith("torch.jit is tracing")


def test_transforms_of_torch_func_take_the_original_forward() -> None:
    block = Block(WIDTH, HEADS)
    original = copy.deepcopy(block)
    report = accelerate(block, only="")
    mapped = [
        torch.func.vmap(torch.func.grad(lambda x, layer=layer: layer(x[None]).sum()))(X)
        for layer in (block, original)
    ]
    torch.testing.assert_close(*mapped)
    _, tangents = zip(
        *(torch.func.jvp(layer, (X,), (torch.ones_like(X),)) for layer in (block, original)), strict=True
    )
    torch.testing.assert_close(*tangents)
    assert "torch.func transform" in report.swapped[0].note


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
            with accelerate(layer):
                found = layer(*arguments, **options)
        found, expected = (each[0] if isinstance(each, tuple) else each for each in (found, expected))
        assert found.dtype == expected.dtype, f"training {training}"
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "attention": attention,
    "post-norm layer": encoder_layer,
    "pre-norm layer": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "decoder layer": lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True),
    "block": lambda: Block(WIDTH, HEADS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_results_under_autocast_have_the_type_they_had(name: str) -> None:
    autocast_types(LAYERS[name](), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_results_under_autocast_on_a_device_have_the_type_they_had(name: str, dtype: torch.dtype) -> None:
    autocast_types(LAYERS[name](), "cuda", dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_any_layout_expanded_gradients_and_frozen_weights_are_taken(name: str) -> None:
    layer = LAYERS[name]()
    for number, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    strided = X.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not strided.is_contiguous()
    found = []
    for _ in range(2):
        arguments, options = arguments_of(layer, strided)
        output = layer(*arguments, **options)
        output = output[0] if isinstance(output, tuple) else output
        found.append([output, *torch.autograd.grad(output.sum(), [strided, *trained])])
        accelerate(layer)
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_sequence_first_results_can_be_viewed_as_before() -> None:
    for layer, arguments in (
        (attention(batch_first=False), (X, X, X, None, False)),
        (encoder_layer(batch_first=False), (X,)),
        (encoder_layer(batch_first=False, norm_first=True), (X,)),
    ):
        expected = layer(*arguments)
        accelerate(layer)
        found = layer(*arguments)
        if isinstance(found, tuple):
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found.view(-1), expected.view(-1), rtol=1e-5, atol=1e-5)
