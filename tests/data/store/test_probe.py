"""probe: right sizes for what users have, a verdict for what is broken, and two forms that never differ."""

import importlib
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from encoded_images import HEIGHT, WIDTH, mutations, patched, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from other_threads import other_threads_run_during

from lmim_fast.data.store.probe import Status, probe, probe_in_python
from lmim_fast.data.store.records import RecordStore
from lmim_fast.native import native

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)
_C = importlib.import_module("lmim_fast._C")  # where there is a compiler, it must have been built

ROOT = Path(__file__).parents[3]
REAL_DATA = ROOT / "../shared/data/train"
MAX_PIXELS = 2**26
FORMS = {"native": _C.probe, "python": probe_in_python}


def both_forms(images, max_pixels=MAX_PIXELS):
    """(status, height, width) of each image, after checking that the forms agree in values and types."""
    native, python = _C.probe(images, max_pixels), probe_in_python(images, max_pixels)
    for name, ours, theirs in zip(("status", "height", "width"), native, python, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    return list(zip(*(column.tolist() for column in native), strict=True))


@pytest.mark.parametrize("name", variants())
def test_the_size_of_an_intact_file_is_what_a_decoder_finds(name):
    data = variants()[name]
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert decoded.shape[:2] == (HEIGHT, WIDTH)
    assert both_forms([data]) == [(Status.OK, HEIGHT, WIDTH)]


def test_results_come_in_the_order_of_the_batch_as_arrays():
    result = probe([variants()["png"], b"", b"text", variants()["jpeg"][:-2]])
    assert result.status.tolist() == [Status.OK, Status.EMPTY, Status.NOT_AN_IMAGE, Status.TRUNCATED]
    assert result.height.tolist() == [HEIGHT, 0, 0, 0]
    assert result.width.tolist() == [WIDTH, 0, 0, 0]
    assert [array.dtype for array in result] == [np.uint8, np.int32, np.int32]
    assert [array.shape for array in probe([])] == [(0,)] * 3


@pytest.mark.parametrize("form", FORMS)
def test_any_contiguous_buffer_is_read_and_other_things_are_type_errors(form):
    data = variants()["webp"]
    images = [bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)]
    assert FORMS[form](images, MAX_PIXELS)[0].tolist() == [Status.OK] * 3
    for wrong in ("text", None, 3):
        with pytest.raises(TypeError):
            FORMS[form]([data, wrong], MAX_PIXELS)


@pytest.mark.parametrize("name", variants())
def test_a_file_cut_at_any_byte_is_never_ok(name):
    data = variants()[name]
    cuts = [status for status, *_ in both_forms([data[:size] for size in range(len(data))])]
    assert cuts[0] == Status.EMPTY
    assert set(cuts[1:12]) <= {Status.NOT_AN_IMAGE, Status.TRUNCATED}
    assert set(cuts[12:]) == {Status.TRUNCATED}


@pytest.mark.parametrize("name", variants())
def test_bytes_behind_the_end_of_an_image_are_ignored(name):
    for tail in (b"\0" * 1000, b"\xff\xd8\xff\xe0 a thumbnail", b"\n"):
        assert both_forms([variants()[name] + tail]) == [(Status.OK, HEIGHT, WIDTH)]


@pytest.mark.parametrize("name", variants())
def test_the_pixel_limit_is_exact_and_reports_the_size(name):
    data = variants()[name]
    assert both_forms([data], HEIGHT * WIDTH) == [(Status.OK, HEIGHT, WIDTH)]
    assert both_forms([data], HEIGHT * WIDTH - 1) == [(Status.TOO_LARGE, HEIGHT, WIDTH)]


def test_a_pixel_limit_out_of_range_is_an_error():
    for limit in (0, 2**40 + 1):
        with pytest.raises(ValueError, match=f"got {limit}"):
            probe([b""], limit)


def frame_at(data):
    """Place of the precision byte of a baseline JPEG's frame header."""
    return data.index(b"\xff\xc0") + 4


