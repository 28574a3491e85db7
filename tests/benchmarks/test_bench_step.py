"""Variants of a step as they are prepared, and its parts."""

import dataclasses
import itertools
import time
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from stopped_clock import StoppedClock
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from benchmarks import step_parts, step_variants
from benchmarks.floors import Ceilings, floor_seconds
from benchmarks.step_floor import step_passes
from benchmarks.step_variants import Candidate, Search, Setting, Trainee
from lmim_fast.config import preset
from lmim_fast.reference import ReferenceLMIM

CONFIG = preset("tiny", depth=2, decoder_depth=1, decoder_dropout=0.0)
ON_CPU = Setting(CONFIG, 2, "cpu", False)
FIRST = [Candidate("default", "default")]


@pytest.mark.parametrize("variant", ["released", "sdpa", "ours"])
def test_parts_add_up_to_the_step_and_come_in_its_order(variant: str) -> None:
    trainee = Trainee(variant, ON_CPU)
    shares = []
    for _ in range(10):  # a busy machine may interrupt a step at its end
        start = time.perf_counter()
        parts = step_parts.step_parts(variant, trainee)
        shares.append(sum(parts.values()) / (time.perf_counter() - start) / 1e3)
        if len(shares) > 1 and shares[-1] > 0.9:
            break
    assert 0.9 < shares[-1] <= max(shares) <= 1
    both = [step_parts.STUDENT] if variant == "ours" else ["guidance", "masked"]
    backward = ["loss", "decoder", *both]
    assert [name for name, direction in parts if direction == "backward"] == backward
    forward = {step_parts.OTHER, "teacher", "decoder", "loss", *both}
    assert {name for name, direction in parts if direction == "forward"} == forward
    assert [name for name, direction in parts if direction == "step"] == ["optimiser"]
    assert "make_target" not in vars(trainee.model)  # the marks are gone


def test_a_slow_part_is_found_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            clock.sleep(0.25)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            clock.sleep(0.5)
            return grad

    decode = ReferenceLMIM.decode
    monkeypatch.setattr(
        ReferenceLMIM, "decode", lambda self, latent, *others: decode(self, Slow.apply(latent), *others)
    )
    monkeypatch.setattr(step_parts, "time", clock)
    parts = step_parts.step_parts("released", Trainee("released", ON_CPU))
    slow = {part: milliseconds for part, milliseconds in parts.items() if milliseconds}
    assert slow == {("decoder", "forward"): 250, ("decoder", "backward"): 500}


def test_rows_of_parts_name_the_floor_of_both_branches_for_ours() -> None:
    ceilings = Ceilings(1e10, 1e11)
    rows = step_parts.measure_parts("ours", ON_CPU, ceilings)
    found = {(row["part"], row["direction"]): row for row in rows}
    passes = step_passes(CONFIG, 2, 4)
    expected = floor_seconds(passes["masked"].backward + passes["guidance"].backward, ceilings) * 1e3
    row = found[step_parts.STUDENT, "backward"]
    assert row["floor_milliseconds"] == pytest.approx(expected)
    assert (row["variant"], row["batch"], row["dropout"]) == ("ours", 2, 0.0)
    assert row["milliseconds"] > 0
    assert found[step_parts.OTHER, "forward"]["floor_milliseconds"] is None


