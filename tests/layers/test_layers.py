"""Drop-in layers against the modules whose place they take, with the same state dict."""

from __future__ import annotations

import pytest
import torch
from layer_pairs import (
    DROPPING,
    HEADS,
    HIDDEN,
    MEMORY,
    PAIRS,
    QUERIES,
    WIDTH,
    Pair,
    our_multihead,
    timm_attention,
    timm_block,
    torch_attention,
)
from torch import Tensor, nn

from lmim_fast.layers import Attention, Block, DecoderLayer
from lmim_fast.layers.block import PackedBlock
from lmim_fast.layers.decoder_layer import PackedDecoderLayer
from lmim_fast.layers.decoder_rows import Memory, PlainRows
from lmim_fast.ops.linear import linear


def gradients(pair: Pair, module: nn.Module, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    outputs = pair.run(module, inputs)
    # In the order of names: the modules may register their parameters in another one.
    parameters = [p for _, p in sorted(module.named_parameters())]
    return list(torch.autograd.grad(outputs, [*inputs, *parameters], [up.to(outputs[0]) for up in upstream]))


def upstream_of(pair: Pair, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(output) for output in pair.run(module, inputs)]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_every_gradient_are_those_of_the_known_module(name: str) -> None:
    pair = PAIRS[name]
    ours, truth = pair.make(torch.float64)
    inputs = pair.inputs(torch.float64)
    for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
        torch.testing.assert_close(mine, expected)
    upstream = upstream_of(pair, truth, inputs)
    both = (gradients(pair, module, inputs, upstream) for module in (ours, truth))
    for mine, expected in zip(*both, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_names_and_shapes_of_weights_are_those_of_the_known_module(name: str) -> None:
    ours, truth = PAIRS[name].ours(), PAIRS[name].truth()
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (ours, truth)]
    assert shapes[0] == shapes[1]
    truth.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", PAIRS)
def test_inputs_in_any_layout_and_expanded_gradients_are_taken(name: str) -> None:
    pair = PAIRS[name]
    ours, _ = pair.make()
    inputs = pair.inputs()
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    results = []
    for variant in (inputs, strided):
        outputs = pair.run(ours, variant)
        results.append([*outputs, *torch.autograd.grad(sum(output.sum() for output in outputs), variant)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def size(error: Tensor, by_mean: bool) -> Tensor:
    return error.square().mean().sqrt() if by_mean else error.abs().max()


def errors_in_half_precision(name: str, device: str) -> None:
    """Under autocast ours is at most three times as far from fp32 as the known module, or one rounding.

    By the largest error of outputs, by the mean square of gradients.
    """
    pair = PAIRS[name]
    ours, truth = (module.to(device) for module in pair.make())
    inputs = [x.detach().to(device).requires_grad_() for x in pair.inputs()]
    upstream = upstream_of(pair, truth, inputs)
    exact = [*pair.run(truth, inputs), *gradients(pair, truth, inputs, upstream)]
    with torch.autocast(device, dtype=torch.bfloat16):
        plain, mine = (
            [*pair.run(module, inputs), *gradients(pair, module, inputs, upstream)]
            for module in (truth, ours)
        )
    for number, (low, fast, right) in enumerate(zip(plain, mine, exact, strict=True)):
        by_mean = number >= len(upstream)
        rounding = torch.finfo(torch.bfloat16).eps / 2 * size(right, by_mean)
        allowed = 3 * torch.maximum(size(low.float() - right, by_mean), rounding)
        assert size(fast.float() - right, by_mean) <= allowed, f"tensor {number}"
        assert fast.dtype == low.dtype, f"tensor {number}"


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_autocast_is_as_exact_as_the_known_module(name: str) -> None:
    errors_in_half_precision(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_bf16_autocast_on_a_device_is_as_exact_as_the_known_module(name: str) -> None:
    errors_in_half_precision(name, "cuda")


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_weights_give_bf16_results(name: str) -> None:
    pair = PAIRS[name]
    ours, _ = pair.make(torch.bfloat16)
    for output in pair.run(ours, pair.inputs(torch.bfloat16)):
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_acts_in_training_as_in_the_known_module_and_not_in_evaluation(name: str) -> None:
    """The same sequence many times in a batch: mean and deviation of each value are those of the truth."""
    pair, copies = DROPPING[name], 4000
    ours, truth = pair.make()
    inputs = [x.detach()[:1].expand(copies, -1, -1) for x in pair.inputs()]
    with torch.no_grad():
        for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
            error = (mine.mean(0) - expected.mean(0)).abs()
            deviation = ((mine.var(0) + expected.var(0)) / copies).sqrt()
            assert (error <= 5 * deviation + 1e-6).all()
            spread = mine.std(0).square().mean().sqrt() / expected.std(0).square().mean().sqrt()
            assert 0.97 < spread < 1.03
        ours.eval(), truth.eval()
        for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_fresh_weights_are_drawn_as_torch_draws_them() -> None:
    for ours, truth in (
        (our_multihead, torch_attention),
        (lambda: Attention(WIDTH, HEADS, True), timm_attention),
        (lambda: Block(WIDTH, HEADS, 2.5, True), timm_block),
    ):
        torch.manual_seed(1)
        mine = ours()
        torch.manual_seed(1)
        expected = truth().state_dict()
        for name, value in mine.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_attention_takes_its_place_in_torch_layers(training: bool) -> None:
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        layer = kind(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True).train(training)
        inputs = [torch.randn(QUERIES), torch.randn(MEMORY)][: 2 if kind is nn.TransformerDecoderLayer else 1]
        expected = layer(*inputs)
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                ours = our_multihead().train(training)
                ours.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, ours)
        for gradients_kept in (True, False):
            with torch.set_grad_enabled(gradients_kept):
                torch.testing.assert_close(layer(*inputs), expected)


def same_weights(module: nn.Module, source: nn.Module) -> nn.Module:
    module.load_state_dict(source.state_dict(), strict=True)
    return module


def test_packed_blocks_equal_blocks_of_each_batch_apart() -> None:
    first, second = PackedBlock(WIDTH, HEADS, proj_drop=0.1).eval(), PackedBlock(WIDTH, HEADS)
    batches = torch.randn(3, 5, WIDTH), torch.randn(2, 4, WIDTH)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    segments = [batch.shape[:2] for batch in batches]
    residual, branch, bias = second(*first(rows, None, None, segments), segments)
    apart = [same_weights(Block(WIDTH, HEADS), block) for block in (first, second)]
    expected = torch.cat([apart[1](apart[0](batch)).flatten(0, 1) for batch in batches])
    torch.testing.assert_close(residual + branch + bias, expected)


def test_a_packed_block_returns_its_last_branch_with_bias_and_dropout_applied() -> None:
    block = PackedBlock(WIDTH, HEADS, proj_drop=0.5)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.fill_(3.0)
    _, branch, bias = block(torch.randn(50, WIDTH), None, None, [(10, 5)])
    assert bias is None
    assert branch.unique().tolist() == [0.0, 6.0]


def test_a_block_does_not_keep_its_normalised_rows() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(QUERIES, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    middle = x + block.attn(block.norm1(x))
    for normalised in (block.norm1(x), block.norm2(middle)):
        flat = normalised.flatten(0, 1)
        same = [t for t in kept if t.shape == flat.shape and torch.allclose(t, flat, atol=1e-5)]
        assert not same
    assert any(t.shape == (10, 4 * WIDTH) for t in kept), "the product of fc1 is kept"


@pytest.mark.parametrize("order", ["sa_ca", "ca_sa"])
def test_masked_rows_alone_equal_the_last_rows_of_the_whole_layer(order: str) -> None:
    packed = PackedDecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order=order)
    layer = same_weights(DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order=order), packed)
    x, memory = torch.randn(QUERIES), torch.randn(MEMORY)
    q_weight, kv_weight, q_bias, kv_bias = packed.multihead_attn.projections()
    keys = Memory(linear(memory, kv_weight), kv_bias, q_weight, q_bias, added=False)
    last = packed(PlainRows(2, x), keys, masked_only=True).rows
    torch.testing.assert_close(last, layer(x, memory)[:, 2:])


COMPILED = {
    "Block": lambda: (Block(WIDTH, HEADS), [torch.randn(QUERIES, requires_grad=True)]),
    "DecoderLayer": lambda: (
        DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0),
        [torch.randn(shape, requires_grad=True) for shape in (QUERIES, MEMORY)],
    ),
}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPILED)
def test_the_whole_layer_is_one_compiled_graph_equal_to_eager(name: str, backend: str, low: bool) -> None:
    torch.compiler.reset()
    layer, inputs = COMPILED[name]()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = run(*inputs)
        sources = [*inputs, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output, sources, torch.ones_like(output))])
    rtol, atol = (2**-6, 2**-5) if low else (1e-4, 1e-5)
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)
