"""Options that hold for every command: lists that are repeated, paths, numbers."""

import dataclasses
import typing
from pathlib import Path

import pytest

from lmim_fast import cli
from lmim_fast.cli_commands import COMMANDS
from lmim_fast.cli_options import parse
from lmim_fast.config import EvaluateConfig, FinetuneConfig, PretrainConfig, RenderConfig
from lmim_fast.config.checks import PATH, _metadata, require_numbers

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
        (["--optim.weight-decay", "inf"], "optim.weight_decay must be a finite number, got inf"),
        (["--epochs", "1e400"], "epochs must be a finite number, got inf"),
        (["--optim.final-lr", "nan"], "final_lr must be >= 0, got nan"),
        (["--steps", str(10**30)], "steps must fit in 64 bits, got 1e+30"),
    ],
)
def test_a_value_that_nothing_can_use_is_one_line(capsys, arguments, message):
    assert cli.main(["pretrain", "--data", "x", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused_in_every_option(value):
    @dataclasses.dataclass
    class Inner:
        share: tuple[float, float]

    @dataclasses.dataclass
    class Outer:
        inner: Inner

    with pytest.raises(ValueError, match=r"inner\.share must be a finite number"):
        require_numbers(Outer(Inner((0.0, float(value)))))


def test_r31_no_control_character_reaches_the_terminal_whatever_its_encoding(capsys, tmp_path):
    folder = tmp_path / "\x1b[31mred\u00e9"
    assert cli.main(["data", "inspect", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[31mred\u00e9" in told
    assert "\x1b" not in told
    assert Path(tmp_path).is_dir()
