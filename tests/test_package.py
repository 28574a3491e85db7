"""What a user meets first: import, names, configuration."""

import dataclasses
import importlib

import forked
import pytest

from lmim_fast.config import (
    DataConfig,
    GuidanceConfig,
    ModelConfig,
    PretrainConfig,
    RenderConfig,
    preset,
)
from lmim_fast.config.io import config_hash, from_dict, to_dict

OPTIONAL = (
    "lmdb",
    "cv2",
    "nvidia",
    "tyro",
    "rich",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "PIL",
    "psutil",
    "rapidfuzz",
    "zhconv",
)


def run_python(code: str) -> str:
    result = forked.run("-c", code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_models_and_ops_import_with_torch_triton_and_numpy_only() -> None:
    code = f"""
import importlib, pkgutil, sys
sys.modules.update({{name: None for name in {OPTIONAL!r}}})
import lmim_fast, lmim_fast.ops, lmim_fast.models, lmim_fast.kernels, lmim_fast.reference
for package in (lmim_fast.ops, lmim_fast.models, lmim_fast.kernels):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(package.__name__ + "." + module.name)
print("ok")
"""
    assert run_python(code) == "ok"


def test_training_steps_need_neither_records_nor_their_pipeline_nor_the_command_line() -> None:
    code = """
import sys
sys.modules.update({name: None for name in ("lmdb", "nvidia", "tyro", "rapidfuzz", "zhconv")})
import lmim_fast.train.step
from lmim_fast.config import recipe
from lmim_fast.train.tasks import make_task
print(make_task(recipe("strong", data=("x",), size="tiny")).title)
"""
    assert run_python(code) == "Recogniser"


def test_ops_layers_and_models_import_neither_triton_nor_dynamo() -> None:
    code = """
import sys
import lmim_fast.layers, lmim_fast.models.lmim, lmim_fast.kernels.runtime
print([name for name in ("triton", "torch._dynamo") if name in sys.modules])
"""
    assert run_python(code) == "[]"


def test_import_takes_under_two_seconds_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import lmim_fast; print(time.perf_counter() - t)"
    assert any(float(run_python(code)) < 2.0 for _ in range(3))


def test_public_names_exist() -> None:
    import lmim_fast

    for name in lmim_fast.__all__:
        assert getattr(lmim_fast, name) is not None


def test_sizes_of_the_small_model() -> None:
    config = preset("small")
    assert (config.grid, config.num_patches, config.num_visible) == ((8, 32), 256, 51)
    assert (config.patch_pixels, config.target_width) == (48, 384)
    assert preset("small", target="pixel").target_width == 48


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"width": 385}, "385"),
        ({"heads": 7}, "7 heads"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.999}, "0.999"),
        ({"decoder_dropout": 1.0}, r"\[0, 1\)"),
        ({"image_size": (30, 128)}, "patch_size 4"),
        ({"image_size": (32, 100)}, "square number of patches, got 200"),
        ({"depth": 0}, r"depth must be in \[1, 65536\]"),
        ({"mlp_ratio": 0.001}, "mlp_ratio .* width 384, got 0.001"),
        ({"mlp_ratio": 0.01, "decoder_width": 96}, "mlp_ratio .* width 96, got 0.01"),
        ({"mlp_ratio": -4.0}, "mlp_ratio .*-4"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio .*inf"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio .*nan"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("small", **override)


def test_an_mlp_of_one_unit_is_allowed() -> None:
    assert preset("small", mlp_ratio=1 / 384).mlp_ratio == 1 / 384


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"contrast": (-0.1, 1.0)}, r"contrast must be >= 0, got \(-0.1, 1.0\)"),
        ({"contrast": (0.5, float("inf"))}, "contrast must be finite"),
        ({"blur_sigma": (0.0, 1.0)}, r"blur_sigma must be in \(0, 5\], got \(0.0, 1.0\)"),
        ({"blur_sigma": (0.5, 5.1)}, "blur_sigma .*5.1"),
        ({"blur_sigma": (float("nan"), 1.0)}, "blur_sigma .*nan"),
        ({"crop_vertical": (0.0, 0.5)}, r"crop_vertical must be in \[0, 0.5\), got \(0.0, 0.5\)"),
        ({"crop_horizontal": (-0.1, 0.1)}, "crop_horizontal .*-0.1"),
        ({"sharpen_alpha": (0.0, 1.5)}, r"sharpen_alpha must be in \[0, 1\], got \(0.0, 1.5\)"),
        ({"sharpen_lightness": (-1.0, 0.5)}, "sharpen_lightness must be >= 0"),
        ({"rotate_degrees": (-15.0, float("inf"))}, "rotate_degrees must be finite"),
        ({"piecewise_scale": (-0.01, 0.05)}, "piecewise_scale must be >= 0"),
        ({"perspective_scale": (-0.01, 0.05)}, "perspective_scale must be >= 0"),
        ({"solarize_threshold": (32.0, 256.0)}, r"solarize_threshold must be in \[0, 255\]"),
        ({"solarize_threshold": (-1.0, 128.0)}, "solarize_threshold"),
        ({"grayscale_alpha": (-0.5, 1.0)}, "grayscale_alpha"),
        ({"jitter": (0.4, -0.4, 0.2, 0.1)}, "jitter must be >= 0"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue of jitter must be at most 0.5"),
        ({"jitter": (0.4, float("nan"), 0.2, 0.1)}, "jitter must be finite"),
        ({"jitter_probability": 1.1}, r"jitter_probability must be in \[0, 1\], got 1.1"),
        ({"grayscale_probability": -0.1}, "grayscale_probability"),
    ],
)
def test_a_guidance_view_that_cannot_be_made_is_refused(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**override)


