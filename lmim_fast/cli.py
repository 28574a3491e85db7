"""The `lmim` command: finds it in the table, parses its config, says errors in one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import lmim_fast
from lmim_fast.cli_commands import COMMANDS
from lmim_fast.cli_options import parse
from lmim_fast.data.visible import visible
from lmim_fast.errors import LmimError, UsageError, is_shared, shared_on_this_machine
from lmim_fast.terminal import guarded

_LESS = "use a smaller model or batch, fewer threads, or a machine with more memory"
_WIDTH = max(map(len, COMMANDS))
_LIST = "\n".join(f"  {name:{_WIDTH}}  {command.about}" for name, command in COMMANDS.items())
_HELP = f"""\
usage: lmim COMMAND [OPTIONS]

Fast LMIM pre-training and fine-tuning for scene text recognition.

commands:
{_LIST}

`lmim COMMAND --help` lists the options; `lmim --version` prints the version.
On several GPUs: torchrun --nproc-per-node=N -m lmim_fast.pretrain [OPTIONS], likewise finetune"""

_PERMISSION = ("no permission", "use a path that this user may read and write")
_FAILED = ("the file system failed", "look at the disk or the mount, then run the same command again")
_FULL = ("disk full", "free some space, then run the same command again")
_REFUSED = ("the system refused", "look at this path, then run again")
_SYSTEM = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EIO: _FAILED,
    errno.ESTALE: _FAILED,
    errno.ENOTCONN: ("the mount has gone", "mount it again, then run the same command again"),
    errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n`"),
    errno.ENFILE: ("too many open files on this machine", "end other processes, or raise fs.file-max"),
    errno.ENAMETOOLONG: ("a name is too long", "choose a shorter one"),
    errno.ELOOP: ("links lead in a circle", "mend the link"),
    errno.ENOMEM: ("no memory left", "end other processes, or use fewer threads"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong option or path, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _shorten_spinning()
    with guarded():
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
        if error.errno is None:  # raised by a package, not by the system
            raise
        _complain(error, _system_message(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's words
            raise
        _complain(error, f"not enough memory: {error or 'an allocation failed'}; {_LESS}")
        return 1
    except SystemExit as stop:  # tyro's way to end after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130


def _system_message(error: OSError) -> str:
    """What the operating system refused, in which file, and what to do about it."""
    reason, advice = _SYSTEM.get(error.errno or 0, _REFUSED)
    places = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    place = f"{places}: " if places else ""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return f"{reason}: {place}{error.strerror} ({name}); {advice}"


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
        raise shared_on_this_machine(UsageError(f"unknown command {name!r}; `lmim --help` lists them"))
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


def _complain(error: Exception, message: str) -> None:
    """One line on stderr: of rank 0, or of another one whose failure rank 0 does not know."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and is_shared(error):
        return
    suffix = "" if rank == "0" else f" (rank {rank})"
    print("error: " + visible(" ".join(message.split())) + suffix, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
