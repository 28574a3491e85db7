"""What follows the warp in ABINet's augmentation: noise and colour jitter, on the images that have them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmim_fast.data.augment.abinet import AbinetParameters
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.noise import add_gaussian
from lmim_fast.data.guidance.color import color_program
from lmim_fast.data.guidance.parameters import GuidanceParameters
from lmim_fast.ops.photometric import ColorProgram, photometric


class AbinetFinish:
    """Adds noise to views, then jitters their colours.

    Args:
        parameters: of B samples.
        deviation:  (B,) of their noise; 0: none.
        keys:       of their noise.
        image_size: height and width of the views.
    """

    def __init__(
        self,
        parameters: AbinetParameters,
        deviation: NDArray[np.float64],
        keys: Keys,
        image_size: tuple[int, int],
    ) -> None:
        self._noisy, self._jittered = np.flatnonzero(deviation), np.flatnonzero(parameters.jitter)
        self._deviation = torch.from_numpy(deviation[self._noisy]).float()
        self._keys = keys.take(self._noisy)
        self._colors = jitter_program(parameters.take(self._jittered), image_size)

    def __call__(self, views: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the same tensor, finished in place."""
        if len(self._noisy):
            rows = torch.from_numpy(self._noisy).to(views.device)
            keys = self._keys.to(views.device)
            views[rows] = add_gaussian(views[rows], self._deviation.to(views.device), *keys)
        if len(self._jittered):
            rows = torch.from_numpy(self._jittered).to(views.device)
            before = views[rows]
            _, after = photometric(before, before, self._colors.to(views.device))
            assert after is not None
            views[rows] = after.add_(1.0).mul_(127.5).round_().byte().permute(0, 2, 3, 1)
        return views


def jitter_program(parameters: AbinetParameters, image_size: tuple[int, int]) -> ColorProgram:
    """The colour jitter of B samples, all of which have one, as the colours of a view with nothing else."""
    batch = len(parameters)
    nothing, one = np.zeros(batch), np.ones(batch)
    none = GuidanceParameters(
        order=np.full((batch, 1), -1),
        contrast=one,
        blur_sigma=one,
        crop_vertical=np.zeros((batch, 2)),
        crop_horizontal=np.zeros((batch, 2)),
        sharpen_alpha=nothing,
        sharpen_lightness=nothing,
        angle=nothing,
        piecewise=np.zeros((batch, 4, 4, 2)),
        perspective=np.zeros((batch, 4, 2)),
        solarize_threshold=nothing,
        solarize_above=np.zeros(batch, bool),
        grayscale_alpha=nothing,
        jitter=parameters.jitter,
        jitter_order=parameters.jitter_order,
        jitter_factors=parameters.jitter_factors,
        gray=np.zeros(batch, bool),
    )
    return color_program(none, np.full((batch, *image_size), 255, np.uint8))
