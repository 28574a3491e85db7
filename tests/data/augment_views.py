"""Augmented views of crops through DALI, for tests."""

import cv2
import numpy as np
import torch
from crop_views import png

from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.program import make_augment_program
from lmim_fast.data.dali import DaliViews, Stage


def keys(count, *, seed=1, epoch=0, first=0):
    """Keys of `count` samples in a row."""
    return Keys(seed, torch.full((count,), epoch), torch.arange(first, first + count))


def views(parameters, sources, image_size=(32, 128)):
    """(B, 32, 128, 3) uint8 views of (encoded, decoded) crops."""
    encoded, images = zip(*sources, strict=True)
    heights, widths = np.array([image.shape[:2] for image in images]).T
    program = make_augment_program(parameters, keys(len(images)), heights, widths, image_size)
    dali = DaliViews(
        batch_size=len(images),
        threads=1,
        device=torch.device("cpu"),
        image_size=image_size,
        stage=Stage.AUGMENT,
    )
    (warped,) = dali(encoded, program)
    dali.close()
    return program.finish(warped).numpy()


def difference(parameters, sources, reference):
    """(B,) mean absolute difference of the bytes to the views that `reference` makes."""
    literal = np.stack([reference(image, parameters, row) for row, (_, image) in enumerate(sources)])
    return abs(views(parameters, sources) - literal.astype(float)).mean(axis=(1, 2, 3))


def smooth_crops(count, height=60, width=200):
    """(encoded, decoded) crops without fine detail: how often they are resampled makes no difference."""
    rng = np.random.default_rng(0)
    images = [
        cv2.resize(
            rng.integers(0, 256, (4, 9, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
        )
        for _ in range(count)
    ]
    return [(png(image), image) for image in images]
