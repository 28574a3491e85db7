"""What is done to a model before it is trained."""

import pytest
import torch

from lmim_fast.config import ModelConfig, PretrainConfig
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.train import parallel
from lmim_fast.train.world import World

WORLD = World(0, 1, torch.device("cpu"))
MODEL = ModelConfig(
    **dict(width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_ffn=64)
)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_teachers_matrices_and_no_others_are_bf16_in_a_bf16_run(precision, dtype):
    model = LMIM(MODEL)
    parallel.place(model, PretrainConfig(data=("x",), model=MODEL, precision=precision), WORLD)
    matrices = {
        name
        for name, module in model.model_maeenc_momentum.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.dtype == dtype
    }
    assert len(matrices) == 5  # patches, qkv, proj, fc1, fc2
    rest = [p for name, p in model.named_parameters() if "momentum" not in name]
    assert {p.dtype for p in rest} == {torch.float32}


def test_a_model_without_frozen_matrices_stays_as_it_is():
    model = MAE(MODEL)
    parallel.frozen_to_bf16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_one_process_trains_the_model_itself():
    layer = torch.nn.Linear(1, 1)
    assert parallel.wrap(layer, PretrainConfig(data=("x",)), WORLD) is layer
