"""The `lmim` command: options come from the config dataclasses, errors are one line."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import lmim_fast
from lmim_fast.config import ModelConfig, PretrainConfig, RenderConfig, ReportConfig, preset
from lmim_fast.errors import DataError, LmimError, UsageError, is_shared, shared

Config = TypeVar("Config")

_HELP = """\
usage: lmim COMMAND [OPTIONS]

Fast LMIM pre-training for scene text recognition.

commands:
  pretrain      train an MAE teacher, or LMIM with a teacher, on LMDB folders
  data render   write an LMDB of rendered words: data to start with
  data inspect  say what LMDB folders hold and which records are broken
  convert       turn a run or a checkpoint into released .pth or encoder .safetensors
  report        draw curves, views and attention maps of a run as one HTML page

`lmim COMMAND --help` lists the options; `lmim --version` prints the version.
On several GPUs: torchrun --nproc-per-node=N -m lmim_fast.pretrain [OPTIONS]"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong option or path, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except LmimError as error:
        _complain(error, str(error))
        return 2 if isinstance(error, UsageError) else 1
    except (
        BrokenPipeError
    ):  # `lmim ... | head`: the reader has left; so that Python's own flush at exit is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _complain(error, f"disk full: {error}")
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _complain(error, f"no permission: {error}")
        else:
            raise
        return 1
    except SystemExit as stop:  # tyro's way to end after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130


def _complain(error: Exception, message: str) -> None:
    """One line on stderr: of rank 0, or of another one whose failure rank 0 does not know."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and is_shared(error):
        return
    suffix = "" if rank == "0" else f" (rank {rank})"
    print("error: " + " ".join(message.split()) + suffix, file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments in (["-h"], ["--help"], ["data"], ["data", "-h"], ["data", "--help"]):
        print(_HELP)
        return 2 if arguments in ([], ["data"]) else 0
    if arguments == ["--version"]:
        print(lmim_fast.__version__)
        return 0
    words = 2 if arguments[0] == "data" else 1
    name = " ".join(arguments[:words])
    if name not in _COMMANDS:
        raise shared(UsageError(f"unknown command {name!r}; `lmim --help` lists them"))
    return _COMMANDS[name](arguments[words:])


# --- commands; each imports what it needs, so that help and errors are quick ---


def _pretrain(arguments: list[str]) -> int:
    config = parse_pretrain(arguments)
    from lmim_fast.train.run import run_pretrain

    run_pretrain(config)
    return 0


def _data_render(arguments: list[str]) -> int:
    config = _parse(
        RenderConfig, arguments, "lmim data render", "Write an LMDB of rendered words, with labels."
    )
    from lmim_fast.data.render.database import render

    print(f"rendered {config.count} crops into {render(config)}")
    return 0


@dataclass(frozen=True)
class _InspectOptions:
    """Options of `lmim data inspect`."""

    paths: tuple[str, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("name at least one LMDB folder")


def _data_inspect(arguments: list[str]) -> int:
    about = "Say what LMDB folders hold and which records are broken."
    config = _parse(_InspectOptions, arguments, "lmim data inspect", about)
    from lmim_fast.data.store.databases import find_databases
    from lmim_fast.data.tools.inspect import inspect

    try:
        find_databases(config.paths)
    except DataError as error:  # a path that holds no data is a wrong path; damaged data is not
        raise UsageError(str(error)) from error
    inspect(config.paths)
    return 0


@dataclass(frozen=True)
class _ConvertOptions:
    """Options of `lmim convert`."""

    source: str
    """Run folder, or a released or MAERec .pth, or an encoder .safetensors."""
    target: str
    """File to write."""
    to: Literal["released", "encoder"] | None = None
    """released: a .pth that the released code loads; encoder: the plain encoder as .safetensors; None: by the
    target's suffix."""
    step: int | None = None
    """Checkpoint of the run folder; None: the newest."""


def _convert(arguments: list[str]) -> int:
    config = _parse(
        _ConvertOptions, arguments, "lmim convert", "Turn weights from one file layout into another."
    )
    from lmim_fast.train.export import convert

    print(convert(config.source, config.target, to=config.to, step=config.step))
    return 0


def _report(arguments: list[str]) -> int:
    about = "Draw curves, views and attention maps of a run as one self-contained HTML page."
    config = _parse(ReportConfig, arguments, "lmim report", about)
    from lmim_fast.report.write import write_report

    print(f"report: {write_report(config)}")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": _pretrain,
    "data render": _data_render,
    "data inspect": _data_inspect,
    "convert": _convert,
    "report": _report,
}


# --- options ---


def parse_pretrain(arguments: Sequence[str]) -> PretrainConfig:
    """Options of `lmim pretrain`; the preset is chosen first, `--model.*` then overrides single values of it.

    Raises:
        UsageError: an unknown option or a wrong value.
    """
    import tyro

    default = PretrainConfig(data=("",), model=_chosen_model(arguments))
    object.__setattr__(default, "data", tyro.MISSING)  # no default: the option is required
    about = (
        "Pre-train on LMDB folders: first `--objective mae` to make a teacher, then LMIM with `--teacher`."
    )
    return _parse(PretrainConfig, arguments, "lmim pretrain", about, default)


def _chosen_model(arguments: Sequence[str]) -> ModelConfig:
    name = "small"
    for option, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if option == "--preset":
            name = value
        elif option.startswith("--preset="):
            name = option.removeprefix("--preset=")
    try:
        return preset(name)
    except ValueError as error:
        raise shared(UsageError(f"--preset: {error}")) from error


def _parse(
    kind: type[Config], arguments: Sequence[str], program: str, about: str, default: Config | None = None
) -> Config:
    import tyro

    asks_help = any(argument in ("-h", "--help") for argument in arguments)
    printed = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8"
    )  # tyro draws ASCII for streams without encoding
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    try:
        with contextlib.nullcontext() if asks_help else _captured(printed):
            result: Config = tyro.cli(
                kind,
                prog=program,
                description=about,
                args=list(arguments),
                **({"config": markers} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        printed.seek(0)
        raise shared(UsageError(f"{_first_message(printed.read())}; see `{program} --help`")) from None
    return result


@contextlib.contextmanager
def _captured(printed: io.TextIOWrapper) -> Iterator[None]:
    """Catch tyro's error box, drawn wide enough that no line of it is wrapped."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _first_message(box: str) -> str:
    """The sentence of tyro's error box, with the options it suggests."""
    sections: list[list[str]] = [[]]
    for raw in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        line = raw.strip("│").rstrip()
        if line.strip().startswith(("─", "╭", "╰")):
            sections.append([])
        elif line:
            sections[-1].append(line.removeprefix(" "))
    sections = [section for section in sections if section]
    if not sections:
        return "wrong options"
    first = sections[0]
    if first[0].startswith("Missing from"):  # the options are indented by four, their help by more
        first = ["missing:", *(line for line in first[1:] if not line.startswith("     "))]
    if "Got errors:" in first:
        first = first[: first.index("Got errors:")]
    text = " ".join(" ".join(first).split())
    text = re.sub(r"^Error parsing (\w+(Config|Options): )?", "", text).rstrip(". ")
    guesses = [
        line.split()[0]
        for section in sections[1:]
        if section[0].startswith("Perhaps")
        for line in section
        if line.strip().startswith("--")
    ]
    return text + (f" (did you mean {' or '.join(guesses)}?)" if guesses else "")


if __name__ == "__main__":
    sys.exit(main())
