"""A layer whose part was replaced, hooked or adapted calls that part, as the known module does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attachments import OF_ANY, OF_LINEARS, lora, replace
from layer_pairs import HEADS, HIDDEN, MEMORY, PAIRS, QUERIES, WIDTH, Pair, to_itself
from torch import Tensor, nn

from lmim_fast.layers import Attention, Block, DecoderLayer, Mlp, MultiheadAttention, attention, decoder_layer
from lmim_fast.layers import block as block_module
from lmim_fast.layers import mlp as mlp_module
from lmim_fast.layers.block import PackedBlock
from lmim_fast.ops import dispatch
from lmim_fast.ops.attention import backend as attention_backend
from lmim_fast.reference import MultiheadAttention as ReleasedAttention

PAIRS = PAIRS | {
    "self-attention": Pair(
        lambda: MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda: ReleasedAttention(WIDTH, HEADS, 0.0),  # torch's own reads the weights of its projection
        call=lambda module, x: module(x, x, x)[0] if isinstance(module, MultiheadAttention) else module(x, x),
    )
}
PARTS = {
    "Attention": {"qkv": OF_LINEARS, "proj": ("lora", "forward hook", "pruning")},
    "Mlp": {"fc1": ("lora", "pre-hook", "weight norm"), "fc2": ("lora", "spectral norm")},
    "self-attention": {"out_proj": OF_LINEARS},
    "Block": {
        "attn.qkv": OF_LINEARS,
        "attn.proj": ("lora", "pruning", "backward hook"),
        "mlp.fc1": ("sequential", "parametrization"),
        "mlp.fc2": ("lora", "spectral norm"),
        "attn": OF_ANY,
        "mlp": OF_ANY,
        "norm1": ("lora", "forward hook", "weight norm"),
        "norm2": ("sequential", "pruning"),
    },
    "DecoderLayer": {
        "linear1": OF_LINEARS,
        "linear2": ("lora", "backward hook"),
        "self_attn": OF_ANY,
        "multihead_attn": ("lora", "pre-hook"),
        "self_attn.out_proj": ("lora", "weight norm"),
        "multihead_attn.out_proj": ("lora", "pruning"),
    },
    "DecoderLayer, memory first": {"self_attn": ("lora",), "multihead_attn.out_proj": ("forward hook",)},
}
CASES = [
    (layer, part, kind) for layer, parts in PARTS.items() for part, kinds in parts.items() for kind in kinds
]
OWN_FORMS = [  # what the layers' own forms, which read weights, call
    (attention, "self_attention"),
    (mlp_module, "mlp"),
    (block_module, "norm_mlp"),
    (decoder_layer, "mlp"),
]


@contextmanager
def own_calls() -> Iterator[list[str]]:
    """The calls of the layers' own forms inside."""
    calls: list[str] = []

    def noted(name: str, form: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments, **named: calls.append(name) or form(*arguments, **named)

    with ExitStack() as patches:
        for module, name in OWN_FORMS:
            patches.enter_context(mock.patch.object(module, name, noted(name, getattr(module, name))))
        yield calls


def trained(pair: Pair, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and all gradients of two steps of training, and the output after them."""
    results = []
    for _ in range(2):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        (output,) = pair.run(module, leaves)
        module.zero_grad()
        output.square().mean().backward()
        named = sorted((name, p) for name, p in module.named_parameters())
        for name, p in named:
            assert p.grad is not None, f"{name} has no gradient"
        results += [output.detach(), *(x.grad for x in leaves), *(p.grad.clone() for _, p in named)]
        with torch.no_grad():
            for _, p in named:
                p -= 0.1 * p.grad
    with torch.no_grad():
        return [*results, *pair.run(module, inputs)]


@pytest.mark.parametrize(("layer", "part", "kind"), CASES)
def test_an_attached_part_acts_trains_and_leaves(layer: str, part: str, kind: str) -> None:
    """Under both forms of the layer: that of a few rows, and its own."""
    pair = PAIRS[layer]
    for form in ("auto", "eager"):
        torch.compiler.reset()
        ours, truth = pair.make(torch.float64)
        ours, truth = ours.double(), truth.double()
        undos = [OF_LINEARS[kind](module, part) for module in (ours, truth)]
        ours.double(), truth.double()
        ours.load_state_dict(truth.state_dict(), strict=True)
        inputs = [x.detach() for x in pair.inputs(torch.float64)]
        with dispatch.backend(form):
            for mine, expected in zip(*(trained(pair, m, inputs) for m in (ours, truth)), strict=True):
                torch.testing.assert_close(mine, expected)
            for undo in undos:
                undo()
            ours.eval(), truth.eval()
            with torch.no_grad(), own_calls() as calls:
                (mine,), (expected,) = (pair.run(module, inputs) for module in (ours, truth))
            torch.testing.assert_close(mine, expected)
            assert bool(calls) == (form == "eager"), "the own form runs again"


@pytest.mark.parametrize("norm", ["norm1", "norm2", "norm3"])
def test_norms_of_a_decoder_layer_may_be_hooked_or_replaced(norm: str) -> None:
    pair = PAIRS["DecoderLayer"]
    ours, truth = pair.make()
    inputs = [x.detach() for x in pair.inputs()]
    seen: list[nn.Module] = []
    with ours.get_submodule(norm).register_forward_hook(lambda module, *_: seen.append(module)):
        torch.testing.assert_close(ours(*inputs), truth(*inputs))
    assert len(seen) == 1
    for module in (ours, truth):
        setattr(module, norm, nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh()))
    for mine, expected in zip(*(trained(pair, m, inputs) for m in (ours, truth)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


class Wrapped(nn.Module):
    """A part in a module that calls it, as checkpointing and peft's copies of trained parts do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.base(*inputs, **named)


@pytest.mark.parametrize("layer", ["Block", "DecoderLayer"])
def test_every_part_of_a_layer_may_be_wrapped(layer: str) -> None:
    ours, truth = PAIRS[layer].make()
    inputs = [x.detach() for x in PAIRS[layer].inputs()]
    (expected,) = PAIRS[layer].run(truth, inputs)
    for name, part in list(ours.named_modules())[1:]:
        undo = replace(ours, name, Wrapped(part))
        torch.testing.assert_close(ours(*inputs), expected)
        undo()


def test_a_bias_that_is_no_parameter_is_added() -> None:
    ours, truth = PAIRS["Block"].make()
    x = torch.randn(QUERIES)
    for part in (ours.attn.proj, ours.attn.qkv, ours.mlp.fc1, ours.norm1):
        bias = part.bias.detach()
        del part.bias
        part.bias = bias
    for form in ("auto", "eager"):
        with dispatch.backend(form):
            torch.testing.assert_close(ours(x), truth(x))


def test_a_decoder_layer_takes_an_attention_without_biases() -> None:
    layer, x = DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0), torch.randn(QUERIES)
    expected = layer(x, x)  # fresh biases are zeros
    attention = MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    attention.load_state_dict(layer.self_attn.state_dict(), strict=False)
    layer.self_attn = attention
    torch.testing.assert_close(layer(x, x), expected)


def test_a_block_with_a_called_part_keeps_the_dtype_of_its_input() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(QUERIES, dtype=torch.float16)
    block.attn.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == x.dtype


def test_a_decoder_layer_takes_torchs_attention_in_place_of_its_own() -> None:
    pair = PAIRS["torch's decoder layer"]
    ours, truth = pair.make()
    inputs = [x.detach() for x in pair.inputs()]
    ours.self_attn = copy.deepcopy(truth.self_attn)
    torch.testing.assert_close(ours(*inputs), truth(*inputs))


@pytest.mark.parametrize("heads", [2, 6])
def test_a_layer_uses_the_heads_of_the_attention_that_it_holds(heads: int) -> None:
    x, memory = torch.randn(QUERIES), torch.randn(MEMORY)
    layer = DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0)
    layer.self_attn = MultiheadAttention(WIDTH, heads, batch_first=True)
    layer.multihead_attn = MultiheadAttention(WIDTH, heads, batch_first=True)
    own = layer(x, memory)
    with layer.linear1.register_forward_hook(lambda *_: None):
        torch.testing.assert_close(own, layer(x, memory))


