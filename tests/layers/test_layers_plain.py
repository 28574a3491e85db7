"""A few rows on a CPU: the drop-in layers by PyTorch's own ops, equal to their own forms."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from layer_pairs import HEADS, HIDDEN, MEMORY, QUERIES, WIDTH
from torch import Tensor, nn

from lmim_fast.layers import Attention, Block, DecoderLayer, Mlp, MultiheadAttention, plain
from lmim_fast.ops import attention_backends, dispatch

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Attention": lambda: Attention(WIDTH, HEADS, qkv_bias=True),
    "Attention without bias": lambda: Attention(WIDTH, HEADS),
    "Mlp": lambda: Mlp(WIDTH, HIDDEN),
    "Block": lambda: Block(WIDTH, HEADS, qkv_bias=True),
    "self-attention": lambda: MultiheadAttention(WIDTH, HEADS, batch_first=True),
    "cross-attention": lambda: MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False),
    "DecoderLayer": lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0),
    "DecoderLayer, ca_sa": lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order="ca_sa"),
}


def call(name: str, layer: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    """Output of the layer, of whatever it takes."""
    if name == "self-attention":
        return layer(x, x, x)[0]
    if name == "cross-attention":
        return layer(x, memory, memory)[0]
    return layer(x, memory) if "Decoder" in name else layer(x)


def was_plain(run: Callable[[], object]) -> bool:
    """Whether a call runs a form of `layers/plain.py`."""
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        form = getattr(plain, name)
        return lambda *arguments, **named: calls.append(name) or form(*arguments, **named)

    names = ("self_attention", "attend_memory", "mlp")
    with mock.patch.multiple(plain, **{name: noted(name) for name in names}):
        run()
    return bool(calls)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_every_gradient_equal_those_of_the_own_form(name: str) -> None:
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    results = []
    for backend in ("eager", "auto"):
        x, memory = (torch.randn(s, generator=torch.Generator().manual_seed(5)) for s in (QUERIES, MEMORY))
        leaves = [x.requires_grad_(), memory.requires_grad_(), *layer.parameters()]
        with dispatch.backend(backend):
            output = call(name, layer, x, memory)
            gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            assert was_plain(partial(call, name, layer, x, memory)) == (backend == "auto")
        results.append([output, *(grad for grad in gradients if grad is not None)])
    assert len(results[0]) == len(results[1])
    for mine, own in zip(*results, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)


def test_batched_gradients_and_second_derivatives_go_through() -> None:
    block, x = Block(WIDTH, HEADS).double(), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    with dispatch.backend("auto"):
        both = [torch.autograd.functional.jacobian(block, x, vectorize=v) for v in (False, True)]
        torch.testing.assert_close(*both)
        assert torch.autograd.gradgradcheck(block.mlp, x.requires_grad_())


@pytest.mark.parametrize("case", ["many rows", "autocast", "backend", "attention backend", "compiled"])
def test_other_calls_take_the_own_form(case: str) -> None:
    block = Block(WIDTH, HEADS)
    x = torch.randn(plain.MOST_ROWS if case == "many rows" else 1, 3, WIDTH)
    run: Callable[[], object] = lambda: block(x)  # noqa: E731
    if case == "compiled":
        run = lambda: torch.compile(block, backend="eager", fullgraph=True)(x)  # noqa: E731
    with (
        dispatch.backend("eager" if case == "backend" else "auto"),
        attention_backends.backend("sdpa" if case == "attention backend" else "auto"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
    ):
        assert not was_plain(run)
    with dispatch.backend("auto"):
        assert was_plain(lambda: Block(WIDTH, HEADS)(x[:1]))


def test_dropout_is_in_all_its_places_and_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def dropout(x: Tensor, p: float) -> Tensor:
        calls.append(("dropout", p))
        return drop(x, p)

    def attention(*inputs: Tensor, dropout_p: float) -> Tensor:
        calls.append(("attention", dropout_p))
        return attend(*inputs, dropout_p=dropout_p)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    layer, x, memory = DecoderLayer(WIDTH, HEADS, HIDDEN, 0.5), torch.randn(QUERIES), torch.randn(MEMORY)
    block = Block(WIDTH, HEADS, proj_drop=0.25, attn_drop=0.5)
    branch, drawn, weights = ("dropout", 0.5), ("dropout", 0.25), ("attention", 0.5)
    with dispatch.backend("auto"):
        layer(x, memory)
        assert calls == [weights, branch, weights, branch, branch, branch]  # hidden values, and its branch
        calls.clear()
        block(x)
        assert calls == [weights, drawn, drawn, drawn]
        calls.clear()
        layer.eval()(x, memory)
        block.eval()(x)
        assert calls == [("attention", 0.0)] * 3


def test_stochastic_depth_drops_branches_of_a_few_rows_in_training_alone() -> None:
    block, x = Block(WIDTH, HEADS, drop_path=1 - 1e-9), torch.randn(QUERIES)
    with dispatch.backend("auto"):
        assert torch.equal(block(x), x)
        assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("part", ["mlp", "norm1", "attn.proj", "mlp.fc2"])
def test_parts_in_another_dtype_are_cast(part: str) -> None:
    block, x = Block(WIDTH, HEADS, qkv_bias=True), torch.randn(QUERIES)
    block.get_submodule(part).bfloat16()
    with dispatch.backend("auto"):
        assert was_plain(lambda: block(x))
        ours = block(x)
    own = block(x)
    assert ours.dtype == torch.float32
    assert (ours - own).norm() < 0.01 * own.norm()


@pytest.mark.parametrize("keys", ["self", "cross"])
def test_a_hooked_or_replaced_output_projection_acts(keys: str) -> None:
    layer = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, memory = torch.randn(QUERIES), torch.randn(MEMORY)
    inputs = (x, x, x) if keys == "self" else (x, memory, memory)
    with dispatch.backend("auto"):
        expected = layer(*inputs)[0]
        layer.out_proj.register_forward_hook(lambda module, given, output: 2 * output)
        torch.testing.assert_close(layer(*inputs)[0], 2 * expected)
        layer.out_proj = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU())
        assert layer(*inputs)[0].shape[-1] == 5


def test_an_input_that_does_not_fit_is_refused_in_the_layers_words() -> None:
    with dispatch.backend("auto"):
        with pytest.raises(ValueError, match=rf"x \(1, 3, 7\) must have {WIDTH} features"):
            Block(WIDTH, HEADS)(torch.randn(1, 3, 7))
        with pytest.raises(ValueError, match=r"must have at least one sequence and one token"):
            Block(WIDTH, HEADS)(torch.randn(0, 3, WIDTH))
        with pytest.raises(ValueError, match=r"torch\.float64"):
            Mlp(WIDTH, HIDDEN)(torch.randn(1, 3, WIDTH, dtype=torch.float64))
