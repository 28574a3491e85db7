"""The benchmark of the input pipeline on a small LMDB, and the released manner that it is compared with."""

import io
import json
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_data, released_imgaug
from benchmarks.released_views import ReleasedViews
from lmim_fast.config import GuidanceConfig

NOTHING = GuidanceConfig(
    min_operations=0,
    max_operations=0,
    contrast=(1.0, 1.0),
    blur_sigma=(0.01, 0.01),
    crop_vertical=(0.0, 0.0),
    crop_horizontal=(0.0, 0.0),
    sharpen_alpha=(0.0, 0.0),
    rotate_degrees=(0.0, 0.0),
    piecewise_scale=(0.0, 0.0),
    perspective_scale=(0.0, 0.0),
    solarize_threshold=(0.0, 0.0),
    grayscale_alpha=(0.0, 0.0),
    jitter_probability=0.0,
    grayscale_probability=0.0,
)


def crop(number: int = 0, height: int = 24, width: int = 80) -> np.ndarray:
    """Smooth colours."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [120 + 100 * np.sin(x / (7 + part) + y / 9 + number) for part in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def encoded(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(crop(number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with (
        lmdb.open(str(folder), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(1, 41):
            transaction.put(b"image-%09d" % number, encoded(number))
        transaction.put(b"image-%09d" % 41, b"no image")
        transaction.put(b"num-samples", b"41")
    return folder


def program(path: Path, text: str) -> str:
    """A script that stands in for an interpreter."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_table_and_its_file_have_the_pipeline_and_the_released_manner(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = "import struct\nrest, count = sys.stdin.buffer.read(), 0\n"
    count += "while rest: rest, count = rest[8 + struct.unpack('<Q', rest[:8])[0]:], count + 1\n"
    fake = program(tmp_path / "python", f"{count}print('{{\"seconds\": %f}}' % (count / 8000))")
    file = tmp_path / "data.json"
    arguments = ["--data", str(data), "--batch", "8", "--seconds", "0.1", "--threads", "1"]
    assert bench_data.main([*arguments, "--json", str(file), "--imgaug-python", fake]) == 0
    result = json.loads(file.read_text())
    rows = {row["stage"]: row for row in result["rows"]}
    ours, released = rows["whole pipeline, both views normalised"], rows["released manner, one process"]
    imgaug = rows["released manner with imgaug, one process"]
    assert imgaug["cpu_microseconds"] == pytest.approx(1e6 * 40 / 8000)  # every record but the broken one
    assert all(row["cpu_microseconds"] > 0 for row in rows.values())
    for ratio, row in zip(result["released"], (released, imgaug), strict=True):
        assert ratio["stage"] == row["stage"]
        assert ratio["ratio_by_cpu_time"] == row["cpu_microseconds"] / ours["cpu_microseconds"]
        clock = ours["images_per_second"] / result["cores"] * row["cpu_microseconds"] / 1e6
        assert ratio["ratio_by_clock"] == pytest.approx(clock)
    printed = capsys.readouterr().out
    assert "goal 25x" in printed
    assert f"images/s on {result['cores']} cores, goal {1500 * result['cores']:,}" in printed


def test_an_interpreter_without_the_library_is_named_with_what_it_said(tmp_path: Path) -> None:
    fake = program(tmp_path / "python", "sys.stdin.buffer.read()\nsys.exit('line\\nno imgaug here')")
    with pytest.raises(RuntimeError, match=r"python cannot run benchmarks\.released_imgaug: no imgaug here"):
        released_imgaug.in_process(fake, [encoded()])


def test_without_operations_the_guidance_view_is_the_plain_one() -> None:
    plain, guidance = ReleasedViews(NOTHING)(encoded())
    picture = Image.fromarray(crop()).resize((128, 32), Image.Resampling.BICUBIC)
    expected = (np.asarray(picture, np.float64) / 255 - 0.5) / 0.5
    for view in (plain, guidance):
        assert (view.shape, view.dtype) == ((3, 32, 128), np.float32)
        np.testing.assert_allclose(view.transpose(1, 2, 0), expected, rtol=0, atol=1e-6)


def test_every_operation_of_no_strength_leaves_the_image() -> None:
    make = ReleasedViews(NOTHING)
    assert len(make.operations) == 10
    for operation in make.operations:
        if operation.__name__ != "solarize":
            difference = np.abs(operation(crop()).astype(int) - crop())
            assert difference.max() <= 1, operation.__name__
    found = {bytes(make.solarize(crop())) for _ in range(20)}  # inverts all that is above 0, or below
    assert found == {bytes(crop()), bytes(255 - crop())}


def test_operations_change_the_image_and_only_rotation_its_size() -> None:
    make = ReleasedViews(GuidanceConfig())
    for operation in make.operations:
        images = [operation(crop()) for _ in range(8)]
        assert any(not np.array_equal(image, crop()) for image in images), operation.__name__
        sizes = {image.shape for image in images}
        assert (sizes == {crop().shape}) == (operation.__name__ != "rotate"), operation.__name__


def test_control_points_that_move_alike_move_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    make = ReleasedViews(GuidanceConfig())
    shifts = iter([0.1, 0.0] * 16)  # of x and y, in widths and heights
    monkeypatch.setattr(make.random, "gauss", lambda mean, deviation: next(shifts))
    moved = make.piecewise_affine(crop())
    np.testing.assert_allclose(moved[:, :-8].astype(int), crop()[:, 8:], rtol=0, atol=1)
    assert np.array_equal(moved[:, -8:], np.repeat(crop()[:, -1:], 8, axis=1))


def test_the_library_makes_views_of_the_same_kind() -> None:
    pytest.importorskip("imgaug", reason="imgaug is not installed")
    for view in released_imgaug.ImgaugViews(GuidanceConfig())(encoded()):
        assert (view.shape, view.dtype) == ((3, 32, 128), np.float32)
