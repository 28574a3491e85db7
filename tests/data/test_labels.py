"""Labels of real LMDBs: what is kept, what is counted, targets, and the records that are left."""

import json
import pickle

import numpy as np
import pytest
from crop_views import png
from lmdb_folders import image, write_database

from lmim_fast.config import DataConfig, LabelConfig
from lmim_fast.data import labels as labels_module
from lmim_fast.data.charset import Charset
from lmim_fast.data.labels import LabelledRecords, LabelTable
from lmim_fast.data.mix import MixedOrder
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.samples import BadRecords, SampleReader
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError, UsageError

ASCII = Charset.named("94")
LABELS = ["first", None, "", "eleven char", "中", "a中b", "Café", "last"]


def write(folder, labels):
    """An LMDB with these labels; None: no label key."""
    keys = [b"label-%09d" % number for number in range(1, len(labels) + 1)]
    extra = [(key, label.encode()) for key, label in zip(keys, labels, strict=True) if label is not None]
    missing = [key for key, label in zip(keys, labels, strict=True) if label is None]
    return write_database(folder, len(labels), extra=extra, skip=missing)


@pytest.fixture
def store(tmp_path):
    with pytest.warns(UserWarning, match="some lack image or label"):
        return RecordStore([write(tmp_path / "crops", LABELS)])


def texts(table, records=None):
    return [table.charset.decode(row) for row in table.targets(table.kept if records is None else records)]


@pytest.mark.parametrize(
    ("config", "kept", "read"),
    [
        (LabelConfig(), [0, 4, 5, 6, 7], ["first", "\ufffd", "a\ufffdb", "Cafe", "last"]),
        (LabelConfig(outside="leave_out"), [0, 6, 7], ["first", "Cafe", "last"]),
        (LabelConfig(outside="delete"), [0, 3, 5, 6, 7], ["first", "elevenchar", "ab", "Cafe", "last"]),
        (
            LabelConfig(too_long="cut"),
            [0, 3, 4, 5, 6, 7],
            ["first", "eleven\ufffdcha", "\ufffd", "a\ufffdb", "Cafe", "last"],
        ),
    ],
)
def test_labels_that_do_not_fit_become_what_the_config_says(store, config, kept, read):
    table = LabelTable(store, ASCII, config, max_length=11)
    assert table.kept.tolist() == kept
    assert texts(table) == read
    assert len(table) == len(kept)


def test_targets_are_characters_then_eos_then_pad_in_the_order_asked(store):
    charset = Charset.named("62")
    table = LabelTable(store, charset, LabelConfig(), max_length=7)
    targets = table.targets([7, 0, 7])
    assert targets.dtype.is_signed
    assert str(targets.dtype) == "torch.int64"
    last = [*charset.encode("last"), charset.eos, charset.pad, charset.pad]
    assert targets.tolist() == [last, [*charset.encode("first"), charset.eos, charset.pad], last]
    assert table.targets([]).shape == (0, 7)


def test_a_label_as_long_as_the_target_allows_is_kept_and_one_more_is_not(tmp_path):
    store = RecordStore([write(tmp_path / "crops", ["abcd", "abcde", "a"])])
    table = LabelTable(store, ASCII, LabelConfig(), max_length=5)
    assert texts(table) == ["abcd", "a"]
    assert table.targets([0]).tolist() == [[10, 11, 12, 13, ASCII.eos]]
    assert table.counts == {"too_long": 1}


def test_a_record_that_is_not_kept_has_no_target(store):
    table = LabelTable(store, ASCII, LabelConfig(), max_length=11)
    for number in (1, 2, 8, -1):
        with pytest.raises(IndexError, match=f"record {number} is not among the 5"):
            table.targets([0, number])


def test_everything_special_is_counted_and_shown_with_its_place(store):
    table = LabelTable(store, ASCII, LabelConfig(), max_length=11)
    assert table.counts == {"missing": 1, "empty": 1, "outside": 3, "too_long": 1, "normalized": 1}
    path = store.databases[0].path
    assert table.examples["missing"] == [(path, "image-000000002", "", "no label")]
    assert table.examples["normalized"] == [(path, "image-000000007", "Café", "read as 'Cafe'")]
    report = "\n".join(table.report_lines())
    assert report.startswith("labels: 5 of 8 records are trained on\n")
    for line in (
        "  1 without a label: left out",
        "  1 with an empty label: left out",
        "  1 of more than 10 characters: left out",
        "  3 with characters outside the set: read as the class for unknown characters",
        "  1 written in equivalent characters of the set",
        f"    {path} image-000000006: 'a中b': '中' not in the character set",
        f"    {path} image-000000004: 'eleven char': 11 characters, more than 10",
    ):
        assert line in report.split("\n")


