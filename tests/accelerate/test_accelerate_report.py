"""The report of accelerate(model): what is known and selected, how it reads, what a check refuses."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm_like
import torch
from accelerate_models import FAMILIES, HEADS, LIKE, WIDTH, MaskedAutoencoder, VisionTransformer, accelerated
from foreign_layers import MlpBlock
from timm_like import Block, Mlp
from torch import Tensor, nn

from lmim_fast import accelerate
from lmim_fast.layers.fast_forwards import CLASSES, FORMS
from lmim_fast.ops import dispatch


def named_as(qualified: str, base: type[nn.Module]) -> type[nn.Module]:
    """A copy of a class under the name of another package's."""
    module, name = qualified.rsplit(".", 1)
    methods = {}
    for key, value in vars(base).items():
        if callable(value) and key in ("__init__", "forward", "random_masking"):
            home = value.__globals__ | {"__name__": module}
            value = type(value)(value.__code__, home, key, value.__defaults__, value.__closure__)
        if key != "__dict__":
            methods[key] = value
    return type(name, base.__bases__, methods | {"__module__": module, "__qualname__": name})


@pytest.mark.parametrize("qualified", [name for name, form in CLASSES.items() if form == "timm.Mlp"])
def test_classes_are_known_by_their_exact_names_without_their_package(qualified: str) -> None:
    class Further(named_as(qualified, Mlp)):  # type: ignore[misc]
        pass

    known = named_as(qualified, Mlp)
    model = nn.Sequential()
    for cls in (known, Further, Mlp):
        layer = cls.__new__(cls)
        layer.__dict__ = copy.deepcopy(Mlp(WIDTH, 40)).__dict__
        model.append(layer)
    report = accelerate(model)
    assert [row.swapped for row in report.rows[:3]] == [True, False, False]
    assert report.rows[0].kind == qualified
    assert {row.reason for row in report.left} == {"no fast form"}


def test_a_class_that_another_package_has_patched_is_left() -> None:
    cls = named_as("timm.layers.mlp.Mlp", Mlp)
    own = cls.forward
    layer = cls.__new__(cls)
    layer.__dict__ = Mlp(WIDTH, 40).__dict__
    for patched in (lambda self, x: -x, functools.wraps(own)(lambda self, x: -own(self, x))):
        cls.forward = patched
        (row,) = [row for row in accelerate(layer).rows if row.name == ""]
        assert row.reason == f"the forward of its class was patched by {__name__}"
    inherited = type("MLPBlock", (nn.Sequential,), {"__module__": "torchvision.models.vision_transformer"})
    assert accelerate(inherited(*MlpBlock(WIDTH, 40))).rows[0].swapped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda results: results, "its random_masking"),
        (lambda results: (results[0].flip(1), *results[1:]), "its random_masking is another: it gives other"),
        (lambda results: (*results, results[2]), "its random_masking is another: too many values"),
    ],
)
def test_models_that_share_the_name_of_the_public_mae_but_not_its_masking_are_left(
    change: Callable[..., object], reason: str
) -> None:
    cls = named_as("models_mae.MaskedAutoencoderViT", MaskedAutoencoder)
    own = cls.random_masking
    vary = "lambda self, x, mask_ratio: change(own(self, x, mask_ratio))"
    cls.random_masking = eval(vary, {"change": change, "own": own, "__name__": "models_mae"})
    model = cls.__new__(cls)
    model.__dict__ = MaskedAutoencoder().__dict__
    before = torch.get_rng_state()
    row = accelerate(model).rows[0]
    assert row.note.startswith(reason)
    assert row.swapped == (reason == "its random_masking")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_that_is_not_what_like_says_has_a_row_that_says_why() -> None:
    beside = "has bias, weight beside what its form knows"
    for form, reason in {"mae.random_masking": "has no random_masking", "timm.Mlp": beside}.items():
        assert accelerate(nn.Linear(2, 2), like={nn.Linear: form}).rows[0].reason == reason

    class Attention(timm_like.Attention):
        def __init__(self) -> None:
            super().__init__(WIDTH, HEADS)
            del self.num_heads

    row = accelerate(Attention(), like={Attention: "timm.Attention"}).rows[0]
    assert row.reason == "'Attention' object has no attribute 'num_heads'"


