"""Test sets whose images hold their number as a colour, and a model that reads it."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import lmdb
import numpy as np
import torch
from torch import nn

from lmim_fast.config import ModelConfig, RecognizerConfig
from lmim_fast.errors import WeightsError
from lmim_fast.models import recognizer_files


def encoded(number):
    """A crop of one colour: any resize keeps it."""
    blue_green_red = (77, number // 256, number % 256)
    return cv2.imencode(".png", np.full((20, 50, 3), blue_green_red, np.uint8))[1].tobytes()


def word(number):
    """The label of an image; its length grows with the number."""
    return f"Word-{number}" + "x" * (number % 19)


def reading(number):
    """What the model reads: right, in other case, or with an error in every seventh image."""
    if number % 7 == 3:
        return word(number).replace("o", "0")
    return word(number).lower() if number % 5 == 1 else word(number)


def write_set(folder, count, *, labels=True, broken=(), unlabelled=(), first=0):
    """An LMDB of `count` images; 1-based numbers in `broken` are cut files."""
    folder.mkdir(parents=True)
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key in range(1, count + 1):
            number = first + key - 1
            image = encoded(number)
            transaction.put(b"image-%09d" % key, image[:30] if key in broken else image)
            if labels and key not in unlabelled:
                transaction.put(b"label-%09d" % key, word(number).encode())
        transaction.put(b"num-samples", str(count).encode())
    return folder


@dataclass
class Reading:
    """The two columns that an evaluation needs."""

    strings: list[str]
    word_probabilities: torch.Tensor


class ColourReader(nn.Module):
    """A recogniser's interface; it reads the number off the colour, through `read`."""

    def __init__(self, read=reading):
        super().__init__()
        self.config = RecognizerConfig(encoder=ModelConfig(image_size=(8, 32), patch_size=4))
        self.characters = string.printable[:94]
        self.child = nn.Dropout()
        self.read = read
        self.batches: list[list[int]] = []
        self.flags: list[tuple[bool, bool, bool, bool]] = []

    def greedy(self, images):
        return self._answer(images)

    def beam_search(self, images, width):
        reading = self._answer(images)
        return Reading([f"{text}|{width}" for text in reading.strings], reading.word_probabilities)

    def _answer(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (8, 32, 3)
        colours = images[:, 0, 0].tolist()
        numbers = [red + 256 * green for red, green, _ in colours]
        self.batches.append(numbers)
        bf16 = torch.is_autocast_enabled("cpu")
        self.flags.append((self.training, self.child.training, torch.is_grad_enabled(), bf16))
        probabilities = torch.tensor([1 / (1 + number % 11) for number in numbers])
        return Reading([self.read(number) for number in numbers], probabilities)


def install_files(patch=setattr):
    """Put a loader in the place of the recogniser's: it takes files that begin with COLOUR."""

    def load_recognizer(path):
        if not path.read_bytes().startswith(b"COLOUR"):
            raise WeightsError(f"{path}: not a recogniser; give a file of a fine-tuning")
        return ColourReader()

    patch(recognizer_files, "load_recognizer", load_recognizer)


def distance(left: Iterable[str], right: Iterable[str]) -> int:
    """Edit distance, from its definition."""
    left, right = list(left), list(right)
    row = list(range(len(right) + 1))
    for place, character in enumerate(left, 1):
        corner, row[0] = row[0], place
        for column, other in enumerate(right, 1):
            best = min(row[column] + 1, row[column - 1] + 1, corner + (character != other))
            corner, row[column] = row[column], best
    return row[-1]