def test_the_bounds_of_a_guidance_view_are_allowed() -> None:
    GuidanceConfig(
        contrast=(0.0, 3.0),
        blur_sigma=(0.01, 5.0),
        crop_vertical=(0.0, 0.49),
        crop_horizontal=(0.0, 0.49),
        sharpen_alpha=(0.0, 1.0),
        sharpen_lightness=(0.0, 2.0),
        rotate_degrees=(-180.0, 180.0),
        piecewise_scale=(0.0, 0.0),
        perspective_scale=(0.0, 0.0),
        solarize_threshold=(0.0, 255.0),
        grayscale_alpha=(0.0, 1.0),
        jitter=(0.0, 2.0, 2.0, 0.5),
        jitter_probability=1.0,
        grayscale_probability=0.0,
    )


@pytest.mark.parametrize("pixels", [0, 2**40 + 1])
def test_a_pixel_limit_that_the_header_reader_refuses_is_refused(pixels: int) -> None:
    with pytest.raises(ValueError, match=rf"max_pixels must be in \[1, 2\^40\], got {pixels}"):
        DataConfig(max_pixels=pixels)
    assert DataConfig(max_pixels=2**40).max_pixels == 2**40


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    for config, options in ((PretrainConfig, {"data": ("a",)}), (RenderConfig, {})):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\^64\), got {seed}"):
            config(seed=seed, **options)
        assert config(seed=2**64 - 1, **options).seed == 2**64 - 1


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="'huge'; choose from tiny, small, base"):
        preset("huge")


def test_a_config_survives_json_and_its_hash_sees_every_change() -> None:
    config = PretrainConfig(data=("a", "b"), model=preset("tiny"), view=GuidanceConfig(contrast=(0.6, 0.9)))
    assert from_dict(PretrainConfig, to_dict(config)) == config
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, align_weight=0.5))
    assert config_hash(changed) != config_hash(config)
    with pytest.raises(ValueError, match="ModelConfig has no field depht"):
        from_dict(ModelConfig, {"depht": 3})


@pytest.mark.parametrize(
    "names",
    [
        "lmim_fast.config PretrainConfig ModelConfig preset",
        "lmim_fast.reference ReferenceLMIM ReferenceMAE",
        "lmim_fast.models.lmim LMIM",
        "lmim_fast.models.mae MAE",
        "lmim_fast.models.weights load_encoder read_state_dict",
        "lmim_fast.pretrain run_pretrain",
        "lmim_fast.evaluate run_evaluate",
        "lmim_fast.evaluation.scoring evaluate_store",
        "lmim_fast.report write_report",
        "lmim_fast.kernels.runtime recording",
        "benchmarks.static main",
        "benchmarks.bench_step main",
    ],
)
def test_import_paths_that_documents_and_users_have_stay(names: str) -> None:
    module, *members = names.split()
    imported = importlib.import_module(module)
    assert all(hasattr(imported, member) for member in members)
