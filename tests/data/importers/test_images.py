"""Vertical crops, EXIF orientation and boxes of pages: what is turned and cut, and which way."""

import io
import json

import cv2
import numpy as np
import pytest
from import_sources import encoded, imported, pixels, records, rejects, write_tar
from PIL import Image, ImageOps

from lmim_fast.data.importers import images
from lmim_fast.data.importers.entries import Refused


def decoded(image):
    return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)


# --- vertical crops ---


def write_vertical(path):
    """Crops by name: image and label."""
    made = {
        "tall.png": (encoded(1, 60, 40, ".png"), "two"),
        "high.jpg": (encoded(1, 90, 30, ".jpg"), "竖排"),
        "single.png": (encoded(2, 60, 20, ".png"), "1"),
        "nearly.png": (encoded(3, 59, 40, ".png"), "two"),
        "wide.png": (encoded(4, 20, 60, ".png"), "wide"),
    }
    write_tar(
        path,
        [
            member
            for name, (image, label) in made.items()
            for member in (
                (name, image),
                (name[:-4] + ".txt", label.encode()),
            )
        ],
    )
    return made


def test_vertical_crops_are_turned_counter_clockwise_unless_their_label_is_one_character(tmp_path, capsys):
    made = write_vertical(tmp_path / "x.tar")
    said = imported(capsys, tmp_path / "x.tar", "--output", tmp_path / "out")
    assert "2 vertical crops turned by 90 degrees counter-clockwise (--no-turn-vertical keeps them)" in said
    found = dict(zip(made, records(tmp_path / "out"), strict=True))
    for name in ("single.png", "nearly.png", "wide.png"):
        assert found[name] == made[name]
    turned = decoded(found["tall.png"][0])
    assert found["tall.png"][0].startswith(b"\x89PNG")
    assert np.array_equal(turned, np.rot90(pixels(1, 60, 40)))
    assert np.array_equal(turned[-1, 0], pixels(1, 60, 40)[0, 0])  # the top left corner is now below
    jpeg = decoded(found["high.jpg"][0])
    assert found["high.jpg"][0].startswith(b"\xff\xd8")
    assert jpeg.shape == (30, 90, 3)
    assert np.abs(jpeg.astype(int) - np.rot90(decoded(made["high.jpg"][0]))).mean() < 3


