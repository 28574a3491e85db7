"""Each format gives its records in order, whatever the number of threads; `auto` says what it took."""

import json

import numpy as np
import pytest
from import_sources import (
    SOURCES,
    content,
    encoded,
    imported,
    records,
    refused,
    rejects,
    write_folder,
    write_source,
    write_tar,
)

from lmim_fast import cli
from lmim_fast.data.importers import json_stream, lists
from lmim_fast.data.store.records import RecordStore

COUNT = 130


@pytest.mark.parametrize("kind", SOURCES)
def test_every_record_of_a_format_is_imported_as_it_is_and_in_order(tmp_path, capsys, kind):
    source, expected = write_source(kind, tmp_path / "source", COUNT)
    said = imported(capsys, source, "--output", tmp_path / "out")
    assert records(tmp_path / "out") == expected
    name = {"json": "mmocr", "jsonl": "mmocr", "paddleocr": "tsv", "tar.gz": "tar"}.get(kind, kind)
    assert said.startswith(f"{source}: read as {name} (")
    labelled = 0 if kind == "folder" else COUNT
    assert f"{COUNT} records in {tmp_path / 'out'}, {labelled} with a label" in said
    store = RecordStore([tmp_path / "out"])
    assert len(store) == COUNT
    assert store.record(77).image == expected[77][0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.mdb", "import.json"]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_number_of_threads_and_the_format_given_by_name_change_nothing(tmp_path, capsys, kind):
    source, _ = write_source(kind, tmp_path / "source", COUNT)
    (tmp_path / "source" / "part1" / "img10.png").write_bytes(b"broken")
    imported(capsys, source, "--output", tmp_path / "one", "--workers", 1)
    name = {"json": "mmocr", "jsonl": "mmocr", "tar.gz": "tar"}.get(kind, kind)
    imported(capsys, source, "--output", tmp_path / "many", "--workers", 5, "--format", name)
    assert content(tmp_path / "one") == content(tmp_path / "many")
    if not kind.startswith("tar"):
        assert rejects(tmp_path / "one") == rejects(tmp_path / "many") != []


def test_several_sources_follow_each_other(tmp_path, capsys):
    first, a = write_source("tar", tmp_path / "a", 5)
    second, b = write_source("tsv", tmp_path / "b", 40)
    said = imported(capsys, second, first, second, "--output", tmp_path / "out")
    assert records(tmp_path / "out") == b + a + b
    assert [line.split(": read as ")[1] for line in said.splitlines()[:3]] == [
        "tsv (its lines have a tab)",
        "tar (by its name)",
        "tsv (its lines have a tab)",
    ]


# --- folders ---


def test_names_are_sorted_by_their_numbers_or_plainly(tmp_path, capsys):
    for name in ("img10.png", "img9.png", "img1.png", "img01.png", "b/2.png", "b/11.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(1, suffix=".png"))

    def order(sort):
        out = tmp_path / sort
        imported(capsys, tmp_path / "in", "--output", out, "--sort", sort, "--label-from", "name")
        return [label for _, label in records(out)]

    assert order("natural") == ["2", "11", "img01", "img1", "img9", "img10"]
    assert order("plain") == ["11", "2", "img01", "img1", "img10", "img9"]


def test_a_label_comes_from_the_name_or_the_folder(tmp_path, capsys):
    (tmp_path / "in" / "stop").mkdir(parents=True)
    for name in ("a.b.png", "stop/1.JPG"):
        (tmp_path / "in" / name).write_bytes(encoded(1))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    said = imported(
        capsys, tmp_path / "in", "--output", tmp_path / "names", "--label-from", "name", "--workers", 1
    )
    assert [label for _, label in records(tmp_path / "names")] == ["a.b", "1"]
    assert "1 other files passed over" in said
    imported(capsys, tmp_path / "in", "--output", tmp_path / "folders", "--label-from", "parent")
    assert [label for _, label in records(tmp_path / "folders")] == ["in", "stop"]


# --- lists ---


def test_a_list_may_have_a_root_a_byte_order_mark_and_windows_line_ends(tmp_path, capsys):
    made = write_folder(tmp_path / "images", 3)
    text = "\r\n".join(f"{name}\t{label}" for name, _, label in made) + "\r\n\r\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    imported(capsys, tmp_path / "list.txt", "--root", tmp_path / "images", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(image, label) for _, image, label in made]


def test_a_list_with_spaces_is_read_when_that_is_said(tmp_path, capsys):
    made = write_folder(tmp_path, 3)
    (tmp_path / "list.txt").write_text("".join(f"{name} two words\n" for name, _, _ in made))
    error = refused(capsys, "import", tmp_path / "list.txt", "--output", tmp_path / "out")
    assert "0 of its first 3 lines have a tab" in error
    assert "--format folder|tsv|csv|mmocr|paddleocr|tar" in error
    assert "--format tsv --separator space" in error
    imported(capsys, tmp_path / "list.txt", "--separator", "space", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(image, "two words") for _, image, _ in made]


def test_lines_that_cannot_be_used_are_rejected_with_their_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lists, "MAX_LINE_BYTES", 200)
    write_folder(tmp_path, 2)
    lines = [
        b"part0/img0.jpg\tgood",
        b"part0/img0.jpg",
        b"part0/img0.jpg\t\xff\xfe",
        b"part0/img0.jpg\ta\x1b[31mb",
        b"part0/img0.jpg\ta\tb",
        b"gone.jpg\tx",
        b"part0/img0\0.jpg\tx",
        b"part0/img0.jpg\t" + b"x" * 1000,
        b"\tx",
        b"part0\tx",
        b"part0/img1.png\talso good",
        b"part0/img1.png\t",
    ]
    (tmp_path / "list.tsv").write_bytes(b"\n".join(lines))
    said = imported(
        capsys, tmp_path / "list.tsv", "--format", "tsv", "--output", tmp_path / "out", "--workers", 1
    )
    assert [label for _, label in records(tmp_path / "out")] == ["good", "also good", ""]
    name = str(tmp_path / "list.tsv")
    assert rejects(tmp_path / "out") == [
        (f"{name}:2", "no tab in the line"),
        (f"{name}:3", "not UTF-8"),
        (f"{name}:4", "control character in the label"),
        (f"{name}:5", "control character in the label"),
        (f"{name}:6: gone.jpg", "no such file"),
        (f"{name}:7: part0/img0\\x00.jpg", "NUL in the path"),
        (f"{name}:8", "line too long"),
        (f"{name}:9: ", "no path"),
        (f"{name}:10: part0", "not a regular file"),
    ]
    assert "9 rejected: 2 control character in the label, " in said
    assert "\x1b" not in (tmp_path / "out" / "rejects.tsv").read_text()
    assert json.loads((tmp_path / "out" / "import.json").read_text())["rejected"]["line too long"] == 1


# --- csv ---


def test_a_csv_may_have_other_columns_quotes_and_line_breaks_in_fields(tmp_path, capsys):
    made = write_folder(tmp_path, 3)
    rows = "".join(f'"a,b\n\nc",{name},"say ""{label}"", twice"\n' for name, _, label in made)
    (tmp_path / "list.csv").write_text("note,file,text\n" + rows + "\nshort\n", "utf-8")
    options = ("--path-column", "file", "--label-column", "text")
    imported(capsys, tmp_path / "list.csv", *options, "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(image, f'say "{label}", twice') for _, image, label in made]
    assert [reason for _, reason in rejects(tmp_path / "out")] == ["too few columns"]
    imported(
        capsys, tmp_path / "list.csv", *options[:2], "--label-column", "None", "--output", tmp_path / "bare"
    )
    assert records(tmp_path / "bare") == [(image, None) for _, image, _ in made]


def test_a_csv_without_the_column_names_those_that_it_has(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("file,text\x1b,label,label\nx,y,z,z\n")
    error = refused(capsys, "import", tmp_path / "list.csv", "--output", tmp_path / "out")
    assert "column 'path' is not there; --path-column names one of: file, text\\x1b, label" in error
    error = refused(
        capsys, "import", tmp_path / "list.csv", "--path-column", "file", "--output", tmp_path / "out"
    )
    assert "column 'label' is twice" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.csv"]


def test_a_csv_with_another_separator_is_told_from_one_without_the_column(tmp_path, capsys):
    made = write_folder(tmp_path, 3)
    rows = "".join(f"{name};{label}\n" for name, _, label in made)
    (tmp_path / "list.csv").write_text("path;label\n" + rows, "utf-8")
    error = refused(capsys, "import", tmp_path / "list.csv", "--output", tmp_path / "out")
    assert "one of: path;label (one column only: is --separator right?)" in error
    imported(capsys, tmp_path / "list.csv", "--separator", "semicolon", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == [(image, label) for _, image, label in made]


def test_a_quote_that_is_never_closed_costs_some_rows_and_no_memory(tmp_path, capsys):
    made = write_folder(tmp_path, 1)
    rows = [f"{made[0][0]},word {number}\n" for number in range(12000)]
    rows[10] = f'{made[0][0]},"word\n'
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows))
    imported(capsys, tmp_path / "list.csv", "--output", tmp_path / "out")
    assert [reason for _, reason in rejects(tmp_path / "out")] == ["not csv"]
    labels = [label for _, label in records(tmp_path / "out")]
    assert labels[:10] == [f"word {number}" for number in range(10)]
    assert labels[-1] == "word 11999"
    assert 6000 < len(labels) < 12000


# --- json ---


def test_json_that_is_not_a_recognition_list_is_rejected_by_entry(tmp_path, capsys):
    write_folder(tmp_path, 1)
    image = "part0/img0.jpg"
    entries = [
        {"img_path": image, "instances": [{"text": "good"}]},
        {"img_path": image, "instances": []},
        {"img_path": image, "instances": [{"text": "a"}, {"text": "b"}]},
        {"img_path": image, "instances": [{"text": "a", "bbox": [0, 0, 9, 9]}]},
        {"img_path": image, "instances": [{"text": 5}]},
        {"instances": [{"text": "a"}]},
        {"img_path": "\ud800.jpg", "instances": [{"text": "a"}]},
        "text",
        {"img_path": image, "instances": [{"text": "\ud800"}]},
        {"img_path": image},
    ]
    (tmp_path / "list.json").write_text(json.dumps({"data_list": entries, "metainfo": {}}))
    imported(capsys, tmp_path / "list.json", "--output", tmp_path / "out", "--workers", 1)
    assert [label for _, label in records(tmp_path / "out")] == ["good", None]
    assert [reason for _, reason in rejects(tmp_path / "out")] == [
        "not one instance",
        "not one instance",
        "an instance with a box",
        "label is not text",
        "path is not text",
        "no such file",
        "not a JSON object",
        "not UTF-8",
    ]
    assert rejects(tmp_path / "out")[0][0] == f"{tmp_path / 'list.json'} data_list[1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data_list": [{"img_path": "a.jpg"', "not JSON at character 15"),
        ('{"data_list": ' + "[" * 100_000, "nested too deeply"),
        ('{"other": [1, 2]}', "no list 'data_list'"),
        ("[1, 2]", "'{' expected, found '['"),
        ("", "'{' expected, found ''"),
        ('{"data_list": [' + "9" * 5000 + "]}", "not JSON at character"),
        ('{"data_list": ["' + "x" * 3000 + '"]}', "no value of less than 2000 characters"),
    ],
)
def test_a_file_that_is_not_such_json_is_one_line_that_says_where(
    tmp_path, capsys, monkeypatch, text, message
):
    if "xxx" in text:
        monkeypatch.setattr(json_stream, "_MAX_VALUE", 2000)
        monkeypatch.setattr(json_stream, "_BLOCK", 100)
    (tmp_path / "list.json").write_text(text)
    error = refused(
        capsys, "import", tmp_path / "list.json", "--format", "mmocr", "--output", tmp_path / "out", code=1
    )
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.json"]


@pytest.mark.parametrize("block", [1, 3, 7])
def test_json_is_the_same_however_it_is_cut_into_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "_BLOCK", block)
    values = [{"a": [1, 23, "x, ]}"], "b": None}, 123456, "é\n", [], {}, -1.5e-3, True]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"first": {"data_list": [1]}, "data_list": values, "last": 1}, indent=2))
    with path.open(encoding="utf-8") as file:
        assert list(json_stream.elements(file, "x", "data_list")) == values


