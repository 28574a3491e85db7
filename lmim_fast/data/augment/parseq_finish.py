"""What follows the warp in PARSeq's augmentation: gray borders, colours and noise in their drawn order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmim_fast.data.augment import color_operations
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.noise import add_poisson
from lmim_fast.data.augment.parseq import FILL, Operation, ParseqParameters, noise_rate
from lmim_fast.data.augment.parseq_geometry import Canvases

Array = NDArray[np.float64]

_FACTOR: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.COLOR: color_operations.color,
    Operation.CONTRAST: color_operations.contrast,
    Operation.BRIGHTNESS: color_operations.brightness,
}


class ParseqFinish:
    """Runs what is drawn for B samples on their warped views, place by place of the order.

    Which samples an operation has is known on the host, so nothing waits for a device.

    Args:
        parameters: of B samples.
        canvases:   their geometry.
        sizes:      (B, 2) height and width of the crops.
        keys:       of the noise.
        image_size: height and width of the views.
    """

    def __init__(
        self,
        parameters: ParseqParameters,
        canvases: Canvases,
        sizes: Array,
        keys: Keys,
        image_size: tuple[int, int],
    ) -> None:
        self._parameters, self._canvases, self._keys = parameters, canvases, keys
        self._pixels = torch.from_numpy(sizes.prod(axis=1)).long()
        self._rate = torch.from_numpy(noise_rate(parameters, sizes)).float()
        # Noise of the crop's own pixels is averaged where the resize shrinks it; enlarged, it stays white.
        share = np.sqrt((np.minimum(sizes, np.array(image_size)) / sizes).prod(axis=1))
        self._share = torch.from_numpy(share).float()

    def __call__(self, views: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the same tensor, finished in place."""
        order, device = self._parameters.order, views.device
        plain = {
            Operation.AUTO_CONTRAST: color_operations.auto_contrast,
            Operation.INVERT: color_operations.invert,
            Operation.POSTERIZE: lambda x: color_operations.posterize(x, self._parameters.bits),
            Operation.SOLARIZE: lambda x: color_operations.solarize(x, self._parameters.threshold),
            Operation.SOLARIZE_ADD: lambda x: color_operations.solarize_add(x, self._parameters.addition),
        }
        for place in range(order.shape[1]):
            moved = self._canvases.rows[place]
            if len(moved):
                rows = torch.from_numpy(moved).to(device)
                coverage = torch.from_numpy(self._canvases.coverages[place]).to(device)
                views[rows] = color_operations.lay_over(views[rows], coverage, FILL)
            for operation in (*plain, *_FACTOR, Operation.EQUALIZE, Operation.POISSON_NOISE):
                chosen = np.flatnonzero(order[:, place] == operation)
                if not len(chosen):
                    continue
                rows = torch.from_numpy(chosen).to(device)
                images = views[rows]
                if operation in plain:
                    views[rows] = plain[operation](images)
                elif operation in _FACTOR:
                    factor = self._parameters.factor(self._parameters.sign[chosen, place])
                    views[rows] = _FACTOR[operation](images, torch.from_numpy(factor).float().to(device))
                elif operation == Operation.EQUALIZE:
                    pixels = self._pixels[torch.from_numpy(chosen)].to(device)
                    views[rows] = color_operations.equalize(images, pixels)
                else:
                    views[rows] = self._noise(images, chosen)
        return views

    def _noise(self, images: Tensor, chosen: NDArray[np.int64]) -> Tensor:
        rows = torch.from_numpy(chosen)
        rate, share = (values[rows].to(images.device) for values in (self._rate, self._share))
        return add_poisson(images, rate, share, *self._keys.take(chosen).to(images.device))
