"""Released and plain weights in and out."""

import argparse
import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmim_fast.config import preset
from lmim_fast.errors import WeightsError
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.models.weights import load_encoder, load_released, read_state_dict, save_encoder, to_released
from lmim_fast.reference import ReferenceLMIM

CONFIG = preset("tiny", depth=2, decoder_depth=1)
OTHER = preset("tiny", depth=2, width=48, decoder_depth=1)


def released_file(path: Path, key: str | None = "model") -> tuple[Path, LMIM]:
    """A file as the released code writes it: an argparse.Namespace and optimiser state beside the model."""
    model = LMIM(CONFIG)
    state = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    whole = {key: state, "optimizer": optimizer, "epoch": 9, "args": argparse.Namespace(lr=1.0)}
    content = state if key is None else whole
    torch.save(content, path)
    return path, model


@pytest.mark.parametrize("key", ["model", "module", None])
def test_r15_released_file_loads_bit_for_bit(tmp_path: Path, key: str | None) -> None:
    path, source = released_file(tmp_path / "checkpoint.pth", key)
    for model in (LMIM(CONFIG), ReferenceLMIM(CONFIG)):
        load_released(path, model)
        for name, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name


def test_export_and_import_are_inverse(tmp_path: Path) -> None:
    source, target = LMIM(CONFIG), LMIM(CONFIG)
    load_released(to_released(source), target)
    torch.save({"model": to_released(target)}, tmp_path / "export.pth")
    exported = read_state_dict(tmp_path / "export.pth")
    assert list(exported) == list(source.state_dict())
    assert all(torch.equal(exported[name], value) for name, value in source.state_dict().items())


def test_r15_an_encoder_loads_from_every_kind_of_file_with_a_report_of_its_keys(tmp_path: Path) -> None:
    lmim_path, lmim = released_file(tmp_path / "lmim.pth")
    mae = MAE(CONFIG)
    torch.save({"model": mae.state_dict(), "args": argparse.Namespace()}, tmp_path / "maerec.pth")
    plain = save_encoder(lmim, tmp_path / "encoder.safetensors")
    cases = [
        (lmim_path, lmim.model_maeenc.state_dict(), "LMIM"),
        (tmp_path / "maerec.pth", mae.state_dict(), "MAE"),
        (plain, lmim.model_maeenc.state_dict(), "encoder"),
    ]
    for path, expected, kind in cases:
        student = LMIM(CONFIG)
        report = load_encoder(path, student.model_maeenc_momentum)
        assert report.kind == kind
        for name, value in student.model_maeenc_momentum.state_dict().items():
            assert torch.equal(value, expected[name]), (kind, name)
        assert set(report.loaded) == set(student.model_maeenc.state_dict())
    assert all(
        name.startswith(("decoder", "mask_token"))
        for name in load_encoder(cases[1][0], Encoder(CONFIG)).ignored
    )


def test_loading_an_encoder_leaves_an_mae_decoder_alone(tmp_path: Path) -> None:
    path = save_encoder(LMIM(CONFIG), tmp_path / "encoder.safetensors")
    model = MAE(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_encoder(path, model)
    for name, value in model.state_dict().items():
        if name.startswith(("decoder", "mask_token")):
            assert torch.equal(value, before[name]), name
    assert torch.equal(model.norm.weight, load_file(path)["norm.weight"])


def test_a_student_refuses_weights_of_another_position_grid_and_a_teacher_takes_them(tmp_path: Path) -> None:
    folded = LMIM(CONFIG)
    path = save_encoder(folded, tmp_path / "encoder.safetensors")
    model = LMIM(dataclasses.replace(CONFIG, pos_grid="true"))
    with pytest.raises(
        WeightsError,
        match=r"positions of 16 x 16 patches, the model has those of 8 x 32: set --model\.pos-grid released",
    ):
        load_encoder(path, model.model_maeenc, keep_positions=True)
    load_encoder(path, model.model_maeenc_momentum)
    assert torch.equal(model.model_maeenc_momentum.pos_embed, folded.model_maeenc.pos_embed)
    load_encoder(path, LMIM(CONFIG).model_maeenc, keep_positions=True)


def test_saved_encoder_holds_the_student_without_prefix(tmp_path: Path) -> None:
    for model in (LMIM(CONFIG), MAE(CONFIG)):
        tensors = load_file(save_encoder(model, tmp_path / "encoder.safetensors"))
        encoder = model.model_maeenc if isinstance(model, LMIM) else model
        expected = Encoder(CONFIG).state_dict()
        assert set(tensors) == set(expected)
        assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in tensors.items())
    assert os.listdir(tmp_path) == ["encoder.safetensors"]


def test_an_encoder_of_another_size_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    path = save_encoder(LMIM(OTHER), tmp_path / "other.safetensors")
    model = LMIM(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"misshaped: cls_token \[1, 1, 48\] instead of \[1, 1, 96\]"):
        load_encoder(path, model.model_maeenc_momentum)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_r15_missing_and_extra_tensors_are_listed() -> None:
    state = to_released(LMIM(CONFIG))
    removed = state.pop("decoder_norm.weight")
    state["decoder_norm.scale"] = removed
    with pytest.raises(WeightsError) as caught:
        load_released(state, LMIM(CONFIG))
    assert "1 missing: decoder_norm.weight [96]" in str(caught.value)
    assert "1 extra: decoder_norm.scale [96]" in str(caught.value)


def test_r15_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(witness),)

    torch.save({"model": LMIM(CONFIG).state_dict(), "args": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    for name in ("trap.pth", "trap.pkl"):
        with pytest.raises(WeightsError, match=r"was not read: it calls posix\.mkdir .* do not load it"):
            read_state_dict(tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors", "empty.pth", "absent.pth"])
def test_unreadable_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not name.startswith("absent"):
        path.write_bytes(b"" if name.startswith("empty") else os.urandom(300))
    with pytest.raises(WeightsError, match=name):
        read_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_any_damaged_bytes_are_refused_alike(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for _ in range(500):
        path.write_bytes(random.bytes(300))
        with pytest.raises(WeightsError, match=r"no checkpoint|not a readable"):
            read_state_dict(path)


def test_a_file_without_an_encoder_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"model": {"head.weight": torch.zeros(2)}}, tmp_path / "head.pth")
    with pytest.raises(
        WeightsError, match=r"no encoder \(cls_token .*: head\.weight; they begin with `head\.` \(1\)"
    ):
        load_encoder(tmp_path / "head.pth", Encoder(CONFIG))


def test_r22_non_finite_weights_are_not_exported() -> None:
    model = LMIM(CONFIG)
    with torch.no_grad():
        model.decoder_pred.bias[3] = float("nan")
    with pytest.raises(WeightsError, match=r"decoder_pred\.bias"):
        to_released(model)
