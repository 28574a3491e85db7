"""Colours of both views in one pass: from the pipeline's bytes to normalised network inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmim_fast.native import native
from lmim_fast.ops import dispatch
from lmim_fast.ops.operators import photometric as operators
from lmim_fast.ops.operators.operator import differentiable, direct

LUMA = (0.299, 0.587, 0.114)
"""Gray weights of ITU-R BT.601, as PIL, OpenCV and torchvision use them."""

# Images at once on the CPU: fewer values than torch gives to a second thread (32,768). A thread team for
# operations of microseconds is far slower while the data threads hold the cores. All stays in the cache, too.
_CPU_CHUNK = 2


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

    def to(self, device: torch.device | str) -> ColorProgram:
        """The same program on `device`."""
        return ColorProgram(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})

    def tensors(self) -> list[Tensor]:
        """The fields in their order."""
        return [getattr(self, item.name) for item in fields(self)]

    def take(self, rows: slice | Tensor) -> ColorProgram:
        """The programs of some of the images."""
        return ColorProgram(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


def photometric(
    plain: Tensor,
    warped: Tensor | None = None,
    program: ColorProgram | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Normalise the plain view; colour and normalise the guidance view.

    Per guidance pixel: `before`, solarize, `after`, the border laid over what is not covered, contrast around
    the mean gray of that image, `final`. Both views end as `(value / 255 - 0.5) / 0.5`. No gradient.

    Args:
        plain:   (B, H, W, 3) uint8.
        warped:  (B, H, W, 3) uint8 filtered and warped crops, or None for the plain view alone.
        program: colours of `warped`, on the same device.
        dtype:   of the results; the arithmetic is fp32.
    Returns:
        plain and guidance views, (B, 3, H, W) in [-1, 1]; None where `warped` is None.
    Raises:
        ValueError: wrong shape, dtype or device, or `warped` and `program` not given together.
    Source: LMIM's released augmentation (imgaug's solarize, torchvision's ColorJitter), composed.
    """
    _check(plain, warped, program)
    refused = _refuses(program)
    colours = [] if program is None else program.tensors()
    if dispatch.takes("photometric", (plain, warped), refused, dtype):
        view, guidance = operators.photometric(plain, warped, colours, dtype)
        return view, None if warped is None else guidance
    if refused is None and _runs_native(plain, warped, *colours):
        return _native(plain, warped, colours, dtype)
    return _eager(plain, warped, program, dtype)


def _runs_native(*tensors: Tensor | None) -> bool:
    """True if nothing has to see the single operations of the eager form, and the C++ form is built."""
    if not direct(*tensors) or differentiable(*tensors):
        return False
    first = tensors[0]
    return first is not None and dispatch.takes_native(first.device) and native() is not None


def _native(
    plain: Tensor, warped: Tensor | None, colours: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """In C++, the same bits as `_eager`; by the calling thread: the data threads need the other cores."""
    batch, height, width, _ = plain.shape
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    views = [
        plain.new_empty((batch, 3, height, width), dtype=kind) for _ in range(1 if warped is None else 2)
    ]
    # NumPy has no bfloat16; the bits stand for themselves.
    arrays = [(view.view(torch.int16) if kind == torch.bfloat16 else view).numpy() for view in views]
    native().plain_views(plain.contiguous().numpy(), arrays[0])
    if warped is not None:
        arguments = (tensor.detach().contiguous().numpy() for tensor in (warped, *colours))
        native().guidance_views(*arguments, arrays[1])
    plain_view, *guidance = (view.to(dtype) for view in views)
    return plain_view, guidance[0] if guidance else None


def _eager(
    plain: Tensor, warped: Tensor | None, program: ColorProgram | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    batch, height, width, _ = plain.shape
    views = [
        torch.empty((batch, 3, height, width), dtype=dtype, device=plain.device)
        for _ in range(1 if warped is None else 2)
    ]
    chunk = _CPU_CHUNK if plain.device.type == "cpu" else max(batch, 1)
    for rows in (slice(start, start + chunk) for start in range(0, batch, chunk)):
        views[0][rows] = _normalise(_planes(plain[rows]))
        if warped is not None and program is not None:
            views[1][rows] = _normalise(_color(_planes(warped[rows]), program.take(rows)))
    return views[0], views[1] if warped is not None else None


def _color(value: Tensor, program: ColorProgram) -> Tensor:
    """Run the program on (B, 3, H, W) fp32."""
    value = _affine(program.before, value)
    threshold = program.threshold[:, None, None, None]
    inverted = (value >= threshold) == program.invert_above[:, None, None, None]
    value = _affine(program.after, torch.where(inverted, 255.0 - value, value))
    border = program.border[:, :, None, None]
    value = value.sub_(border).mul_(program.coverage[:, None] * (1.0 / 255.0)).add_(border)
    gray = value[:, 0] * LUMA[0] + value[:, 1] * LUMA[1] + value[:, 2] * LUMA[2]
    # In double precision no order of the sum shows in the rounded mean: eager and native views are equal.
    mean = gray.flatten(1).mean(dim=1, dtype=torch.float64).float()[:, None, None, None]
    value = value.sub_(mean).mul_(program.contrast[:, None, None, None]).add_(mean).clamp_(0.0, 255.0)
    return _affine(program.final, value)


def _affine(matrix: Tensor, value: Tensor) -> Tensor:
    """(B, 3, 4) applied to the colours of (B, 3, H, W), clamped.

    Written out, not as a batched product: its rounding could change with the batch size, and with it a
    solarized pixel. Nor by addcmul, which rounds once or twice by the instructions of the machine.
    """
    rows = matrix[:, :, :, None, None]
    result = rows[:, :, 0] * value[:, 0:1]
    result.add_(rows[:, :, 1] * value[:, 1:2]).add_(rows[:, :, 2] * value[:, 2:3])
    return result.add_(rows[:, :, 3]).clamp_(0.0, 255.0)


def _planes(image: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) fp32, contiguous."""
    batch, height, width, _ = image.shape
    return image.new_empty((batch, 3, height, width), dtype=torch.float32).copy_(image.permute(0, 3, 1, 2))


def _normalise(value: Tensor) -> Tensor:
    return value.mul_(1.0 / 127.5).sub_(1.0)


def _check(plain: Tensor, warped: Tensor | None, program: ColorProgram | None) -> None:
    if plain.dtype != torch.uint8 or plain.dim() != 4 or plain.shape[-1] != 3:
        raise ValueError(f"plain must be (B, H, W, 3) uint8, got {plain.dtype} of shape {tuple(plain.shape)}")
    if (warped is None) != (program is None):
        raise ValueError("warped and program belong together: give both or neither")
    if warped is None or program is None:
        return
    dispatch.same_device(plain=plain, warped=warped)
    if warped.dtype != torch.uint8 or warped.shape != plain.shape:
        raise ValueError(
            f"warped must be uint8 of shape {tuple(plain.shape)},"
            f" got {warped.dtype} of shape {tuple(warped.shape)}"
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
                f"program.{name} must be {shape} on {warped.device},"
                f" got {tuple(field.shape)} on {field.device}"
            )


def _refuses(program: ColorProgram | None) -> str | None:
    kinds = dict(invert_above=torch.bool, coverage=torch.uint8)
    for item in () if program is None else fields(program):
        kind, expected = getattr(program, item.name).dtype, kinds.get(item.name, torch.float32)
        if kind != expected:
            return f"takes program.{item.name} in {expected}, got {kind}"
    return None
