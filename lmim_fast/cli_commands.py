"""What each `lmim` command does: it takes its config; imports are late, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lmim_fast.config import (
    CharsetConfig,
    ConvertConfig,
    DoctorConfig,
    DoctorFinetuneConfig,
    DoctorPretrainConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportConfig,
    InspectConfig,
    MergeConfig,
    PretrainConfig,
    RenderConfig,
    ReportConfig,
    RunConfig,
    SheetConfig,
    SplitConfig,
    StatsConfig,
    VerifyConfig,
)
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError, LmimError, UsageError


class Command(NamedTuple):
    """What `lmim NAME` does: it parses a `config` and gives it to `entry`."""

    entry: Callable[[Any], None]
    config: type
    about: str


def _train(config: RunConfig) -> None:
    from lmim_fast.train.run import run_training

    run_training(config)


def _evaluate(config: EvaluateConfig) -> None:
    from lmim_fast.report.evaluate_run import run_evaluate

    run_evaluate(config)


def _data_render(config: RenderConfig) -> None:
    from lmim_fast.data.render.database import render

    print(visible(f"rendered {config.count} crops into {render(config)}"))


def _data_import(config: ImportConfig) -> None:
    from lmim_fast.data.importers.run import import_crops

    print("\n".join(import_crops(config)))


def _data_merge(config: MergeConfig) -> None:
    from lmim_fast.data.tools.merge import merge

    _require_databases(config.paths)
    print("\n".join(merge(config)))


def _data_split(config: SplitConfig) -> None:
    from lmim_fast.data.tools.split import split

    _require_databases(config.paths)
    print("\n".join(split(config)))


def _data_inspect(config: InspectConfig) -> None:
    from lmim_fast.config.tools import NO_REPLAY

    if config.replay != NO_REPLAY:
        from lmim_fast.report.replay import replay

        print("\n".join(replay(config)))
        return
    from lmim_fast.data.tools.inspect import inspect

    _require_databases(config.paths)
    inspect(config.paths)


def _data_verify(config: VerifyConfig) -> None:
    _require_databases(config.paths)
    try:
        from lmim_fast.data.tools.verify import verify
    except ImportError as error:
        raise LmimError(str(error)) from error
    found = verify(config)
    if config.strict and found.bad:
        raise DataError(f"{len(found.bad)} of {found.records} records are broken")


def _data_stats(config: StatsConfig) -> None:
    from lmim_fast.data.tools.stats import stats

    _require_databases(config.paths)
    stats(config)


def _data_sheet(config: SheetConfig) -> None:
    from lmim_fast.data.tools.sheet import write_sheet

    _require_databases(config.paths)
    print(write_sheet(config))


def _data_charset(config: CharsetConfig) -> None:
    from lmim_fast.data.tools.charset_file import write_charset

    _require_databases(config.paths)
    print("\n".join(write_charset(config).report_lines()))


def _require_databases(paths: Sequence[str]) -> None:
    """A path that holds no data is a wrong path; damaged data is not."""
    from lmim_fast.data.store.databases import find_databases

    try:
        find_databases(paths)
    except DataError as error:
        raise UsageError(str(error)) from error


def _convert(config: ConvertConfig) -> None:
    from lmim_fast.train.export import convert

    print(convert(config.source, config.target, to=config.to, step=config.step))


def _doctor(config: DoctorConfig | DoctorPretrainConfig | DoctorFinetuneConfig) -> None:
    from lmim_fast.doctor.run import run_doctor

    run_doctor(config)


def _report(config: ReportConfig) -> None:
    from lmim_fast.report import write_report

    print(f"report: {write_report(config)}")


COMMANDS = {
    "pretrain": Command(
        _train,
        PretrainConfig,
        "Pre-train on LMDB folders: first `--objective mae`, then LMIM with `--teacher`.",
    ),
    "finetune": Command(
        _train, FinetuneConfig, "Train the recogniser on labelled LMDB folders, from `--init`."
    ),
    "evaluate": Command(
        _evaluate,
        EvaluateConfig,
        "Read labelled test sets with a recogniser: accuracies, a page of errors, published results.",
    ),
    "data render": Command(_data_render, RenderConfig, "Write an LMDB of rendered words, with labels."),
    "data import": Command(
        _data_import, ImportConfig, "Write an LMDB of images in folders, lists or tar archives; resumable."
    ),
    "data merge": Command(
        _data_merge, MergeConfig, "Write one LMDB of several, without duplicates if asked."
    ),
    "data split": Command(
        _data_split, SplitConfig, "Divide records into LMDBs; equal images are in the same one."
    ),
    "data inspect": Command(
        _data_inspect,
        InspectConfig,
        "Say what LMDB folders hold and which records are broken, or replay one sample of training.",
    ),
    "data sheet": Command(
        _data_sheet, SheetConfig, "Draw crops of LMDB folders with their labels as one PNG."
    ),
    "data verify": Command(
        _data_verify, VerifyConfig, "Decode every record; list the broken ones, for training to skip."
    ),
    "data stats": Command(
        _data_stats, StatsConfig, "Count and draw sizes, formats, labels, characters, duplicates."
    ),
    "data charset": Command(
        _data_charset, CharsetConfig, "Write the characters of labels as a file with one character a line."
    ),
    "doctor": Command(
        _doctor,
        DoctorConfig,
        "Check this machine, and the run of a folder or a config.json, before hours are spent.",
    ),
    "doctor pretrain": Command(
        _doctor, DoctorPretrainConfig, "The same for a run with the options of `pretrain`."
    ),
    "doctor finetune": Command(
        _doctor, DoctorFinetuneConfig, "The same for a run with the options of `finetune`."
    ),
    "convert": Command(
        _convert,
        ConvertConfig,
        "Turn a run or a checkpoint into released .pth or encoder .safetensors.",
    ),
    "report": Command(
        _report, ReportConfig, "Draw curves, views and attention maps of a run as one HTML page."
    ),
}
