"""R16: the losses of a short run on a CPU are the numbers in this file, whatever CPU it is.

Crops are computed here, not drawn by a library, and travel as PNG, so that no version of one changes a pixel.
Instruction sets (none, AVX2, AVX-512), threads (one or two) and passes (one or two) change a number by 4e-7;
decoders and warps that put one byte of a hundred a level higher change losses by 2e-4 and their smaller parts
by 2e-3. `TOLERANCE` is five times that; bf16, or a learning rate that is a hundredth off, is further away.
"""

import cv2
import lmdb
import numpy as np
import pytest
from pretrain_runs import lines, options

from lmim_fast import cli

TOLERANCE = {"loss": 1e-3, "loss_recon": 1e-3, "loss_align": 1e-2, "grad_norm": 1e-2}
GOLDEN = {
    "loss": [
        2.63806,
        2.18587,
        2.15977,
        1.73476,
        1.472,
        1.19549,
        1.13626,
        1.08892,
        0.959705,
        1.0138,
        1.06236,
        0.956879,
    ],
    "loss_recon": [
        1.71127,
        1.67991,
        1.50577,
        1.32155,
        1.18749,
        1.04046,
        1.00411,
        0.952375,
        0.881642,
        0.891882,
        0.920633,
        0.833524,
    ],
    "loss_align": [
        0.926797,
        0.50596,
        0.653993,
        0.41321,
        0.284513,
        0.155029,
        0.132152,
        0.136542,
        0.0780621,
        0.121918,
        0.141728,
        0.123355,
    ],
    "grad_norm": [
        7.06129,
        5.50728,
        5.66069,
        4.78599,
        3.0266,
        2.2173,
        1.85909,
        2.02359,
        1.83034,
        1.8308,
        1.81165,
        1.75687,
    ],
}


def striped(number):
    """A PNG of stripes whose width, slope and colours depend on the number alone."""
    height, width = 24 + 3 * (number % 7), 60 + 11 * (number % 9)
    rows, columns = np.mgrid[:height, :width]
    stripes = (columns * (1 + number % 3) + rows * (number % 5)) // (4 + number % 6) % 2
    colours = np.array([[(37 * number + 60 * c) % 128, 128 + (53 * number + 40 * c) % 128] for c in range(3)])
    image = np.stack([colours[c][stripes] for c in range(3)], axis=2).astype(np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stripes"
    folder.mkdir()
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for number in range(1, 21):
            transaction.put(b"image-%09d" % number, striped(number))
        transaction.put(b"num-samples", b"20")
    return folder


def test_r16_the_loss_curve_of_a_short_run_is_the_golden_one(data, tmp_path):
    more = ("--teacher", "random", "--model.decoder-dropout", "0", "--optim.clip-norm", "1.0")
    assert cli.main(["pretrain", *options(data, tmp_path / "run", *more, objective="lmim", steps=12)]) == 0
    found = lines(tmp_path / "run")
    for name, golden in GOLDEN.items():
        assert [line[name] for line in found] == pytest.approx(golden, rel=TOLERANCE[name]), name
