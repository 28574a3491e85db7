"""`lmim evaluate`: read test sets with a recogniser; a table, evaluation.json and evaluation.html."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lmim_fast.config import EvaluateConfig
from lmim_fast.config.io import to_dict
from lmim_fast.data.console import SafeConsole
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError
from lmim_fast.evaluation.layouts import TestSet, find_test_sets
from lmim_fast.evaluation.published import Published, published_rows
from lmim_fast.evaluation.results import LABELS_AS_FOUND, Result, averages, document, in_percent
from lmim_fast.evaluation.scoring import RecognizerLike, evaluate_store
from lmim_fast.models.weight_names import split_key
from lmim_fast.owner import owned
from lmim_fast.report.evaluation import evaluation_html
from lmim_fast.train.agreement import refuse_different, start_of
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.recognizer_start import BEST, LAST, find_recognizer, recognizer_of
from lmim_fast.train.run_weights import Place
from lmim_fast.train.start import versions
from lmim_fast.train.world import World, join


def run_evaluate(config: EvaluateConfig) -> Path:
    """Evaluate a recogniser; under torchrun every process calls this, and rank 0 writes and prints.

    Returns:
        the folder that holds evaluation.json and evaluation.html, each replaced whole or not at all.
    Raises:
        UsageError:   a wrong path, a set without labels, an unknown layout.
        WeightsError: the model's file is no recogniser.
        DataError:    a database is damaged.
        LmimError:    the results cannot be written.
    """
    agreed = start_of("evaluation", config, versions())
    with contextlib.ExitStack() as outside, join(config.device, agreed=agreed) as world:
        with world.together():
            place = _find(config.model)
            test_sets = find_test_sets(config.data, config.layout)
        refuse_different(world.gather({"sets": [entry.name for entry in test_sets]}))
        with world.together():
            folder = _prepare_output(config, place, world)
            if world.is_main:
                outside.enter_context(owned(folder, _say))
            model = _load(place, world)
            test_sets = [dataclasses.replace(entry, characters=model.characters) for entry in test_sets]
        results: list[Result] = []
        with contextlib.ExitStack() as stack:
            stores: dict[str, RecordStore] = {}
            for test_set in test_sets:
                with world.together():
                    store = RecordStore([test_set.path])
                    data = store.fingerprint()
                refuse_different(world.gather({"data": data}))
                stores[test_set.name] = stack.enter_context(contextlib.closing(store))
                results.append(_evaluate(config, model, test_set, store, world))
            with world.together():
                if world.is_main:
                    _write(config, place, folder, results, stores, world)
        return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _find(model: str) -> Place:
    """Where the recogniser is that a file, a run folder of a fine-tuning or a checkpoint of it stands for.

    Raises:
        UsageError: there is none.
    """
    if not split_key(model)[0].exists():
        raise UsageError(f"{model}: no such file or run folder; give a recogniser")
    place = find_recognizer(model)
    if place is None:
        raise UsageError(
            f"{model}: no recogniser here ({BEST}, {LAST} or checkpoints); give the run folder of a "
            "fine-tuning, one of its checkpoints, or a file"
        )
    return place


def _load(place: Place, world: World) -> RecognizerLike:
    from lmim_fast.models.recognizer_files import load_recognizer

    if place.checkpoint is not None:
        return recognizer_of(place.checkpoint).to(world.device)
    return load_recognizer(place.path).to(world.device)


def _prepare_output(config: EvaluateConfig, place: Place, world: World) -> Path:
    """The output folder, made before the work so that a wrong path costs no evaluation."""
    model = Path(config.model)
    default = (model if model.is_dir() else place.path.parent) / "evaluation"
    if place.path == model and place.checkpoint is not None:  # whose folder is deleted when it is old
        run = model.parent.parent if model.parent.name == "checkpoints" else model.parent
        default = run / f"evaluation-{model.name}"
    elif model.name == "checkpoints":
        default = model.parent / "evaluation"
    folder = Path(config.output) if config.output else default
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write the evaluation to {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"cannot write the evaluation to {folder}: no permission")
    return folder


def _evaluate(
    config: EvaluateConfig, model: RecognizerLike, test_set: TestSet, store: RecordStore, world: World
) -> Result:
    if world.is_main:
        _console(stderr=True).print(f"{test_set.name}: {len(store):,} records", highlight=False)
    score, readings = evaluate_store(
        model,
        store,
        world,
        batch_size=config.batch_size,
        precision=config.precision,
        beam=config.beam,
        normalize=test_set.normalize,
    )
    return Result(test_set, len(store), score, readings)


def _write(
    config: EvaluateConfig,
    place: Place,
    folder: Path,
    results: Sequence[Result],
    stores: dict[str, RecordStore],
    world: World,
) -> None:
    """Both files, then the table."""
    published: list[Published] = []
    if config.compare:
        benchmarks = dict.fromkeys(result.test_set.benchmark for result in results)
        published = [row for benchmark in benchmarks for row in published_rows(benchmark)]
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    search = "greedy" if config.beam == 1 else f"beam search, {config.beam} beams"
    facts: dict[str, Any] = {
        "model": str(place.path),
        "weights": "; ".join(place.told()),
        "search": search,
        "precision": precision,
        "config": to_dict(config),
        "versions": versions(),
    }
    model = "; ".join([str(place.path), *place.told()])
    shown = {"model": model, "search": search, "precision": precision}
    text = json.dumps(document(results, published, facts), indent=2, ensure_ascii=False)
    write_file(folder / "evaluation.json", (text + "\n").encode())
    html = evaluation_html(results, stores, published, shown, config.errors)
    write_file(folder / "evaluation.html", html.encode())
    print(f"read with {model}")
    _print_tables(results, published)
    print(f"evaluation: {folder / 'evaluation.html'}")


def _print_tables(results: Sequence[Result], published: Sequence[Published]) -> None:
    console = _console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("set", overflow="fold")
    table.add_column("split", overflow="fold", min_width=len("IIIT5K-3000"))
    for name in ("images", "accuracy", "exact", "1-NED", "broken", "no label"):
        table.add_column(name, justify="right")
    for result in results:
        score = result.score
        table.add_row(
            result.test_set.name,
            result.split or "-",
            f"{score.images:,}",
            in_percent(score.accuracy),
            in_percent(score.exact_accuracy),
            in_percent(score.one_minus_ned),
            f"{score.broken:,}",
            f"{score.unlabelled:,}",
        )
    console.print(table)
    for row in averages(results):
        console.print(
            f"{row.title}: Avg {in_percent(row.average)}, W-Avg {in_percent(row.weighted)}"
            f" of {row.images:,} images",
            highlight=False,
        )
    console.print(LABELS_AS_FOUND, highlight=False)
    for entry in published:
        weighted = f", W-Avg {in_percent(entry.weighted)}" if entry.weighted is not None else ""
        console.print(
            f"published, {entry.method} ({entry.labels}): Avg {in_percent(entry.average)}{weighted}",
            highlight=False,
        )


def _console(*, stderr: bool = False) -> Console:
    return SafeConsole(stderr=stderr, markup=False)
