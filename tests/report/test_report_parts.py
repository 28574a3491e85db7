"""The report's pieces: charts, heat, masks, query patches, reconstructions."""

import base64
import json
import re

import cv2
import numpy as np
import pytest
import torch

from lmim_fast.reference import normalise_patches, patchify
from lmim_fast.report.charts import Chart, Points, Series, chart_html, short, smoothed
from lmim_fast.report.images import boxed_html, crop_pixels, data_uri, heat_pixels, masked_pixels

STEPS = np.arange(1, 61) * 10


def chart(*values: np.ndarray, **options: bool) -> str:
    series = tuple(Series(f"line {place}", one, "abc"[place]) for place, one in enumerate(values))
    return chart_html(Chart("Loss", series, **options), STEPS, "loss")


def test_a_large_range_gets_a_log_switch_and_a_small_one_does_not() -> None:
    falling = np.geomspace(5, 0.05, 60)
    assert chart(falling).count("<svg") == 2
    assert 'class="log"' in chart(falling)
    assert chart(falling + 1).count("<svg") == 1
    assert chart(falling - 0.1).count("<svg") == 1, "a value below zero has no logarithm"
    assert chart(falling, from_zero=True).count("<svg") == 1


def test_chart_colours_follow_the_page_and_ids_are_its_own() -> None:
    svg = chart(np.linspace(1, 0, 60), np.linspace(2, 1, 60))
    assert "stroke: var(--a)" in svg
    assert "stroke: var(--b)" in svg
    assert not re.search(r"#0000\d\d", svg)
    assert "xmlns" not in svg
    ids = re.findall(r'\sid="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) > 0
    assert all(name.startswith("loss") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)) <= set(ids)


def test_gaps_and_infinities_leave_the_rest_of_the_line() -> None:
    values = np.linspace(2, 1, 60)
    values[[0, 17, 18, 59]] = [np.nan, np.inf, np.nan, -np.inf]
    page = chart(values)
    points = json.loads(re.search(r'data-points="([^"]*)"', page)[1].replace("&quot;", '"'))  # type: ignore[index]
    line = points["lines"][0]
    assert [place for place, y in enumerate(line["y"]) if y is None] == [0, 17, 18, 59]
    assert line["text"][17] == "not finite"
    assert points["step"] == STEPS.tolist()
    assert all(earlier <= later for earlier, later in zip(line["y"][1:17], line["y"][2:17], strict=False))
    assert "No value was logged" in chart(np.full(60, np.nan))


def test_points_of_other_steps_are_marked_and_read_out() -> None:
    points = Points("held-out", np.array([25, 205]), np.array([40.0, 0.5]))
    page = chart(np.linspace(2, 1, 60), points=points)
    assert page.count("<svg") == 2, "the points too decide whether a log scale is offered"
    assert '<span class="key ink">held-out</span>' in page
    assert re.search(r'<use [^>]*style="[^"]*fill: var\(--ink\)', page)
    hover = json.loads(re.search(r'data-points="([^"]*)"', page)[1].replace("&quot;", '"'))  # type: ignore[index]
    texts = dict(zip(hover["step"], hover["lines"][1]["text"], strict=True))
    newest = {step: text for step, text in texts.items() if text != "not yet"}
    assert min(newest) >= 25
    assert newest[min(newest)] == "40 (step 25)"
    assert texts[hover["step"][-1]] == "0.5 (step 205)"
    assert len(page) > len(chart(np.linspace(2, 1, 60)))


def test_one_logged_step_makes_a_chart() -> None:
    page = chart_html(Chart("Loss", (Series("total", np.array([1.5])),)), np.array([10]), "one")
    assert page.count("<svg") == 1


def test_smoothing_keeps_level_trend_and_gaps() -> None:
    level = np.full(200, 3.0)
    level[50:60] = np.nan
    result = smoothed(level)
    assert np.array_equal(np.isnan(result), np.isnan(level))
    np.testing.assert_allclose(result[~np.isnan(result)], 3.0)
    noisy = np.linspace(1, 0, 400) + np.random.default_rng(0).normal(0, 0.2, 400)
    inner = slice(40, -40)
    assert np.abs(smoothed(noisy) - np.linspace(1, 0, 400))[inner].max() < 0.12
    np.testing.assert_allclose(smoothed(np.array([7.0])), [7.0])


