"""What was drawn for a view, in words: each operation with its strength, in the order applied."""

from __future__ import annotations

import numpy as np

from lmim_fast.data.augment.abinet import AbinetParameters, Deterioration, Geometry
from lmim_fast.data.augment.parseq import Operation as ParseqOperation
from lmim_fast.data.augment.parseq import ParseqParameters
from lmim_fast.data.augment.program import AugmentParameters
from lmim_fast.data.guidance.parameters import GuidanceParameters, Jitter, Operation


def guidance_lines(parameters: GuidanceParameters, row: int = 0) -> list[str]:
    """The operations of the guidance view of one of the samples, the resize and what follows it included."""
    order = [Operation(number) for number in parameters.order[row].tolist() if number >= 0]
    lines = [_guidance_line(parameters, row, operation) for operation in order]
    lines.append("resize to the view's size")
    lines += _jitter_lines(parameters, row)
    if parameters.gray[row]:
        lines.append("gray")
    return lines


def _guidance_line(parameters: GuidanceParameters, row: int, operation: Operation) -> str:
    match operation:
        case Operation.CONTRAST:
            return f"contrast: x {parameters.contrast[row]:.3f} around 128"
        case Operation.BLUR:
            return f"blur: sigma {parameters.blur_sigma[row]:.2f} pixels of the crop"
        case Operation.CROP_VERTICAL:
            return f"crop: {_two_shares(parameters.crop_vertical[row], 'top', 'bottom')} of the height"
        case Operation.CROP_HORIZONTAL:
            return f"crop: {_two_shares(parameters.crop_horizontal[row], 'left', 'right')} of the width"
        case Operation.SHARPEN:
            alpha, lightness = parameters.sharpen_alpha[row], parameters.sharpen_lightness[row]
            return f"sharpen: blend {alpha:.2f}, lightness {lightness:.2f}"
        case Operation.ROTATE:
            way = "clockwise" if parameters.angle[row] >= 0 else "anticlockwise"
            return f"rotate: {abs(parameters.angle[row]):.1f} degrees {way}"
        case Operation.PIECEWISE_AFFINE:
            most = np.abs(parameters.piecewise[row]).max()
            return f"piecewise affine: control points moved by up to {_share(most)} of the side"
        case Operation.PERSPECTIVE:
            most = parameters.perspective[row].max()
            return f"perspective: corners moved inwards by up to {_share(most)} of the side"
        case Operation.SOLARIZE:
            side = "from {:.0f} up" if parameters.solarize_above[row] else "below {:.0f}"
            return f"solarize: values {side.format(parameters.solarize_threshold[row])} are inverted"
        case Operation.GRAYSCALE:
            return f"grayscale: {_share(parameters.grayscale_alpha[row])} gray"


def augment_lines(parameters: AugmentParameters, row: int = 0) -> list[str]:
    """The operations of the augmented crop of one of the samples."""
    if isinstance(parameters, ParseqParameters):
        return _parseq_lines(parameters, row)
    return _abinet_lines(parameters, row)


def _parseq_lines(parameters: ParseqParameters, row: int) -> list[str]:
    lines = []
    for number, sign in zip(parameters.order[row].tolist(), parameters.sign[row].tolist(), strict=True):
        if number < 0:
            lines.append("one operation that was drawn and not applied")
            continue
        name = ParseqOperation(number).name.lower().replace("_", " ")
        way = "up" if sign > 0 else "down"
        lines.append(f"{name}: magnitude {parameters.magnitude:g} of 10, direction {way} where it has one")
    return lines


def _abinet_lines(parameters: AbinetParameters, row: int) -> list[str]:
    lines = []
    if parameters.geometry[row] >= 0:
        lines.append(_geometry_line(parameters, row, Geometry(int(parameters.geometry[row]))))
    lines.append("resize to the view's size")
    if parameters.deterioration[row]:
        for number in parameters.deterioration_order[row].tolist():
            lines.append(_deterioration_line(parameters, row, Deterioration(number)))
    return lines + _jitter_lines(parameters, row)


def _geometry_line(parameters: AbinetParameters, row: int, geometry: Geometry) -> str:
    match geometry:
        case Geometry.ROTATION:
            return f"rotate: {parameters.angle[row]:.1f} degrees anticlockwise"
        case Geometry.AFFINE:
            x, y = parameters.shear[row]
            angle, scale = parameters.angle[row], parameters.scale[row]
            return f"affine: {angle:.1f} degrees, scale {scale:.2f}, shear {x:.1f} and {y:.1f} degrees"
        case Geometry.PERSPECTIVE:
            most = parameters.corners[row].max()
            return f"perspective: corners moved inwards by up to {_share(most)} of the side"


def _deterioration_line(parameters: AbinetParameters, row: int, part: Deterioration) -> str:
    match part:
        case Deterioration.NOISE:
            return f"noise: variance {parameters.variance[row]:.0f}"
        case Deterioration.MOTION_BLUR:
            length, angle = parameters.blur_length[row], parameters.blur_angle[row]
            return f"motion blur: {length} pixels of the crop at {angle:.0f} degrees"
        case Deterioration.RESCALE:
            return f"rescale: {parameters.halvings[row]} halvings of 128 x 512"


def _jitter_lines(parameters: GuidanceParameters | AbinetParameters, row: int) -> list[str]:
    """The colour jitter, one line a part."""
    if not parameters.jitter[row]:
        return []
    lines = []
    for number in parameters.jitter_order[row].tolist():
        factor = parameters.jitter_factors[row, number]
        strength = f"{factor:+.3f} turns" if number == Jitter.HUE else f"x {factor:.3f}"
        lines.append(f"jitter: {Jitter(number).name.lower()} {strength}")
    return lines


def _two_shares(pair: np.ndarray, first: str, second: str) -> str:
    return f"{_share(pair[0])} at the {first}, {_share(pair[1])} at the {second}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