def test_five_examples_are_kept_and_the_count_goes_on(tmp_path):
    store = RecordStore([write(tmp_path / "crops", ["ok", *["中" * 30] * 20])])
    table = LabelTable(store, ASCII, LabelConfig(), max_length=100)
    assert table.counts["outside"] == 20
    assert len(table.examples["outside"]) == 5
    assert len(table.report_lines()) == 1 + 1 + 5


def test_bytes_that_are_not_utf_8_are_outside_the_set(tmp_path):
    folder = write_database(tmp_path / "crops", 2, extra=[(b"label-000000001", b"a\xffb")])
    table = LabelTable(RecordStore([folder]), ASCII, LabelConfig(), max_length=11)
    assert texts(table)[0] == "a\ufffdb"
    assert table.counts["outside"] == 2  # and the space of "word 2"


def test_labels_are_read_in_blocks_across_databases(tmp_path, monkeypatch):
    monkeypatch.setattr(labels_module, "_BLOCK", 7)
    words = [f"word{number}" for number in range(50)]
    paths = [write(tmp_path / "a", words[:20]), write(tmp_path / "b", words[20:])]
    reads = []
    store = RecordStore(paths)
    read = store._read
    monkeypatch.setattr(store, "_read", lambda which, keys: reads.append(len(keys)) or read(which, keys))
    table = LabelTable(store, ASCII, LabelConfig(), max_length=25)
    assert texts(table) == words
    assert len(reads) == 8 + 1  # blocks, and one of them lies in both


def test_data_without_any_label_is_an_error_that_names_it(tmp_path):
    store = RecordStore([write_database(tmp_path / "crops", 3, labels=False)])
    with pytest.raises(DataError, match=r"none of 3 records has a label \(.*crops\)"):
        LabelTable(store, ASCII, LabelConfig(), 25)


def test_nothing_left_is_one_line_with_the_counts(tmp_path):
    store = RecordStore([write(tmp_path / "crops", ["too long", "中", ""])])
    with pytest.raises(DataError) as caught:
        LabelTable(store, ASCII, LabelConfig(outside="delete"), 2)
    message = str(caught.value)
    assert message.startswith("no record is left to train on: ")
    assert "1 of more than 1 characters: left out" in message
    assert "2 with an empty label: left out" in message
    assert "\n" not in message


def test_sizes_that_no_target_can_have_are_errors(store):
    with pytest.raises(ValueError, match=r"max_length must be >= 2 .* got 1"):
        LabelTable(store, ASCII, LabelConfig(), 1)
    large = Charset("".join(map(chr, range(0x10000, 0x20000))))
    with pytest.raises(UsageError, match="65536 classes at most, got 65539"):
        LabelTable(store, large, LabelConfig(), 25)


@pytest.fixture
def records(store):
    return LabelledRecords(store, LabelTable(store, ASCII, LabelConfig(), max_length=11))


def test_the_kept_records_are_numbered_from_zero_in_every_method(records):
    assert len(records) == 5
    assert records.images([4, 1]) == [image(8), image(5)]
    assert records.labels([4, 1]) == [records.label(4), records.label(1)] == ["last", "中"]
    assert records.locate(1)[1] == "image-000000005"
    record = records.record(np.int64(4))
    assert (record.index, record.image, record.label, record.key) == (4, image(8), "last", "image-000000008")
    assert [ASCII.decode(row) for row in records.targets([4, 0])] == ["last", "first"]
    for method in (records.images, records.labels, records.targets):
        with pytest.raises(IndexError, match=r"5 is outside 0 \.\. 4"):
            method([0, 5])
        with pytest.raises(IndexError, match=r"-1 is outside 0 \.\. 4"):
            method([-1])


