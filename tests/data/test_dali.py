"""How broken images of a batch are found."""

import random

import cv2
import numpy as np
import pytest
import torch
from crop_views import png
from encoded_images import mutations, patched, variants

from lmim_fast.data import dali
from lmim_fast.data.dali import BrokenImages, DaliViews, Stage
from lmim_fast.data.samples import decodable
from lmim_fast.data.store.gather import EncodedImages, gather_in_python
from lmim_fast.data.store.probe import Status, probe

GOOD = png(np.full((8, 20, 3), 120, np.uint8))


def undecodable():
    """A JPEG with an impossible Huffman table."""
    data = cv2.imencode(".jpg", np.full((16, 16, 3), 9, np.uint8))[1].tobytes()
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


@pytest.fixture
def decode_runs(monkeypatch):
    """Sizes of the batches given to pipelines that only decode, while DALI makes the views, too."""
    monkeypatch.setattr(dali, "native", lambda: None)
    runs = []
    feed = dali.feed

    def counted(pipeline, stage, encoded, program):
        if stage == Stage.DECODE:
            runs.append(len(encoded))
        feed(pipeline, stage, encoded, program)

    monkeypatch.setattr(dali, "feed", counted)
    return runs


@pytest.mark.parametrize("row", [0, 21, 63])
def test_one_broken_image_is_found_in_few_runs(row, decode_runs):
    images = [GOOD] * 64
    images[row] = undecodable()
    views = DaliViews(
        batch_size=64, threads=1, device=torch.device("cpu"), image_size=(32, 128), stage=Stage.PLAIN
    )
    with pytest.raises(BrokenImages) as caught:
        views(images, None)
    assert caught.value.rows == [row]
    assert len(decode_runs) == 64 // 8 + 2 * 3  # eights, then one of them in halves
    assert max(decode_runs) == 8  # larger ones can crash in DALI
    images[row] = GOOD
    (plain,) = views(images, None)  # they can be made again
    assert plain.shape == (64, 32, 128, 3)
    views.close()


def test_the_broken_images_of_any_batch_are_those_found_one_by_one():
    rng = random.Random(1)
    images = [data for data in mutations(rng, 12) if data] + [GOOD] * 37
    rng.shuffle(images)
    one_by_one = [row for row, image in enumerate(images) if dali._broken_rows([image])]
    assert 5 < len(one_by_one) < 15
    assert dali._broken_rows(images) == one_by_one
    bad = [images[row] for row in one_by_one]
    assert dali._broken_rows(bad) == list(range(len(bad)))
    assert dali._broken_rows([GOOD] * 5) == []


def test_fill_bytes_before_markers_pass_the_probe_and_are_decoded():
    jpeg = variants()["jpeg"]
    filled = [
        jpeg[:at] + b"\xff\xff" + jpeg[at:] for at in (2, jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda"))
    ]
    assert set(probe(filled).status) == {Status.OK}
    assert dali._broken_rows(filled) == []


def in_rows(images, noise):
    """The images at equal distances, noise behind each."""
    lengths = np.array([len(image) for image in images])
    stride = int(lengths.max()) + 100
    arena = np.random.default_rng(noise).integers(0, 256, (len(images), stride), dtype=np.uint8)
    for row, image in zip(arena, images, strict=True):
        row[: len(image)] = np.frombuffer(image, np.uint8)
    return EncodedImages(arena.reshape(-1), stride, stride * np.arange(len(images)), lengths)


def test_what_lies_behind_an_image_in_its_row_changes_no_pixel_and_no_refusal():
    # A column more than its data has: refused, but decoded where anything follows.
    files = [patched("webp lossless", 21, b"\x25")]
    files += [*variants().values(), *mutations(random.Random(5), 600)]
    found = decodable(gather_in_python(files, 2**20))
    images = [found.encoded[row].tobytes() for row in np.flatnonzero(found.status == Status.OK)]
    broken = dali._broken_rows(images)
    assert broken[0] == 0
    good = [image for row, image in enumerate(images) if row not in broken]
    views = DaliViews(
        batch_size=len(images), threads=2, device=torch.device("cpu"), image_size=(32, 128), stage=Stage.PLAIN
    )
    (expected,) = views(good, None)
    for noise in (1, 2):
        rows = in_rows(good, noise)
        assert rows.rectangle() is not None
        (plain,) = views(rows, None)
        assert torch.equal(plain, expected)
    rows.put(0, np.frombuffer(good[0] + bytes(5000), np.uint8))  # does not fit: handed over one by one
    assert rows.rectangle() is None
    (plain,) = views(rows, None)
    assert torch.equal(plain, expected)
    for row in broken:
        with pytest.raises(BrokenImages):
            views(in_rows([images[row], GOOD], 0), None)
    views.close()
