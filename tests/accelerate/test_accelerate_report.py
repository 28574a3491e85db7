"""The report of accelerate(model): what is selected, how it reads, what undo says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate_models import FAMILIES, WIDTH, VisionTransformer
from timm_like import Block, Mlp
from torch import nn

from lmim_fast import accelerate


def test_only_takes_classes_and_patterns_of_names() -> None:
    def names(**options: object) -> set[str]:
        with accelerate(FAMILIES["timm's ViT"].model(), **options) as report:
            assert not report.left
            return {row.name for row in report.swapped}

    assert names(only=Block) == {"blocks.0", "blocks.1"}
    assert names(only="blocks.1*") == {
        f"blocks.1{part}" for part in ("", ".norm1", ".attn", ".norm2", ".mlp")
    }
    assert names(only=[Mlp, "norm"]) == {"blocks.0.mlp", "blocks.1.mlp", "norm"}


def test_only_that_matches_nothing_lists_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm \(5\), ViT MLP \(2\), ViT attention \(2\)"):
        accelerate(VisionTransformer(), only=[nn.MultiheadAttention, "decoder.*"])
    with pytest.raises(ValueError, match="there are: none"):
        accelerate(nn.Linear(2, 2), only="*")
    with pytest.raises(TypeError, match="got 3"):
        accelerate(VisionTransformer(), only=[3])
    with pytest.raises(TypeError, match="got int"):
        accelerate(3)


def test_the_table_folds_stacks_and_counts_layers() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(12)), nn.Linear(4, 4))
    model[3].register_forward_hook(lambda *_: None)
    report = accelerate(model)
    model[5](torch.randn(0, 4))
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[1] == ["{0,1,2,4,6,7,8,9,10,11}", "x", "10", "LayerNorm", "swapped"]
    assert lines[2][:3] == ["3", "LayerNorm", "left"]
    assert " ".join(lines[3]) == "5 LayerNorm swapped runs its own forward: input of shape (0, 4)"
    assert " ".join(lines[4]) == "12 Linear left no fast form"
    assert " ".join(lines[-1]) == "11 swapped, 2 left"
    assert (
        str(accelerate(nn.Sequential(*(nn.LayerNorm(4) for _ in range(12)))))
        .splitlines()[1]
        .startswith("0..11 x 12")
    )


def test_a_class_changed_by_others_is_named_by_undo() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
    report = accelerate(model)
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    with pytest.raises(RuntimeError, match="changed since: 0"):
        report.undo()
    assert type(model[1]) is nn.LayerNorm
    report = accelerate(model[1])
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    with pytest.raises(RuntimeError, match="changed since: the model"):
        accelerate.undo(model[1])
    with pytest.raises(RuntimeError, match="changed since: the model"):
        report.undo()


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Use a fast layer in your own model\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "layers.0..3 x 4" in printed
    assert "16 swapped, 0 left" in printed
    assert printed.rstrip().endswith("torch.Size([2, 257, 384])")