def test_a_part_that_a_later_version_adds_is_not_bypassed() -> None:
    for path, name in {"": "adapter", "attn": "rope", "mlp": "gate"}.items():
        block = Block(WIDTH, HEADS)
        block.get_submodule(path).add_module(name, nn.Identity())
        (row,) = [row for row in accelerated(block).rows if row.name == ""]
        assert row.reason.endswith(f"has {name} beside what its form knows")


def test_without_a_device_nothing_is_bound_and_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    norm = nn.LayerNorm(4)
    with dispatch.backend("auto"):
        assert "no CUDA device in this process" in str(accelerate(norm))
        assert "forward" not in vars(norm)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "no CUDA device" not in str(accelerate(norm))
        assert "forward" in vars(norm)


def test_every_class_has_a_form() -> None:
    assert set(CLASSES.values()) <= FORMS.keys()
    assert set(FORMS) == set(CLASSES.values())


def test_only_takes_classes_and_patterns_of_names() -> None:
    def names(**options: object) -> set[str]:
        with accelerated(FAMILIES["timm's ViT"].model(), **options) as report:
            assert not report.left
            return {row.name for row in report.swapped}

    assert names(only=Block) == {"blocks.0", "blocks.1"}
    assert names(only="blocks.1*") == {
        f"blocks.1{part}" for part in ("", ".norm1", ".attn", ".norm2", ".mlp")
    }
    assert names(only=[Mlp, "norm"]) == {"blocks.0.mlp", "blocks.1.mlp", "norm"}


def test_wrong_arguments_say_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"timm\.Attention \(2\), timm\.Block \(2\), timm\.Mlp \(2\)"):
        accelerated(VisionTransformer(), only=[nn.MultiheadAttention, "decoder.*"])
    with pytest.raises(ValueError, match="there are: none"):
        accelerate(nn.Linear(2, 2), only="*")
    for only in (3, [3]):
        with pytest.raises(TypeError, match="got 3"):
            accelerate(VisionTransformer(), only=only)
    with pytest.raises(TypeError, match="got int"):
        accelerate(3)
    with pytest.raises(ValueError, match=r"unknown form 'timm\.Blok'; choose from .*timm\.Block"):
        accelerate(nn.Linear(2, 2), like={Block: "timm.Blok"})
    with pytest.raises(TypeError, match="module classes, got 'Block'"):
        accelerate(nn.Linear(2, 2), like={"Block": "timm.Block"})


def test_layers_that_a_reader_expects_have_a_row_with_a_reason() -> None:
    class WindowAttention(nn.Module):
        pass

    class RotaryDecoderLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm = WindowAttention(), nn.RMSNorm(8)

    model = nn.Sequential(RotaryDecoderLayer(), nn.MultiheadAttention(8, 2, kdim=4), nn.ReLU())
    rows = {row.name: row for row in accelerate(model).rows}
    assert rows["0"].kind.endswith("RotaryDecoderLayer")
    assert {rows[name].reason for name in ("0", "0.attn", "0.norm")} == {"no fast form"}
    assert rows["0.norm"].kind == "torch.nn.modules.normalization.RMSNorm"
    assert rows["1"].reason == "kdim or vdim differs from embed_dim"
    assert "2" not in rows


def test_the_reason_names_the_package_of_a_class() -> None:
    class Linear(nn.Linear):
        pass

    block = Block(WIDTH, HEADS)
    block.attn.qkv = Linear(WIDTH, 3 * WIDTH)
    (row,) = [row for row in accelerated(block).rows if row.name == ""]
    assert re.fullmatch(rf"attn: qkv is a {__name__}\..*\.Linear", row.reason)


def test_nothing_is_run_or_allocated_however_wide_a_layer_is() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(4096, 32, 16384, 0.0, batch_first=True)
        model = nn.Sequential(layer, Block(4096, 32))
    assert {"0", "1"} <= {row.name for row in accelerated(model).swapped}


def test_a_shared_module_has_a_row_for_each_name() -> None:
    norm = nn.LayerNorm(4)
    report = accelerate(nn.ModuleList([norm, norm]))
    assert [(row.name, row.reason) for row in report.rows] == [("0", ""), ("1", "same module as 0")]