def test_a_parametrized_input_projection_is_computed_once_a_call() -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counted.calls += 1
            return weight.tril()

    ours, truth = PAIRS["self-attention"].make()
    inputs = [torch.randn(QUERIES)]
    for module in (ours, truth):
        nn.utils.parametrize.register_parametrization(module, "in_proj_weight", Counted())
    for form in ("auto", "eager"):
        Counted.calls = 0
        with dispatch.backend(form):
            mine = to_itself(ours, *inputs)
        assert Counted.calls == 1
        torch.testing.assert_close(mine, truth(*inputs, *inputs))


SEGMENTS = [(2, 3), (1, 5)]


@pytest.mark.parametrize(
    ("part", "shapes"),
    [
        ("attn.qkv", [(11, WIDTH)]),
        ("mlp.fc1", [(11, WIDTH)]),
        ("norm2", [(11, WIDTH)]),
        ("attn", [(2, 3, WIDTH), (1, 5, WIDTH)]),
        ("mlp", [(2, 3, WIDTH), (1, 5, WIDTH)]),
    ],
)
def test_packed_views_reach_a_part_once_or_an_attention_segment_by_segment(
    part: str, shapes: list[tuple[int, ...]]
) -> None:
    block, rows = PackedBlock(WIDTH, HEADS, qkv_bias=True), torch.randn(11, WIDTH)
    residual, branch, bias = block(rows, None, None, SEGMENTS)
    seen: list[tuple[int, ...]] = []
    with block.get_submodule(part).register_forward_hook(lambda _, x, out: seen.append(tuple(x[0].shape))):
        hooked = block(rows, None, None, SEGMENTS)
    assert seen == shapes
    assert hooked[2] is None
    torch.testing.assert_close(hooked[0] + hooked[1], residual + branch + bias)


