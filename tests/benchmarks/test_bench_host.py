"""The benchmark of the host's time on a small model, and its tables."""

import json
import os
import sys

import forked
import pytest
import torch

from benchmarks import bench_host, host_calls, host_counts, host_data, host_launch, host_step, tables
from benchmarks.tables_host import host
from lmim_fast.kernels import runtime
from lmim_fast.layers.block import PackedBlock
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import dispatch

SMALL = host_step.config(host_step.TIMED, depth=2)


@pytest.fixture(scope="module")
def counts():
    return host_counts.measure("fp32", SMALL)


def total(launches):
    return sum(sum(kernels.values()) for kernels in launches.values())


def test_launches_by_part_are_those_that_are_recorded(counts):
    model, views = LMIM(SMALL).train(), torch.randn(2, 2, 3, *SMALL.image_size)
    with dispatch.backend("triton"), runtime.recording((9, 0)) as recording:
        loss = model(*views, torch.rand(2, SMALL.num_patches)).loss
        forward = len(recording.launches)
        loss.backward()
    launches = counts["launches"]
    assert sum(launches["forward"].values()) == forward > 0
    assert total(launches) == len(recording.launches) > forward
    assert launches["forward"]["masking.select_patches_kernel"] == 1
    assert not launches["update"]


@pytest.mark.parametrize("precision", host_step.PRECISIONS)
def test_each_block_adds_the_same_launches_in_both_precisions(precision):
    found = [
        total(
            host_counts.launches(
                host_step.Form("ours", precision, host_step.config(host_step.TIMED, depth=depth))
            )
        )
        for depth in (1, 2, 3)
    ]
    assert found[2] - found[1] == found[1] - found[0] > 0


def test_a_launch_more_in_a_block_is_seen(counts, monkeypatch):
    forward = PackedBlock.forward
    kernel = host_step.Form("ours", "fp32", SMALL).step()["forward"][0].kernel

    def launching(self, *inputs):
        runtime.launch(kernel, (1,), torch.ones(1), num_warps=1)
        return forward(self, *inputs)

    monkeypatch.setattr(PackedBlock, "forward", launching)
    found = host_counts.launches(host_step.Form("ours", "fp32", SMALL))
    assert total(found) == total(counts["launches"]) + 2 * 2  # student and teacher
    assert found["backward"] == counts["launches"]["backward"]


def test_views_and_empty_memory_launch_nothing():
    for name in ("view", "split", "detach", "t", "linear", "empty", "new_empty", "_unsafe_view", "reshape"):
        assert not host_counts.launching(name), name
    for name in ("add", "add_", "mm", "_foreach_add_", "_to_copy", "zeros_like", "copy_", "sum"):
        assert host_counts.launching(name), name


class _Steps:
    """Stands for a form: a step of known operators."""

    def step(self, mark):
        x = torch.ones(3, 4, requires_grad=True)  # before the first part
        mark("start")
        y = torch.nn.functional.linear(x, torch.ones(5, 4))  # a product of a view
        mark("forward")
        y.sum().backward()
        mark("backward")
        x.detach()
        mark("update")


def test_operators_are_counted_in_the_part_that_they_run_in():
    counted = host_counts.operators(_Steps())
    assert counted["forward"]["launching"] == 2  # ones, product
    assert counted["backward"]["launching"] == 3  # sum, ones, product
    assert counted["update"] == {"launching": 0, "others": 1}


def test_both_models_ask_for_operators(counts):
    ours, reference = counts["operators"]["ours"], counts["operators"]["reference"]
    assert 0 < ours["forward"]["launching"] < reference["forward"]["launching"]
    assert 0 < ours["backward"]["launching"] < reference["backward"]["launching"]
    assert reference["update"]["launching"] >= 1  # AdamW


def test_the_frames_up_to_a_launch_are_counted(counts, monkeypatch):
    hops = counts["hops"]
    assert {name.rpartition(".")[0] for name in hops} >= {"attention", "norm"}
    assert all(1 <= least <= most for least, most in hops.values())
    launch = runtime.launch
    # One frame more on the way, between the caller and what the count puts in place of `launch`.
    for module in [module for name, module in sys.modules.items() if name.startswith("lmim_fast.kernels.")]:
        if getattr(module, "runtime", None) is runtime:
            monkeypatch.setattr(module, "runtime", _Further(launch))
    farther = host_counts.hops(host_step.Form("ours", "fp32", SMALL))
    assert farther == {name: [least + 1, most + 1] for name, (least, most) in hops.items()}


class _Further:
    def __init__(self, launch):
        self._launch = launch

    def __getattr__(self, name):
        return getattr(runtime, name)

    def launch(self, *arguments, **options):
        runtime.launch(*arguments, **options)


def test_no_launch_from_a_block_is_an_error(monkeypatch):
    form = host_step.Form("reference", "fp32", SMALL)
    with pytest.raises(RuntimeError, match="no block launched"):
        host_counts.hops(form)


