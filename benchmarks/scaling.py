"""Predicts training on 1 to 512 GPUs: step time, images/s, what limits them, and how to share the model.

    python -m benchmarks.scaling                      # tables of ViT-S, ViT-B and ViT-L
    python -m benchmarks.scaling --times              # hours of whole trainings on 1 and 8 GPUs
    python -m benchmarks.scaling --measure FILE       # two CPU processes, measured; then --check FILE

Every figure is predicted: from floors, an efficiency, bandwidths and latencies, each an option (`--help`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks import goals
from benchmarks.floors import Ceilings
from benchmarks.markdown import table
from benchmarks.scaling_model import CARDS, Card, Compute, Host, Job, lmim, mae, reader
from benchmarks.scaling_step import MODES, Fabric, Setup, Step, best, efficiency, modes, predict
from lmim_fast.config import ModelConfig, PresetName, preset

MODELS: dict[str, ModelConfig] = {
    "ViT-S": preset("small"),
    "ViT-B": preset("base"),
    # No preset: ViT-L's encoder with ViT-B's decoder (8 layers of width 512).
    "ViT-L": preset("base", width=1024, depth=24, heads=16),
}
PAPER_BATCH = 512  # of the paper's recipe, 64 a GPU on 8
LOW = 0.8  # efficiency that is worth a word
LARGE_BATCH = 4096  # of MAE's recipe, the largest that its learning rate per image is known to hold for


@dataclass(frozen=True)
class Options:
    """What is predicted, and from what."""

    models: tuple[Literal["ViT-S", "ViT-B", "ViT-L"], ...] = ("ViT-S", "ViT-B", "ViT-L")
    """Sizes; ViT-L is no preset: width 1024, depth 24, 16 heads, the decoder of ViT-B."""
    gpus: tuple[int, ...] = tuple(2**power for power in range(10))
    """Numbers of GPUs."""
    global_batch: tuple[int, ...] = (PAPER_BATCH, LARGE_BATCH)
    """Strong scaling: images a step of all GPUs; the paper's 512 and MAE's 4096."""
    gpu_batch: tuple[int, ...] = (512, 64)
    """Weak scaling: images a step and GPU."""
    card: Literal["H200", "H100"] = "H200"
    """Whose ceilings and memory count."""
    ceilings: Path | None = None
    """Result of `benchmarks.bench_step` on a GPU: its ceilings and efficiency in place of the card's."""
    reshard: bool = False
    """Sharded blocks are freed after the forward pass and gathered twice."""
    compute: Compute = field(default_factory=Compute)
    """How near to the floor."""
    fabric: Fabric = field(default_factory=Fabric)
    """Bandwidths and latencies."""
    host: Host = field(default_factory=Host)
    """CPU times and data."""
    json: Path | None = None
    """File to write the same to."""
    times: bool = False
    """Hours of whole trainings instead."""
    check: Path | None = None
    """Result of --measure: predicted against measured."""
    measure: Path | None = None
    """Run two gloo processes on this machine and write their times to this file."""
    measure_size: PresetName = "small"
    """Model of --measure."""
    measure_batch: int = 8
    """Images a rank of --measure."""


def setup(options: Options) -> Setup:
    """What the predictions assume."""
    card, compute = CARDS[options.card], options.compute
    if options.ceilings is not None:
        result = json.loads(options.ceilings.read_text(encoding="utf-8"))
        card = Card(result["device"], Ceilings(**result["ceilings"]), card.memory)
        ours = [row for row in result.get("rows", ()) if row.get("variant") in goals.OURS]
        shares = [row["share_of_floor"] for row in ours if row.get("share_of_floor")]
        if shares:
            compute = replace(compute, efficiency=max(shares))
    return Setup(card, compute, options.fabric, options.host, options.reshard)


@dataclass(frozen=True)
class Row:
    """One number of GPUs under one kind of scaling: a step of each mode that differs, and the one to use."""

    scaling: str
    gpus: int
    batch: int
    steps: dict[str, Step]
    use: Step
    efficiency: float


