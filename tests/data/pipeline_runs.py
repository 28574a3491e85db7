"""Databases of smooth crops, and runs of the view pipeline over them."""

import cv2
import numpy as np
import torch
from crop_views import png
from lmdb_folders import write_database

from lmim_fast.config import DataConfig, GuidanceConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.records import RecordStore

COUNT = 23


def smooth_image(number):
    rng = np.random.default_rng(number)
    size = tuple(int(side) for side in rng.integers(12, 160, 2))
    return cv2.resize(rng.integers(0, 256, (4, 9, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)


def database(folder, replaced=None, count=COUNT):
    """An LMDB of `count` smooth crops, PNG and JPEG by turns; `replaced` maps indices to other bytes."""
    replaced = replaced or {}
    images = {}
    for index in range(count):
        encoded = png(smooth_image(index))
        if index % 2:
            encoded = cv2.imencode(".jpg", smooth_image(index))[1].tobytes()
        images[b"image-%09d" % (index + 1)] = replaced.get(index, encoded)
    missing = [key for key, value in images.items() if value is None]
    extra = [(key, value) for key, value in images.items() if value is not None]
    return write_database(folder, count, labels=False, extra=extra, skip=missing)


def pipeline(folder, *, batch_size=8, loader=None, seed=3, **options):
    store = RecordStore([folder])
    options.setdefault("guidance", GuidanceConfig())
    options.setdefault("end_step", 4)
    loader = loader or DataConfig(threads=2)
    return ViewPipeline(store, SampleOrder(len(store), batch_size, seed), loader=loader, seed=seed, **options)


def samples(folder, **options):
    """Every sample of a run by (epoch, index): its plain, warped and finished views."""
    views_of = {}
    with pipeline(folder, **options) as batches:
        for batch in batches:
            finished = batch.views()
            for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
                views_of[key] = [batch.plain[row], batch.warped[row], finished[0][row], finished[1][row]]
    return views_of


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, views in actual.items():
        assert all(torch.equal(a, b) for a, b in zip(views, expected[key], strict=True)), key
