"""The `lmim` command: finds it in the table, parses its config, says errors in one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

import lmim_fast
from lmim_fast.cli_commands import COMMANDS
from lmim_fast.cli_options import parse
from lmim_fast.data.visible import visible
from lmim_fast.errors import LmimError, UsageError, is_shared, shared

_WIDTH = max(map(len, COMMANDS))
_LIST = "\n".join(f"  {name:{_WIDTH}}  {command.about}" for name, command in COMMANDS.items())
_HELP = f"""\
usage: lmim COMMAND [OPTIONS]

Fast LMIM pre-training and fine-tuning for scene text recognition.

commands:
{_LIST}

`lmim COMMAND --help` lists the options; `lmim --version` prints the version.
On several GPUs: torchrun --nproc-per-node=N -m lmim_fast.pretrain [OPTIONS], likewise finetune"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong option or path, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _shorten_spinning()
    warnings.formatwarning = _format_warning
    try:
        code = _run_and_complain(arguments)
    except BaseException:
        if not _is_stuck():
            raise
        traceback.print_exc()
        code = 1
    if _is_stuck():  # the launcher ends the peers when it sees this process gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_stuck() -> bool:
    world = sys.modules.get("lmim_fast.train.world")
    return world is not None and bool(world.is_stuck())


def _run_and_complain(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except LmimError as error:
        _complain(error, str(error))
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # `lmim ... | head`: the reader has left; Python's own flush at exit stays quiet
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


def _run(arguments: list[str]) -> int:
    groups = {name.split()[0] for name in COMMANDS if " " in name} - set(COMMANDS)
    first, rest = arguments[:1], arguments[1:]
    if not first or (first[0] in groups and not rest):
        print(_HELP)
        return 2
    if arguments in (["-h"], ["--help"]) or (first[0] in groups and rest in (["-h"], ["--help"])):
        print(_HELP)
        return 0
    if arguments == ["--version"]:
        print(lmim_fast.__version__)
        return 0
    words = 2 if first[0] in groups or " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        raise shared(UsageError(f"unknown command {name!r}; `lmim --help` lists them"))
    command = COMMANDS[name]
    command.entry(parse(command.config, arguments[words:], f"lmim {name}", command.about))
    return 0


def _shorten_spinning() -> None:
    """Let OpenMP threads sleep after a short wait, unless the user has set how they wait.

    By default they spin for long, on a busy machine on the core of the very thread that they wait for: tiny
    models trained 1.6x faster with this beside two busy processes, 2x beside four, equally fast on a free
    machine, where sleeping at once (`passive`) cost a tenth. Torch's OpenMP reads it when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of the package for its user, in one line without the place in the code."""
    if category is UserWarning and filename.startswith(os.path.dirname(lmim_fast.__file__) + os.sep):
        return f"warning: {visible(str(message))}\n"
    return _FULL_WARNING(message, category, filename, lineno, line)


_FULL_WARNING = warnings.formatwarning


def _complain(error: Exception, message: str) -> None:
    """One line on stderr: of rank 0, or of another one whose failure rank 0 does not know."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and is_shared(error):
        return
    suffix = "" if rank == "0" else f" (rank {rank})"
    print("error: " + visible(" ".join(message.split())) + suffix, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