def rows(job: Job, options: Options, assumed: Setup) -> list[Row]:
    """All of a model; a global batch is not shared among more GPUs than it has images."""
    kinds: list[tuple[str, Callable[[int], int]]] = [
        (f"{size:,} images in all", lambda gpus, size=size: size // gpus)  # type: ignore[misc]
        for size in options.global_batch
    ]
    kinds += [
        (f"{size:,} images a GPU", lambda gpus, size=size: size)  # type: ignore[misc]
        for size in options.gpu_batch
    ]
    found = []
    for (scaling, batch_of), gpus in itertools.product(kinds, options.gpus):
        if batch := batch_of(gpus):
            steps = {mode: predict(job, mode, gpus, batch, assumed) for mode in modes(gpus, assumed.fabric)}
            use = best(list(steps.values()))
            found.append(Row(scaling, gpus, batch, steps, use, efficiency(use, job, assumed)))
    return found


def _cell(step: Step | None) -> str:
    if step is None:
        return "-"
    passes = f" ({step.passes} passes)" if step.passes > 1 else ""
    return f"{step.total:,.1f}{passes}" if step.fits else "does not fit"


def model_table(found: Sequence[Row]) -> str:
    """A line a row."""
    head = ("scaling", "GPUs", "batch a GPU", *(f"{mode} ms" for mode in MODES))
    lines = [
        [
            row.scaling,
            str(row.gpus),
            str(row.batch),
            *(_cell(row.steps.get(mode)) for mode in MODES),
            f"{sum(row.use.memory.values()) / 1e9:,.0f}",
            f"{row.use.images_per_second:,.0f}",
            row.use.limit,
            f"{row.efficiency:.0%}",
            row.use.mode,
        ]
        for row in found
    ]
    return table((*head, "GB a GPU", "images/s", "limit", "efficiency", "use"), lines)


def parts_table(found: Sequence[Row]) -> str:
    """The parts of every mode at the most GPUs of each scaling."""
    head = ("scaling", "GPUs", "mode", "compute", "communication", "exposed", "host", "serial data", "cores")
    last = [list(group)[-1] for _, group in itertools.groupby(found, key=lambda row: row.scaling)]
    lines = []
    for row in last:
        for step in row.steps.values():
            parts = (step.compute, step.communication, step.exposed, step.host, step.serial, step.cores)
            sizes = [f"{step.sent_bytes / 1e6:,.0f}", f"{sum(step.memory.values()) / 1e9:,.1f}"]
            lines.append([row.scaling, str(row.gpus), step.mode, *(f"{part:,.2f}" for part in parts), *sizes])
    return table((*head, "MB sent", "GB a GPU"), lines)


def _runs(values: Iterable[tuple[int, str]]) -> str:
    """ "a up to 8 GPUs, then b" of (GPUs, word); "a" alone if there is one word."""
    groups = [(word, list(group)) for word, group in itertools.groupby(values, key=lambda pair: pair[1])]
    told = [f"{word} up to {group[-1][0]} GPUs" for word, group in groups[:-1]]
    return ", ".join([*told, f"then {groups[-1][0]}" if told else groups[-1][0]])


def _told(found: Sequence[Row], say: Callable[[list[Row]], str]) -> str:
    """What `say` makes of each scaling; once if it is the same for all."""
    kinds: dict[str, list[str]] = {}
    for scaling, group in itertools.groupby(found, key=lambda row: row.scaling):
        if text := say(list(group)):
            kinds.setdefault(text, []).append(scaling)
    if len(kinds) == 1 and len(next(iter(kinds.values()))) == len({row.scaling for row in found}):
        return next(iter(kinds))
    return "; ".join(f"{text} (with {' and '.join(scalings)})" for text, scalings in kinds.items())


def _low_efficiency(rows_of: list[Row]) -> str:
    first = next((row.gpus for row in rows_of if row.efficiency < LOW), None)
    return "" if first is None else f"under {LOW:.0%} from {first} GPU{'s' * (first > 1)} on"


def sentence(name: str, found: Sequence[Row], assumed: Setup) -> str:
    """Which mode to use, what is the limit from where on, and how far data and host are from being it."""
    use = _told(found, lambda of: _runs((row.gpus, row.use.mode) for row in of))
    limit = _told(found, lambda of: _runs((row.gpus, row.use.limit) for row in of))
    low = _told(found, _low_efficiency)
    full = max((row.use for row in found), key=lambda step: (step.passes == 1, step.batch))
    most = full.batch / max(full.host + assumed.host.lock_share * full.serial, full.serial, full.cores)
    share = most * full.compute / full.batch
    return (
        f"{name} on {assumed.card.name} (predicted): use {use}. Limit: {limit}."
        + (f" Efficiency: {low}." if low else "")
        + f" Host and data of a process make at most {1e3 * most:,.0f} images/s,"
        + f" {share:.1f}x what its GPU takes."
    )


# Crops of the field's training sets, as their authors count them: Union14M-U and -L (ICCV 2023), UCTI-11M and
# the epochs (LMIM, CVPR 2025), the Chinese benchmark's four training sets.
TRAININGS = (
    ("Union14M-U", "MAE", 10.6e6, 10),
    ("Union14M-U", "LMIM", 10.6e6, 10),
    ("Union14M-L", "fine-tuning", 3.2e6, 10),
    ("UCTI-11M", "MAE", 11e6, 10),
    ("UCTI-11M", "LMIM", 11e6, 10),
    ("Chinese benchmark", "fine-tuning", 1.1e6, 60),
    ("own, 1 M crops", "LMIM", 1e6, 10),
)
READER = dict(trained=35_791_457, layers=6, width=512)  # the released English recogniser on ViT-S


def times_table(options: Options) -> str:
    """Hours of ViT-S trainings at the paper's batch, on 1 and 8 GPUs of both cards."""
    small = MODELS["ViT-S"]
    jobs = {
        "MAE": mae("MAE", small),
        "LMIM": lmim("LMIM", small),
        "fine-tuning": reader("fine-tuning", small, **READER),
    }
    choices = [(card, gpus) for card in ("H100", "H200") for gpus in (1, 8)]
    lines = []
    for data, stage, crops, epochs in TRAININGS:
        line = [data, stage, f"{crops / 1e6:,.1f} M", str(epochs)]
        for card, gpus in choices:
            assumed = replace(setup(options), card=CARDS[card])
            step = predict(jobs[stage], "replicate", gpus, PAPER_BATCH // gpus, assumed)
            line.append(f"{crops * epochs / step.images_per_second / 3600:,.1f}")
        lines.append(line)
    head = ("data", "stage", "crops", "epochs", *(f"{gpus} x {card}, h" for card, gpus in choices))
    return table(head, lines)


def _json(options: Options, assumed: Setup, found: dict[str, list[Row]]) -> dict[str, Any]:
    plain = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    told = {name: sentence(name, of, assumed) for name, of in found.items()}
    listed = {name: [dataclasses.asdict(row) for row in of] for name, of in found.items()}
    return dict(
        benchmark="scaling",
        predicted=True,
        options=plain,
        card=dataclasses.asdict(assumed.card),
        efficiency=assumed.compute.efficiency,
        sentences=told,
        models=listed,
    )


def _predictions(options: Options) -> None:
    assumed = setup(options)
    print(
        f"# Predicted scaling: {assumed.card.name}, {assumed.compute.efficiency:.0%} of the floor\n\n"
        "Nothing here is measured. ms: a step; limit, efficiency and images/s are those of the mode to use; "
        f"within a node ({assumed.fabric.gpus_per_node} GPUs) hybrid is shard. Compute at a low efficiency: "
        "a GPU has too few images to fill its kernels."
    )
    found: dict[str, list[Row]] = {}
    for name in options.models:
        of = rows(lmim(name, MODELS[name]), options, assumed)
        found[name] = of
        print(f"\n## {name} (predicted)\n\n{sentence(name, of, assumed)}\n\n{model_table(of)}")
        print(f"\nParts in ms at the most GPUs (predicted)\n\n{parts_table(of)}")
    if options.json is not None:
        options.json.write_text(json.dumps(_json(options, assumed, found), indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    import tyro

    options = tyro.cli(Options, args=argv, description=__doc__, prog="python -m benchmarks.scaling")
    if options.measure is not None or options.check is not None:
        from benchmarks.scaling_check import measure_two_ranks, report

        measured: dict[str, Any] = {}
        if options.measure is not None:
            measured = measure_two_ranks(options.measure_size, options.measure_batch)
            options.measure.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        if options.check is not None:
            measured = json.loads(options.check.read_text(encoding="utf-8"))
        print(report(measured))
    elif options.times:
        print(times_table(options))
    else:
        _predictions(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