def test_vertical_crops_stay_as_they_are_when_that_is_asked_for(tmp_path, capsys):
    made = write_vertical(tmp_path / "x.tar")
    said = imported(capsys, tmp_path / "x.tar", "--no-turn-vertical", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == list(made.values())
    assert "turned" not in said


def test_without_a_label_the_shape_alone_decides():
    assert images.is_vertical(30, 20, None)
    assert not images.is_vertical(29, 20, None)
    assert not images.is_vertical(30, 20, "1")
    assert not images.is_vertical(30, 20, "")
    assert images.is_vertical(30, 20, "11")


# --- EXIF ---


def rotated(orientation, format_="JPEG", size=(48, 16)):
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif[0x0112] = orientation
    data = io.BytesIO()
    image = Image.fromarray(pixels(1, size[1], size[0])[:, :, ::-1])
    image.save(data, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    return data.getvalue()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_read_and_applied_as_pillow_does(orientation, format_):
    image = rotated(orientation, format_)
    assert images.orientation(image) == orientation
    with Image.open(io.BytesIO(image)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))[:, :, ::-1]
    found = images.upright(images.decode(image), orientation)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 3


def test_damaged_exif_is_no_orientation():
    rng = np.random.default_rng(0)
    image = rotated(6)
    at = image.index(b"Exif\0\0")
    assert images.orientation(image[: at + 20]) == 1
    for _ in range(2000):
        data = bytearray(image)
        for _ in range(4):
            data[at + rng.integers(-4, 60)] = rng.integers(0, 256)
        assert 1 <= images.orientation(bytes(data)) <= 8
    assert images.orientation(b"") == images.orientation(encoded(1)) == 1


def test_an_orientation_is_applied_and_counted_or_left_in_the_file(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    made = {"1.jpg": rotated(3), "2.jpg": rotated(6, size=(48, 40)), "3.jpg": rotated(1)}
    for name, image in made.items():
        (tmp_path / "in" / name).write_bytes(image)
    said = imported(capsys, tmp_path / "in", "--output", tmp_path / "out")
    assert "2 images turned as their EXIF orientation says" in said
    upside_down, on_its_side, plain = (image for image, _ in records(tmp_path / "out"))
    assert plain == made["3.jpg"]
    assert np.abs(decoded(upside_down).astype(int) - pixels(1, 16, 48)[::-1, ::-1]).mean() < 4
    assert decoded(on_its_side).shape == (48, 40, 3)
    assert images.orientation(upside_down) == images.orientation(on_its_side) == 1
    imported(capsys, tmp_path / "in", "--no-apply-exif", "--output", tmp_path / "kept")
    assert [image for image, _ in records(tmp_path / "kept")] == list(made.values())


def test_a_crop_that_is_vertical_after_its_orientation_is_turned_from_there(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(rotated(6))  # 16 x 48, upright 48 x 16
    imported(capsys, tmp_path / "in", "--output", tmp_path / "out")
    ((image, _),) = records(tmp_path / "out")
    assert np.abs(decoded(image).astype(int) - pixels(1, 16, 48)).mean() < 4


@pytest.mark.parametrize("kind", ["gray", "16 bit", "alpha", "palette", "cmyk"])
def test_images_of_every_kind_of_pixel_can_be_turned(tmp_path, capsys, kind):
    (tmp_path / "in").mkdir()
    plain = Image.fromarray(pixels(1, 60, 20)[:, :, ::-1])
    data = io.BytesIO()
    if kind == "16 bit":
        data.write(cv2.imencode(".png", pixels(1, 60, 20).astype(np.uint16) * 257)[1].tobytes())
    else:
        mode = {"gray": "L", "alpha": "RGBA", "palette": "P", "cmyk": "CMYK"}[kind]
        plain.convert(mode).save(data, "JPEG" if kind == "cmyk" else "PNG")
    (tmp_path / "in" / "a.png").write_bytes(data.getvalue())
    imported(capsys, tmp_path / "in", "--output", tmp_path / "out")
    ((image, _),) = records(tmp_path / "out")
    expected = pixels(1, 60, 20)
    if kind == "gray":
        expected = np.repeat(np.asarray(plain.convert("L"))[:, :, None], 3, axis=2)
    tolerance = {"palette": 20, "cmyk": 12}.get(kind, 2)
    assert np.abs(decoded(image).astype(int) - np.rot90(expected)).mean() < tolerance


# --- boxes of pages ---

PAGE = cv2.resize(np.random.default_rng(5).integers(0, 256, (12, 16, 3), dtype=np.uint8), (400, 300))


def paddle_crop(page, points):
    """The published crop, written down literally."""
    points = np.array(points, np.float32)
    norm = np.linalg.norm
    width = int(max(norm(points[0] - points[1]), norm(points[2] - points[3])))
    height = int(max(norm(points[0] - points[3]), norm(points[1] - points[2])))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    return cv2.warpPerspective(
        page,
        cv2.getPerspectiveTransform(points, target),
        (width, height),
        borderMode=cv2.BORDER_REPLICATE,
        flags=cv2.INTER_CUBIC,
    )


def page_list(folder, *boxes, page=PAGE, name="page.png"):
    folder.mkdir(exist_ok=True)
    if page is not None:
        cv2.imwrite(str(folder / name), page)
    (folder / "list.txt").write_text(f"{name}\t{json.dumps(list(boxes))}\n", "utf-8")
    return folder / "list.txt"


def box(points, label="word"):
    return {"transcription": label, "points": points}


def test_boxes_are_cut_out_upright_and_marked_ones_are_left_out(tmp_path, capsys):
    straight = [[20, 30], [120, 30], [120, 60], [20, 60]]
    slanted = [[200, 50], [330, 80], [320, 120], [190, 95]]
    edge = [[-10, 250], [80, 250], [80, 320], [-10, 320]]
    tall = [[300, 150], [330, 150], [330, 290], [300, 290]]
    listed = page_list(
        tmp_path / "in",
        box(straight, "one"),
        box(slanted, "zwei"),
        box(straight, "###"),
        box(edge, "edge"),
        box(tall, "竖排"),
        box(tall, "竖"),
        box(straight, "*"),
    )
    said = imported(capsys, listed, "--output", tmp_path / "out", "--workers", 1)
    assert "read as paddleocr (its lines hold boxes)" in said
    assert f"\n5 records in {tmp_path / 'out'}, 5 with a label" in said
    assert "5 cut out of pages" in said
    assert "2 boxes left out, marked as unreadable" in said
    found = records(tmp_path / "out")
    assert [label for _, label in found] == ["one", "zwei", "edge", "竖排", "竖"]
    crops = [decoded(image) for image, _ in found]
    assert np.array_equal(crops[0], PAGE[30:60, 20:120])
    for crop, points in zip(crops[1:3], (slanted, edge), strict=True):
        assert np.array_equal(crop, paddle_crop(PAGE, points))
    assert np.array_equal(crops[3], np.rot90(PAGE[150:290, 300:330]))
    assert np.array_equal(crops[4], PAGE[150:290, 300:330])


def test_crops_of_a_jpeg_page_are_jpeg(tmp_path, capsys):
    listed = page_list(tmp_path / "in", box([[20, 30], [120, 30], [120, 60], [20, 60]]), name="page.jpg")
    imported(capsys, listed, "--output", tmp_path / "out")
    ((image, _),) = records(tmp_path / "out")
    assert image.startswith(b"\xff\xd8")
    assert np.abs(decoded(image).astype(int) - PAGE[30:60, 20:120]).mean() < 4


def test_a_box_in_the_other_direction_is_not_mirrored():
    clockwise = ((20, 30), (120, 35), (118, 70), (19, 66))
    counter = (clockwise[0], clockwise[3], clockwise[2], clockwise[1])
    expected = paddle_crop(PAGE, clockwise)
    assert np.array_equal(images.rectify(PAGE, clockwise), expected)
    assert np.array_equal(images.rectify(PAGE, counter), expected)


def test_a_polygon_is_cut_out_by_the_smallest_rectangle_around_it():
    crop = images.rectify(PAGE, ((20, 40), (70, 30), (120, 40), (120, 60), (70, 70), (20, 60)))
    assert crop.shape == (40, 100, 3)
    assert np.abs(crop.astype(int) - PAGE[30:70, 20:120]).mean() < 1


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (((10, 10), (10, 10), (10, 10), (10, 10)), "without area"),
        (((10, 10), (50, 50), (90, 90), (130, 130)), "without area"),
        (((500, 10), (600, 10), (600, 50), (500, 50)), "outside"),
        (((0, 0), (99999, 0), (99999, 50), (0, 50)), "larger than the page"),
        (((-400, -400), (600, -400), (600, 600), (-400, 600)), "larger than the page"),
    ],
)
def test_a_box_that_holds_nothing_is_refused(points, reason):
    with pytest.raises(Refused, match=reason):
        images.rectify(PAGE, points)


def test_boxes_and_pages_that_cannot_be_used_are_rejected_one_by_one(tmp_path, capsys):
    good = [[20, 30], [120, 30], [120, 60], [20, 60]]
    listed = page_list(
        tmp_path / "in",
        box(good),
        box(good, "a\nb"),
        box(good[:3]),
        box([[0, "x"]] * 4),
        box([[float("nan"), 0]] * 4),
        box([[10**400, 0]] * 4),
        {"points": good},
        "text",
        box([[500, 10], [600, 10], [600, 50], [500, 50]]),
    )
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    with listed.open("a", encoding="utf-8") as file:
        file.write("page.png\t[]\n")
        file.write("page.png\t[{\n")
        file.write("page.png\t{}\n")
        file.write(f"broken.png\t{json.dumps([box(good)])}\n")
        file.write(f"../page.png\t{json.dumps([box(good)])}\n")
    said = imported(capsys, listed, "--keep-broken", "--output", tmp_path / "out", "--workers", 1)
    assert [label for _, label in records(tmp_path / "out")] == ["word"]
    assert [reason for _, reason in rejects(tmp_path / "out")] == [
        "control character in the label",
        "box of less than four points",
        *["box without points [[x, y], ...]"] * 3,
        "label is not text",
        "box is not a JSON object",
        "box outside of the page",
        "boxes are not JSON",
        "boxes are not a list",
        "not an image",
        "path with ..",
    ]
    assert rejects(tmp_path / "out")[0][0] == f"{listed}:1: page.png box 1"
    assert "12 rejected" in said


def test_boxes_are_meant_on_the_page_as_it_is_seen(tmp_path, capsys):
    points = [[10, 20], [30, 20], [30, 27], [10, 27]]
    listed = page_list(tmp_path / "in", box(points), page=None, name="page.jpg")
    (tmp_path / "in" / "page.jpg").write_bytes(rotated(6, size=(48, 40)))
    imported(capsys, listed, "--output", tmp_path / "out")
    ((image, _),) = records(tmp_path / "out")
    seen = np.rot90(pixels(1, 40, 48), 3)  # 48 x 40
    assert np.abs(decoded(image).astype(int) - seen[20:27, 10:30]).mean() < 6


def test_a_recognition_line_may_name_several_images(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number, suffix=".png"))
    (tmp_path / "list.txt").write_text('["0.png", "1.png"]\tword\n2.png\t[3]\n')
    imported(capsys, tmp_path / "list.txt", "--format", "paddleocr", "--output", tmp_path / "out")
    assert [label for _, label in records(tmp_path / "out")] == ["word", "word", "[3]"]
