"""Colours of both views in one pass: from the pipeline's bytes to normalised network inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Gray weights of ITU-R BT.601, as PIL, OpenCV and torchvision use them."""


@dataclass(frozen=True)
class ColorProgram:
    """Colour operations of B guidance views, values 0..255. Fields are fp32 unless said.

    `before`, `after` and `final` are affine maps of (red, green, blue, 1); each result is clamped to 0..255.
    """

    before: Tensor
    """(B, 3, 4) what comes before the solarize threshold."""
    threshold: Tensor
    """(B,) solarize threshold; 256 with `invert_above` inverts nothing."""
    invert_above: Tensor
    """(B,) bool: values >= threshold become 255 - value; False: values below it."""
    after: Tensor
    """(B, 3, 4) what follows, up to the contrast of the colour jitter."""
    coverage: Tensor
    """(B, H, W) uint8: 255 where the crop is seen, 0 where the rotation shows nothing."""
    border: Tensor
    """(B, 3) colour of what is not covered, as it is after `after`."""
    contrast: Tensor
    """(B,) contrast factor around the mean gray of the view."""
    final: Tensor
    """(B, 3, 4) what follows that contrast."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ColorProgram:
        """The same program on `device`."""
        return ColorProgram(
            **{
                item.name: getattr(self, item.name).to(device, non_blocking=non_blocking)
                for item in fields(self)
            }
        )

    def pin_memory(self) -> ColorProgram:
        """The same program in page-locked memory, for copies that do not block."""
        return ColorProgram(**{item.name: getattr(self, item.name).pin_memory() for item in fields(self)})


def photometric(
    plain: Tensor,
    warped: Tensor | None = None,
    program: ColorProgram | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Normalise the plain view; colour and normalise the guidance view.

    Per guidance pixel: `before`, solarize, `after`, black of the rotation laid over it, contrast around the mean gray
    of that image, `final`. Both views end as `(value / 255 - 0.5) / 0.5`. No gradient.

    Args:
        plain:   (B, H, W, 3) uint8.
        warped:  (B, H, W, 3) uint8 filtered and warped crops, or None for the plain view alone.
        program: colours of `warped`, on the same device.
        dtype:   of the results; the arithmetic is fp32.
    Returns:
        plain and guidance views, (B, 3, H, W) in [-1, 1]; None where `warped` is None.
    Raises:
        ValueError: wrong shape, dtype or device, or `warped` and `program` not given together.
    Source: SPEC of LMIM's released augmentation (imgaug's solarize, torchvision's ColorJitter), composed.
    """
    _check(plain, warped, program)
    plain_view = _normalise(plain.permute(0, 3, 1, 2).float(), dtype)
    if warped is None or program is None:
        return plain_view, None
    value = _affine(program.before, warped.permute(0, 3, 1, 2).float())
    threshold = program.threshold[:, None, None, None]
    inverted = torch.where(program.invert_above[:, None, None, None], value >= threshold, value < threshold)
    value = _affine(program.after, torch.where(inverted, 255.0 - value, value))
    border = program.border[:, :, None, None]
    value = border + (value - border) * (program.coverage[:, None] * (1.0 / 255.0))
    gray = value[:, 0] * LUMA[0] + value[:, 1] * LUMA[1] + value[:, 2] * LUMA[2]
    mean = gray.flatten(1).mean(dim=1)[:, None, None, None]
    value = (mean + (value - mean) * program.contrast[:, None, None, None]).clamp_(0.0, 255.0)
    return plain_view, _normalise(_affine(program.final, value), dtype)


def _affine(matrix: Tensor, value: Tensor) -> Tensor:
    """(B, 3, 4) applied to the colours of (B, 3, H, W), clamped.

    Written out, not as a batched product: whose rounding may change with the batch size, and with it a
    solarized pixel.
    """
    rows = matrix[:, :, :, None, None]
    result = rows[:, :, 0] * value[:, 0:1]
    result += rows[:, :, 1] * value[:, 1:2]
    result += rows[:, :, 2] * value[:, 2:3]
    result += rows[:, :, 3]
    return result.clamp_(0.0, 255.0)


def _normalise(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.mul_(1.0 / 127.5).sub_(1.0).to(dtype)


def _check(plain: Tensor, warped: Tensor | None, program: ColorProgram | None) -> None:
    if plain.dtype != torch.uint8 or plain.dim() != 4 or plain.shape[-1] != 3:
        raise ValueError(f"plain must be (B, H, W, 3) uint8, got {plain.dtype} of shape {tuple(plain.shape)}")
    if (warped is None) != (program is None):
        raise ValueError("warped and program belong together: give both or neither")
    if warped is None or program is None:
        return
    if warped.dtype != torch.uint8 or warped.shape != plain.shape:
        raise ValueError(
            f"warped must be uint8 of shape {tuple(plain.shape)}, got {warped.dtype} of shape {tuple(warped.shape)}"
        )
    batch, height, width, _ = plain.shape
    expected = dict(before=(batch, 3, 4), threshold=(batch,), invert_above=(batch,), after=(batch, 3, 4))
    expected |= dict(
        coverage=(batch, height, width), border=(batch, 3), contrast=(batch,), final=(batch, 3, 4)
    )
    for name, shape in expected.items():
        field = getattr(program, name)
        if tuple(field.shape) != shape or field.device != warped.device:
            raise ValueError(
                f"program.{name} must be {shape} on {warped.device}, got {tuple(field.shape)} on {field.device}"
            )
