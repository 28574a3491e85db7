"""What a user meets first: import, names, configuration."""

import dataclasses
import subprocess
import sys

import pytest

from lmim_fast.config import GuidanceConfig, ModelConfig, PretrainConfig, preset
from lmim_fast.config_io import config_hash, from_dict, to_dict

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
)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
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


def test_import_takes_under_two_seconds_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import lmim_fast; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 2.0


def test_public_names_exist() -> None:
    import lmim_fast

    for name in lmim_fast.__all__:
        assert getattr(lmim_fast, name) is not None


def test_sizes_of_the_small_model() -> None:
    config = preset("small")
    assert (config.grid, config.num_patches, config.num_visible, config.num_masked) == ((8, 32), 256, 51, 205)
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
        ({"depth": 0}, "depth must be positive"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("small", **override)


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