# --- tar ---


def test_a_tar_has_labels_in_text_or_json_and_images_without(tmp_path, capsys):
    image = encoded(1)
    write_tar(
        tmp_path / "shard.tar",
        [
            ("a/1.jpg", image),
            ("a/1.txt", "ä one\n".encode()),
            ("2.json", b'{"text": "two"}'),
            ("2.jpg", image),
            ("3.jpg", image),
            ("3.json", b'{"label": "three", "text": "no"}'),
            ("3.cls", b"7"),
            ("1.5_word.jpg", image),
            ("1.6_word.jpg", image),
            ("5.txt", b"no image"),
            ("6.jpg", image),
            ("6.png", image),
            ("7.jpg", image),
            ("7.json", b"[1"),
            ("8.jpg", image),
            ("8.txt", b"\xff"),
        ],
    )
    said = imported(capsys, tmp_path / "shard.tar", "--output", tmp_path / "out", "--workers", 1)
    assert [label for _, label in records(tmp_path / "out")] == ["ä one", "two", "three", None, None]
    name = tmp_path / "shard.tar"
    assert rejects(tmp_path / "out") == [
        (f"{name}: 5", "label without an image"),
        (f"{name}: 6", "two members for one place"),
        (f"{name}: 7", "not JSON"),
        (f"{name}: 8", "not UTF-8"),
    ]
    assert "1 other files passed over" in said


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar_that_was_cut_short_gives_what_is_whole_and_says_so(tmp_path, capsys, suffix):
    rng = np.random.default_rng(0)
    members = [(f"{number}.jpg", encoded(number) + rng.bytes(2000)) for number in range(40)]
    write_tar(tmp_path / f"whole.{suffix}", members)
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    for number, end in enumerate([len(whole) // 2, len(whole) // 3]):
        path = tmp_path / f"cut{number}.{suffix}"
        path.write_bytes(whole[:end])
        out = tmp_path / f"out{number}"
        said = imported(capsys, path, "--output", out)
        found = [image for image, _ in records(out)]
        assert 5 < len(found) < 35
        assert found == [image for _, image in members[: len(found)]]
        assert rejects(out) == [(str(path), "damaged archive, its rest is lost")]
        assert "1 damaged archive, its rest is lost" in said


def test_whatever_bytes_a_tar_has_an_import_ends_in_words(tmp_path, capsys):
    write_tar(tmp_path / "whole.tar", [(f"{'long/' * 30}{n}.jpg", encoded(n)) for n in range(4)])
    whole = (tmp_path / "whole.tar").read_bytes()
    rng = np.random.default_rng(1)
    for number in range(30):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.integers(0, 4096) if number % 2 else rng.integers(0, len(data))] = rng.integers(0, 256)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        code = cli.main(["data", "import", str(path), "--output", str(tmp_path / f"out{number}")])
        assert code in (0, 1)
        assert "Traceback" not in capsys.readouterr().err


# --- options and mistakes ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "no such file or folder"),
        (["list.tsv", "--label-from", "name"], "--label-from is for folder, this is tsv; leave it out"),
        (["list.tsv", "--format", "folder"], "is no folder, so it cannot be read as folder"),
        ([".", "--format", "tsv"], "is a folder, so it cannot be read as tsv"),
        (["binary"], "a binary file and no tar archive by its name; say which it is: --format folder|tsv|"),
        (["empty"], "no lines to tell the format from"),
        (["list.tsv", "--root", "gone"], "no such folder"),
        (["lmdb"], "is an LMDB already; `lmim data merge`"),
        ([], "name at least one folder, list or archive"),
        (["list.tsv", "--workers", "-1"], "workers must be in [0, 4096]"),
    ],
)
def test_a_wrong_source_or_option_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.tsv").write_text("a.jpg\tx\n")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "empty").touch()
    (tmp_path / "lmdb").mkdir()
    (tmp_path / "lmdb" / "data.mdb").touch()
    assert message in refused(capsys, "import", *arguments, "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_sources_without_a_record_say_why_and_leave_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "b.txt").touch()
    error = refused(capsys, "import", tmp_path / "in", "--output", tmp_path / "out", code=1)
    assert "no record was found: 1 other files passed over; 1 rejected: 1 not an image" in error
    assert f"(the first one: {tmp_path}/in/a.jpg, not an image)" in error
    assert "rejects.tsv" not in error  # it goes with the rest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_broken_images_are_rejected_or_kept(tmp_path, capsys):
    made = write_folder(tmp_path / "in", 3)
    broken = made[1][1][:40]
    (tmp_path / "in" / made[1][0]).write_bytes(broken)
    imported(capsys, tmp_path / "in", "--output", tmp_path / "out")
    assert [image for image, _ in records(tmp_path / "out")] == [made[0][1], made[2][1]]
    assert [reason for _, reason in rejects(tmp_path / "out")] == ["truncated"]
    said = imported(capsys, tmp_path / "in", "--keep-broken", "--output", tmp_path / "kept")
    assert [image for image, _ in records(tmp_path / "kept")] == [made[0][1], broken, made[2][1]]
    assert "1 kept though they cannot be used" in said
