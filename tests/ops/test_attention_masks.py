"""Causal self-attention and cross-attention of key lengths: the kernel and plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, every_second
from attention_cases import (
    DTYPE,
    Form,
    Inputs,
    assert_kernel_is_accurate,
    assert_nearly_equal,
    crossed,
    differentiate,
    draw,
    packed,
    seed,
)
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.ops import attention, routes
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.dropout import keep_mask, scale
from lmim_fast.ops.operators import attention as operators

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = ["triton", "eager", "sdpa"]


def lengths_of(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, weigh: Callable[[Tensor], Tensor]
) -> Tensor:
    """Softmax attention (B, N, H, d) in fp64 over the keys where `visible` (B, 1, N, M)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5
    return (weigh(scores.masked_fill(~visible, float("-inf")).softmax(-1)) @ v).transpose(1, 2)


CAUSAL = [(1, 32, [(2, 1)]), (2, 64, [(2, 5)]), (2, 32, [(1, 18), (2, 25)]), (1, 64, [(1, 64)])]
WITH_LENGTHS = [
    (32, (3, 1, 40), (1, 40, 17)),
    (64, (2, 4, 18), (18, 5)),
    (64, (2, 1, 64), (64, 63)),
    (32, (2, 70, 20), (20, 3)),
    (64, (2, 3, 9), (0, 9)),
]


@pytest.mark.parametrize(("heads", "dim", "segments", "p", "dtype"), every_second(CAUSAL, [0.0, 0.1], DTYPES))
def test_causal_attention_is_as_accurate_as_eager(
    heads: int, dim: int, segments: list[tuple[int, int]], p: float, dtype: torch.dtype
) -> None:
    form, inputs = packed(heads, dim, segments, dtype)
    assert_kernel_is_accurate(form, inputs, causal=True, p=p, seed=seed() if p else None)


@pytest.mark.parametrize(
    ("dim", "sizes", "lengths", "p", "dtype"), every_second(WITH_LENGTHS, [0.0, 0.1], DTYPES)
)
def test_attention_of_key_lengths_is_as_accurate_as_eager(
    dim: int, sizes: tuple[int, int, int], lengths: tuple[int, ...], p: float, dtype: torch.dtype
) -> None:
    form, inputs = crossed(2, dim, sizes, dtype)
    assert_kernel_is_accurate(form, inputs, key_lengths=lengths_of(*lengths), p=p, seed=seed() if p else None)


