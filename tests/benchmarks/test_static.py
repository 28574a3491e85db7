"""Kernels compiled without a GPU: what is found wrong, and that nothing is wrong with ours."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import forked
import pytest

from benchmarks import static_cases
from benchmarks.static_build import ARCHES, Limits
from lmim_fast.kernels import runtime

ROOT = Path(__file__).parents[2]
Small = dict[str, tuple[int, str, str]]  # exit code, output and errors of each call


def run_static(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.static`, or a snippet; the environment asks for the interpreter, as in tests."""
    command = ["-c", code] if code else ["-m", "benchmarks.static", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    return forked.run(*command, env=environment)


# Several calls of the program in one process: name, what is compiled, limits of other devices.
_SMALL = """
import contextlib, io, json
from unittest import mock
from benchmarks import static, static_build
Limits = static_build.Limits
calls = {
    "good": (["--only", "pointwise|product", "--json"], {}),
    "none": (["--only", "nothing like that"], {}),
    "spilling": (["--only", "spilling"], {}),
    "old": (["--only", "product", "--arch", "sm_75"], {"sm_75": Limits()}),  # too old for Triton's MMA
    "limits": (["--only", "product"], {"sm_90": Limits(block_shared=16000, block_threads=64)}),
}
found = {}
for name, (arguments, arches) in calls.items():
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(static_build.ARCHES, arches),
    ):
        try:
            code = static.main(["--cases", "small_kernels", "--jobs", "1", *arguments])
        except SystemExit as error:  # Python prints the reason, and ends with 1
            code, _ = 1, err.write(str(error.code))
    found[name] = code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def small() -> Small:
    result = run_static(code=_SMALL)
    assert result.returncode == 0, result.stderr
    return {name: (code, out, err) for name, (code, out, err) in json.loads(result.stdout).items()}


def test_good_kernels_pass_and_their_resources_are_told(small: Small) -> None:
    code, out, err = small["good"]
    assert code == 0, err
    first, second, product = (row for arch in json.loads(out) for row in arch["rows"])
    assert first["cases"] == second["cases"] == ["pointwise"]  # 1000 and 1008 elements, both scales alike
    assert first["configuration"] == second["configuration"] == "bf16; offset=1, BLOCK=128"
    assert (first["products"], first["mma"], first["spilled"], first["threads"]) == (0, {}, 0, 128)
    assert 8 <= first["registers"] <= 32
    assert (first["blocks_per_multiprocessor"], first["warps_per_multiprocessor"]) == (16, 64)
    assert product["products"] == 1
    assert list(product["mma"]) == ["wgmma"]
    assert product["shared"] == 2 * 64 * 64 * 2
    assert "3 configurations of 2 kernels for sm_90: all pass" in err.splitlines()[-1]


def test_no_case_is_not_a_success(small: Small) -> None:
    code, _, err = small["none"]
    assert (code, err) == (1, "static: no case matches 'nothing like that'")


def test_a_spilling_kernel_is_named_and_fails(small: Small) -> None:
    code, out, err = small["spilling"]
    assert code == 1
    assert "small_kernels:keep_too_much for spilling: spills" in err
    assert "1 FAILED" in out.splitlines()[-1]


def test_a_16_bit_product_without_mma_instructions_fails(small: Small) -> None:
    code, _, err = small["old"]
    assert code == 1
    assert "for 16-bit product: does 1 products of 16-bit values without MMA instructions" in err


def test_limits_of_a_block_are_told_with_their_numbers(small: Small) -> None:
    code, _, err = small["limits"]
    assert code == 1
    assert "takes 16384 bytes of shared memory, a block may have 16000" in err
    assert "runs 128 threads, a block may have 64" in err


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (32, 4, 0, 16),  # warps bind: 64
        (255, 4, 0, 2),  # registers: 8 warps of 256 x 32
        (16, 1, 0, 32),  # blocks
        (168, 4, 45120, 3),  # registers: 12 warps
        (64, 4, 100_000, 2),  # shared memory
        (255, 16, 0, 0),  # does not run at all
    ],
)
def test_blocks_on_a_multiprocessor(registers: int, warps: int, shared: int, blocks: int) -> None:
    assert Limits().blocks_per_multiprocessor(registers, warps, shared) == blocks


@pytest.mark.parametrize(("programs", "warps"), [(3, 4), (2, 8), (5, 4), (2, 4)])
def test_programs_with_their_share_of_the_registers_fit_a_multiprocessor(programs: int, warps: int) -> None:
    registers = runtime.registers(programs, warps)
    assert Limits().blocks_per_multiprocessor(registers, warps, 0) == programs


def test_the_limit_of_registers_and_fused_products_are_asked_for_whatever_the_default_is() -> None:
    code = """
import os
del os.environ["TRITON_INTERPRET"]
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # the default of Triton 3.10
import small_kernels, torch
from benchmarks.static_build import specialise, target_of
from lmim_fast.kernels import runtime
x = torch.empty(1000, device="meta")
with runtime.recording((9, 0)) as recording:
    runtime.launch(small_kernels.add_one, (8,), x, x, 2.0, 1000, 1, num_warps=4, maxnreg=40, BLOCK=128)
options = specialise(recording.launches[0], target_of("sm_90")).options
print(options.maxnreg, options.enable_fp_fusion)
"""
    result = run_static(code=code)
    assert result.stdout == "40 True\n", result.stderr


def launched_kernels() -> set[str]:
    """`@triton.jit` functions in kernels/ that no other one calls."""
    functions: dict[str, str] = {}
    called: set[str] = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            decorators = map(ast.unparse, getattr(node, "decorator_list", []))
            if any(name.startswith("triton.jit") for name in decorators):
                functions[f"{path.stem}:{node.name}"] = node.name
                called |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return {key for key, name in functions.items() if name not in called}


# Two processes that differ only in the order of the keys.
_KEYS = """
import json, os
del os.environ["TRITON_INTERPRET"]
from benchmarks import static_cases
from benchmarks.operation import kernel_name
from lmim_fast.kernels import runtime
with runtime.recording((9, 0)) as recording:
    for _, call in static_cases.cases():
        call()
kernels = {kernel_name(one.kernel): one.kernel for one in recording.launches}
reverse = not os.fork()
for name in sorted(kernels, reverse=reverse):
    runtime.settle_key(kernels[name])
if not reverse:
    _, status = os.wait()
    assert status == 0
print(json.dumps({name: kernel.cache_key for name, kernel in sorted(kernels.items())}))
"""


def test_what_is_compiled_once_is_found_again_whatever_ran_before() -> None:
    result = run_static(code=_KEYS)
    assert result.returncode == 0, result.stderr
    backwards, forwards = map(json.loads, result.stdout.splitlines())
    assert backwards == forwards
    assert len(forwards) == 22


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_has_cases(arch: str) -> None:
    number = int(arch.removeprefix("sm_"))
    with runtime.recording((number // 10, number % 10)) as recording:
        for _, call in static_cases.cases():
            call()
    recorded = {
        f"{launch.kernel.fn.__module__.rpartition('.')[2]}:{launch.kernel.fn.__name__}"
        for launch in recording.launches
    }
    assert recorded == launched_kernels()


# What a step runs; make static compiles all.
OF_A_STEP = [
    r"attention ViT-S 257 bfloat16",
    r"attention ViT-S 25 \+ 52 bfloat16, p=0\.0",
    r"attention decoder .* bfloat16, p=0\.1",
    r"feature loss .* bfloat16",
    r"GELU ViT-S .* bfloat16",
    r"LayerNorm ViT-S .* residual bfloat16(, p=0\.0)?(, rows, more from 1)?$",
    r"LayerNorm decoder .* residual bfloat16, p=0\.1$",
    r"patch embed ViT-S bfloat16, uint8 images, bfloat16",
    r"photometric ViT-S both views 32x128 bfloat16",
]


def test_kernels_of_the_small_model_and_of_the_decoder_in_bf16_compile_for_sm_90_without_spills() -> None:
    labels = [label for label, _ in static_cases.cases()]
    assert all(any(re.search(one, label) for label in labels) for one in OF_A_STEP)
    result = run_static("--arch", "sm_90", "--only", "|".join(OF_A_STEP))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_all_our_kernels_compile_without_spills(arch: str) -> None:
    result = run_static("--arch", arch)
    assert result.returncode == 0, result.stderr
