"""Files of a recogniser: what is written is what is read, and what does not fit is named."""

import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmim_fast.config import ModelConfig, RecognizerConfig
from lmim_fast.errors import WeightsError
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import load_recognizer, save_recognizer

ENCODER = ModelConfig(width=64, depth=1, heads=1, decoder_width=32, decoder_heads=2)
SIZES = dict(encoder=ENCODER, decoder_width=64, decoder_depth=1, decoder_heads=1, decoder_ffn=32)


def reader(characters: str) -> Recognizer:
    return Recognizer(RecognizerConfig(classes=len(characters) + 3, **SIZES), characters).eval()


def same(one: Recognizer, other: Recognizer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_recogniser_comes_back_with_its_sizes_and_characters(tmp_path: Path) -> None:
    model = reader("abcß中")
    path = save_recognizer(model, tmp_path / "reader.safetensors")
    again = load_recognizer(path)
    assert (again.config, again.characters, again.training) == (model.config, "abcß中", False)
    assert same(model, again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["reader.safetensors"]


def test_a_file_holds_each_tensor_once(tmp_path: Path) -> None:
    path = save_recognizer(reader("ab"), tmp_path / "reader.safetensors")
    names = set(load_file(path))
    assert "pos_embed" in names
    assert {"encoder.pos_embed", "patch_embed.proj.weight"}.isdisjoint(names)
    assert "encoder.patch_embed.proj.weight" in names


def test_a_released_file_gives_its_sizes_by_its_shapes_and_the_english_characters(tmp_path: Path) -> None:
    model = reader(string.printable[:94])
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    again = load_recognizer(tmp_path / "released.pth")
    assert again.characters == string.printable[:94]
    assert again.config.encoder.width == 64
    assert (again.config.classes, again.config.max_length, again.config.decoder_depth) == (97, 25, 1)
    assert same(model, again)


def test_the_full_size_of_the_release_is_recognised(tmp_path: Path) -> None:
    model = Recognizer(RecognizerConfig())
    torch.save(model.state_dict(), tmp_path / "released.pth")
    assert load_recognizer(tmp_path / "released.pth").config == RecognizerConfig()


def test_a_released_file_of_unknown_characters_is_refused(tmp_path: Path) -> None:
    torch.save(reader("".join(map(chr, range(0x4E00, 0x4E80)))).state_dict(), tmp_path / "chinese.pth")
    with pytest.raises(WeightsError, match="has 128 characters and does not say which"):
        load_recognizer(tmp_path / "chinese.pth")


def test_an_encoder_is_no_recogniser_and_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = reader("ab")
    save_file(
        {name: value.clone() for name, value in model.encoder.state_dict().items()},
        tmp_path / "e.safetensors",
    )
    with pytest.raises(WeightsError, match=r"is no recogniser: it has no decoder\.trg_word_emb\.weight"):
        load_recognizer(tmp_path / "e.safetensors")
    state = model.state_dict()
    del state["linear_norm.0.weight"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(WeightsError, match=r"1 missing: linear_norm\.0\.weight \[64, 64\]"):
        load_recognizer(tmp_path / "broken.pth")


def test_r22_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = reader("ab")
    model.get_submodule("decoder.classifier").bias.data[0] = float("nan")
    with pytest.raises(WeightsError, match=r"non-finite values in decoder\.classifier\.bias"):
        save_recognizer(model, tmp_path / "reader.safetensors")
    assert not list(tmp_path.iterdir())
