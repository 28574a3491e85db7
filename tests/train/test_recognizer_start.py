"""A recogniser starts from an encoder, from a recogniser, or from one with other characters."""

from pathlib import Path

import pytest
import torch

from lmim_fast.config import ModelConfig, RecognizerConfig
from lmim_fast.errors import UsageError, WeightsError
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import save_recognizer
from lmim_fast.models.weights import save_encoder
from lmim_fast.train.recognizer_start import start_recognizer

ENCODER = ModelConfig(width=64, depth=1, heads=1, decoder_width=32, decoder_heads=2)
SIZES = dict(encoder=ENCODER, decoder_width=64, decoder_depth=1, decoder_heads=1, decoder_ffn=32)
EMBEDDING, WEIGHT, BIAS = (
    "decoder.trg_word_emb.weight",
    "decoder.classifier.weight",
    "decoder.classifier.bias",
)


def reader(characters: str, seed: int = 0, **changes: object) -> Recognizer:
    torch.manual_seed(seed)
    model = Recognizer(RecognizerConfig(**{"classes": len(characters) + 3, **SIZES, **changes}), characters)
    torch.nn.init.normal_(model.get_parameter(BIAS))
    return model


def test_an_encoder_fills_the_encoder_and_leaves_the_decoder(tmp_path: Path) -> None:
    lmim, model, said = LMIM(ENCODER), reader("ab"), []
    before = model.get_parameter(EMBEDDING).clone()
    start_recognizer(str(save_encoder(lmim, tmp_path / "encoder.safetensors")), model, said.append)
    for name, value in lmim.model_maeenc.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    assert torch.equal(model.get_parameter(EMBEDDING), before)
    assert said == [f"encoder starts from {tmp_path / 'encoder.safetensors'}"]


def test_a_released_lmim_file_fills_the_encoder_with_its_student(tmp_path: Path) -> None:
    lmim, model = LMIM(ENCODER), reader("ab")
    torch.save({"model": lmim.state_dict()}, tmp_path / "lmim.pth")
    start_recognizer(str(tmp_path / "lmim.pth"), model, print)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, lmim.model_maeenc.blocks[0].attn.qkv.weight)


def test_a_recogniser_fills_all_and_a_run_folder_gives_its_best(tmp_path: Path) -> None:
    best, last, model = reader("ab", 1), reader("ab", 2), reader("ab", 3)
    (tmp_path / "best").mkdir()
    save_recognizer(best, tmp_path / "best" / "recognizer.safetensors")
    save_recognizer(last, tmp_path / "recognizer.safetensors")
    start_recognizer(str(tmp_path), model, print)
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_characters_keep_the_rows_of_the_shared_ones_and_of_the_special_classes(tmp_path: Path) -> None:
    old, new, said = reader("abcd", 1), reader("dxb", 2), []
    fresh = {name: new.get_parameter(name).clone() for name in (EMBEDDING, WEIGHT, BIAS)}
    start_recognizer(str(save_recognizer(old, tmp_path / "old.safetensors")), new, said.append)
    # d and b; EOS, PAD, UNK; the start token, which only the embedding has
    pairs = {0: 3, 2: 1, 3: 4, 4: 5, 5: 6}
    for name in (EMBEDDING, WEIGHT, BIAS):
        ours, theirs = new.get_parameter(name), old.get_parameter(name)
        for row, source in pairs.items() | ({(6, 7)} if name == EMBEDDING else set()):
            assert torch.equal(ours[row], theirs[source]), (name, row)
        assert torch.equal(ours[1], fresh[name][1]), "a new character stays as it was"
    assert torch.equal(new.encoder.cls_token, old.encoder.cls_token)
    assert "2 of 3 kept" in said[0]
    assert said[1:] == ["new characters, to be learned: x", "characters that are no longer read: ac"]


def test_a_transplanted_recogniser_reads_shared_characters_as_before(tmp_path: Path) -> None:
    old, new = reader("abcd", 1).eval(), reader("dcba", 2).eval()
    start_recognizer(str(save_recognizer(old, tmp_path / "old.safetensors")), new, print)
    images = torch.rand(2, 3, 32, 128) * 2 - 1
    first, second = old.greedy(images), new.greedy(images)
    assert first.strings == second.strings
    torch.testing.assert_close(first.word_probabilities, second.word_probabilities)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = str(save_recognizer(reader("ab"), tmp_path / "old.safetensors"))
    with pytest.raises(
        WeightsError, match=r"decoder\.layer_stack\.0\.mlp\.w_1\.bias \[32\] instead of \[16\]"
    ):
        start_recognizer(path, reader("abc", decoder_ffn=16), print)
    with pytest.raises(UsageError, match="does not exist"):
        start_recognizer(str(tmp_path / "gone"), reader("ab"), print)
    with pytest.raises(UsageError, match="not the folder of a run"):
        start_recognizer(str(tmp_path), reader("ab"), print)
