"""What the released layout cannot hold of a model is said by name, and of a released model nothing."""

import string

import pytest

from lmim_fast.config import preset
from lmim_fast.config.finetune import recognizer_preset
from lmim_fast.train.released import of_pretraining, of_recognizer

ALL = string.printable[:94]


@pytest.mark.parametrize("name", ["small", "base"])
def test_a_model_of_released_sizes_is_written_without_a_warning(name):
    assert of_pretraining(preset(name, mask_ratio=0.7, mae_decoder_depth=3), mae=False) == []
    assert of_pretraining(preset(name, decoder_ffn=64), mae=True) == []
    assert of_recognizer(recognizer_preset(name), ALL) == []
    assert of_recognizer(recognizer_preset(name, classes=39, max_length=40), ALL[:36]) == []


def test_other_sizes_and_characters_are_named():
    (lmim,) = of_pretraining(preset("base", decoder_depth=3, heads=6), mae=False)
    assert "released ViT-base: --model.heads 6 instead of 12, --model.decoder-depth 3 instead of 8; " in lmim
    (mae,) = of_pretraining(preset("small", mae_decoder_depth=3, image_size=(64, 64)), mae=True)
    assert "--model.image-size[0] 64 instead of 32" in mae
    assert "--model.mae-decoder-depth 3 instead of 8" in mae
    config = recognizer_preset("small", classes=7, max_length=30)
    sizes, characters = of_recognizer(config, "9876")
    assert ": --model.max-length 30 instead of 25; " in sizes
    assert "which its 4 characters are" in characters
    assert "--charset" in characters
