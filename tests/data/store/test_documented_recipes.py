"""The recipes of docs/DATA.md for databases with other keys, as they are written there."""

import re
from pathlib import Path

import lmdb
from lmdb_folders import image

from lmim_fast.data.store.records import RecordStore

TEXT = (Path(__file__).parents[3] / "docs/DATA.md").read_text().partition("**Other keys**")[2]


def write(folder, pairs):
    with lmdb.open(str(folder), map_size=2**24) as data, data.begin(write=True) as transaction:
        for key, value in pairs.items():
            transaction.put(key, value)


def test_the_recipe_for_other_keys_renames_them_in_the_order_of_their_numbers(tmp_path):
    pairs = {b"image_hr-%d" % number: image(number) for number in range(1, 13)}
    labels = {b"label-%d" % number: b"word %d" % number for number in range(1, 13)}
    write(tmp_path / "old", {**pairs, **labels, b"image_lr-1": b""})
    (recipe,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)[:1]
    exec(recipe, {"OLD": str(tmp_path / "old"), "NEW": str(tmp_path / "new")})
    store = RecordStore([tmp_path / "new"])
    assert store.images(range(12)) == list(pairs.values())
    assert store.labels(range(12)) == [f"word {number}" for number in range(1, 13)]


def test_the_recipe_for_num_samples_writes_it(tmp_path):
    write(tmp_path / "crops", {b"image-%09d" % number: image(number) for number in range(1, 41)})
    (recipe,) = re.findall(r"`(with [^`]*)`", " ".join(TEXT.split()))[:1]
    exec(recipe, {"lmdb": lmdb, "FOLDER": str(tmp_path / "crops")})
    assert len(RecordStore([tmp_path / "crops"])) == 40
