"""Options of a command from its config dataclass, with tyro; a wrong one is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from lmim_fast.config import FinetuneConfig, PretrainConfig, RunConfig, preset, recipe
from lmim_fast.config.checks import refused_number, with_home_folders
from lmim_fast.data.visible import beneath
from lmim_fast.errors import UsageError, shared_on_this_machine

Config = TypeVar("Config")


def parse(kind: type[Config], arguments: Sequence[str], program: str, about: str) -> Config:
    """A config from the arguments of its command.

    A run's config takes its model from `--preset`, and a `FinetuneConfig` its recipe from `--recipe`; other
    options override single values of them.

    Raises:
        UsageError: missing and unknown options, or a wrong value.
        SystemExit: after `--help`.
    """
    import tyro

    arguments = _lists_together(kind, arguments)
    options: dict[str, Any] = dict(prog=program, description=about)
    try:
        if issubclass(kind, RunConfig):
            # With a default no required field becomes positional.
            default: Any = _defaults(kind, arguments)
            object.__setattr__(default, "data", tyro.MISSING)
            options["default"] = default
        else:
            options["config"] = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
        _refuse_numbers(kind, arguments)
        config: Config = _tyro(kind, arguments, **options)
        try:
            return with_home_folders(config)
        except ValueError as error:
            raise UsageError(str(error)) from error
    except UsageError as error:
        message = _all_problems(kind, arguments, str(error), options)
        raise shared_on_this_machine(UsageError(f"{message}; see `{program} --help`")) from None


def _lists_together(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with all values of a repeated list option behind its first place: its lists add up.

    Of an option with one value, or a fixed number of them, the last one counts.
    """
    lists = {option for option, hint in _options_of(kind) if _is_list(hint)}  # type: ignore[arg-type]
    kept: list[str] = []
    places: dict[str, list[str]] = {}  # an option's values, in a list of their own until the end
    parts: list[list[str]] = [kept]
    for argument in arguments:
        option, equals, value = argument.partition("=")
        option = option.replace("_", "-")
        if option in lists:
            if option not in places:
                places[option] = [option]
                parts.append(places[option])
            current = places[option]
            current += [value] if equals else []
            open_list = not equals
        elif argument.startswith("--") or not places or not open_list:
            if parts[-1] is not kept:
                kept = []
                parts.append(kept)
            kept.append(argument)
            open_list = False
        else:
            current.append(argument)
    return [argument for part in parts for argument in part]


@functools.cache
def _options_of(kind: type[Any], prefix: str = "--") -> list[tuple[str, Any]]:
    """Every option of a config with its type."""
    options: list[tuple[str, Any]] = []
    for name, hint in typing.get_type_hints(kind).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            options += _options_of(hint, f"{option}.")  # type: ignore[arg-type]
        else:
            options.append((option, hint))
    return options


def _is_list(hint: Any) -> bool:
    """Whether an option takes any number of values."""
    return typing.get_origin(hint) is tuple and Ellipsis in typing.get_args(hint)


def _refuse_numbers(kind: type[Any], arguments: Sequence[str]) -> None:
    """Refuse numbers that nothing can use before a config computes with them.

    Raises:
        UsageError: the option and its value.
    """
    kinds = ((option, {hint, *typing.get_args(hint)}) for option, hint in _options_of(kind))  # type: ignore[arg-type]
    numeric = {option for option, parts in kinds if {int, float} & parts}
    current = ""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if argument.startswith("--"):
            current = option.replace("_", "-")
            argument = value
        reason = refused_number(argument) if current in numeric else ""
        if reason:
            raise UsageError(f"{current} {reason}")


def _all_problems(kind: type[Any], arguments: Sequence[str], first: str, options: dict[str, Any]) -> str:
    """Unknown options, and what else is wrong: tyro names one of the two, `first`."""
    if not first.startswith("Unrecognized"):
        unknown = ", ".join(_unknown_options(kind, arguments))
        return f"{first}; Unrecognized options: {unknown}" if unknown else first
    try:
        _tyro(kind, arguments, return_unknown_args=True, **options)
    except UsageError as error:
        return f"{error}; {first}"
    return first


def _defaults(kind: type[RunConfig], arguments: Sequence[str]) -> RunConfig:
    """The config of a run that names its preset and recipe and nothing else."""
    size = _named("--preset", "small", arguments)
    try:
        if issubclass(kind, FinetuneConfig):
            name: Any = _named("--recipe", "lmim", arguments)
            chosen = recipe(name, data=("",), size=size)
            return kind(**{item.name: getattr(chosen, item.name) for item in dataclasses.fields(chosen)})
        model: Any = preset(size)
    except ValueError as error:
        raise UsageError(f"--preset, --recipe: {error}") from error
    pretraining: Any = kind if issubclass(kind, PretrainConfig) else PretrainConfig
    default: RunConfig = pretraining(data=("",), model=model)
    return default


def _named(option: str, default: str, arguments: Sequence[str]) -> str:
    """The value of an option before the others are parsed; the last one counts."""
    for argument, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == option:
            default = value
        elif argument.startswith(option + "="):
            default = argument.removeprefix(option + "=")
    return default


def _unknown_options(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """Options that a config does not have, whatever else is missing or wrong."""
    known = {"-h", "--help"}
    for option, hint in _options_of(kind):  # type: ignore[arg-type]
        known.add(option)
        if hint is bool:
            known.add(re.sub(r"^(--(.*\.)?)", r"\1no-", option))
    names = [argument.partition("=")[0] for argument in arguments if re.match(r"--?[A-Za-z]", argument)]
    return [name for name in names if name.replace("_", "-") not in known and name not in ("-inf", "-nan")]


def _tyro(kind: type[Any], arguments: Sequence[str], **options: Any) -> Any:
    """`tyro.cli`, its error box as a UsageError of one line."""
    import tyro

    asks_help = any(argument in ("-h", "--help") for argument in arguments)
    # tyro colours its help, and draws ASCII for streams without encoding
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(beneath(sys.stdout)) if asks_help else _captured(printed):
            return tyro.cli(kind, args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        printed.seek(0)
        raise UsageError(_first_message(printed.read())) from None


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
    text = text.replace("invalid literal for int() with base 10:", "must be a whole number, got")
    text = text.replace("could not convert string to float:", "must be a number, got")
    text = re.sub(r"no type matching (\S+) could be instantiated from \[(.*)\]", r"must be \1, got \2", text)
    guesses = [
        line.split()[0]
        for section in sections[1:]
        if section[0].startswith("Perhaps")
        for line in section
        if line.strip().startswith("--")
    ]
    return text + (f" (did you mean {' or '.join(guesses)}?)" if guesses else "")
