"""Options that hold for every command: lists that are repeated, paths, numbers."""

import dataclasses
import typing

import pytest

from lmim_fast import cli
from lmim_fast.cli_commands import COMMANDS
from lmim_fast.cli_options import _options_of, _refuse_numbers, _unknown_options, parse
from lmim_fast.config import EvaluateConfig, FinetuneConfig, PretrainConfig, RenderConfig
from lmim_fast.config.checks import PATH, _metadata, require_numbers
from lmim_fast.errors import UsageError

NO_PATHS = {"wandb", "characters", "path_column", "label_column", "parts"}


def given(kind, *arguments):
    return parse(kind, arguments, "lmim", "about")


def fields(kind):
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint)
        else:
            yield name, hint


def test_lists_that_are_given_again_add_up_and_of_single_values_the_last_counts():
    config = given(
        FinetuneConfig,
        "--data",
        "a",
        "b",
        "--val=v",
        "--epochs",
        "2",
        "--data=c",
        "--epochs",
        "3",
        "--val",
        "w",
    )
    assert (config.data, config.val, config.epochs) == (("a", "b", "c"), ("v", "w"), 3.0)
    assert given(RenderConfig, "--fonts", "a", "--fonts", "b").fonts == ("a", "b")
    config = given(PretrainConfig, "--data=a", "--eval_data", "p", "--eval-data", "q", "--eval-every", "1")
    assert config.eval_data == ("p", "q")


@pytest.mark.parametrize(
    "kind", dict.fromkeys(command.config for command in COMMANDS.values()), ids=lambda kind: kind.__name__
)
def test_every_text_option_is_known_as_a_path_or_as_none(kind):
    for name, hint in fields(kind):
        parts = (hint, *typing.get_args(hint))
        texts = any(part is str or typing.get_origin(part) is typing.Annotated for part in parts)
        if texts:
            assert (PATH in _metadata(hint)) != (name in NO_PATHS), name


def test_home_folders_are_expanded_in_paths_of_all_kinds(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = given(PretrainConfig, "--data=~/a", "~/b", "--output=~/x", "--loader.skip=~/s")
    assert (config.data, config.output, config.loader.skip) == (
        ("/home/me/a", "/home/me/b"),
        "/home/me/x",
        "/home/me/s",
    )
    config = given(EvaluateConfig, "~/model", "set=~/a")
    assert (config.model, config.data) == ("/home/me/model", ("set=/home/me/a",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output="], "output is empty"),
        (["--output=~nobody9/x"], "output: '~nobody9/x' is in no user's home folder"),
        (["--optim.weight-decay", "inf"], "--optim.weight-decay must be a finite number, got inf"),
        (["--epochs", "1e400"], "--epochs must be a finite number, got 1e400"),
        (["--optim.final-lr", "nan"], "--optim.final-lr must be a finite number, got nan"),
        (["--steps", str(10**30)], "--steps must fit in 64 bits, got 100000000000... (31 characters)"),
    ],
)
def test_a_value_that_nothing_can_use_is_one_line(capsys, arguments, message):
    assert cli.main(["pretrain", "--data", "x", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


NUMBERS = {
    "nan": "finite",
    "-inf": "finite",
    "1e400": "finite",
    str(2**64): "64 bits",
    "-" + "9" * 400: r"64 bits, got -99999999999\.\.\. \(401 characters\)",  # beyond what a float holds
    "9" * 5000: r"64 bits, got 999999999999\.\.\. \(5000 characters\)",  # beyond what Python reads
}


@pytest.mark.parametrize(
    "kind", dict.fromkeys(command.config for command in COMMANDS.values()), ids=lambda kind: kind.__name__
)
def test_every_numeric_option_refuses_what_is_no_number_of_a_machine(kind):
    for option, hint in _options_of(kind):
        parts = {hint, *typing.get_args(hint)}
        for value, message in NUMBERS.items():
            if parts & {int, float}:
                behind = ["--x", "1", option, "0", value]  # of a pair too
                for arguments in (
                    [f"{option}={value}"],
                    ["--" + option[2:].replace("-", "_"), value],
                    behind,
                ):
                    with pytest.raises(UsageError, match=f"{option} must .*{message}"):
                        _refuse_numbers(kind, arguments)
            else:
                _refuse_numbers(kind, [option, value])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "1e12"], "timeout must be in (0, 1e8] seconds"),
        (["--epochs", "1e308"], "epochs must be in (0, 1e9]"),
        (["--optim.warmup-epochs", "1e308"], "warmup_epochs must be in [0, 1e9]"),
        (["--loader.threads", "1000000000000"], "threads must be in [0, 4096]"),
        (["--batch-size", "1000000000000"], "batch_size must be at most 2^24"),
        (["--model.width", "1000000000000"], "width must be in [1, 65536]"),
        (["--model.mlp-ratio", "1e300"], "mlp_ratio must be at most 1000"),
        (["--model.mask-ratio", "1e308"], "mask_ratio must keep 1 to 255 of 256 patches"),
    ],
)
def test_sizes_beyond_all_machines_are_refused_before_anything_is_made(capsys, arguments, message):
    assert cli.main(["pretrain", "--data", "x", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_number_of_a_config_file_is_refused_by_name():
    @dataclasses.dataclass
    class Inner:
        share: tuple[float, float]

    @dataclasses.dataclass
    class Outer:
        inner: Inner

    for value in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match=r"inner\.share must (be a finite number|fit in 64 bits)"):
            require_numbers(Outer(Inner((0.0, value))))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(entry=fail))
    assert cli.main(["convert", "a", "b"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: not enough memory: ")
    assert told.count("\n") == 1


def test_options_that_a_command_has_are_never_called_unknown():
    given = [
        "--no-resume",
        "--optim.lr=-inf",
        "--loader_threads",
        "-5",
        "-inf",
        "--frob=1",
        "-x",
        "--loader.no-frob",
    ]
    known = [option for option, _ in _options_of(PretrainConfig)]
    assert _unknown_options(PretrainConfig, [*given, *known, "-h"]) == [
        "--loader_threads",
        "--frob",
        "-x",
        "--loader.no-frob",
    ]
