"""Real crops and their views, for tests."""

import dataclasses
import functools

import cv2
import numpy as np
import torch

from lmim_fast.data.dali import DaliViews, Stage
from lmim_fast.data.guidance.parameters import GuidanceParameters
from lmim_fast.data.guidance.program import GuidanceProgram
from lmim_fast.data.store.records import RecordStore
from lmim_fast.ops.photometric import photometric


def crops(folder, names, count):
    """`count` (encoded, decoded RGB) crops spread evenly over the databases `names`."""
    store = RecordStore([folder / name for name in names])
    encoded = store.images(np.linspace(0, len(store) - 1, count).astype(int).tolist())
    store.close()
    return [(data, decoded(data)) for data in encoded]


def decoded(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(image[..., ::-1])


def png(image):
    """(H, W, 3) uint8 RGB, encoded without loss."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def only(parameters: GuidanceParameters, operations=(), *, jitter=False) -> GuidanceParameters:
    """The same draws with `operations` for their order, with or without the jitter and its grayscale."""
    order = np.full_like(parameters.order, -1)
    order[:, : len(operations)] = operations
    return dataclasses.replace(
        parameters, order=order, jitter=parameters.jitter & jitter, gray=parameters.gray & jitter
    )


@functools.cache
def _dali_views(image_size):
    return DaliViews(
        batch_size=512, threads=2, device=torch.device("cpu"), image_size=image_size, stage=Stage.WARP
    )


def run_programs(encoded, program: GuidanceProgram):
    """Plain and guidance views, (B, 3, H, W) in [-1, 1], through DALI and the photometric op."""
    plain, warped = _dali_views(program.map_x.shape[1:])(encoded, program)
    return photometric(plain, warped, program.color)


def as_bytes(view):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((view.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def psnr(left, right):
    """(B,) decibels of (B, H, W, 3) uint8 pairs, at most 78."""
    error = ((left.astype(float) - right.astype(float)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))