@pytest.mark.parametrize(
    ("backend", "p"), [*((name, 0.0) for name in BACKENDS), ("triton", 0.3), ("eager", 0.3)]
)
def test_a_query_sees_itself_and_the_keys_before_it(backend: str, p: float) -> None:
    form, (qkv, _) = packed(2, 32, [(2, 6)], DTYPE, bias=False)
    output, _ = differentiate(backend, form, [qkv, None], causal=True, p=p, seed=seed() if p else None)
    keep = keep_mask(seed(), torch.arange(4, device=DEVICE), 6, 6, p).view(2, 2, 6, 6) if p else None

    def weigh(weights: Tensor) -> Tensor:
        return weights if keep is None else torch.where(keep, weights * scale(p), 0.0)

    visible = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).tril()
    truth = written_out(*qkv.view(2, 6, 3, 2, 32).unbind(2), visible, weigh)
    tolerance = 20 * torch.finfo(DTYPE).eps
    torch.testing.assert_close(output.double(), truth.reshape(12, 64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_queries_see_the_first_keys_of_their_sequence(backend: str, kind: torch.dtype) -> None:
    form, (q, _, kv, _) = crossed(2, 32, (3, 4, 7), DTYPE, bias=False)
    lengths = lengths_of(1, 7, 3, dtype=kind)
    output, (d_q, _, d_kv, _) = differentiate(backend, form, [q, None, kv, None], key_lengths=lengths)
    for number, length in enumerate(lengths.tolist()):
        part = [q[number : number + 1], None, kv[number : number + 1, :length], None]
        expected, (of_q, _, of_kv, _) = differentiate(backend, form, part)
        tolerance = 20 * torch.finfo(DTYPE).eps
        for mine, other in (
            (output[number], expected[0]),
            (d_q[number], of_q[0]),
            (d_kv[number, :length], of_kv[0]),
        ):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        assert d_kv[number, length:].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("backend", "queries", "p"),
    [
        *((name, queries, 0.0) for name in BACKENDS for queries in (1, 70)),
        ("triton", 3, 0.1),
        ("eager", 3, 0.1),
    ],
)
def test_memory_behind_the_keys_does_not_matter(backend: str, bad: float, queries: int, p: float) -> None:
    form, inputs = crossed(2, 32, (3, queries, 20), DTYPES[0])
    lengths = lengths_of(1, 20, 6)
    options = dict(key_lengths=lengths, p=p, seed=seed() if p else None)
    clean = differentiate(backend, form, inputs, **options)
    behind = torch.arange(20, device=DEVICE) >= lengths[:, None]
    dirty = [*inputs[:2], inputs[2].masked_fill(behind[:, :, None], bad), inputs[3]]
    found = differentiate(backend, form, dirty, **options)
    assert torch.equal(found[0], clean[0])
    assert all(torch.equal(mine, other) for mine, other in zip(found[1], clean[1], strict=True))
    assert found[1][2][behind].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_without_keys_gets_zeros(backend: str) -> None:
    form, inputs = crossed(2, 32, (3, 4, 5), DTYPE)
    inputs[2][0] = float("nan")
    output, (d_q, _, d_kv, _) = differentiate(backend, form, inputs, key_lengths=lengths_of(0, 3, -1))
    for number in (0, 2):
        for x in (output, d_q, d_kv):
            assert x[number].count_nonzero() == 0
    assert output[1].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_beyond_the_keys_is_all_of_them(backend: str) -> None:
    form, inputs = crossed(2, 32, (2, 4, 5), DTYPE)
    whole = differentiate(backend, form, inputs, key_lengths=lengths_of(5, 2))
    assert_nearly_equal(differentiate(backend, form, inputs, key_lengths=lengths_of(99, 2)), whole, DTYPE)


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_backends_that_cannot_hide_keys_refuse_their_lengths(name: str) -> None:
    form, inputs = crossed(2, 32, (2, 3, 4), DTYPE)
    with attention.backend(name), pytest.raises(RuntimeError, match=f"'{name}' takes no key_lengths, got"):
        form(*inputs, key_lengths=lengths_of(1, 4))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("route", ["flash", "cudnn"])
def test_a_route_to_a_backend_that_cannot_hide_keys_runs_on_sdpa(
    route: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, inputs = crossed(2, 32, (2, 3, 4), DTYPE)
    lengths = lengths_of(1, 4)
    expected = differentiate("eager", form, inputs, key_lengths=lengths)
    monkeypatch.setenv("LMIM_FAST_ROUTES", f"cross_attention.{direction}={route}")
    if direction == "backward":
        found = differentiate("triton", form, inputs, key_lengths=lengths)
    else:
        with torch.no_grad():
            found = form(*inputs, key_lengths=lengths), []
        expected = expected[0], []
        rule = routes.of_call("cross_attention", ("forward",), (*inputs, 2, 0.0, None, lengths))
        assert rule is not None
        assert rule.backend == "sdpa"
        whole = routes.of_call("cross_attention", ("forward",), (*inputs, 2, 0.0, None, None))
        assert whole is not None
        assert whole.backend == route
    for mine, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)


def test_the_kernel_named_says_up_to_which_size_it_masks() -> None:
    with attention.backend("triton"), runtime.recording((9, 0)):
        form, inputs = packed(2, 32, [(1, 65)], DTYPE)
        with pytest.raises(RuntimeError, match=r"up to 64 keys with a causal mask, got 65"):
            form(*inputs, causal=True)
        form, inputs = crossed(2, 32, (2, 3, 65), DTYPE)
        with pytest.raises(RuntimeError, match=r"up to 64 keys with key_lengths, got 65"):
            form(*inputs, key_lengths=lengths_of(1, 65))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.ones(3, dtype=torch.int64), r"\(2,\) int32 or int64, got \(3,\) torch.int64"),
        (torch.ones(2, 1, dtype=torch.int64), r"got \(2, 1\) torch.int64"),
        (torch.ones(2), r"got \(2,\) torch.float32"),
        (torch.ones(2, dtype=torch.int64, device="meta"), r"key_lengths on meta"),
    ],
)
def test_wrong_key_lengths_are_named(lengths: Tensor, message: str) -> None:
    q, kv = draw(2, 3, 64), draw(2, 4, 128)
    with pytest.raises(ValueError, match=message):
        cross_attention(q, None, kv, None, 2, key_lengths=lengths if lengths.is_meta else lengths.to(DEVICE))