def test_kept_records_pickle_and_open_again_after_closing(records):
    records.images([0])
    copy = pickle.loads(pickle.dumps(records))
    records.close()
    assert copy.images([4]) == records.images([4]) == [image(8)]
    assert copy.targets([1]).tolist() == records.targets([1]).tolist()
    assert copy.max_pixels == records.store.max_pixels


def test_the_fingerprint_changes_with_set_config_and_kept_records(store, records):
    def of(charset=ASCII, config=None, max_length=11):
        table = LabelTable(store, charset, config or LabelConfig(), max_length)
        return json.dumps(LabelledRecords(store, table).fingerprint(), sort_keys=True)

    assert of() == json.dumps(records.fingerprint(), sort_keys=True)
    assert records.fingerprint()["count"] == 5
    variants = [
        of(),
        of(Charset.named("62")),
        of(config=LabelConfig(outside="delete")),
        of(config=LabelConfig(too_long="cut")),
        of(max_length=12),
    ]
    assert len(set(variants)) == len(variants)


def test_a_broken_record_is_named_and_replaced_by_a_kept_one(records):
    order = SampleOrder(len(records), 4, seed=0)
    bad = BadRecords(records, max_fraction=1.0)
    with pytest.raises(DataError, match="no readable record"):  # no image here is one
        SampleReader(records, order, bad, records.max_pixels).read(*order.batch(0))
    kept = {f"image-{number + 1:09d}" for number in records.table.kept}
    assert {entry.key for entry in bad.entries} == kept


def test_the_pipeline_gives_each_kept_crop_its_own_target(tmp_path):
    words = [None if number % 3 == 1 else f"w{number}" for number in range(12)]
    images = [(b"image-%09d" % (n + 1), png(np.full((8, 32, 3), 20 * n, np.uint8))) for n in range(12)]
    labels = [(b"label-%09d" % (n + 1), (word or "").encode()) for n, word in enumerate(words)]
    store = RecordStore([write_database(tmp_path / "crops", 12, extra=[*images, *labels])])
    records = LabelledRecords(store, LabelTable(store, ASCII, LabelConfig(), max_length=6))
    order = MixedOrder([(0, 2), (2, 6)], [1, 1], 4, seed=0)
    with ViewPipeline(
        records,
        order,
        guidance=None,
        labels=records.targets,
        loader=DataConfig(threads=1),
        seed=0,
        end_step=4,
    ) as batches:
        for batch in batches:
            gray = batch.plain.float().mean(dim=(1, 2, 3)).div(20).round().int().tolist()
            assert [ASCII.decode(row) for row in batch.targets] == [f"w{number}" for number in gray]


def test_a_table_of_another_store_is_refused(tmp_path, records):
    other = RecordStore([write(tmp_path / "other", ["one"])])
    with pytest.raises(ValueError, match="table is of 8 records, the store has 1"):
        LabelledRecords(other, records.table)


def two_paths(tmp_path, labels):
    for name, words in labels.items():
        write(tmp_path / name, words)
    paths = [tmp_path / "b", tmp_path / "a"]
    store = RecordStore(paths)
    return LabelledRecords(store, LabelTable(store, ASCII, LabelConfig(outside="leave_out"), 25)), paths


def test_groups_are_the_kept_records_of_each_path_with_all_its_databases(tmp_path):
    records, paths = two_paths(
        tmp_path, {"b/1": ["x", "中"], "b/2": ["中", "文"], "b/3": ["y"], "a": ["中", "p", "q", "r"]}
    )
    assert records.groups(paths) == [(0, 2), (2, 3)]
    assert records.groups([str(tmp_path / "a")]) == [(2, 3)]
    assert [(d.first_index, d.count) for d in records.databases] == [(0, 1), (1, 0), (1, 1), (2, 3)]
    assert records.labels(range(5)) == ["x", "y", "p", "q", "r"]


def test_a_path_with_nothing_kept_or_of_another_run_is_named(tmp_path):
    records, _ = two_paths(tmp_path, {"b": ["x"], "a": ["中"], "c": ["z"]})
    with pytest.raises(DataError, match=r"a: none of its records has a usable label"):
        records.groups([tmp_path / "b", tmp_path / "a"])
    with pytest.raises(UsageError, match=r"c is not among the databases"):
        records.groups([tmp_path / "c"])
