"""Direct launches: keys against Triton's own, calls against its JIT's, what is left to it. No device.

The keys are compared in this process: kernels, argument lists and Triton's binder and cache key are real. The
launches run in a process of their own (`direct_launches.py`), which says what stands in for what there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from accuracy import interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from benchmarks import static_cases
from lmim_fast.kernels import attention, direct, gelu, masking, norm, runtime, tokens
from lmim_fast.ops import dispatch
from lmim_fast.ops.norm import layer_norm

ROOT = Path(__file__).parents[2]
INTEGERS = (0, 1, -1, 8, 15, 16, 17, -16, 384)
WIDE = (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**31 + 16, 2**33, 2**33 + 1, -(2**63), 2**63 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
MEMORY = torch.zeros(64, dtype=torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def _device() -> Iterator[None]:
    """The current device is number 0, whether there is one or not."""
    with pytest.MonkeyPatch.context() as patch:
        driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
        patch.setattr(direct, "driver", driver)
        yield


def recorded(call: Any) -> list[runtime.Launch]:
    """Launches of a call, of Triton's kernels even where those of this process are the interpreter's."""
    with runtime.recording((9, 0)) as recording:
        call()
    return [launch._replace(kernel=_as_jit(launch.kernel)) for launch in recording.launches]


def _as_jit(kernel: Any) -> JITFunction:
    return (
        kernel
        if type(kernel) is JITFunction
        else _jit.setdefault(kernel, JITFunction(kernel.fn, **kernel.kwargs))
    )


_jit: dict[Any, JITFunction] = {}


def _make() -> None:
    x, stream, parameter = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(8, 64), torch.zeros(64)
    weight, seed = torch.nn.Parameter(parameter), torch.zeros(1, dtype=torch.int64)
    _, total, statistics = norm.forward(x, weight, stream, weight, parameter, seed, 26, x.dtype, 1e-6)
    assert total is not None
    norm.backward(
        x, total, total, weight, statistics, seed, 26, x_dtype=x.dtype, residual_dtype=torch.float32,
        parameters=True, x_bias=True, rows=x, bias=weight, extra=[x], first=0,
    )  # fmt: skip
    q = x.view(1, 8, 64)
    attention.forward(q, q, q, None, parameter, torch.empty_like(q), None, 1, 0, None, 3)
    ids = torch.zeros(1, 7, dtype=torch.int64)
    tokens.decoder_tokens(q, weight, parameter[None, None], torch.zeros(1, 15, 64), ids, ids, x.dtype)
    gelu.forward(x, weight, None, 0)
    gelu.backward(x, x, parameter, None, 0, bias_wanted=True)
    masking.draw(1, None, 2, torch.arange(8), 16, 4, 0)


LAUNCHES = recorded(_make)


def key_of(launch: runtime.Launch) -> tuple[Any, ...] | None:
    return direct._key(direct._look_at(launch.kernel), launch.arguments, launch.options, launch.constants)


def tritons_key(launch: runtime.Launch) -> str:
    """What the JIT would look up on an H100; an empty table, so that it is made anew."""
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = launch.options | {"debug": False, "instrumentation_mode": ""}
    _, specialization, options = bind(*launch.arguments, **launch.constants, **options)
    found: str = compute_cache_key({}, specialization, options)
    return found


def other_value(value: Any) -> st.SearchStrategy[Any]:
    """Of the kinds that an argument of this kind may have."""
    if isinstance(value, int):
        return st.sampled_from((*INTEGERS, *WIDE))
    if isinstance(value, float):
        return st.sampled_from((0.0, 1.0, 1e-6, 16.0))
    tensor = st.builds(
        lambda dtype, start, parameter: _tensor(dtype, start, parameter),
        st.sampled_from(DTYPES), st.sampled_from((0, 8, 16, 24, 32)), st.booleans(),
    )  # fmt: skip
    return st.none() | tensor


def _tensor(dtype: torch.dtype, start: int, parameter: bool) -> Tensor:
    """In memory that starts so many bytes behind a multiple of 16."""
    start += -MEMORY.data_ptr() % 16
    tensor = MEMORY[start : start + 8].view(dtype)
    return torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor


@st.composite
def two_launches(draw: st.DrawFn) -> tuple[runtime.Launch, runtime.Launch]:
    """Two of the same kernel that differ in one or two arguments, some in a constant or in options."""
    first = LAUNCHES[draw(st.integers(0, len(LAUNCHES) - 1))]
    mine, others = [*first.arguments], [*first.arguments]
    for place in draw(st.lists(st.integers(0, len(mine) - 1), min_size=1, max_size=2)):
        values = other_value(first.arguments[place])
        mine[place], others[place] = draw(values), draw(values)
    first = first._replace(arguments=tuple(mine))
    second = first._replace(arguments=tuple(others))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(first.constants)))
        second = second._replace(constants=first.constants | {name: draw(st.sampled_from(INTEGERS[3:]))})
    if draw(st.integers(0, 4)) == 0:
        warps, registers = draw(st.sampled_from((1, 4, 8))), draw(st.sampled_from((None, 64)))
        second = second._replace(options=runtime._options(warps, 1, registers))
    return first, second


@settings(max_examples=400)
@given(two_launches())
def test_keys_are_equal_where_tritons_are_and_only_there(
    launches: tuple[runtime.Launch, runtime.Launch],
) -> None:
    first, second = launches
    assert key_of(first) is not None
    assert (key_of(first) == key_of(second)) == (tritons_key(first) == tritons_key(second))


def test_the_plainest_keys_are_as_expected() -> None:
    launch = LAUNCHES[0]
    place = len(launch.arguments) - 2  # rows

    def key(value: Any, at: int = place) -> tuple[Any, ...] | None:
        return key_of(launch._replace(arguments=(*launch.arguments[:at], value, *launch.arguments[at + 1 :])))

    apart = [key(value) for value in (1, 15, 16, 2**31 + 1, 2**33)]
    assert len(set(apart)) == len(apart)
    assert key(15) == key(17) == key(-1)
    assert key(0) == key(16) == key(-32)
    aligned, other, moved = (_tensor(torch.float32, start, False) for start in (0, 16, 8))
    assert key(aligned, 0) == key(other, 0) != key(moved, 0) != key(None, 0)


@pytest.mark.parametrize("name", ["seed_low", "seed_high", "epoch"])
def test_what_changes_every_step_makes_no_new_key(name: str) -> None:
    launch = next(one for one in LAUNCHES if name in one.kernel.arg_names)
    place = launch.kernel.arg_names.index(name)
    keys = {
        key_of(launch._replace(arguments=(*launch.arguments[:place], value, *launch.arguments[place + 1 :])))
        for value in (*INTEGERS, 2**31 - 1, -(2**31))
    }
    assert len(keys) == 1


def test_every_launch_of_the_package_can_be_direct() -> None:
    launches = recorded(lambda: [call() for _, call in static_cases.cases()])
    assert len({launch.kernel.fn for launch in launches}) >= 20
    assert not [launch.kernel for launch in launches if key_of(launch) is None]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What `direct_launches.py` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = forked.run(str(Path(__file__).with_name("direct_launches.py")), env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_driver_gets_the_same_grid_stream_and_arguments_either_way(told: dict[str, Any]) -> None:
    assert {row["kernel"] for row in told["same"]} == {
        "_backward", "attention_forward", "linear_gelu_kernel", "_forward",
    }  # fmt: skip
    for row in told["same"]:
        first, *others = row["launched"]
        assert len(others) == 3
        assert all(other == first for other in others), row["kernel"]


def test_the_first_launch_of_a_key_alone_goes_through_the_jit(told: dict[str, Any]) -> None:
    # Through the JIT by name, then directly: the first, the second, and a third after other forms.
    assert [row["runs"] for row in told["same"]] == [[1, 1, 0, 0]] * len(told["same"])


def test_stream_and_device_are_read_at_every_launch(told: dict[str, Any]) -> None:
    assert told["moved"] == {"streams": [7, 8, 0, 9, 10, 11], "runs": [1, 0, 0, 1, 0, 0]}


def test_hooks_of_a_profiler_are_called_while_they_are_set(told: dict[str, Any]) -> None:
    *through, runs = told["hooked"]["triton"]
    *directly, direct_runs = told["hooked"]["direct"]
    assert directly == through == [["enter", "_backward", 0], ["exit", "_backward", 0]]
    assert (runs, direct_runs) == (2, 0)


def test_what_the_jit_alone_can_do_is_left_to_it(told: dict[str, Any]) -> None:
    assert told["left to the JIT"] == {
        "nothing": 0,
        "a hook before the run": 2,
        "debug of runtime_knobs": 2,
        "instrumentation_mode of compilation_knobs": 2,
        "add_stages_inspection_hook of runtime_knobs": 2,
        "debug of JITFunction": 2,
        "an integer of 64 bits without sign": 2,
        "a tuple": 2,
        "nothing again": 0,
        "a kernel that is still being compiled": 2,
    }


def test_forms_do_not_grow_with_steps_and_are_bounded(told: dict[str, Any]) -> None:
    assert told["grown"] == {"steps": [2, 2], "constants": [40, 8]}  # two streams are two constants


@pytest.mark.skipif(not interpreted(), reason="about kernels of the interpreter")
def test_the_interpreter_runs_kernels_as_ever() -> None:
    x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
    results = []
    for name in runtime.LAUNCHES:
        with dispatch.backend("triton"), runtime.launching(name):
            results.append(layer_norm(x, weight, bias, torch.float32))
    assert torch.equal(*results)


@pytest.fixture
def _read_anew() -> Iterator[None]:
    """LMIM_FAST_LAUNCH is read again in this test, and after it."""
    runtime._chosen.cache_clear()
    yield
    runtime._chosen.cache_clear()


@pytest.mark.usefixtures("_read_anew")
def test_the_environment_chooses_and_the_jit_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMIM_FAST_LAUNCH", raising=False)
    assert runtime._chosen() is runtime._through_triton
    runtime._chosen.cache_clear()
    monkeypatch.setenv("LMIM_FAST_LAUNCH", "direct")
    assert runtime._chosen() is direct.launch


@pytest.mark.usefixtures("_read_anew")
def test_an_unknown_choice_is_an_error_at_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_LAUNCH", "fast")
    monkeypatch.setattr(
        runtime, "settle_key", lambda kernel: None
    )  # the interpreter's functions have no keys
    launch = LAUNCHES[0]
    with pytest.raises(ValueError, match="'fast'; choose from triton, direct"):
        runtime.launch(launch.kernel, launch.grid, *launch.arguments, num_warps=4, **launch.constants)
    with pytest.raises(ValueError, match="'slow'; choose from"), runtime.launching("slow"):
        pass


def test_a_triton_that_was_not_checked_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct.triton, "__version__", "3.10.1+git")
    unchecked = pytest.warns(UserWarning, match=r"checked with Triton 3\.6 to 3\.9, this is 3\.10\.1")
    with unchecked, runtime.launching("direct"):
        assert runtime._start is runtime._through_triton
    assert runtime._start is None
