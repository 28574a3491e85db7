"""The small reading problem of `benchmarks/value.py`: rendered digits, held-out strings for the test."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.render.fonts import font_files

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
TRAIN, TEST = 12_000, 1_000  # crops
# The test's strings are read as words of one line; a line of several words would join them anew.
PLAIN = RenderConfig(random_share=0.0, lines_share=0.0, curved_share=0.0, vertical_share=0.0, sign_share=0.0)


def rendered_digits(folder: Path) -> tuple[list[str], str]:
    """Training LMDB and test set (NAME=FOLDER) under `folder`, made if they are not there.

    Training has the ten digits and 85 strings of two; the test the other 15.
    """
    fonts = folder / "fonts"
    if not fonts.is_dir():
        fonts.mkdir(parents=True)
        for file in font_files(()):
            if file.stem in FONTS:
                shutil.copy(file, fonts)
    words = [f"{number:02d}" for number in range(100)]
    random.Random(0).shuffle(words)
    parts = (("train", [*words[:85], *"0123456789"], TRAIN, 1), ("test", words[85:], TEST, 2))
    for name, part, count, seed in parts:
        if (folder / name / "data.mdb").is_file():
            continue
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
        render(
            replace(
                PLAIN,
                output=str(folder / name),
                count=count,
                fonts=(str(fonts),),
                words=(str(folder / f"{name}.txt"),),
                seed=seed,
            )
        )
    return [str(folder / "train")], f"digits={folder / 'test'}"
