"""`lmim data sheet`: crops, labels and broken records where they belong."""

import cv2
import numpy as np
from finetune_runs import write_words

from lmim_fast import cli
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.tools.sheet import BOX


def sheet(path):
    return cv2.imread(str(path))[..., ::-1]


def test_a_sheet_shows_the_first_crops_of_a_run_and_names_the_broken_ones(tmp_path, capsys):
    data, output = write_words(tmp_path / "words", 12, broken=(3, 7)), tmp_path / "sheet.png"
    arguments = ["data", "sheet", str(data), "--output", str(output), "--columns", "5", "--seed", "4"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{output}: 12 of 12 records, 2 of them broken\n"
    pixels = sheet(output)
    height, width = (pixels.shape[0] - 8) // 3, (pixels.shape[1] - 8) // 5
    order = SampleOrder(12, 12, 4).batch(0)[1].tolist()
    for place, index in enumerate(order):
        row, column = divmod(place, 5)
        tile = pixels[8 + row * height : 8 + row * height + BOX[0], 8 + column * width :][:, : BOX[1]]
        is_gray = bool((tile == 160).all(axis=2).mean() > 0.5)
        assert is_gray == (index in (2, 6)), index
        assert tile.min() < 120  # the word, or what is wrong
    assert (pixels[8 + 2 * height :, 8 + 2 * width :] == 255).all()  # no thirteenth tile


def test_views_stand_beside_their_crops_and_a_broken_one_has_none(tmp_path):
    data = write_words(tmp_path / "words", 6, broken=(2,))
    arguments = ["data", "sheet", str(data), "--count", "6", "--columns", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path / "crops.png")]) == 0
    assert cli.main([*arguments, "--output", str(tmp_path / "both.png"), "--views"]) == 0
    crops, both = sheet(tmp_path / "crops.png"), sheet(tmp_path / "both.png")
    assert both.shape[1] - crops.shape[1] == BOX[1] + 4
    height = (both.shape[0] - 8) // 6
    for place, index in enumerate(SampleOrder(6, 6, 0).batch(0)[1].tolist()):
        top = 8 + place * height
        view = both[top : top + BOX[0], 8 + BOX[1] + 4 : -8]
        assert (view == 255).all() == (index == 1)
        assert np.array_equal(both[top : top + BOX[0], : 8 + BOX[1]], crops[top : top + BOX[0], : 8 + BOX[1]])


def test_wrong_paths_are_one_line(tmp_path, capsys):
    data = write_words(tmp_path / "words", 3)
    assert cli.main(["data", "sheet", str(data), "--output", str(tmp_path / "no" / "sheet.png")]) == 2
    assert "the folder" in capsys.readouterr().err
    assert cli.main(["data", "sheet", str(tmp_path / "none")]) == 2
    assert "cannot be opened" in capsys.readouterr().err
