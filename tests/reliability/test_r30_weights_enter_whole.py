"""R30: weights that are not finite, or are no floating-point numbers, are refused where they enter."""

from pathlib import Path

import pytest
import torch

from lmim_fast import cli
from lmim_fast.config import ModelConfig, RecognizerConfig
from lmim_fast.errors import WeightsError
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import load_recognizer
from lmim_fast.models.weights import load_encoder
from lmim_fast.train.recognizer_start import start_recognizer
from lmim_fast.train.start import load_student, load_teacher

CONFIG = ModelConfig(width=64, depth=1, heads=1, decoder_width=32, decoder_heads=2)
SIZES = dict(encoder=CONFIG, decoder_width=64, decoder_depth=1, decoder_heads=1, decoder_ffn=32)
NORM = "norm.weight"


def at(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.ones(64, dtype=dtype)
    weight[3] = value
    return weight


REFUSED = {
    "nan": (at(float("nan")), r"not finite in norm\.weight \(1 NaN and 0 infinite of 64\)"),
    "infinite": (at(float("inf"), torch.bfloat16), r"norm\.weight \(0 NaN and 1 infinite of 64\)"),
    "beyond fp32": (at(1e300, torch.float64), r"norm\.weight \(0 NaN and 1 infinite of 64\)"),
    "integer": (torch.ones(64, dtype=torch.int8), r"norm\.weight is of torch\.int8"),
    "complex": (torch.ones(64, dtype=torch.complex64), r"norm\.weight is of torch\.complex64"),
    "fp8": (torch.ones(64).to(torch.float8_e4m3fn), r"norm\.weight is of torch\.float8_e4m3fn"),
    "sparse": (torch.ones(64).to_sparse(), r"norm\.weight is sparse"),
    "meta": (torch.ones(64, device="meta"), r"norm\.weight is on the meta device"),
    "empty": (torch.ones(0), r"1 misshaped: norm\.weight \[0\] instead of \[64\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_r30_an_encoder_that_is_not_whole_is_refused_by_name_and_changes_nothing(
    tmp_path: Path, case: str
) -> None:
    value, message = REFUSED[case]
    encoder, path = Encoder(CONFIG), tmp_path / "x.pth"
    torch.save(encoder.state_dict() | {NORM: value}, path)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for load in (load_teacher, load_student):
        with pytest.raises(WeightsError, match=message):
            load(str(path), encoder, print)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("case", ["nan", "infinite", "integer", "sparse", "meta"])
def test_r30_a_recogniser_and_a_conversion_refuse_them_too(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value, _ = REFUSED[case]
    model, path = Recognizer(RecognizerConfig(classes=97, **SIZES)), tmp_path / "x.pth"
    state = dict(model.state_dict()) | {"encoder.norm.weight": value}
    torch.save(state, path)
    for load in (load_recognizer, lambda path: start_recognizer(str(path), model, print)):
        with pytest.raises(WeightsError, match=r"encoder\.norm\.weight"):
            load(path)
    for target in ("y.pth", "y.safetensors"):
        assert cli.main(["convert", str(path), str(tmp_path / target)]) == 1
        assert "norm.weight" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_shared_storage_load_into_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = Encoder(CONFIG)
    state = {name: value.to(dtype) for name, value in encoder.state_dict().items()}
    state["norm.bias"] = state["norm.weight"] = torch.ones(1, dtype=dtype).expand(64)
    torch.save(state, tmp_path / "x.pth")
    load_encoder(tmp_path / "x.pth", encoder)
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float()), name