def test_numbers_are_short() -> None:
    values = (0.0, 1.23456, 12345.0, 2.5e6, 0.00012, 7.5e-5, float("nan"))
    assert [short(value) for value in values] == [
        "0",
        "1.235",
        "12.35k",
        "2.5M",
        "1.2e-4",
        "7.5e-5",
        "not finite",
    ]
    shares = (0.0, 0.0004861, 0.01264, 0.5, 1.0)
    assert [short(share, percent=True) for share in shares] == ["0 %", "0.05 %", "1.26 %", "50 %", "100 %"]


def test_png_data_uri_holds_the_very_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    prefix, encoded = data_uri(pixels).split(",")
    assert prefix == "data:image/png;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), pixels)
    with pytest.raises(ValueError, match="uint8"):
        data_uri(pixels.astype(np.float32))


def test_normalised_images_become_the_pixels_they_came_from() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 16, 1)
    images = (pixels.float() / 255 - 0.5) / 0.5
    assert np.array_equal(crop_pixels(images), pixels.permute(0, 2, 3, 1).numpy())


def test_heat_is_strongest_over_the_strongest_patch() -> None:
    weights = np.full((8, 32), 0.001)
    weights[5, 20] = 0.7
    alpha = heat_pixels(weights)[..., 3]
    assert alpha.shape == (32, 128)
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert (row // 4, column // 4) == (5, 20)
    assert alpha[:12].max() == 0
    even = np.full((8, 32), 1 / 256)
    even[5, 20] *= 1.02
    assert heat_pixels(even)[..., 3].max() < 30, "an all but even spread shows no peak"


def test_masked_patches_are_gray_and_the_box_is_on_its_patch() -> None:
    pixels = np.full((32, 128, 3), 200, np.uint8)
    masked = masked_pixels(pixels, np.array([0, 33, 255]), 4)
    gray = np.argwhere(masked[::4, ::4, 0] != 200).tolist()
    assert gray == [[0, 0], [1, 1], [7, 31]]
    assert (pixels == 200).all()
    assert "left:3.125%;top:12.5%;width:3.125%;height:12.5%" in boxed_html(pixels, 33, (8, 32), "query")


def test_reconstruction_of_the_true_target_is_the_image() -> None:
    from lmim_fast.report.maps import reconstruct

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 128, generator=generator) * 2 - 1
    ids_masked = torch.stack([torch.randperm(256, generator=generator)[:192] for _ in range(2)])
    target = normalise_patches(patchify(images, 4)).gather(1, ids_masked[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(reconstruct(images, ids_masked, target, 4), images, rtol=1e-4, atol=1e-5)
    flat = patchify(reconstruct(images, ids_masked, torch.zeros_like(target), 4), 4)
    patches = patchify(images, 4)
    for place, ids in enumerate(ids_masked):
        mean = patches[place, ids].mean(-1, keepdim=True).expand(-1, 48)
        torch.testing.assert_close(flat[place, ids], mean)
        seen = [patch for patch in range(256) if patch not in set(ids.tolist())]
        assert torch.equal(flat[place, seen], patches[place, seen])


def test_query_patches_are_masked_have_contrast_and_span_the_crop() -> None:
    from lmim_fast.report.maps import query_patches

    pixels = np.full((32, 128, 3), 90, np.uint8)
    strokes = [2 * 32 + 3, 4 * 32 + 12, 5 * 32 + 17, 30]
    for patch in strokes:
        row, column = divmod(patch, 32)
        pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 2] = 255
    everything = np.arange(256)
    assert query_patches(pixels, everything, 4) == strokes
    without = np.delete(everything, [strokes[1], *[patch for patch in everything if patch % 32 >= 24]])
    chosen = query_patches(pixels, without, 4)
    assert len(chosen) == 3, "the last strip has no masked patch"
    assert chosen[0] == strokes[0]
    assert chosen[1] != strokes[1]
    assert 8 <= chosen[1] % 32 < 16
