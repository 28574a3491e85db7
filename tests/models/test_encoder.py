"""Position tables against the oracle."""

import pytest
import torch

from lmim_fast.config import ModelConfig, preset
from lmim_fast.models.encoder import position_table
from lmim_fast.reference import sincos_table


@pytest.mark.parametrize("grid", ["released", "true"])
def test_position_table_is_the_oracle_table(grid: str) -> None:
    config = preset("tiny", pos_grid=grid)
    assert torch.equal(position_table(96, config), sincos_table(96, config))


def test_released_positions_fold_the_line_and_true_ones_do_not() -> None:
    released, true = position_table(64, ModelConfig()), position_table(64, ModelConfig(pos_grid="true"))
    assert torch.equal(released[0, 1 + 16, :32], released[0, 1, :32]), "column 16 has column 0's x"
    assert not torch.equal(true[0, 1 + 16, :32], true[0, 1, :32])
    assert torch.equal(true[0, 1 + 32, :32], true[0, 1, :32]), "the next row begins at column 0"
