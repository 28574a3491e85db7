"""The formulas of predicted scaling against numbers worked out by hand, and the run that checks them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

from benchmarks import scaling, scaling_check
from benchmarks.floors import Ceilings, Passes, Work
from benchmarks.scaling import MODELS, Options, Row, rows, sentence
from benchmarks.scaling_model import (
    CARDS,
    Compute,
    Host,
    Job,
    Times,
    compute_times,
    eager_host_ms,
    lmim,
    mae,
    reader,
)
from benchmarks.scaling_step import (
    MODES,
    Fabric,
    Group,
    Setup,
    Traffic,
    across_nodes,
    all_ranks,
    all_reduce_bytes,
    all_reduce_seconds,
    best,
    efficiency,
    gather_bytes,
    gather_seconds,
    gpu_seconds,
    memory_bytes,
    modes,
    predict,
    traffic,
)
from lmim_fast.config.finetune import recognizer_preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.models.recognizer import Recognizer

# Round numbers: 1 us a hop in a node, 10 us between nodes, 5 us a launch, 100 and 50 bytes a microsecond.
FABRIC = Fabric(4, 100e6, 50e6, 1e-6, 10e-6, 5e-6, 0.5)
JOBS = {name: lmim(name, config) for name, config in MODELS.items()}


def small_job(**changes: Any) -> Job:
    """1,000 parameters of which 4 blocks of 200; a pass of 3 stages."""

    def passes(batch: int) -> dict[str, Passes]:
        model = Passes((Work(100.0 * batch),), (Work(200.0 * batch), Work(0.0)))
        return {"model": model, "optimiser": Passes((Work(28_000.0),), ())}

    return dataclasses.replace(Job("small", passes, 1000, 200, 4, 300, 1e3), **changes)


def test_a_ring_sends_two_thirds_and_so_on_of_the_buffer() -> None:
    assert all_reduce_bytes(800, 4) == 1200  # 2 x 3/4
    assert all_reduce_bytes(800, 2) == 800
    assert gather_bytes(800, 4) == 600
    assert all_reduce_bytes(800, 1) == gather_bytes(800, 1) == 0


def test_an_all_reduce_in_a_node_takes_its_bytes_its_hops_and_a_launch() -> None:
    group = all_ranks(4, FABRIC)
    assert group == Group(4, 1, 100e6)
    # 1,200 bytes at 100 a microsecond, 6 hops, the launch; the tree takes 5 + 6 + 2 x 800 / 50
    assert all_reduce_seconds(800, group, FABRIC) == pytest.approx(23e-6)
    # a small buffer goes over the tree where that has fewer hops: 16 nodes of 1, 2 x 4 hops instead of 30
    many = Group(16, 16, 50e6)
    assert all_reduce_seconds(0, many, FABRIC) == pytest.approx(85e-6)


def test_a_gather_between_nodes_pays_the_slower_link() -> None:
    group = all_ranks(8, FABRIC)
    assert group == Group(8, 2, 50e6)
    # 700 bytes at 50 a microsecond, 6 hops inside, 1 between, the launch
    assert gather_seconds(800, group, FABRIC) == pytest.approx((14 + 6 + 10 + 5) * 1e-6)
    assert across_nodes(8, FABRIC) == Group(2, 2, 12.5e6)  # four ranks share a node's network


def test_replicas_send_all_gradients_in_fp32_at_the_end() -> None:
    found = traffic(small_job(), "replicate", 4, FABRIC)
    assert found == Traffic(last=all_reduce_seconds(4000, all_ranks(4, FABRIC), FABRIC), sent_bytes=6000)


def test_shards_gather_bf16_and_scatter_fp32_a_block() -> None:
    job, group = small_job(), all_ranks(4, FABRIC)
    found = traffic(job, "shard", 4, FABRIC)
    assert job.rest == 200
    assert found.first == found.forward / 4 == gather_seconds(400, group, FABRIC)
    assert found.last == found.backward / 4 == gather_seconds(800, group, FABRIC)
    assert found.sent_bytes == 0.75 * (2000 + 4000)
    again = traffic(job, "shard", 4, FABRIC, reshard=True)
    assert again.backward == pytest.approx(found.backward + found.forward)
    assert again.sent_bytes == 0.75 * (2000 + 4000 + 1600)


def test_hybrid_stays_in_the_node_and_reduces_its_shards_between_nodes() -> None:
    job = small_job()
    found, inside = traffic(job, "hybrid", 8, FABRIC), traffic(job, "shard", 4, FABRIC)
    assert (found.first, found.forward) == (inside.first, inside.forward)
    between = all_reduce_seconds(200, Group(2, 2, 12.5e6), FABRIC)  # a quarter of 800 bytes
    assert found.last == pytest.approx(inside.last + between)
    assert found.sent_bytes == inside.sent_bytes + 1000
    assert traffic(job, "hybrid", 4, FABRIC) == inside


def test_only_the_first_gather_and_the_last_scatter_are_not_hidden() -> None:
    times, sent = Times(10.0, 20.0, 1.0), Traffic(first=0.5, forward=4.0, backward=30.0, last=0.25)
    assert gpu_seconds(times, sent) == 0.5 + 10 + 30 + 0.25 + 1
    assert gpu_seconds(times, sent, passes=3) == 0.5 + 10 + 2 * 30 + 30 + 0.25 + 1
    assert gpu_seconds(times, Traffic()) == times.total == 31
    assert gpu_seconds(times, Traffic(last=7.0)) == 38


def test_computing_is_the_floor_over_the_efficiency_and_no_kernel_is_shorter_than_the_shortest() -> None:
    card = dataclasses.replace(CARDS["H100"], ceilings=Ceilings(100e6, 1e15))
    times = compute_times(small_job(), 8, card, Compute(0.5, 3.0))
    assert times.forward == pytest.approx(16e-6)  # 800 bytes at 100 a microsecond, half as fast
    assert times.backward == pytest.approx(35e-6)  # 32, and an empty kernel
    assert times.optimiser == pytest.approx(560e-6)


def test_floors_are_those_the_goals_were_planned_with() -> None:
    exact = Compute(1.0, 0.0)
    assert 1e3 * compute_times(JOBS["ViT-S"], 512, CARDS["H200"], exact).total == pytest.approx(58, rel=0.01)
    assert 1e3 * compute_times(JOBS["ViT-S"], 512, CARDS["H100"], exact).total == pytest.approx(69, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_models(name: str) -> None:
    config, job = MODELS[name], JOBS[name]
    with torch.device("meta"):
        model, stage = LMIM(config), MAE(config)

    def trained(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    assert job.trained == trained(model)
    assert job.teacher == trained(model.model_maeenc)
    assert job.unit == trained(model.model_maeenc.blocks[0])
    assert job.units == len(model.model_maeenc.blocks)
    assert mae(name, config).trained == trained(stage)


def test_parameters_of_the_recogniser_are_those_of_the_real_one() -> None:
    model = Recognizer(recognizer_preset("small"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == scaling.READER["trained"]
    assert reader("x", MODELS["ViT-S"], **scaling.READER).rest > 0


def test_memory_is_counted_by_part() -> None:
    job = small_job(stored=0.0)
    whole = memory_bytes(job, "replicate", 8, 1, FABRIC, reshard=False)
    assert whole == dict(weights=4000, gradients=4000, moments=8000, teacher=600, activations=0, casts=2000)
    shard = memory_bytes(job, "shard", 8, 1, FABRIC, reshard=False)
    assert (shard["weights"], shard["moments"], shard["gathered"]) == (500, 1000, 2000)
    assert shard["unsharded gradients"] == 6 * 200
    assert memory_bytes(job, "shard", 8, 1, FABRIC, reshard=True)["gathered"] == 2 * 600
    assert memory_bytes(job, "hybrid", 8, 1, FABRIC, reshard=False)["weights"] == 1000  # nodes of 4


def test_activations_are_those_of_the_measured_step() -> None:
    result = json.loads(Path("benchmarks/results/cpu_step_small.json").read_text())
    peak = next(row["peak_memory"] for row in result["rows"] if row["variant"] == "ours")
    parts = memory_bytes(JOBS["ViT-S"], "replicate", 1, 8, FABRIC, reshard=False)
    state = parts["weights"] + parts["gradients"] + parts["moments"] + 2 * parts["teacher"]
    assert state + 2 * parts["activations"] == pytest.approx(peak)


def test_what_does_not_fit_takes_several_passes_without_a_graph() -> None:
    whole, split = (predict(JOBS["ViT-L"], "replicate", 1, batch, Setup()) for batch in (512, 2048))
    assert (whole.passes, whole.host) == (1, Host().graph_ms)
    assert split.passes > 1
    assert split.host == pytest.approx(split.passes * eager_host_ms(JOBS["ViT-L"], Host()))
    assert sum(split.memory.values()) < 0.9 * 141e9
    tiny = Setup(card=dataclasses.replace(CARDS["H100"], memory=1e9))
    assert not predict(JOBS["ViT-L"], "replicate", 1, 8, tiny).fits


def test_one_gpu_communicates_nothing() -> None:
    for job in JOBS.values():
        for mode in MODES:
            step = predict(job, mode, 1, 64, Setup())
            assert step.communication == step.exposed == step.sent_bytes == 0
    assert modes(1, Fabric()) == ("replicate",)
    assert modes(8, Fabric()) == ("replicate", "shard")
    assert modes(9, Fabric()) == MODES


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_efficiency_is_at_most_one_and_more_bandwidth_is_never_slower(name: str, mode: str) -> None:
    job = JOBS[name]
    for gpus in (1, 2, 8, 16, 512):
        for batch in (1, 64, 512):
            before = predict(job, mode, gpus, batch, Setup())
            assert 0 < efficiency(before, job, Setup()) <= 1 + 1e-9
            for wider in (Fabric(nvlink_bandwidth=720e9), Fabric(network_bandwidth=680e9)):
                after = predict(job, mode, gpus, batch, Setup(fabric=wider))
                assert after.total <= before.total
                assert after.communication <= before.communication


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, "compute"),
        (dict(fabric=Fabric(network_bandwidth=1e9)), "communication"),
        (dict(host=Host(graph=False)), "host"),
        (dict(host=Host(serial_us=2000.0)), "data"),
        (dict(host=Host(cores_per_gpu=0.1)), "data"),
    ],
)
def test_the_limit_is_the_part_that_takes_longest(changes: dict[str, Any], limit: str) -> None:
    setup = Setup(**changes)
    step = predict(JOBS["ViT-S"], "replicate", 16, 64, setup)
    assert step.limit == limit
    options = Options(gpus=(16,), global_batch=(), gpu_batch=(64,))
    found = rows(JOBS["ViT-S"], options, setup)
    alone = [dataclasses.replace(row, use=row.steps["replicate"]) for row in found]
    assert f"Limit: {limit}." in sentence("ViT-S", alone, setup)


def test_the_simplest_of_equally_fast_modes_is_used() -> None:
    slow, fast = (predict(JOBS["ViT-S"], mode, 16, 64, Setup()) for mode in MODES[:2])
    equal, faster = (dataclasses.replace(fast, total=share * slow.total) for share in (0.95, 0.5))
    assert best([slow, equal]) is slow
    assert best([slow, faster]) is faster
    assert best([dataclasses.replace(slow, fits=False), equal]) is equal


def test_the_sentence_says_from_where_on_something_changes() -> None:
    step = predict(JOBS["ViT-S"], "replicate", 1, 64, Setup())

    def row(scaling: str, gpus: int, limit: str, share: float) -> Row:
        return Row(scaling, gpus, 64, {}, dataclasses.replace(step, limit=limit), share)

    one = [row("weak", 1, "compute", 1.0), row("weak", 2, "data", 0.7), row("weak", 4, "data", 0.6)]
    text = sentence("ViT-S", one, Setup())
    assert "use replicate. Limit: compute up to 1 GPUs, then data. Efficiency: under 80% from 2 GPUs" in text
    text = sentence("ViT-S", [*one, row("strong", 1, "host", 0.9)], Setup())
    assert "compute up to 1 GPUs, then data (with weak); host (with strong)" in text
    assert "under 80% from 2 GPUs on (with weak)." in text


def test_the_command_prints_tables_that_are_marked_and_writes_the_same(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "scaling.json"
    assert scaling.main(["--models", "ViT-S", "--gpus", "1", "16", "--json", str(file)]) == 0
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    assert "## ViT-S (predicted)" in shown
    assert "| 512 images a GPU | 16 | 512 |" in shown
    assert result["predicted"] is True
    assert result["sentences"]["ViT-S"] in shown
    assert len(result["models"]["ViT-S"]) == 8
    first = result["models"]["ViT-S"][0]
    assert f"{first['use']['total']:,.1f}" in shown


def test_ceilings_and_efficiency_come_from_a_result(tmp_path: Path) -> None:
    ceilings = dict(bandwidth=2e12, flops=5e14, exponentials=None)
    shares = [("ours", 0.7), ("compiled", 0.9), ("ours+graph", 0.75)]
    step_rows = [dict(variant=variant, share_of_floor=share) for variant, share in shares]
    file = tmp_path / "step.json"
    file.write_text(json.dumps(dict(device="GPU X", ceilings=ceilings, rows=step_rows)))
    setup = scaling.setup(Options(ceilings=file))
    assert setup.card.name == "GPU X"
    assert setup.card.ceilings == Ceilings(**ceilings)
    assert setup.compute.efficiency == 0.75


def test_a_check_compares_the_sum_of_the_parts_with_the_whole(tmp_path: Path, capsys: Any) -> None:
    measured = dict(mode="replicate", compute_ms=90.0, allreduce_ms=10.0, gradient_bytes=4e7, step_ms=80.0)
    file = tmp_path / "two.json"
    file.write_text(json.dumps(measured))
    assert scaling.main(["--check", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "(4.00 GB/s)" in shown
    assert "predicted / measured 1.250" in shown
    with pytest.raises(ValueError, match="'shard'"):
        scaling_check.predicted_ms(measured | {"mode": "shard"})


def test_two_real_processes_are_measured() -> None:
    code = """
import functools, json
import torch.multiprocessing as mp
from benchmarks import scaling_check
mp.spawn = functools.partial(mp.start_processes, start_method="fork")
print(json.dumps(scaling_check.measure_two_ranks("tiny", batch=2, rounds=2)))
"""
    done = forked.run("-c", code)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    parameters = sum(
        parameter.numel()
        for parameter in LMIM(scaling.preset("tiny")).parameters()
        if parameter.requires_grad
    )
    assert measured["gradient_bytes"] == 4 * parameters
    assert min(measured[part] for part in ("compute_ms", "allreduce_ms", "step_ms")) > 0
    # Loose: other processes may share the cores.
    assert 0.2 < scaling_check.predicted_ms(measured) / measured["step_ms"] < 5