def test_every_step_of_a_variant_sees_the_next_batch_and_trains() -> None:
    trainee = Trainee("ours", ON_CPU)
    batches = [trainee.next_batch()[0] for _ in range(4)]
    assert torch.equal(batches[0], batches[3])
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(batches[:3], 2))
    losses = [float(trainee.step(*trainee.next_batch())) for _ in range(12)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(parameter.grad is None for parameter in trainee.model.parameters())


def fake_compiler(costs: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for `torch.compile`: the mode decides how long a call takes; an unknown one fails."""
    clock = StoppedClock()
    monkeypatch.setattr(step_variants, "time", clock)

    def compile(function: Any, mode: str, **options: Any) -> Any:
        assert options == dict(fullgraph=True, dynamic=False)

        def run(*inputs: Tensor) -> Tensor:
            if mode not in costs:
                raise RuntimeError(f"no {mode} here\nand more")
            clock.sleep(costs[mode])
            loss: Tensor = function(*inputs)
            return loss

        return run

    return compile


@pytest.mark.parametrize(("seconds", "chosen"), [(None, "slow"), (60.0, "fast")])
def test_the_compiled_variant_takes_the_first_that_runs_or_searches_the_fastest(
    seconds: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", fake_compiler(dict(slow=0.5, fast=0.0), monkeypatch))
    tries = [Candidate(mode, "default") for mode in ("refused", "slow", "fast")]
    prepared = step_variants.prepare("compiled", ON_CPU, Search(tries, seconds=seconds))
    assert prepared.chosen == Candidate(chosen, "default")
    assert prepared.searched[0] == dict(
        mode="refused", attention="default", error="RuntimeError: no refused here / and more"
    )
    tried = ["refused", "slow", "fast"] if seconds else ["refused", "slow"]
    assert [row["mode"] for row in prepared.searched] == tried
    if seconds:
        assert set(prepared.searched[1]["milliseconds"]) == {500}
    with pytest.raises(RuntimeError, match="no way to compile runs"):
        step_variants.prepare("compiled", ON_CPU, Search(tries[:1], seconds=seconds))


def test_further_modes_are_tried_with_the_fastest_attention_and_each_candidate_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    fake = fake_compiler(dict(first=0.2, second=0.3, third=0.0), monkeypatch)
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, **options: compiled.append(mode) or fake(f, mode, **options)
    )
    monkeypatch.setattr(step_variants, "probe", lambda *arguments: None)
    reported: list[list[str]] = []
    search = Search(
        [Candidate("first", "default"), Candidate("second", "other")],
        ("third", "fourth"),
        60.0,
        lambda rows: reported.append([row["mode"] for row in rows]),
    )
    prepared = step_variants.prepare("compiled", ON_CPU, search)
    assert prepared.chosen == Candidate("third", "default")
    assert reported == [["first", "second", "third", "fourth"][:count] for count in (1, 2, 3, 4)]
    assert "no fourth here" in prepared.searched[-1]["error"]
    assert compiled == ["first", "second", "third", "fourth", "third"]  # each one makes the compiler forget


def test_a_search_that_has_spent_its_time_says_what_it_has_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fake_compiler(dict(slow=0.2, fast=0.0), monkeypatch))
    tries = [Candidate(mode, "default") for mode in ("refused", "slow", "fast")]
    prepared = step_variants.prepare("compiled", ON_CPU, Search(tries, seconds=0.1))
    assert prepared.chosen == Candidate("slow", "default")
    assert prepared.searched[2]["not_tried"] == "the 0.1 s of the search were spent"


@pytest.mark.parametrize(
    ("attention", "operator"),
    [
        ("math", "softmax"),
        # A CPU's default, too.
        pytest.param("flash", "scaled_dot_product_flash_attention", marks=pytest.mark.slow),
    ],
)
def test_the_attention_of_a_candidate_is_what_its_graph_holds(
    attention: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    recording = aot_autograd(fw_compiler=look, bw_compiler=lambda graph, inputs: make_boxed_func(graph))
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: compile(function, backend=recording, **options)
    )
    monkeypatch.setitem(step_variants._ATTENTION, "math", torch.nn.attention.SDPBackend.MATH)
    shallow = ON_CPU._replace(config=dataclasses.replace(CONFIG, depth=1))
    step_variants.prepare("compiled", shallow, Search([Candidate("default", attention)]))
    heads = [name for name in found if "softmax" in name or "scaled_dot_product" in name]
    assert len(heads) == 5
    assert all(operator in name for name in heads)


def test_attention_that_does_not_take_a_shape_is_found_before_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU cuDNN's takes none; flash takes all, decoder and encoder, short and long."""
    seen: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        seen.append((*q.shape[1:], k.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    step_variants.probe("flash", ON_CPU)
    heads, dim = CONFIG.heads, CONFIG.width // CONFIG.heads
    deep = CONFIG.decoder_heads, CONFIG.decoder_width // CONFIG.decoder_heads
    assert [(row[:2], row[2:]) for row in ((h, d, n, m) for h, n, d, m in seen)] == [
        ((heads, dim), (52, 52)),
        ((heads, dim), (257, 257)),
        (deep, (257, 257)),
        (deep, (205, 257)),
    ]
    step_variants.probe("default", ON_CPU)
    assert len(seen) == 4
    monkeypatch.setattr(torch, "compile", None)  # is not reached
    tries = [Candidate("default", "cudnn")]
    with pytest.raises(RuntimeError, match=r"no way to compile runs.*RuntimeError: No "):
        step_variants.prepare("compiled", ON_CPU, Search(tries))


def test_a_search_tries_every_attention_then_every_mode_and_else_the_default_mode_alone() -> None:
    attentions = ["cudnn", "flash", "efficient"]
    search = step_variants.search_of("cuda", 60.0)
    assert [(item.mode, item.attention) for item in search.tries] == [
        ("default", name) for name in attentions
    ]
    assert search.modes == ("max-autotune-no-cudagraphs", "reduce-overhead")
    quick = step_variants.search_of("cuda", None)
    assert (quick.tries, quick.modes) == (search.tries, ())
    assert step_variants.search_of("cpu", 60.0)[:2] == (FIRST, ())


def test_the_epilogue_variant_asks_for_it_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The field decides what the fast model runs; other variants leave it alone."""
    built: list[dict[str, Any]] = []

    class Refused(Exception):
        pass

    def replaced(config: Any, **changes: Any) -> Any:
        built.append(changes)
        raise Refused

    monkeypatch.setattr(step_variants, "replace", replaced)
    with pytest.raises(Refused):
        step_variants._build("ours+epilogue", ON_CPU)
    assert built == [dict(gelu_epilogue="on")]
    step_variants._build("ours", ON_CPU)
    assert len(built) == 1
    with pytest.raises(ValueError, match=r"ours\+epilogue needs a CUDA device"):
        Trainee("ours+epilogue", ON_CPU)


@pytest.mark.gpu
def test_parts_on_a_device_add_up_to_the_step() -> None:
    trainee = Trainee("ours", Setting(CONFIG, 64, "cuda", True))
    for _ in range(3):
        step_parts.step_parts("ours", trainee)
    torch.cuda.synchronize()
    start = time.perf_counter()
    parts = step_parts.step_parts("ours", trainee)
    whole = (time.perf_counter() - start) * 1e3
    assert 0.7 * whole < sum(parts.values()) < 1.05 * whole