@pytest.mark.parametrize("part", ["attn.qkv", "attn", "norm1"])
def test_dropout_and_stochastic_depth_act_beside_a_called_part(part: str) -> None:
    block = PackedBlock(WIDTH, HEADS, proj_drop=0.5)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.fill_(3.0)
    block.get_submodule(part).register_forward_hook(lambda *_: None)
    _, branch, bias = block(torch.randn(50, WIDTH), None, None, [(10, 5)])
    assert bias is None
    assert branch.unique().tolist() == [0.0, 6.0]
    block.drop_path = 1 - 1e-9
    residual, branch, _ = block(rows := torch.randn(50, WIDTH), None, None, [(10, 5)])
    assert torch.equal(residual + branch, rows)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Attention": lambda: Attention(WIDTH, HEADS, qkv_bias=True),
    "Mlp": lambda: Mlp(WIDTH, HIDDEN),
    "Block": lambda: Block(WIDTH, HEADS),
    "DecoderLayer": lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0),
    "MultiheadAttention": lambda: MultiheadAttention(WIDTH, HEADS, batch_first=True),
}


def call(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, MultiheadAttention):
        return layer(x, x, x)[0]
    return layer(x, x) if isinstance(layer, DecoderLayer) else layer(x)


@pytest.mark.parametrize("form", ["auto", "eager", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_returns_a_view(name: str, form: str) -> None:
    """FSDP2 warns of one: changed in place, it would lose a hook on its gradient."""
    layer, x = LAYERS[name](), torch.randn(1, 3, WIDTH)
    with dispatch.backend(form), attention_backend("eager" if form == "triton" else "auto"):
        assert not call(layer, x.clone().requires_grad_())._is_view()
        layer.eval()
        with torch.no_grad():
            assert not call(layer, x)._is_view()


@pytest.mark.parametrize("name", ["Block", "DecoderLayer"])
def test_a_part_that_is_called_goes_with_the_kernels_of_the_others(name: str) -> None:
    layer, x, seen = LAYERS[name](), torch.randn(1, 3, WIDTH), []
    part = layer.get_submodule("norm1" if name == "Block" else "linear1")
    expected = call(layer, x)
    part.register_forward_hook(lambda *_: seen.append(1))
    with dispatch.backend("triton"), attention_backend("eager"):
        torch.testing.assert_close(call(layer, x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_compiled_block_is_one_graph_before_and_after_an_adapter(adapted: bool) -> None:
    torch.compiler.reset()
    block, x = Block(WIDTH, HEADS, qkv_bias=True), torch.randn(QUERIES)
    if adapted:
        lora(block, "attn.qkv")
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


@pytest.mark.parametrize("adapted", [False, True])
def test_an_exported_block_has_the_form_that_it_runs(adapted: bool) -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(QUERIES)
    if adapted:
        lora(block, "attn.qkv")
    with own_calls() as calls:
        program = torch.export.export(block, (x,), strict=False)
    assert ("norm_mlp" in calls) == (not adapted)
    torch.testing.assert_close(program.module()(x), block(x))


def test_a_compiled_block_notices_an_adapter_that_comes_later() -> None:
    torch.compiler.reset()
    block, x = Block(WIDTH, HEADS, qkv_bias=True), torch.randn(QUERIES)
    run = torch.compile(block, fullgraph=True, backend="eager")
    before = run(x)
    lora(block, "mlp.fc1")
    after = run(x)
    torch.testing.assert_close(after, block(x))
    assert not torch.allclose(before, after)


def test_a_copy_of_an_adapted_block_is_adapted_alone() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(QUERIES)
    lora(block, "attn.qkv")
    twin = copy.deepcopy(block)
    torch.testing.assert_close(twin(x), block(x))
    with torch.no_grad():
        twin.attn.qkv.up.weight.fill_(1.0)
    assert not torch.allclose(twin(x), block(x))
    F.mse_loss(twin(x), x).backward()
    assert twin.attn.qkv.up.weight.grad is not None
    assert block.attn.qkv.up.weight.grad is None
