"""Layers whose GELU runs in the epilogue of their products: values, launches, what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import timm_like
import torch
import torch.nn.functional as F
from layer_pairs import HEADS, HIDDEN, MEMORY, QUERIES, WIDTH, timm_block, timm_mlp
from torch import Tensor, nn

from benchmarks.operation import launches
from lmim_fast import accelerate
from lmim_fast.kernels import linear_gelu
from lmim_fast.layers import Block, DecoderLayer, Mlp
from lmim_fast.layers.block import PackedBlock
from lmim_fast.ops import attention, dispatch
from lmim_fast.ops.epilogue import VARIABLE

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="about kernels in the interpreter; on a device: ops/test_mlp.py"
)
FORWARD, BACKWARD = "linear_gelu.linear_gelu_kernel", "linear_gelu.linear_gelu_backward_kernel"
POINTWISE = "gelu._forward", "gelu._backward"


@dataclass(frozen=True)
class Layer:
    """How a layer is made with a setting, and its inputs."""

    make: Callable[[str], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (QUERIES,)

    def inputs(self) -> list[Tensor]:
        return [torch.randn(shape, requires_grad=True) for shape in self.shapes]


LAYERS = {
    "Mlp": Layer(lambda setting: Mlp(WIDTH, HIDDEN, 9, epilogue=setting)),
    "Block": Layer(lambda setting: Block(WIDTH, HEADS, epilogue=setting)),
    "DecoderLayer": Layer(
        lambda setting: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, epilogue=setting), (QUERIES, MEMORY)
    ),
}
FOREIGN = {
    "timm's Mlp": Layer(lambda _: timm_mlp()),
    "timm's Block": Layer(lambda _: timm_block()),
    "torch's encoder": Layer(
        lambda _: nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, F.gelu, batch_first=True)
    ),
    "torch's decoder, pre-norm": Layer(
        lambda _: nn.TransformerDecoderLayer(
            WIDTH, HEADS, HIDDEN, 0.0, F.gelu, batch_first=True, norm_first=True
        ),
        (QUERIES, MEMORY),
    ),
}


LIKE: dict[type[nn.Module], str] = {
    timm_like.Attention: "timm.Attention",
    timm_like.Mlp: "timm.Mlp",
    timm_like.Block: "timm.Block",
}


@contextmanager
def as_kernels() -> Iterator[None]:
    """Ops run as kernels and fail if they have none; attention, whose heads are too narrow here, is eager."""
    with dispatch.backend("triton"), attention.backend("eager"):
        yield


@pytest.fixture
def kernels() -> Iterator[None]:
    """The whole test runs as kernels."""
    with as_kernels():
        yield


def step(layer: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], dict[str, int]]:
    """Output and all gradients, and how often each kernel of GELU was launched."""
    with launches() as names:
        output = layer(*inputs)
        sources = [*inputs, *layer.parameters()]
        results = [output, *torch.autograd.grad(output, sources, torch.ones_like(output))]
    return results, {name: names.count(name) for name in (FORWARD, BACKWARD, *POINTWISE) if name in names}


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_both_forms_give_the_values_and_gradients_of_the_eager_layer(name: str) -> None:
    layers = {setting: LAYERS[name].make(setting) for setting in ("on", "off")}
    layers["off"].load_state_dict(layers["on"].state_dict())
    inputs = LAYERS[name].inputs()
    expected, _ = step(layers["on"], inputs)  # on a CPU no kernel runs
    with as_kernels():
        (on, of_on), (off, of_off) = (step(layers[setting], inputs) for setting in ("on", "off"))
    assert_close(on, expected)
    assert_close(off, expected)
    assert of_on == {FORWARD: 1, BACKWARD: 1}
    assert of_off == dict.fromkeys(POINTWISE, 1)  # the backward pass writes the activated rows again


@pytest.mark.parametrize("name", FOREIGN)
def test_accelerated_layers_follow_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = FOREIGN[name].make(""), FOREIGN[name].inputs()
    expected, _ = step(layer, inputs)
    assert accelerate(layer, like=LIKE).swapped
    for setting, of in (("on", {FORWARD, BACKWARD}), ("off", set(POINTWISE))):
        monkeypatch.setenv(VARIABLE, setting)
        with as_kernels():
            results, counted = step(layer, inputs)
        assert_close(results, expected)
        assert counted.keys() == of


def kept_bytes(layer: nn.Module, inputs: list[Tensor]) -> tuple[int, list[int]]:
    """Bytes of the memory that autograd keeps, and the shares of those tensors that are as wide as hidden."""
    kept: dict[int, int] = {}
    hidden: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        if tensor.shape[-1] == 4 * WIDTH and tensor.shape[:-1].numel() == QUERIES[0] * QUERIES[1]:
            hidden[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = layer(*inputs)
    assert alive.requires_grad
    return sum(kept.values()), list(hidden.values())


@pytest.mark.usefixtures("kernels")
def test_a_block_keeps_the_same_for_backward_in_both_forms() -> None:
    inputs = LAYERS["Block"].inputs()
    layers = {setting: LAYERS["Block"].make(setting) for setting in ("on", "off")}
    layers["on"].load_state_dict(layers["off"].state_dict())
    on, off = (kept_bytes(layers[setting], inputs) for setting in ("on", "off"))
    assert on == off
    assert on[1] == [QUERIES[0] * QUERIES[1] * 4 * WIDTH * 4], "hidden rows once, and activated ones never"


@pytest.mark.usefixtures("kernels")
def test_a_frozen_block_and_one_without_gradients_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    forward = linear_gelu.forward

    def note(*arguments: Tensor, keep_hidden: bool) -> tuple[Tensor | None, Tensor]:
        written.append(keep_hidden)
        return forward(*arguments, keep_hidden=keep_hidden)

    monkeypatch.setattr(linear_gelu, "forward", note)
    block, x = Block(WIDTH, HEADS, epilogue="on"), torch.randn(QUERIES)
    block(x)
    with torch.no_grad():
        block(x)
    block.requires_grad_(False)
    block(x)
    block(x.requires_grad_())
    assert written == [True, False, False, True]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("trained", ["fc1.weight", "fc1.bias", "fc2.weight"])
def test_gradients_of_single_parameters_of_a_block_are_those_of_all(trained: str) -> None:
    block, x = Block(WIDTH, HEADS, epilogue="on"), torch.randn(QUERIES)
    upstream, source = torch.randn(QUERIES), block.get_parameter(f"mlp.{trained}")
    (expected, *_) = torch.autograd.grad(block(x), [source, *block.parameters()], upstream)
    block.requires_grad_(False)
    source.requires_grad_()
    (grad,) = torch.autograd.grad(block(x), source, upstream)
    torch.testing.assert_close(grad, expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["Mlp", "Block", "DecoderLayer"])
def test_dropout_between_the_matmuls_runs_the_gelu_in_a_separate_pass(name: str) -> None:
    layer = {
        "Mlp": lambda: Mlp(WIDTH, HIDDEN, drop=0.25, epilogue="on"),
        "Block": lambda: Block(WIDTH, HEADS, proj_drop=0.25, epilogue="on"),
        "DecoderLayer": lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.25, epilogue="on"),
    }[name]()
    inputs = LAYERS[name].inputs()
    assert step(layer, inputs)[1].keys() == set(POINTWISE)
    assert step(layer.eval(), inputs)[1] == {FORWARD: 1, BACKWARD: 1}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "setting", "low"),
    [
        *[("Block", "on", True), ("DecoderLayer", "on", False), ("DecoderLayer", "off", True)],
        *(
            pytest.param("Mlp", *form, marks=pytest.mark.slow)  # a part of the others
            for form in (("on", False), ("on", True), ("off", True))
        ),
    ],
)
def test_the_whole_layer_is_one_compiled_graph_equal_to_eager(name: str, setting: str, low: bool) -> None:
    torch.compiler.reset()
    layer, inputs = LAYERS[name].make(setting), LAYERS[name].inputs()
    results, counted = [], []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.float16, enabled=low):
            output = run(*inputs)
        sources = [*inputs, *layer.parameters()]
        with launches() as names:
            gradients = torch.autograd.grad(output, sources, torch.ones_like(output))
        results.append([output, *gradients])
        counted.append([name for name in names if "gelu" in name])
    rtol, atol = (2**-9, 2**-8) if low else (1e-4, 1e-5)
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)
    if setting == "on":
        assert counted == [[BACKWARD]] * 2, "no launch recomputes the GELU"


@pytest.mark.usefixtures("kernels")
def test_packed_blocks_take_the_setting_and_other_parts_in_its_place() -> None:
    """A replaced MLP with these names is read as it is, as without the epilogue."""
    block, rows = PackedBlock(WIDTH, HEADS, epilogue="on"), torch.randn(10, WIDTH)
    block.mlp = Mlp(WIDTH, HIDDEN, epilogue="off")
    with launches() as names:
        residual, branch, bias = block(rows, None, None, [(2, 5)])
    assert "gelu._forward" in names
    assert FORWARD not in names
    block.mlp.epilogue = "on"
    with launches() as names:
        second = block(rows, None, None, [(2, 5)])
    assert FORWARD in names
    for mine, theirs in zip(second, (residual, branch, bias), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