def test_bombs_are_too_large_with_the_size_they_claim():
    top = 2**31 - 1
    bombs = {
        patched("jpeg", frame_at(variants()["jpeg"]) + 1, b"\xff\xff\xff\xff"): (65535, 65535),
        patched("png", 16, struct.pack(">II", top, top)): (top, top),
        patched("bmp", 18, struct.pack("<ii", top, -top)): (top, top),
        patched("gif", 6, b"\xff\xff\xff\xff"): (65535, 65535),
        patched("webp", 26, b"\xff\x3f\xff\x3f"): (16383, 16383),
        patched("webp lossless", 21, b"\xff\xff\xff\x0f"): (16384, 16384),
        patched("webp extended", 24, b"\xff" * 6): (2**24, 2**24),
    }
    assert both_forms(list(bombs)) == [(Status.TOO_LARGE, *size) for size in bombs.values()]
    # a BMP of 2^40 pixels is within the largest limit: then its missing pixels count
    assert both_forms([patched("bmp", 18, struct.pack("<ii", 2**20, 2**20))], 2**40) == [
        (Status.TRUNCATED, 0, 0)
    ]


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("png", 16, b"\0\0\0\0"),  # width 0
        ("png", 20, b"\0\0\0\0"),  # height 0
        ("png", 16, b"\x80\0\0\0"),  # width beyond the format
        ("png", 24, b"\x07"),  # bit depth
        ("png", 25, b"\x05"),  # colour type
        ("png", 28, b"\x02"),  # interlace
        ("png", 12, b"IHDX"),
        ("gif", 6, b"\0\0"),
        ("webp", 26, b"\0\0"),
        ("webp", 12, b"VP8?"),
        ("webp", 20, b"\x01"),  # not a key frame
        ("webp", 23, b"\0"),  # start code
        ("webp lossless", 20, b"\0"),
        ("webp lossless", 24, b"\xf0"),  # version
        ("webp extended", 16, b"\x04\0\0\0"),
        ("webp animated", 20, b"\x0a"),  # announces EXIF data and has none
        ("bmp", 18, b"\0\0\0\0"),
        ("bmp", 18, b"\xff\xff\xff\xff"),  # width -1
        ("bmp", 22, b"\0\0\0\x80"),  # height -2^31
        ("bmp", 14, b"\x27\0\0\0"),  # header size
        ("bmp", 28, b"\x03\0"),  # bits per pixel
        ("bmp", 10, b"\0\0\0\0"),  # pixels inside the header
    ],
)
def test_a_header_that_cannot_be_is_invalid(name, at, value):
    assert both_forms([patched(name, at, value)]) == [(Status.INVALID, 0, 0)]


def test_jpegs_without_a_frame_or_scan_and_with_two_frames_are_invalid():
    jpeg = variants()["jpeg"]
    frame = jpeg[frame_at(jpeg) - 4 : jpeg.index(b"\xff\xc4")]
    images = [
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + frame + b"\xff\xd9",
        jpeg.replace(frame, b""),
        jpeg.replace(frame, frame + frame),
        patched("jpeg", frame_at(jpeg) + 1, b"\0\0"),  # height 0
        patched("jpeg", frame_at(jpeg) - 1, b"\x12"),  # segment length
        b"\xff\xd8" + jpeg,
    ]
    assert both_forms(images) == [(Status.INVALID, 0, 0)] * len(images)


@pytest.mark.parametrize("name", [name for name in variants() if name.startswith("jpeg")])
def test_jpegs_with_anything_but_segments_before_the_first_scan_are_invalid(name):
    jpeg = variants()[name]
    starts, at = [], 2
    while jpeg[at + 1] != 0xDA:
        starts.append(at)
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    starts.append(at)
    assert len(starts) >= 5
    for at in starts:
        for junk in (b"\0", b"junk", b"\xff\0", b"\xff\x01", b"\xff\xd0", b"\xff\xd7"):  # TEM, restarts
            assert both_forms([jpeg[:at] + junk + jpeg[at:]]) == [(Status.INVALID, 0, 0)], (at, junk)
        filled = jpeg[:at] + b"\xff\xff" + jpeg[at:]  # bytes that may stand before a marker
        assert both_forms([filled]) == [(Status.OK, HEIGHT, WIDTH)], at
        short = jpeg[: at + 2] + b"\0\1" + jpeg[at + 4 :]  # a length that does not count itself
        assert both_forms([short]) == [(Status.INVALID, 0, 0)], at
        long = jpeg[: at + 2] + b"\xff\xff" + jpeg[at + 4 :]
        assert both_forms([long])[0][0] in (Status.TRUNCATED, Status.INVALID), at


@pytest.mark.parametrize("sampling", [0x00, 0x01, 0x10, 0x15, 0x51, 0xFF])
@pytest.mark.parametrize("component", range(3))
def test_jpegs_with_impossible_sampling_factors_are_invalid(component, sampling):
    at = frame_at(variants()["jpeg"]) + 7 + 3 * component
    assert both_forms([patched("jpeg", at, bytes([sampling]))]) == [(Status.INVALID, 0, 0)]
    assert both_forms([patched("jpeg", at, b"\x11")]) == [(Status.OK, HEIGHT, WIDTH)]