def test_steps_are_timed_by_form_and_part():
    result = host_step.measure("bf16", 2, SMALL)
    for times in result["milliseconds"].values():
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())
        for number, step in enumerate(times["step"]):
            assert step == pytest.approx(sum(times[part][number] for part in host_step.PARTS))
            parts = sum(times[part][number] for part in host_step.TIMED_PARTS)
            assert parts < times["forward"][number]
    assert set(result["ratio"]) == {*host_step.PARTS, *host_step.TIMED_PARTS, "step"}


def test_calls_have_a_row_a_layer_and_direction():
    rows = host_calls.measure(rounds=1, calls=2)
    assert [(row["layer"], row["direction"]) for row in rows] == [
        (layer, direction) for layer in host_calls.pairs() for direction in host_calls.DIRECTIONS
    ]
    for row in rows:
        ours, plain = row["microseconds"]["ours"], row["microseconds"]["plain"]
        assert row["difference"] == pytest.approx(ours[0] - plain[0])


def test_the_layers_that_are_called_compute_the_same():
    x = torch.randn(host_calls.SHAPE)
    for name, (ours, plain, call) in host_calls.pairs().items():
        named = dict(plain.named_parameters())
        with torch.no_grad():
            for parameter, weights in ours.named_parameters():
                tensor = named.get(
                    parameter, named.get(parameter.rpartition("attn.")[2].removeprefix("mlp."))
                )
                weights.copy_(tensor)
            torch.testing.assert_close(
                call(ours.eval(), x), call(plain.eval(), x), msg=name, atol=1e-5, rtol=0
            )


def test_data_has_every_part(tmp_path):
    pytest.importorskip("lmdb")
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("matplotlib")
    data = host_data.measure([], batch=4, rounds=2, rendered=12)
    assert list(data["microseconds"]) == [*host_data.PARTS, "total"]
    assert all(len(times) == 2 for times in data["microseconds"].values())
    assert (data["records"], data["source"], data["left_out"]) == (12, "rendered", {})
    assert "| programs |" in host(_machine() | {"data": data})


def test_data_without_dali_says_what_is_left_out(monkeypatch):
    pytest.importorskip("lmdb")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "lmim_fast.data.dali", None)
    monkeypatch.delattr("lmim_fast.data.dali", raising=False)
    data = host_data.measure([], batch=4, rounds=1, rendered=8)
    assert list(data["microseconds"]) == [*host_data.PARTS[:-1], "total"]
    assert list(data["left_out"]) == ["feeding"]
    assert "Without feeding: " in host(_machine() | {"data": data})


def test_data_without_lmdb_has_a_reason_and_no_times(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmim_fast.data.store.records", None)
    data = host_data.measure([], batch=4, rounds=1)
    assert data["microseconds"] == {}
    assert list(data["left_out"]) == list(host_data.PARTS)
    assert "| us an image |" not in host(_machine() | {"data": data})


def _machine():
    return dict(benchmark="host", device="a CPU", cores=2, threads=1, versions={}, commit="abc")


def test_the_page_of_results_gets_the_tables(counts, tmp_path):
    row = host_step.measure("fp32", 1, SMALL) | counts
    step = dict(tokens=dict(timed=17, counted=257), rows=[row])
    calls = dict(shape=[1, 8, 64], rows=host_calls.measure(rounds=1, calls=1))
    (tmp_path / "cpu_host.json").write_text(json.dumps(_machine() | dict(step=step, calls=calls)))
    page = tables.render(tmp_path)
    assert "## Host time: a CPU" in page
    assert f"| fp32 | step | {row['milliseconds']['ours']['step'][0]:.2f} |" in page
    by_part = [sum(kernels.values()) for kernels in counts["launches"].values()]
    assert f"| all | {by_part[0]} | {by_part[1]} | {by_part[2]} |" in page
    assert f"| fp32 | step | {sum(by_part)} |" in page
    assert "| Block | forward and backward |" in page
    assert "Preparing batches" not in page


def test_the_program_writes_its_result(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(host_calls, "measure", lambda rounds, calls: [])
    file = tmp_path / "result.json"
    assert bench_host.main(["--only", "calls", "--rounds", "1", "--results", str(file)]) == 0
    assert "### Eager calls of layers" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert (result["benchmark"], result["threads"], "step" in result) == ("host", 1, False)


def test_launches_are_timed_on_both_paths(tmp_path):
    # A process of its own: here kernels may be the interpreter's.
    code = (
        "import json; from benchmarks import host_launch; print(json.dumps(host_launch.measure(5, calls=50)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = forked.run("-c", code, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["kernel"], row["arguments"]) for row in rows] == [
        ("norm._backward", 29), ("attention.attention_forward", 30), ("linear_gelu.linear_gelu_kernel", 14),
    ]  # fmt: skip
    for row in rows:
        assert {path: len(times) for path, times in row["microseconds"].items()} == {"triton": 5, "direct": 5}
        assert min(row["microseconds"]["direct"]) < min(row["microseconds"]["triton"])
    page = host(_machine() | {"launch": rows})
    assert "| `norm._backward` | 29 | " in page
    assert "Preparing batches" not in page


def test_launches_need_kernels_of_triton():
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(RuntimeError, match="made for Triton's interpreter"):
            host_launch.measure(1, calls=1)


def test_the_program_refuses_tritons_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        bench_host.main(["--only", "calls"])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
