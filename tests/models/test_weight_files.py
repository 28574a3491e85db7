"""Other people's files of weights: models are found under their keys and prefixes, and the rest is named."""

import gzip
import io
import json
import pathlib
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from lmim_fast.config import ModelConfig
from lmim_fast.errors import WeightsError
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.weight_files import read_content
from lmim_fast.models.weights import encoder_safetensors, load_encoder, read_weights

CONFIG = ModelConfig(width=16, depth=1, heads=1, decoder_width=16, decoder_heads=1)
NAMES = len(Encoder(CONFIG).state_dict())


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    encoder = Encoder(CONFIG)
    torch.nn.init.normal_(encoder.cls_token)
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def under(prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors(seed).items()}


def loaded(path: str | Path) -> tuple[Encoder, tuple[str, ...]]:
    encoder = Encoder(CONFIG)
    return encoder, load_encoder(path, encoder).notes


KEYS = ("model_state_dict", "net", "encoder", "teacher", "state_dict", "student", "module")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.encoder.", "module._orig_mod.encoder.")


@pytest.mark.parametrize(
    ("key", "prefix"),
    [*((key, "") for key in KEYS), *((None, prefix) for prefix in PREFIXES), ("net", "module.")],
)
def test_an_encoder_is_found_under_any_key_and_prefix(tmp_path: Path, key: str | None, prefix: str) -> None:
    path = tmp_path / "x.pth"
    state = under(prefix) | ({"head_of_mine.weight": torch.ones(1)} if prefix else {})
    torch.save(state if key is None else {key: state, "epoch": 3}, path)
    encoder, notes = loaded(path)
    assert all(torch.equal(value, tensors()[name]) for name, value in encoder.state_dict().items())
    assert notes == ((f"stripped `{prefix}` from {NAMES} names",) if prefix else ())


def test_of_several_models_the_trained_one_is_taken_and_a_key_takes_another(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for first, second in (
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "ema"),
        ("student", "teacher"),
    ):
        optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "exp_avg": under("", 7)}
        torch.save({second: under("module.", 2), first: under("", 1), "optimizer": optimizer}, path)
        encoder, notes = loaded(path)
        assert torch.equal(encoder.cls_token, tensors(1)["cls_token"])
        also = f"the file also holds `{second}.module`: name {path}::{second}.module to take it"
        assert notes == (f"took `{first}`; {also}",)
        encoder, notes = loaded(f"{path}::{second}")
        assert torch.equal(encoder.cls_token, tensors(2)["cls_token"])
        assert notes[-1] == f"took `{second}.module` as named"
    with pytest.raises(WeightsError, match=r"has no model at `gone`; it has student, teacher\.module$"):
        loaded(f"{path}::gone")


