"""The attention kernels on a CUDA device: real sizes in bf16, CUDA graphs, Inductor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    Form,
    Inputs,
    assert_kernel_is_accurate,
    crossed,
    differentiate,
    draw,
    mask_mismatch,
    packed,
    seed,
    skip_where_too_long,
)
from torch import Tensor

from lmim_fast.ops import attention
from lmim_fast.ops.attention import self_attention
from lmim_fast.ops.operators import attention as operators

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16

# Encoder (6 heads of 64) on visible patches, on all, and on both packed; decoder (16 heads of 32).
REAL: dict[str, tuple[int, float, Callable[[], tuple[Form, Inputs]]]] = {
    "visible": (52, 0.0, lambda: packed(6, 64, [(512, 52)], BF16)),
    "visible, dropped": (52, 0.1, lambda: packed(6, 64, [(512, 52)], BF16)),
    "all": (257, 0.0, lambda: packed(6, 64, [(64, 257)], BF16)),
    "packed": (257, 0.0, lambda: packed(6, 64, [(64, 52), (64, 257)], BF16)),
    "packed, dropped": (257, 0.1, lambda: packed(6, 64, [(64, 52), (64, 257)], BF16)),
    "decoder": (257, 0.0, lambda: packed(16, 32, [(64, 257)], BF16)),
    "decoder, dropped": (257, 0.1, lambda: packed(16, 32, [(64, 257)], BF16)),
    "across": (257, 0.0, lambda: crossed(16, 32, (64, 205, 257), BF16)),
    "across, dropped": (257, 0.1, lambda: crossed(16, 32, (64, 205, 257), BF16)),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_in_bf16_are_as_accurate_as_eager(name: str) -> None:
    keys, p, make = REAL[name]
    skip_where_too_long(keys)
    assert_kernel_is_accurate(*make(), p=p, seed=seed() if p else None)


@pytest.mark.parametrize("name", REAL)
def test_two_runs_at_real_sizes_are_bit_equal(name: str) -> None:
    keys, p, make = REAL[name]
    skip_where_too_long(keys)
    form, inputs = make()
    with torch.no_grad():
        upstream = torch.randn_like(form(*inputs))
    first, second = (differentiate("triton", form, inputs, upstream, p=p, seed=seed()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(mine, other) for mine, other in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("tokens", [52, 257])
def test_sequences_beyond_two_billion_values_are_found(tokens: int) -> None:
    skip_where_too_long(tokens)
    heads, dim = 6, 64
    sequences = 2**31 // (3 * heads * dim * tokens) + 3
    needed = (
        8 * 3 * sequences * tokens * heads * dim
    )  # qkv, its gradient and the contexts in 16 bits, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    width, last = heads * dim, 2 * tokens
    form, (part, bias) = packed(heads, dim, [(2, tokens)], BF16)
    upstream = draw(last, width, dtype=BF16)
    expected = differentiate("triton", form, [part, bias], upstream)

    qkv = torch.zeros(sequences * tokens, 3 * width, dtype=BF16, device=part.device)
    qkv[-last:] = part
    whole_upstream = torch.zeros(sequences * tokens, width, dtype=BF16, device=part.device)
    whole_upstream[-last:] = upstream

    def long_form(qkv: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return self_attention(qkv, bias, heads, [(sequences, tokens)], **options)

    output, (gradient, _) = differentiate("triton", long_form, [qkv, bias], whole_upstream)
    assert torch.equal(output[-last:], expected[0])
    assert torch.equal(gradient[-last:], expected[1][0])
    assert not gradient[:-last].any()


@pytest.mark.parametrize("problem", ["self", "cross"])
def test_cuda_graph_replay_is_equal(problem: str) -> None:
    skip_where_too_long(257)
    if problem == "self":
        form, inputs = packed(6, 64, [(8, 52), (8, 257)], BF16)
    else:
        form, inputs = crossed(16, 32, (8, 205, 257), BF16)
    fixed = seed()
    upstream = torch.randn_like(form(*inputs))
    plain = differentiate("triton", form, inputs, upstream)
    dropped = differentiate("triton", form, inputs, upstream, p=0.1, seed=fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate("triton", form, inputs, upstream)
        captured_dropped = differentiate("triton", form, inputs, upstream, p=0.1, seed=fixed)
    for _ in range(2):
        for output, gradients in (captured, captured_dropped):
            for tensor in (output, *gradients):
                tensor.fill_(float("nan"))
        graph.replay()
        for found, expected in ((captured, plain), (captured_dropped, dropped)):
            assert torch.equal(found[0], expected[0])
            assert all(torch.equal(mine, other) for mine, other in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("tokens", [52, 257])
def test_each_cuda_graph_replay_draws_a_mask_for_both_passes(tokens: int) -> None:
    skip_where_too_long(tokens)
    form, inputs = packed(6, 64, [(8, tokens)], torch.float16, bias=False)
    upstream = draw(8 * tokens, 6 * 64, dtype=torch.float16)
    differentiate("triton", form, inputs, upstream, p=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, (gradient, _) = differentiate("triton", form, inputs, upstream, p=0.1)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append((output.clone(), gradient.clone()))
    for number, (context, d_qkv) in enumerate(replays):
        assert mask_mismatch(inputs[0], d_qkv, context, upstream) < 0.01
        for other, _ in replays[:number]:
            assert not torch.equal(context, other)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_compiles_with_inductor_in_one_graph(p: float) -> None:
    skip_where_too_long(257)
    torch.compiler.reset()
    segments = [(4, 52), (4, 257)]
    qkv, bias = (tensor.requires_grad_() for tensor in packed(6, 64, segments, BF16)[1])
    fixed = seed() if p else None

    def form(qkv: Tensor, bias: Tensor) -> Tensor:
        return self_attention(2 * qkv, bias, 6, segments, p=p, seed=fixed) / 2  # powers of two: exact in bf16

    with attention.backend("triton"):
        output, expected = torch.compile(form, fullgraph=True)(qkv, bias), form(qkv, bias)
    upstream = torch.randn_like(expected)
    assert torch.equal(output, expected)
    found, wanted = (torch.autograd.grad(x, (qkv, bias), upstream) for x in (output, expected))
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


def test_compiled_attention_draws_a_mask_each_time() -> None:
    torch.compiler.reset()
    qkv, _ = packed(6, 64, [(4, 52)], BF16)[1]
    with attention.backend("triton"):
        compiled = torch.compile(lambda x: self_attention(x, None, 6, [(4, 52)], p=0.1), fullgraph=True)
        first, second = compiled(qkv), compiled(qkv)
    assert first.isfinite().all()
    assert not torch.equal(first, second)


def test_auto_on_this_device_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for op in ("self_attention", "cross_attention"):
        kernel = getattr(operators, op)
        monkeypatch.setattr(operators, op, lambda *given, k=kernel: (ran.append(k.__name__), k(*given))[1])
    for form, inputs in (packed(6, 64, [(4, 52)], BF16), crossed(6, 64, (4, 51, 52), BF16)):
        form(*inputs)
    assert ran == ["self_attention", "cross_attention"]
