"""Run folders and crops for the report's tests."""

import json
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

from lmim_fast.config import PretrainConfig, preset
from lmim_fast.config.io import to_dict

SCRIPT = "<script>alert(1)</script>"
LABELS = [SCRIPT, '漢字 & "quotes"', "Street", "EXIT", None, "broken", "Coffee", "24/7"]


def write_crops(folder: Path) -> Path:
    """An LMDB of eight crops: hostile labels, one without label, one that is no image."""
    with lmdb.open(str(folder), map_size=2**22) as database, database.begin(write=True) as transaction:
        transaction.put(b"num-samples", str(len(LABELS)).encode())
        for number, label in enumerate(LABELS, start=1):
            image = np.full((40, 130, 3), (40, 90, 20 * number), np.uint8)
            cv2.putText(image, f"crop {number}", (6, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2)
            encoded = b"no image" if label == "broken" else cv2.imencode(".png", image)[1].tobytes()
            transaction.put(f"image-{number:09d}".encode(), encoded)
            if label is not None:
                transaction.put(f"label-{number:09d}".encode(), label.encode())
    return folder


def line(step: int, **values: Any) -> str:
    """A line of metrics.jsonl as the trainer writes it."""
    row = {
        "step": step,
        "epoch": step / 2,
        "loss": 2.0 / step,
        "loss_recon": 1.5 / step,
        "loss_align": 0.5 / step,
    }
    row |= {"lr": 1e-4, "images_per_second": 100.0 + step, "data_wait_fraction": 0.02, "grad_norm": 1.0}
    row |= {"bad_records": 3, "skipped_steps": 0, "memory_bytes": 10**9, "elapsed_seconds": 7.0 * step}
    return json.dumps(row | values) + "\n"


def make_run(folder: Path, lines: list[str] | None = None, **values: Any) -> Path:
    """A run folder as a run without checkpoint leaves it; `values` go into its config."""
    settings = dict(data=("gone/away",), objective="mae", preset="tiny", model=preset("tiny"), steps=40)
    config = PretrainConfig(**{**settings, **values})  # type: ignore[arg-type]
    document = {"config": to_dict(config), "versions": {"torch": "2.99<b>"}, "data": {"count": 80}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document))
    lines = [line(step) for step in range(1, 41)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder
