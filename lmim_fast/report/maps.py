"""What the trained model looks at: attention over real crops, and MAE's reconstructions."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from lmim_fast.report.images import boxed_html, crop_html, crop_pixels, heat_html, masked_pixels
from lmim_fast.report.views import Crops, label_html
from lmim_fast.train.task import Task

_HEADS_SHOWN = 3
_QUERIES = 4


@dataclass(frozen=True)
class Maps:
    """Attention and reconstruction of some crops, on the CPU."""

    encoder: np.ndarray
    """(B, heads, rows, columns): cls over patches, last block."""
    ids_masked: np.ndarray | None
    """(B, M) masked patches."""
    decoder: np.ndarray | None
    """(B, heads, M, rows, columns): masked queries over the guidance view, last layer."""
    painted: np.ndarray | None
    """(B, H, W, 3) uint8: the crop with its masked patches as predicted."""
    readings: list[str] | None = None
    """What a recogniser reads."""
    characters: np.ndarray | None = None
    """(B, T, rows, columns): each character that it reads over the crop, last layer, mean of heads."""


def compute_maps(task: Task, model: nn.Module, crops: Crops, count: int) -> Maps:
    """Run the task's model, on the CPU, over the first `count` crops with the masks of the run."""
    plain, guidance = (
        crops.plain[:count],
        crops.second[:count] if task.guided and crops.second is not None else None,
    )
    maps = task.maps(model, plain, guidance, crops.epochs[:count], crops.indices[:count])
    painted = None
    if maps.pred is not None and maps.ids_masked is not None:
        patch_size = task.config.encoder.patch_size
        painted = crop_pixels(reconstruct(plain, maps.ids_masked, maps.pred, patch_size))
    return Maps(
        maps.encoder.numpy(),
        None if maps.ids_masked is None else maps.ids_masked.numpy(),
        None if maps.decoder is None else maps.decoder.numpy(),
        painted,
        maps.readings,
        None if maps.characters is None else maps.characters.numpy(),
    )


def reconstruct(images: Tensor, ids_masked: Tensor, pred: Tensor, patch_size: int) -> Tensor:
    """Put predicted patches into the images, with the mean and variance of the patches they stand for.

    Args:
        images:     (B, 3, H, W) in [-1, 1].
        ids_masked: (B, M) int64.
        pred:       (B, M, 3 * patch_size**2) per-patch normalised, values in the order (row, column, colour).
    Returns:
        (B, 3, H, W); visible patches are the image's own.
    Source: MAE's normalised pixel target (He et al. 2022), inverted.
    """
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, 3, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)  # (B, N, P)
    at = ids_masked[..., None].expand(-1, -1, patches.shape[-1])
    truth = patches.gather(1, at)
    scale = (truth.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    painted = patches.scatter(1, at, pred.to(patches) * scale + truth.mean(dim=-1, keepdim=True))
    painted = painted.reshape(batch, rows, columns, patch_size, patch_size, 3)
    return painted.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)


def query_patches(
    pixels: np.ndarray, ids_masked: np.ndarray, patch_size: int, count: int = _QUERIES
) -> list[int]:
    """Masked patches worth asking about: in each vertical strip of the crop the one with most contrast.

    Args:
        pixels:     (H, W, 3) uint8.
        ids_masked: (M,) row-major patch numbers.
    Returns:
        at most `count` of ids_masked, from left to right; a strip without a masked patch gives none.
    """
    height, width, _ = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    gray = pixels.astype(np.float32).mean(axis=2)
    contrast = gray.reshape(rows, patch_size, columns, patch_size).std(axis=(1, 3))
    chosen = []
    for strip in range(count):
        low, high = strip * columns / count, (strip + 1) * columns / count
        inside = [int(patch) for patch in ids_masked if low <= patch % columns < high]
        if inside:
            chosen.append(max(inside, key=lambda patch: (contrast[divmod(patch, columns)], -patch)))
    return chosen


def maps_html(maps: Maps, crops: Crops, patch_size: int) -> str:
    """One card a crop: the views, the encoder's attention, and the decoder's where there is one."""
    count = len(maps.encoder)
    plain = crop_pixels(crops.plain[:count])
    guidance = None if maps.decoder is None or crops.second is None else crop_pixels(crops.second[:count])
    cards = []
    for place in range(count):
        view = None if guidance is None else guidance[place]
        rows = _row("Input", "", _inputs(maps, place, plain[place], view, patch_size))
        rows += _row(
            "Encoder", "cls attention, last block", _encoder_cells(maps.encoder[place], plain[place])
        )
        if view is not None and maps.ids_masked is not None and maps.decoder is not None:
            cells = _decoder_cells(
                maps.decoder[place], maps.ids_masked[place], plain[place], view, patch_size
            )
            rows += _row("Decoder", "cross-attention, last layer, mean of heads", cells)
        if maps.readings is not None and maps.characters is not None:
            cells = _character_cells(maps.characters[place], maps.readings[place], plain[place])
            rows += _row("Decoder", "cross-attention, last layer, mean of heads", cells)
        number = f'<span class="note">#{int(crops.indices[place])}</span>'
        if maps.readings is not None:
            number = (
                f'<span class="note">read as {html.escape(maps.readings[place]) or "nothing"}</span>{number}'
            )
        cards.append(f'<article class="maps"><h3>{label_html(crops, place)}{number}</h3>{rows}</article>')
    return _intro(maps) + "".join(cards)