def test_a_second_call_swaps_nothing_twice_and_takes_nothing_back() -> None:
    norm = nn.LayerNorm(4)
    with accelerate(norm):
        with accelerate(norm) as second:
            assert second.left[0].reason == "swapped already"
        assert "forward" in vars(norm)
    assert "forward" not in vars(norm)


class Scaled(Block):
    """A block that is not what it is said to be like."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-2)


class ToOne(nn.Module):
    """A model with the block."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.block, self.unused, self.drop = cls(WIDTH, HEADS), cls(WIDTH, HEADS), nn.Dropout(0.5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.norm(input=self.block(self.drop(scale * x)))


def test_a_check_compares_both_forwards_on_what_reaches_each_layer() -> None:
    like = LIKE | {Scaled: "timm.Block"}
    for cls, inputs in (
        (Block, torch.randn(2, 5, WIDTH)),
        (Scaled, {"x": torch.randn(2, 5, WIDTH), "scale": 2.0}),
    ):
        model = ToOne(cls)
        before = torch.get_rng_state()
        rows = {row.name: row for row in accelerate(model, like=like, check=inputs).rows}
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training
        assert model.drop.training
        assert rows["block"].swapped == ("forward" in vars(model.block)) == (cls is Block)
        if cls is Scaled:
            assert re.fullmatch(
                r"its fast form differs by \S+e-0\d of the largest of its outputs", rows["block"].reason
            )
        assert rows["block.attn"].swapped
        assert rows["norm"].swapped
        assert rows["unused"].reason == "the inputs of check do not reach it"


def test_a_check_sees_a_difference_in_gradients_alone() -> None:
    class Detached(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach()) + 0 * x

    report = accelerate(Detached(WIDTH, 40), like={Detached: "timm.Mlp"}, check=torch.randn(2, WIDTH))
    assert report.rows[0].reason.endswith("of the largest of its gradients")


def test_a_check_sees_a_gradient_that_is_not_a_number_also_in_inference_mode() -> None:
    class Root(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 * self.fc2.bias).sqrt()

    layer = Root(WIDTH, 40)
    with torch.inference_mode():
        report = accelerate(layer, like={Root: "timm.Mlp"}, check=torch.randn(2, WIDTH))
    assert report.rows[0].reason == "its fast form differs by nan of the largest of its gradients"


def test_the_table_folds_stacks_and_counts_layers() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(12)), nn.Linear(4, 4))
    model[3].forward = lambda x: x
    report = accelerate(model)
    model[5](torch.randn(0, 4))
    norm = "torch.nn.modules.normalization.LayerNorm"
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[1] == ["{0,1,2,4,6,7,8,9,10,11}", "x", "10", norm, "swapped"]
    assert " ".join(lines[2]) == f"3 {norm} left has a patched forward"
    assert " ".join(lines[3]) == f"5 {norm} swapped runs its own forward: input of shape (0, 4)"
    assert " ".join(lines[4]) == "12 torch.nn.modules.linear.Linear left no fast form"
    assert " ".join(lines[-1]) == "11 swapped, 2 left"
    folded = str(accelerate(nn.Sequential(*(nn.LayerNorm(4) for _ in range(12)))))
    assert folded.splitlines()[1].startswith("0..11 x 12")
    assert "³" in str(accelerate(nn.ModuleDict({"²": nn.LayerNorm(4), "³": nn.LayerNorm(4)})))


def test_notes_of_calls_that_differ_without_end_are_the_first_few() -> None:
    norm = nn.LayerNorm(4)
    report = accelerate(norm)
    for rows in range(100):
        norm(torch.zeros(0, rows, 4))
    assert report.rows[0].note.count("input of shape") == 8


def test_layers_of_timm_itself_are_known() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    model = timm.VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS)
    names = {row.name for row in accelerate(model).swapped}
    assert {"blocks.0", "blocks.1.attn", "blocks.1.mlp", "norm"} <= names
    assert timm_like.Block not in {type(module) for module in model.modules()}


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Use a fast layer in your own model\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "layers.0..3 x 4" in printed
    assert "16 swapped, 0 left" in printed
    assert printed.rstrip().endswith("torch.Size([2, 257, 384])")
