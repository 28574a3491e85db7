"""Crops, heat and boxes as HTML: PNG data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import html

import cv2
import matplotlib
import numpy as np
from torch import Tensor

_HEAT_SCALE = 4  # pixels of the heat image per patch; the browser does the rest smoothly


def crop_pixels(images: Tensor) -> np.ndarray:
    """Normalised images (B, 3, H, W) in [-1, 1] as (B, H, W, 3) uint8 RGB; values outside are clipped."""
    pixels = images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def data_uri(pixels: np.ndarray) -> str:
    """(H, W, 3 | 4) uint8 RGB or RGBA as a PNG data URI.

    Raises:
        ValueError: another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"an image is (H, W, 3 | 4) uint8, got {pixels.shape} {pixels.dtype}")
    swap = cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, swap), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def crop_html(pixels: np.ndarray, description: str, *, kind: str = "") -> str:
    """One crop as an `<img>` of twice its size, its pixels seen as pixels.

    Args:
        pixels:      (H, W, 3) uint8.
        description: alternative text, escaped here.
        kind:        further CSS classes.
    """
    height, width = pixels.shape[:2]
    size = f'width="{2 * width}" height="{2 * height}"'
    return f'<img class="crop {kind}" {size} alt="{html.escape(description)}" src="{data_uri(pixels)}">'


def heat_pixels(weights: np.ndarray) -> np.ndarray:
    """Attention over patches as a transparent colour layer, from its least value to its largest.

    Differences below a quarter of an even spread get no full colour: they are hardly there.

    Args:
        weights: (rows, columns), not negative.
    Returns:
        (4 rows, 4 columns, 4) uint8 RGBA: strong is bright and opaque, weak is clear.
    """
    rows, columns = weights.shape
    low, high = float(weights.min()), float(weights.max())
    share = (weights.astype(np.float32) - low) / max(high - low, 0.25 * float(weights.mean()), 1e-12)
    size = (columns * _HEAT_SCALE, rows * _HEAT_SCALE)
    share = np.clip(cv2.resize(share, size, interpolation=cv2.INTER_CUBIC), 0, 1)
    rgba = matplotlib.colormaps["inferno"](0.25 + 0.75 * share)
    rgba[..., 3] = 0.85 * share**0.8
    return (255 * rgba).round().astype(np.uint8)


def heat_html(pixels: np.ndarray, weights: np.ndarray, description: str) -> str:
    """Heat over a dimmed gray crop."""
    layer = f'<img class="heat" alt="" src="{data_uri(heat_pixels(weights))}">'
    return f'<div class="stack">{crop_html(pixels, description, kind="dimmed")}{layer}</div>'


def boxed_html(pixels: np.ndarray, patch: int, grid: tuple[int, int], description: str) -> str:
    """A crop with a box around one patch (row-major number in `grid`)."""
    rows, columns = grid
    row, column = divmod(patch, columns)
    place = f"left:{100 * column / columns:.4g}%;top:{100 * row / rows:.4g}%"
    box = f'<i class="box" style="{place};width:{100 / columns:.4g}%;height:{100 / rows:.4g}%"></i>'
    return f'<div class="stack">{crop_html(pixels, description)}{box}</div>'


def masked_pixels(pixels: np.ndarray, ids_masked: np.ndarray, patch_size: int) -> np.ndarray:
    """(H, W, 3) uint8 with the masked patches (row-major numbers) in flat gray."""
    result = pixels.copy()
    columns = pixels.shape[1] // patch_size
    for row, column in zip(*np.divmod(ids_masked, columns), strict=True):
        top, left = row * patch_size, column * patch_size
        result[top : top + patch_size, left : left + patch_size] = 118
    return result