def test_models_of_which_none_is_the_first_choice_are_named(tmp_path: Path) -> None:
    torch.save(under("left.") | under("right."), tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match=r"holds 2 models, at `left`, `right`: name one as .*x\.pth::right"
    ):
        loaded(tmp_path / "x.pth")
    torch.save({"vit.embeddings.cls_token": torch.ones(1), "vit.a": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"no encoder .* as timm names them.* begin with `vit\.` \(2\)"):
        loaded(tmp_path / "x.pth")


def test_names_with_control_characters_are_escaped(tmp_path: Path) -> None:
    torch.save(under("\x1b[31m."), tmp_path / "x.pth")
    (note,) = loaded(tmp_path / "x.pth")[1]
    assert note == f"stripped `\\x1b[31m.` from {NAMES} names"


def test_the_head_of_a_timm_vit_is_left_out_and_said_and_another_layout_is_not_written(
    tmp_path: Path,
) -> None:
    vit = tensors() | {"head.weight": torch.ones(2, 16), "head.bias": torch.ones(2)}
    (tmp_path / "out.safetensors").write_bytes(encoder_safetensors(vit))
    assert loaded(tmp_path / "out.safetensors")[1] == ()
    torch.save(vit, tmp_path / "vit.pth")
    assert loaded(tmp_path / "vit.pth")[1] == ("left out head.weight, head.bias: no part of the encoder",)
    vit["fc_norm.weight"] = vit.pop("norm.weight")
    with pytest.raises(WeightsError, match=r"1 missing: norm\.weight; 1 extra: fc_norm\.weight"):
        encoder_safetensors(vit)


def test_a_learned_position_table_is_taken_and_said(tmp_path: Path) -> None:
    state = tensors() | {"pos_embed": torch.randn(1, 257, 16)}
    torch.save(state, tmp_path / "x.pth")
    encoder = Encoder(CONFIG)
    (note,) = load_encoder(tmp_path / "x.pth", encoder, keep_positions=True).notes
    assert "taken as it is" in note
    assert torch.equal(encoder.pos_embed, state["pos_embed"])


def test_what_the_name_ends_in_does_not_matter(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.pth")
    torch.save(tensors(), tmp_path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(), "x.pth")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("x.pth", "x.safetensors", "model.safetensors.index.json"):
        assert torch.equal(loaded(tmp_path / name)[0].cls_token, tensors()["cls_token"])
    (tmp_path / "bad.json").write_text(json.dumps({"weight_map": {"a": "../x.pth"}}))
    with pytest.raises(WeightsError, match="outside its folder"):
        loaded(tmp_path / "bad.json")


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("vit/weights.pth"))
    else:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("vit/weights.pth", b"1")
    return buffer.getvalue()


def cut_tar() -> bytes:
    member = tarfile.TarInfo("vit/weights.pth")
    member.size = 5000
    return member.tobuf() + b"x" * 600


def checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    return buffer.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "page.pth": (b"\n<!DOCTYPE html><html><body>Sign in", "is a web page, not weights"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run `git lfs pull`"),
    "half.pth": (cut_tar(), "is a tar archive that was cut short"),
    "tar.pth": (archive("tar"), r"is a tar archive: unpack it with `tar xf` .*\(vit/weights.pth\)"),
    "zip.pth": (archive("zip"), r"is a zip archive, but not of torch.save: .*\(vit/weights.pth\)"),
    "gz.pth": (gzip.compress(b"weights"), "is compressed by gzip: unpack it with `gunzip`"),
    "config.json": (b'{"hidden_size": 384, "layers": 12}', "is a JSON file without a weight_map"),
    "note.pth": (
        b"404: Not Found, try again\n",
        "is a text file, not weights; it begins with '404: Not Found",
    ),
    "empty.pth": (b"", r"is empty \(0 bytes\): copy or download it again"),
    "model.onnx": (b"\x08\x08\x12\x07pytorch" + bytes(40), "is an ONNX model"),
    "model.ckpt.index": (bytes(range(200)), "is the index of a TensorFlow checkpoint"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "short.pth": (checkpoint()[:3000], "is a checkpoint that was cut short"),
    "short.safetensors": (save(tensors())[:-40], "is a safetensors file that was cut short"),
    "header.safetensors": (save(tensors())[:60], "is a safetensors file that was cut short"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_content(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("thing", "named"),
    [(np.float64(3), "scalar"), (pathlib.PosixPath("x"), "pathlib"), (torch.nn.Linear(1, 1), "Linear")],
)
def test_a_harmless_object_is_named_and_the_advice_saves_the_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: Any, named: str, zipped: bool
) -> None:
    content = {"model": tensors(), "best": thing}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=rf"could run code: .*{named}.*; if you trust the file") as caught:
        read_weights(tmp_path / "x.pth")
    monkeypatch.chdir(tmp_path)
    command = str(caught.value).rpartition('python -c "')[2].removesuffix('"')
    exec(command, {})
    assert torch.equal(loaded("x-weights.pth")[0].cls_token, tensors()["cls_token"])
