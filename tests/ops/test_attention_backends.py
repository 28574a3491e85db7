"""Which attention runs: backends by name, by environment, by input."""

from typing import Any

import pytest
import torch
from accuracy import CUDA, DEVICE, interpreted
from attention_cases import DTYPE, attend, attend_across, crossed, differentiate, packed, seed
from torch._subclasses import FakeTensorMode

from lmim_fast.kernels import runtime
from lmim_fast.ops import attention, attention_backends, dispatch
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.operators import attention as operators


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran, in order; each answers by attention written out."""
    names: list[str] = []
    real = attention_backends.eager

    def recorder(name: str) -> Any:
        return lambda *given, **named: (names.append(name), real(*given, **named))[1]

    for name in attention_backends.PLAIN:
        monkeypatch.setitem(attention_backends.PLAIN, name, recorder(name))
    for op in ("self_attention", "cross_attention"):
        kernel = getattr(operators, op)
        monkeypatch.setattr(operators, op, lambda *given, k=kernel: (names.append("triton"), k(*given))[1])
    monkeypatch.delenv("LMIM_FAST_ATTENTION", raising=False)
    monkeypatch.delenv("LMIM_FAST_BACKEND", raising=False)
    return names


@pytest.mark.parametrize("name", ["triton", "flash", "cudnn", "sdpa", "eager"])
def test_a_named_backend_is_the_one_that_runs(name: str, ran: list[str]) -> None:
    with attention.backend(name):
        attend()
        attend_across()
        attend(p=0.1)
        attend(p=0.0, seed=seed())
    assert ran == [name] * 4


def test_the_environment_names_a_backend_and_a_block_overrides_it(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMIM_FAST_ATTENTION", "eager")
    attend()
    with attention.backend("sdpa"):
        attend()
        with attention.backend("triton"):
            attend()
        attend()
    attend()
    assert ran == ["eager", "sdpa", "triton", "sdpa", "eager"]
    monkeypatch.setenv("LMIM_FAST_ATTENTION", "fast")
    with pytest.raises(ValueError, match="unknown attention backend 'fast'; choose from auto, triton, flash"):
        attend()


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with (
        pytest.raises(ValueError, match="unknown attention backend 'math'; choose from auto, triton, flash"),
        attention.backend("math"),
    ):
        pass
    assert attention_backends.current() == "auto"


def test_the_backend_of_before_is_back_after_an_error() -> None:
    with attention.backend("sdpa"):
        with pytest.raises(KeyError), attention.backend("eager"):
            raise KeyError
        assert attention_backends.current() == "sdpa"


@pytest.mark.skipif(CUDA, reason="on a CUDA device the kernel is auto's choice")
def test_auto_on_a_cpu_is_sdpa_and_with_a_seed_attention_written_out(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend()
    attend_across(p=0.1)
    assert ran == ["sdpa", "sdpa"]
    eager = attention_backends.eager
    monkeypatch.setattr(
        attention_backends,
        "eager",
        lambda *given, **named: (ran.append("seeded"), eager(*given, **named))[1],
    )
    attend(p=0.1, seed=seed())
    attend_across(p=0.1, seed=seed())
    assert ran[2:] == ["seeded", "seeded"]


def test_auto_follows_the_backend_of_all_ops(ran: list[str]) -> None:
    with dispatch.backend("triton"):
        attend()
        attend_across()
        with attention.backend("eager"):
            attend()
    with dispatch.backend("eager"):
        attend()
        with attention.backend("triton"):
            attend()
    assert ran == ["triton", "triton", "eager", "sdpa", "triton"]


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "tokens", "p", "chosen"),
    [
        ((7, 5), torch.float16, 64, 52, 0.0, "sdpa"),
        ((8, 0), torch.bfloat16, 64, 64, 0.1, "triton"),
        ((8, 0), torch.float16, 64, 65, 0.0, "sdpa"),
        ((9, 0), torch.float16, 64, 257, 0.0, "triton"),
        ((9, 0), torch.bfloat16, 32, 257, 0.1, "triton"),
        ((9, 0), torch.bfloat16, 64, 129, 0.1, "triton"),
        ((9, 0), torch.bfloat16, 64, 257, 0.1, "sdpa"),
        ((9, 0), torch.bfloat16, 32, 258, 0.0, "sdpa"),
        ((9, 0), torch.bfloat16, 80, 52, 0.0, "sdpa"),
        ((9, 0), torch.bfloat16, 24, 52, 0.0, "sdpa"),
        ((9, 0), torch.bfloat16, 0, 52, 0.0, "sdpa"),
        ((9, 0), torch.float32, 64, 52, 0.0, "sdpa"),
        ((9, 0), torch.float64, 64, 52, 0.0, "sdpa"),
        ((10, 0), torch.bfloat16, 64, 257, 0.0, "triton"),
        ((10, 0), torch.bfloat16, 64, 258, 0.0, "sdpa"),
        ((12, 0), torch.bfloat16, 64, 65, 0.0, "sdpa"),
    ],
)
def test_auto_on_a_cuda_device_is_the_kernel_where_it_fits(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, tokens: int, p: float, chosen: str
) -> None:
    with FakeTensorMode(), runtime.recording(capability):
        qkv = torch.empty(2 * tokens, 6 * dim, dtype=dtype, device="cuda")
        q = torch.empty(2, 40, 2 * dim, dtype=dtype, device="cuda")
        kv = torch.empty(2, tokens, 4 * dim, dtype=dtype, device="cuda")
        assert attention._choose("self_attention", (qkv, None, 2, ((2, tokens),), p, None)) == chosen
        assert attention._choose("cross_attention", (q, None, kv, None, 2, p, None)) == chosen


@pytest.mark.parametrize(
    ("capability", "queries", "keys", "chosen"),
    [
        ((8, 0), 25, 257, "sdpa"),
        ((9, 0), 1, 256, "triton"),
        ((9, 0), 25, 257, "triton"),
        ((9, 0), 32, 257, "triton"),
        ((9, 0), 33, 257, "sdpa"),
        ((9, 0), 25, 255, "sdpa"),
        ((10, 0), 25, 257, "triton"),
    ],
)
def test_few_queries_with_dropout_over_whole_tiles_run_on_the_kernel(
    capability: tuple[int, int], queries: int, keys: int, chosen: str
) -> None:
    with FakeTensorMode(), runtime.recording(capability):
        q = torch.empty(2, queries, 512, dtype=torch.bfloat16, device="cuda")
        kv = torch.empty(2, keys, 1024, dtype=torch.bfloat16, device="cuda")
        assert attention._choose("cross_attention", (q, None, kv, None, 8, 0.1, None, None)) == chosen


@pytest.mark.parametrize(("tokens", "chosen"), [(25, "triton"), (64, "triton"), (65, "sdpa")])
def test_auto_with_masks_is_the_kernel_where_it_fits(tokens: int, chosen: str) -> None:
    with FakeTensorMode(), runtime.recording((9, 0)):
        qkv = torch.empty(2 * tokens, 192, dtype=torch.bfloat16, device="cuda")
        q = torch.empty(2, 1, 64, dtype=torch.bfloat16, device="cuda")
        kv = torch.empty(2, tokens, 128, dtype=torch.bfloat16, device="cuda")
        lengths = torch.empty(2, dtype=torch.int64, device="cuda")
        causal = (qkv, None, 2, ((2, tokens),), 0.0, None, True)
        assert attention._choose("self_attention", causal) == chosen
        assert attention._choose("cross_attention", (q, None, kv, None, 2, 0.0, None, lengths)) == chosen


@pytest.mark.parametrize("name", ["flash", "cudnn", "sdpa"])
def test_backends_with_their_own_masks_refuse_a_seed(name: str, ran: list[str]) -> None:
    with attention.backend(name):
        for run in (attend, attend_across):
            with pytest.raises(RuntimeError, match=f"'{name}' draws its own dropout mask and takes no seed"):
                run(p=0.1, seed=seed())
    assert ran == []


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make", [lambda: packed(2, 32, [(2, 20), (1, 9)], DTYPE), lambda: crossed(2, 32, (2, 7, 9), DTYPE)]
)
def test_plain_backends_agree(name: str, make: Any) -> None:
    form, inputs = make()
    output, gradients = differentiate(name, form, inputs)
    expected, expected_gradients = differentiate("eager", form, [x.double() for x in inputs])
    tolerance = 1e-2 if CUDA else 1e-5
    for mine, other in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.skipif(CUDA, reason="cuDNN runs on a CUDA device")
def test_cudnn_asked_for_on_a_cpu_is_an_error() -> None:
    with attention.backend("cudnn"), pytest.raises(RuntimeError, match="No viable backend"):
        attend()


@pytest.mark.parametrize(
    ("dim", "keys", "p", "reason"),
    [
        (24, 4, 0.0, r"heads of width 32 or 64, got 24"),
        (0, 4, 0.0, r"heads of width 32 or 64, got 0"),
        (128, 4, 0.0, r"heads of width 32 or 64, got 128"),
        (32, 600, 0.0, r"up to 257 keys for heads of width 32 at p = 0.0 on .*, got 600"),
        (32, 300, 0.1, r"up to 257 keys for heads of width 32 at p = 0.1 on .*, got 300"),
        (64, 258, 0.0, r"up to 257 keys for heads of width 64 at p = 0.0 on .*, got 258"),
        (64, 130, 0.1, r"up to 129 keys for heads of width 64 at p = 0.1 on .*, got 130"),
    ],
)
def test_the_kernel_named_says_why_an_input_does_not_fit(dim: int, keys: int, p: float, reason: str) -> None:
    for form, inputs in (
        packed(2, dim, [(1, 3), (1, keys)], DTYPE),
        crossed(2, dim, (1, 3, keys), DTYPE),
    ):
        with (
            runtime.recording((9, 0)),
            attention.backend("triton"),
            pytest.raises(RuntimeError, match=f"backend 'triton' was asked for, but .*_attention .*{reason}"),
        ):
            form(*inputs, p=p)


def test_the_kernel_named_says_which_dtype_does_not_fit() -> None:
    qkv, kv = torch.randn(3, 96, device=DEVICE), torch.randn(1, 3, 64, device=DEVICE)
    refused = {torch.float64: "has no kernel for torch.float64"}
    if interpreted():
        refused[torch.bfloat16] = "has no kernel for torch.bfloat16 in Triton's interpreter"
    if CUDA:
        refused[torch.float32] = "has no fast product for torch.float32"
    for dtype, reason in refused.items():
        with attention.backend("triton"):
            with pytest.raises(RuntimeError, match=f"self_attention {reason}"):
                self_attention(qkv.to(dtype), None, 2, [(1, 3)])
            with pytest.raises(RuntimeError, match=f"cross_attention {reason}"):
                cross_attention(qkv[None, :, :32].to(dtype), None, kv.to(dtype), None, 2)


def test_the_kernel_named_cannot_run_on_the_meta_device() -> None:
    qkv = torch.empty(3, 96, device="meta")
    with attention.backend("triton"), pytest.raises(RuntimeError, match="cannot run a kernel on meta"):
        self_attention(qkv, None, 2, [(1, 3)])