@pytest.mark.parametrize("options", [{"causal": True}, {"lengths": True}])
def test_gradients_under_masks_are_right_in_fp64(options: dict[str, bool]) -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    for backend in ("sdpa", "eager"):
        with attention.backend(backend):
            if "causal" in options:
                assert torch.autograd.gradcheck(
                    lambda *inputs: self_attention(*inputs, 2, [(2, 3)], causal=True),
                    (double(6, 12), double(12)),
                )
            else:
                assert torch.autograd.gradcheck(
                    lambda *inputs: cross_attention(*inputs, 2, key_lengths=torch.tensor([1, 2])),
                    (double(2, 3, 4), double(4), double(2, 2, 8), double(8)),
                )


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_masked_operators_keep_the_contract_of_pytorch(p: float) -> None:
    ops, dtype, drawn = torch.ops.lmim_fast, DTYPES[0], seed() if p else None
    qkv, bias = packed(1, 32, [(2, 5)], dtype)[1]
    leaves = [x.clone().requires_grad_() for x in (qkv, bias)]
    torch.library.opcheck(ops.self_attention.default, (*leaves, drawn, 1, [2, 5], p, True))
    out, normaliser = ops.self_attention(qkv, bias, drawn, 1, [2, 5], p, True)
    rest = (draw(*out.shape, dtype=dtype), qkv, bias, drawn, out, normaliser, 1, [2, 5], p, True, True)
    torch.library.opcheck(ops.self_attention_backward.default, rest)
    inputs, lengths = crossed(1, 32, (2, 3, 6), dtype)[1], lengths_of(2, 6)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.cross_attention.default, (*leaves, drawn, 1, p, lengths))
    out, normaliser = ops.cross_attention(*inputs, drawn, 1, p, lengths)
    rest = (draw(*out.shape, dtype=dtype), *inputs, drawn, out, normaliser, 1, p, True, lengths)
    torch.library.opcheck(ops.cross_attention_backward.default, rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["causal", "lengths"])
def test_masked_attention_compiles_in_one_graph(backend: str, masked: str) -> None:
    torch.compiler.reset()
    form: Form
    inputs: Inputs
    if masked == "causal":
        form, inputs = packed(2, 32, [(2, 5)], DTYPES[0])
        options: dict[str, object] = {"causal": True}
    else:
        form, inputs = crossed(2, 32, (2, 3, 6), DTYPES[0])
        options = {"key_lengths": lengths_of(2, 6)}
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    found, expected = (differentiate(backend, run, inputs, **options) for run in (compiled, form))
    for mine, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, other)


def test_masked_calls_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for op in ("self_attention", "cross_attention"):
        kernel = getattr(operators, op)
        monkeypatch.setattr(operators, op, lambda *given, k=kernel: (ran.append(k.__name__), k(*given))[1])
    with attention.backend("triton"):
        form, inputs = packed(1, 32, [(1, 3)], DTYPES[0])
        form(*inputs, causal=True)
        form, inputs = crossed(1, 32, (1, 2, 3), DTYPES[0])
        form(*inputs, key_lengths=lengths_of(2))
    assert ran == ["self_attention", "cross_attention"]