def _intro(maps: Maps) -> str:
    text = (
        "Bright is where the attention goes. Peak: the strongest patch over an even spread, so 1.0\u00d7 "
        "prefers nothing and stays dark. "
    )
    if maps.decoder is not None:
        text += (
            "Decoder: the boxed patch of the plain view is masked; below it, where its query looks in the "
            "guidance view."
        )
    elif maps.readings is not None:
        text += "Decoder: where the recogniser looks for each character that it reads, and for the end (EOS)."
    elif maps.painted is not None:
        text += (
            "Prediction: the masked patches as the decoder paints them, given the mean and variance of the "
            "true patch, which the model does not predict."
        )
    else:
        text += "This run has no guidance view, so there is no cross-attention over one."
    return f"<p>{text}</p>"


def _row(title: str, remark: str, cells: list[str]) -> str:
    head = f'<h4>{title}<span class="note">{remark}</span></h4>'
    return f'<div class="row">{head}<div class="cells">{"".join(cells)}</div></div>'


def _cell(body: str, caption: str, weights: np.ndarray | None = None) -> str:
    """A picture with its caption, and with the peak of the attention `weights` that it shows."""
    peak = ""
    if weights is not None:
        ratio = float(weights.max()) / max(float(weights.mean()), 1e-12)
        peak = f'<span class="peak">peak {ratio:.1f}\u00d7</span>'
    return f"<figure>{body}<figcaption>{caption}{peak}</figcaption></figure>"


def _inputs(
    maps: Maps, place: int, plain: np.ndarray, guidance: np.ndarray | None, patch_size: int
) -> list[str]:
    cells = [_cell(crop_html(plain, "plain view"), "plain view")]
    if guidance is not None:
        cells.append(_cell(crop_html(guidance, "guidance view"), "guidance view"))
    if maps.ids_masked is not None:
        kept = masked_pixels(plain, maps.ids_masked[place], patch_size)
        share = 1 - len(maps.ids_masked[place]) / maps.encoder[place, 0].size
        cells.append(_cell(crop_html(kept, "visible patches"), f"visible patches ({share:.0%})"))
    if maps.painted is not None:
        cells.append(_cell(crop_html(maps.painted[place], "prediction"), "prediction"))
    return cells


def _encoder_cells(weights: np.ndarray, plain: np.ndarray) -> list[str]:
    """The mean over the heads and a few of them, evenly picked; weights (heads, rows, columns)."""
    if len(weights) == 1:
        return [_cell(heat_html(plain, weights[0], "encoder attention"), "its one head", weights[0])]
    mean = weights.mean(axis=0)
    cells = [_cell(heat_html(plain, mean, "encoder attention, mean of heads"), "mean of heads", mean)]
    picked = np.linspace(0, len(weights) - 1, min(_HEADS_SHOWN, len(weights))).round().astype(int)
    for head in picked:
        caption = f"head {head + 1} of {len(weights)}"
        body = heat_html(plain, weights[head], f"encoder attention, {caption}")
        cells.append(_cell(body, caption, weights[head]))
    return cells


def _character_cells(weights: np.ndarray, reading: str, plain: np.ndarray) -> list[str]:
    """The crop once for each character that was read and for EOS; weights (T, rows, columns)."""
    captions = [*(html.escape(character) for character in reading), "EOS"]
    return [
        _cell(heat_html(plain, weights[place], f"attention of {caption}"), caption, weights[place])
        for place, caption in enumerate(captions[: len(weights)])
    ]


def _decoder_cells(
    weights: np.ndarray, ids_masked: np.ndarray, plain: np.ndarray, guidance: np.ndarray, patch_size: int
) -> list[str]:
    """Query patches with their attention under them; weights (heads, M, rows, columns), ids_masked (M,)."""
    mean = weights.mean(axis=0)  # (M, rows, columns)
    cells = []
    for patch in query_patches(plain, ids_masked, patch_size):
        query = int(np.flatnonzero(ids_masked == patch)[0])
        row, column = divmod(patch, mean.shape[2])
        caption = f"query: row {row + 1}, column {column + 1}"
        pair = boxed_html(plain, patch, (mean.shape[1], mean.shape[2]), caption)
        pair += heat_html(guidance, mean[query], f"attention of {caption}")
        cells.append(_cell(pair, caption, mean[query]))
    return cells
