"""Rules that send attention, or one direction of it, from the kernel to a library."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from attention_cases import DTYPE, Form, Inputs, crossed, differentiate, packed, seed, skip_where_too_long
from torch._subclasses import FakeTensorMode

from lmim_fast.kernels import attention_backward, runtime
from lmim_fast.ops import attention, attention_backends, dispatch, routes
from lmim_fast.ops.operators import attention as operators
from lmim_fast.ops.routes import Route, Size

SIZE = Size((9, 0), 32, 257, 257)


@pytest.fixture(autouse=True)
def _no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LMIM_FAST_ROUTES", "LMIM_FAST_ATTENTION", "LMIM_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(routes, "TABLE", ())
    torch.compiler.reset()  # what is compiled keeps the rules of its time


@pytest.fixture
def no_backward_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*given: Any) -> None:
        raise AssertionError("the kernel of the backward pass was launched")

    monkeypatch.setattr(attention_backward, "backward", crash)


def test_the_environment_is_read_as_rules() -> None:
    text = (
        " attention.backward.32=cudnn ;self_attention.backward=sdpa:deterministic; cross_attention.both=flash"
    )
    assert routes.parse(text) == (
        Route("attention", "backward", "cudnn", width=32),
        Route("self_attention", "backward", "sdpa", deterministic=True),
        Route("cross_attention", "both", "flash"),
    )
    assert routes.parse("") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attention=cudnn", "cannot read the route 'attention=cudnn': need op.direction"),
        ("norm.backward=cudnn", "unknown 'norm' in a route; choose from attention, self_attention"),
        ("attention.sideways=cudnn", "unknown 'sideways' in a route; choose from forward, backward, both"),
        ("attention.backward=triton", "unknown 'triton' in a route; choose from cudnn, flash, sdpa, eager"),
        ("attention.both=sdpa:deterministic", "deterministic in direction 'backward' only, got 'both'"),
    ],
)
def test_what_is_no_rule_is_an_error_at_the_first_call(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", text)
    with pytest.raises(ValueError, match=reason):
        routes.find("self_attention", ("forward",), [SIZE])


def test_rules_of_the_environment_come_first_and_the_first_that_fits_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow, wide = Route("attention", "backward", "sdpa", width=32), Route("attention", "backward", "eager")
    monkeypatch.setattr(routes, "TABLE", (narrow, wide))
    assert routes.find("cross_attention", ("backward",), [SIZE]) == narrow
    assert routes.find("cross_attention", ("backward",), [SIZE._replace(width=64)]) == wide
    assert routes.find("cross_attention", ("forward",), [SIZE]) is None
    monkeypatch.setenv("LMIM_FAST_ROUTES", "cross_attention.backward=cudnn")
    assert routes.find("cross_attention", ("backward",), [SIZE]) == Route(
        "cross_attention", "backward", "cudnn"
    )
    assert routes.find("self_attention", ("backward",), [SIZE]) == narrow


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        (dict(capability=(9, 0), width=32, queries=257, keys=257), True),
        (dict(capability=(10, 0)), False),
        (dict(width=64), False),
        (dict(queries=205), False),
        (dict(keys=52), False),
        (dict(op="self_attention"), True),
        (dict(op="cross_attention"), False),
        (dict(direction="both"), False),
    ],
)
def test_a_rule_is_for_all_that_it_does_not_name(changes: dict[str, Any], fits: bool) -> None:
    rule = Route(**(dict(op="attention", direction="forward", backend="sdpa") | changes))
    assert rule.fits("self_attention", ("forward",), SIZE) is fits


def problems(dim: int) -> Iterator[tuple[Form, Inputs]]:
    yield packed(2, dim, [(2, 9), (1, 70)], DTYPE)
    yield packed(1, dim, [(2, 20)], DTYPE, bias=False)
    yield crossed(2, dim, (2, 20, 52), DTYPE)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.usefixtures("no_backward_kernel")
def test_a_routed_backward_pass_gives_the_gradients_of_the_kernels_forward_pass(
    backend: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_too_long(70)
    monkeypatch.setenv("LMIM_FAST_ROUTES", f"attention.backward.32={backend}")
    for form, inputs in problems(32):
        upstream = torch.randn_like(form(*inputs))
        options = dict(p=p, seed=seed())
        ours = differentiate("triton", form, inputs, upstream, **options)
        truth = differentiate("eager", form, inputs, upstream, **options)
        for mine, other in zip((ours[0], *ours[1]), (truth[0], *truth[1]), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                assert mine.dtype == other.dtype
                largest = other.abs().max().clamp(min=1.0)
                assert (mine - other).abs().max() <= 20 * torch.finfo(DTYPE).eps * largest


def test_a_rule_for_another_width_leaves_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = attention_backward.backward
    monkeypatch.setattr(attention_backward, "backward", lambda *given: (launched.append(1), real(*given)))
    form, inputs = packed(1, 32, [(1, 9)], DTYPE)
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.backward.64=sdpa")
    differentiate("triton", form, inputs)
    assert launched == [1]


@pytest.mark.usefixtures("no_backward_kernel")
def test_only_the_inputs_that_need_a_gradient_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.backward=sdpa")
    form, inputs = crossed(1, 32, (2, 5, 9), DTYPE)
    leaves = [tensor.detach().requires_grad_(number == 2) for number, tensor in enumerate(inputs)]
    with attention.backend("triton"):
        form(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [False, False, True, False]


@pytest.mark.usefixtures("no_backward_kernel")
def test_a_deterministic_rule_asks_the_library_for_it_and_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    plain = attention_backends.PLAIN["sdpa"]

    def record(*given: Any, **named: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return plain(*given, **named)

    monkeypatch.setitem(attention_backends.PLAIN, "sdpa", record)
    form, inputs = packed(1, 32, [(1, 9)], DTYPE)
    for option in ("", ":deterministic"):
        monkeypatch.setenv("LMIM_FAST_ROUTES", f"attention.backward=sdpa{option}")
        differentiate("triton", form, inputs)
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("no_backward_kernel")
def test_a_routed_backward_pass_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.backward=sdpa")
    form, inputs = packed(1, 32, [(2, 9)], DTYPE)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    expected, found = (differentiate("triton", run, inputs) for run in (form, compiled))
    for mine, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("trained", [False, True])
def test_a_whole_call_on_a_library_compiles_into_one_graph(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.both=sdpa")
    monkeypatch.setattr(dispatch, "takes", lambda *given, **named: True)  # as on a CUDA device
    monkeypatch.setattr(operators, "self_attention", None)
    form, (qkv, bias) = packed(1, 32, [(2, 9)], DTYPE)
    qkv.requires_grad_(trained)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv, bias), form(qkv, bias))


# AOTAutograd traces the backward pass in anomaly mode, which warns of every error.
@pytest.mark.filterwarnings("ignore:Error detected in .*Backward:UserWarning")
def test_compilation_would_lose_a_deterministic_rule_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.backward=sdpa:deterministic")
    form, inputs = packed(1, 32, [(2, 9)], DTYPE)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"torch\.compile would lose that"):
        differentiate("triton", compiled, inputs)


@pytest.mark.parametrize(
    ("rule", "trained", "changes", "chosen"),
    [
        ("self_attention.forward=cudnn", False, {}, "cudnn"),
        ("self_attention.forward=cudnn", True, {}, "triton"),
        ("self_attention.forward=cudnn", False, dict(p=0.1), "triton"),
        ("self_attention.both=cudnn", True, {}, "cudnn"),
        ("self_attention.both=cudnn", False, {}, "cudnn"),
        ("self_attention.backward=cudnn", True, {}, "triton"),
        ("cross_attention.both=cudnn", True, {}, "triton"),
        ("attention.both.32=cudnn", True, {}, "triton"),
        ("attention.both.64=cudnn", True, dict(groups=2), "cudnn"),
        ("attention.both=cudnn", True, dict(kernels="triton"), "triton"),
        ("attention.both=cudnn", True, dict(kernels="eager"), "sdpa"),
        ("attention.both=cudnn", True, dict(capability=(8, 0), tokens=65), "sdpa"),
        ("attention.both=cudnn", True, dict(p=0.1), "cudnn"),
    ],
)
def test_the_forward_pass_follows_rules_where_a_kernel_would_run(
    rule: str, trained: bool, changes: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMIM_FAST_ROUTES", rule)
    given = dict(tokens=52, capability=(9, 0), p=0.0, kernels="auto", groups=1) | changes
    segments = ((2, given["tokens"]), (2, 9))[: given["groups"]]
    rows = sum(count * length for count, length in segments)
    with FakeTensorMode(), runtime.recording(given["capability"]), dispatch.backend(given["kernels"]):
        qkv = torch.empty(rows, 6 * 64, dtype=torch.bfloat16, device="cuda", requires_grad=trained)
        found = attention._choose("self_attention", (qkv, None, 2, segments, given["p"], None))
    assert (found.backend if isinstance(found, Route) else found) == chosen


def test_a_whole_call_on_a_library_keeps_its_dtype_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    form, (qkv, bias) = packed(2, 32, [(1, 9)], torch.float32)
    expected = form(qkv, bias)
    rule = Route("attention", "both", "eager")
    monkeypatch.setattr(attention, "_choose", lambda op, arguments: rule)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = form(qkv, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