def test_forms_that_decoders_refuse_are_unsupported():
    frame = frame_at(variants()["jpeg"])
    images = [
        patched("jpeg", frame, b"\x0c"),  # 12 bits
        patched("jpeg", frame - 3, b"\xc3"),  # lossless
        patched("jpeg", frame - 3, b"\xc5"),  # hierarchical
        patched("bmp", 30, b"\x04\0\0\0"),  # JPEG inside
    ]
    assert both_forms(images) == [(Status.UNSUPPORTED, 0, 0)] * len(images)


def test_png_and_gif_and_webp_without_pixels_are_invalid():
    header = variants()["png"][:33]
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    webp = variants()["webp extended"][12:30]
    images = [
        header + end,
        header + b"\0\0\0\0I\0AT\0\0\0\0" + end,  # not a chunk name
        variants()["gif"][:10] + b"\0\0\0;",
        b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
    ]
    assert both_forms(images) == [(Status.INVALID, 0, 0)] * len(images)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), max_pixels=st.sampled_from([1, 480, 481, MAX_PIXELS, 2**40]))
def test_both_forms_agree_on_mutated_files(seed, max_pixels):
    both_forms(list(mutations(random.Random(seed), 50)), max_pixels)


@settings(max_examples=200)
@given(
    start=st.sampled_from(
        [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\x30\0\0\0WEBPVP8", b"BM"]
    ),
    rest=st.binary(max_size=200),
)
def test_both_forms_agree_on_arbitrary_bytes(start, rest):
    both_forms([start + rest])


HARNESS = """
#include <cstdio>
#include <cstring>
#include <memory>
#include "image_headers.h"
// Each image in memory of exactly its size, so that the sanitizer sees a read of one byte too many.
int main() {
    for (uint32_t size; std::fread(&size, 4, 1, stdin) == 1;) {
        std::unique_ptr<uint8_t[]> data(new uint8_t[size]);
        if (std::fread(data.get(), 1, size, stdin) != size) return 1;
        const auto verdict = lmim::read_header(data.get(), size, 1 << 26);
        std::printf("%d %llu %llu\\n", int(verdict.status), (unsigned long long)verdict.size.height,
                    (unsigned long long)verdict.size.width);
    }
}
"""


def test_the_native_form_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    (tmp_path / "harness.cpp").write_text(HARNESS)
    (tmp_path / "empty.cpp").write_text("int main() {}")
    flags = [COMPILER, "-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*flags, "empty.cpp", "-o", "empty"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    sources = ["harness.cpp", str(ROOT / "csrc/image_headers.cpp"), f"-I{ROOT / 'csrc'}"]
    subprocess.run([*flags, *sources, "-o", "harness"], cwd=tmp_path, check=True)
    images = [b"", *variants().values(), *mutations(random.Random(0), 5000)]
    images += [data[:size] for data in variants().values() for size in range(0, min(len(data), 200))]
    stream = b"".join(struct.pack("<I", len(data)) + data for data in images)
    run = subprocess.run([tmp_path / "harness"], input=stream, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    verdicts = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert verdicts == both_forms(images)
    assert {status for status, *_ in verdicts} == set(Status) - {
        Status.UNDECODABLE
    }  # the fuzz reaches every verdict


def test_the_native_form_lets_other_threads_run():
    endless = variants()["jpeg"][:-2] + b"\xff\x00" * 2**22
    images = [endless] * 8
    assert set(_C.probe(images, MAX_PIXELS)[0]) == {Status.TRUNCATED}
    assert other_threads_run_during(lambda: _C.probe(images, MAX_PIXELS))


def test_without_the_native_form_python_gives_the_same_and_warns_once(monkeypatch):
    images = [*variants().values(), *mutations(random.Random(1), 300)]
    expected = probe(images)
    monkeypatch.setitem(sys.modules, "lmim_fast._C", None)  # makes the import fail
    native.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"lmim_fast._C is not built .* `pip install -e .` build it"):
            actual = probe(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            probe(images[:1])
    finally:
        native.cache_clear()
    for ours, theirs in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the shared word crops are not here")
def test_real_crops_are_all_ok_with_the_sizes_that_a_decoder_finds():
    store = RecordStore([REAL_DATA])
    images = store.images(range(0, len(store), 29))
    result = both_forms(images)
    for data, (status, height, width) in zip(images, result, strict=True):
        decoded = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
        assert (status, height, width) == (Status.OK, *decoded.shape[:2])
