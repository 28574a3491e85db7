"""The skip list: which records its lines are, and what is refused by name."""

import shutil
import threading

import pytest
from lmdb_folders import write_database
from pipeline_runs import database, pipeline

from lmim_fast.config import DataConfig, LabelConfig
from lmim_fast.data.charset import Charset
from lmim_fast.data.labels import LabelledRecords, LabelTable
from lmim_fast.data.skip_list import SkipList, database_name, escaped, skip_list_text
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError

HASH = "0123456789abcdef" * 2


def name_of(store, place=0):
    content = store.fingerprint()["databases"][place]
    return database_name(content["name"], content["hash"])


def listed(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return SkipList.read(path)


@pytest.fixture
def words(tmp_path):
    return write_database(tmp_path / "words", 9)


def test_what_is_written_is_read_and_people_may_edit_it(tmp_path):
    path = tmp_path / "skip.txt"
    records = [("words", "image-000000002", "too large"), ("a b", "image-000000031", "empty")]
    path.write_text(skip_list_text((name, HASH, key, reason) for name, key, reason in records))
    written = SkipList.read(path)
    assert [(line.line, line.name, line.hash, line.number, line.reason) for line in written.lines] == [
        (4, "words", HASH, 2, "too large"),
        (5, "a%20b", HASH, 31, "empty"),
    ]
    edited = ["\ufeff# mine", "", f"  words@{HASH} image-000000002   by hand  ", "\t# too"]
    path.write_bytes("\r\n".join([*edited, f"w@{HASH}\timage-000000001"]).encode())
    read = SkipList.read(path)
    assert [(line.line, line.number, line.reason) for line in read.lines] == [(3, 2, "by hand"), (5, 1, "")]
    assert read.digest() != written.digest()


@pytest.mark.parametrize(
    "name", ["a b", "50%", "new\nline", "tab\t", "esc\x1b[31m", "r\udcffaw", "中文", "#1"]
)
def test_any_name_of_a_folder_is_one_printable_word(name, tmp_path):
    word = escaped(name)
    assert word.isprintable()
    assert word.split() == [word]
    assert (word == name) == (name == "中文")  # only what must be is escaped
    assert listed(tmp_path / "skip.txt", f"{word}@{HASH}\timage-000000001").lines[0].name == word


@pytest.mark.parametrize(
    "line",
    [
        "words\timage-000000001\tempty",
        f"words@{HASH}",
        f"words@{HASH}\tlabel-000000001",
        f"words@{HASH}\timage-1",
        f"words@{HASH[:-1]}\timage-000000001",
        f"@{HASH}\timage-000000001",
        f"words@{HASH}\timage-000000001\t\x1b[31mred",
    ],
)
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    with pytest.raises(UsageError, match=r"skip\.txt, line 2: .* is not NAME@HASH") as error:
        listed(tmp_path / "skip.txt", "# comment", line)
    assert str(error.value).isprintable()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: cannot be read \(No such file"):
        SkipList.read(tmp_path / "nowhere")
    (tmp_path / "skip.txt").write_bytes(b"# \xff\n")
    with pytest.raises(UsageError, match=r"skip\.txt: byte 2 is not UTF-8"):
        SkipList.read(tmp_path / "skip.txt")


def test_a_list_stays_right_when_the_folder_moves_and_gets_another_name(words, tmp_path):
    name = name_of(RecordStore([words]))
    moved = tmp_path / "elsewhere" / "crops"
    shutil.move(words, moved)
    skip_list = listed(tmp_path / "skip.txt", f"{name}\timage-000000003\tempty")
    store = RecordStore([moved])
    assert skip_list.reasons(store) == {2: "empty"}
    skip_list.check([store])


def test_two_databases_of_one_name_are_two(tmp_path):
    folders = [write_database(tmp_path / part / "words", count) for part, count in (("a", 5), ("b", 7))]
    store = RecordStore(folders)
    lines = [f"{name_of(store, place)}\timage-000000002\t{place}" for place in (0, 1)]
    assert listed(tmp_path / "skip.txt", *lines).reasons(store) == {1: "0", 6: "1"}
    assert listed(tmp_path / "skip.txt", lines[1]).reasons(store) == {6: "1"}


def test_copies_are_told_apart_by_their_names_or_refused(words, tmp_path):
    for name in ("copies/first", "copies/second", "same/words"):
        shutil.copytree(words, tmp_path / name)
    pair = RecordStore([tmp_path / "copies"])
    skip_list = listed(tmp_path / "skip.txt", f"{name_of(pair, 1)}\timage-000000004")
    assert skip_list.reasons(pair) == {9 + 3: ""}
    with pytest.raises(UsageError, match=r"line 1: 2 databases of this run are words@"):
        listed(tmp_path / "skip.txt", f"{name_of(RecordStore([words]))}\timage-000000004").reasons(
            RecordStore([words, tmp_path / "same"])
        )


def test_a_line_of_a_database_that_changed_or_is_not_there_is_named(words, tmp_path):
    store = RecordStore([words])
    line = f"{name_of(store)}\timage-000000002\tempty"
    skip_list = listed(tmp_path / "skip.txt", "# one", line, f"other@{HASH}\timage-000000001", line)
    assert skip_list.reasons(store) == {1: "empty"}
    message = rf"skip\.txt, line 3: no database of this run is other@{HASH}; there are words@"
    with pytest.raises(UsageError, match=message):
        skip_list.check([store])
    store.close()
    shutil.rmtree(words)
    changed = RecordStore([write_database(words, 10)])
    with pytest.raises(UsageError, match=r"line 2: no database .* \(and 2 other lines\)"):
        skip_list.check([changed])
    assert skip_list.reasons(changed) == {}


@pytest.mark.parametrize("number", [0, 10, 10**12])
def test_a_record_that_its_database_lacks_is_named(words, tmp_path, number):
    store = RecordStore([words])
    skip_list = listed(tmp_path / "skip.txt", f"{name_of(store)}\timage-{number:09d}\tempty")
    with pytest.raises(UsageError, match=rf"line 1: words@\w+ has 9 records, not image-{number:09d}"):
        skip_list.reasons(store)


def test_a_list_of_all_records_is_refused_and_leaves_no_thread(tmp_path):
    folder = database(tmp_path / "lmdb", count=4)
    name = name_of(RecordStore([folder]))
    listed(tmp_path / "skip.txt", *(f"{name}\timage-{number:09d}" for number in range(1, 5)))
    with pytest.raises(UsageError, match="the skip list holds all 4 records"):
        pipeline(folder, loader=DataConfig(skip=str(tmp_path / "skip.txt")))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmim-")]


def test_all_but_one_record_may_be_skipped(tmp_path):
    folder = database(tmp_path / "lmdb", count=40)
    name = name_of(RecordStore([folder]))
    listed(tmp_path / "skip.txt", *(f"{name}\timage-{number:09d}" for number in range(2, 41)))
    loader = DataConfig(threads=1, skip=str(tmp_path / "skip.txt"), max_bad_fraction=0.0)
    with pipeline(folder, loader=loader, guidance=None, end_step=5) as batches:
        shown = [view for batch in batches for view in batch.plain]
        assert all((view == shown[0]).all() for view in shown)
        assert (batches.bad.count, batches.bad.seen) == (0, 1)
        assert len(batches.bad.skipped) == 39


@pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")
def test_records_are_found_among_those_with_a_usable_label(tmp_path):
    first = write_database(tmp_path / "a", 4, extra=[(b"label-000000002", b"")])
    store = RecordStore([first, write_database(tmp_path / "b", 5, skip=(b"label-000000003",))])
    records = LabelledRecords(store, LabelTable(store, Charset.named("94"), LabelConfig(), max_length=11))
    assert len(records) == 7
    lines = [f"{name_of(store, place)}\timage-{n:09d}" for place in (0, 1) for n in (2, 3)]
    skip_list = listed(tmp_path / "skip.txt", *lines, f"{name_of(store, 1)}\timage-000000005\tlast")
    reasons = skip_list.reasons(records)  # 2 of a and 3 of b are not trained on
    assert [records.locate(index)[1] for index in sorted(reasons)] == [
        *("image-000000003", "image-000000002", "image-000000005")
    ]
    assert reasons[6] == "last"
    with pytest.raises(UsageError, match=r"has 4 records, not image-000000005"):
        listed(tmp_path / "skip.txt", f"{name_of(store, 0)}\timage-000000005").reasons(records)
