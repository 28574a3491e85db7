"""`lmim data charset` on real LMDBs: what is counted, left out, written and said."""

# ruff: noqa: RUF001 - full width characters are what is tested

import pytest
from lmdb_folders import write_database

from lmim_fast import cli
from lmim_fast.config import CharsetConfig
from lmim_fast.data.charset import Charset
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools import charset_file
from lmim_fast.data.tools.charset_file import write_charset
from lmim_fast.errors import DataError, UsageError


def write(folder, labels):
    extra = [(b"label-%09d" % number, label.encode()) for number, label in enumerate(labels, 1)]
    return str(write_database(folder, len(labels), extra=extra))


def made(tmp_path, labels, **options):
    output = tmp_path / "sets" / "set.txt"
    written = write_charset(
        CharsetConfig((write(tmp_path / "crops", labels),), output=str(output), **options)
    )
    assert Charset.named(output) == written.charset
    assert list(written.counts) == list(written.charset.characters)
    assert [path.name for path in output.parent.iterdir()] == ["set.txt"]
    return written


def test_the_most_frequent_characters_come_first_and_ties_by_code_point(tmp_path):
    written = made(tmp_path, ["banana", "中b", "z y"])
    assert written.charset.characters == "abn yz中"
    assert written.counts == {"a": 3, "b": 2, "n": 2, " ": 1, "y": 1, "z": 1, "中": 1}
    assert (tmp_path / "sets" / "set.txt").read_bytes() == "a\nb\nn\n \ny\nz\n中\n".encode()


def test_code_point_order_is_that_of_the_characters(tmp_path):
    assert made(tmp_path, ["bb中a", "B1"], order="codepoint").charset.characters == "1Bab中"


@pytest.mark.parametrize(
    ("normalize", "characters"), [("none", "A Ａ國"), ("nfkc", "A 國"), ("chinese", "a国")]
)
def test_labels_are_counted_in_the_form_asked_for(tmp_path, normalize, characters):
    written = made(tmp_path, ["Ａ", "A A", "國"], normalize=normalize, order="codepoint")
    assert written.charset == Charset("".join(sorted(characters)))


def test_rare_and_impossible_characters_are_left_out_and_named(tmp_path):
    written = made(tmp_path, ["aab", "a\tb", "c  \u3000", "\ufffdx"], min_count=2)
    assert written.counts == {"a": 3, " ": 2, "b": 2}
    assert written.rare == {"c": 1, "x": 1}
    assert set(written.refused) == {"\t", "\u3000", "\ufffd"}
    report = "\n".join(written.report_lines())
    assert "left out as too rare, 2 characters: 'c' 1, 'x' 1" in report
    assert "(U+3000 IDEOGRAPHIC SPACE): a set has one space" in report
    assert "left out: '\\t' (U+0009): a control character" in report


def test_missing_and_empty_labels_are_counted_over_all_databases(tmp_path, monkeypatch):
    monkeypatch.setattr(charset_file, "_BLOCK", 2)
    paths = (
        write(tmp_path / "a", ["ab", "", "b", " "]),
        str(write_database(tmp_path / "b", 3, labels=False)),
    )
    written = write_charset(CharsetConfig(paths, output=str(tmp_path / "set.txt"), normalize="chinese"))
    assert (written.labels, written.missing, written.empty) == (4, 3, 2)
    assert written.report_lines() == [
        f"{tmp_path / 'set.txt'}: 2 characters (5 classes with EOS, PAD and UNK)"
        " from 4 labels of 3 characters",
        "3 records have no label",
        "2 labels are empty",
        "rarest: 'a' 1, 'b' 2",
    ]


def test_the_ten_rarest_are_named_and_the_rest_counted(tmp_path):
    written = made(tmp_path, ["abcdefghijklmn", "n"])
    assert "rarest: 'a' 1, 'b' 1" in written.report_lines()[-1]
    assert written.report_lines()[-1].endswith("'j' 1 and 4 more")


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = write(tmp_path / "crops", ["a"])
    output = tmp_path / "set.txt"
    output.write_text("mine")
    with pytest.raises(UsageError, match=r"set\.txt exists"):
        write_charset(CharsetConfig((path,), output=str(output)))
    assert output.read_text() == "mine"


def test_data_without_labels_or_without_a_usable_character_is_one_line(tmp_path):
    output = str(tmp_path / "set.txt")
    bare = str(write_database(tmp_path / "bare", 3, labels=False))
    with pytest.raises(DataError, match="none of 3 records"):
        write_charset(CharsetConfig((bare,), output=output))
    path = write(tmp_path / "crops", ["a\t"])
    with pytest.raises(DataError, match="1 occur less than min_count = 2 times, 1 cannot"):
        write_charset(CharsetConfig((path,), output=output, min_count=2))
    assert not (tmp_path / "set.txt").exists()


def test_the_command_writes_the_file_prints_the_report_and_lets_go_of_the_data(tmp_path, capsys):
    path, output = write(tmp_path / "crops", ["中a", "a"]), tmp_path / "set.txt"
    arguments = ["data", "charset", path, "--output", str(output), "--order", "codepoint"]
    assert cli.main(arguments) == 0
    assert f"{output}: 2 characters (5 classes" in capsys.readouterr().out
    assert Charset.named(output).characters == "a中"
    assert RecordStore([path]).label(0) == "中a"
    assert cli.main(arguments) == 2
    assert "exists; remove it or choose another --output" in capsys.readouterr().err
