"""Output files of `lmim data`: whole or absent, and refused early where they cannot be written."""

import os

import pytest
from finetune_runs import write_words

from lmim_fast import cli
from lmim_fast.data.tools.files import write_whole
from lmim_fast.errors import UsageError


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UsageError, match=r"report\.json cannot be written"):
        write_whole(tmp_path / "report.json", b"content")
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("command", [("sheet",), ("inspect", "--replay", "0", "0", "1")])
def test_a_picture_is_not_written_over_a_folder_or_into_one_that_is_not_there(tmp_path, capsys, command):
    data = write_words(tmp_path / "words", 4)
    for output, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.png", "does not exist")):
        assert cli.main(["data", *command, str(data), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["words"]
