"""The report of accelerate(model): what is known and selected, how it reads, what a check refuses."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate_models
import pytest
import timm_like
import torch
from accelerate_models import HEADS, VIT, WIDTH, VisionTransformer, attention, block
from before_and_after import LIKE, accelerated, bound
from foreign_layers import MlpBlock, ViTLayer
from timm_like import Attention, Block, Mlp
from torch import Tensor, nn

from lmim_fast import accelerate
from lmim_fast.layers.accelerate import AccelerationReport
from lmim_fast.layers.fast_forwards import CLASSES, FORMS
from lmim_fast.ops import dispatch


def loaded_as(name: str, module: ModuleType) -> ModuleType:
    """The stand-ins of a module as the classes of another one."""
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def reason_of(report: AccelerationReport) -> str:
    """Why the outermost layer was left."""
    (row,) = [row for row in report.rows if row.name == ""]
    assert not row.swapped
    return row.reason


@pytest.mark.parametrize("name", [name for name, form in CLASSES.items() if form == "timm.Mlp"])
def test_classes_are_known_by_their_exact_names_without_their_package(name: str) -> None:
    known = loaded_as(name.removesuffix(".Mlp"), timm_like).Mlp
    classes = known, type("Further", (known,), {}), Mlp
    report = accelerate(nn.Sequential(*(cls(WIDTH, 40) for cls in classes)))
    assert [row.swapped for row in report.rows[:3]] == [True, False, False]
    assert report.rows[0].kind == name
    assert {row.reason for row in report.left} == {"no fast form"}


def test_every_class_has_a_form() -> None:
    assert set(FORMS) == set(CLASSES.values())


def test_a_class_that_another_package_has_patched_is_left() -> None:
    layer = loaded_as("timm.layers.mlp", timm_like).Mlp(WIDTH, 40)
    own = type(layer).forward
    for patched in (lambda self, x: -x, functools.wraps(own)(lambda self, x: -own(self, x))):
        type(layer).forward = patched
        assert reason_of(accelerate(layer)) == f"the forward of its class was patched by {__name__}"
    inherited = type("MLPBlock", (nn.Sequential,), {"__module__": "torchvision.models.vision_transformer"})
    assert accelerate(inherited(*MlpBlock(WIDTH, 40))).rows[0].swapped


MASKINGS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "its random_masking": lambda results: results,
    "its random_masking is another: it gives other results": lambda results: [x.flip(1) for x in results],
    "its random_masking is another: too many values to unpack": lambda results: [*results, results[2]],
}


@pytest.mark.parametrize("note", MASKINGS)
def test_models_that_share_the_name_of_the_public_mae_but_not_its_masking_are_left(note: str) -> None:
    module = loaded_as("models_mae", accelerate_models)
    cls, module.change = module.MaskedAutoencoder, MASKINGS[note]
    cls.__qualname__, module.own = "MaskedAutoencoderViT", cls.random_masking
    cls.random_masking = eval("lambda *inputs: change([*own(*inputs)])", vars(module))
    model = cls()
    before = torch.get_rng_state()
    row = accelerate(model).rows[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert row.note.split(" (")[0] == note
    assert row.swapped == (note == "its random_masking")


class Linear(nn.Linear):
    pass


class NoHeads(Attention):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS)
        del self.num_heads


def block_with(path: str, name: str, part: nn.Module) -> nn.Module:
    layer = block()
    layer.get_submodule(path).add_module(name, part)
    return layer


def with_own_forward() -> nn.Module:
    layer = block()
    layer.forward = lambda x: x
    return layer


def vit_with(**changes: object) -> nn.Module:
    layer = ViTLayer(WIDTH, HEADS)
    vars(layer.attention).update(changes)
    return layer


LEFT: dict[str, Callable[[], nn.Module]] = {
    "has adapter beside what its form knows": lambda: block_with("", "adapter", nn.Identity()),
    "attn: has rope beside": lambda: block_with("attn", "rope", nn.Identity()),
    "mlp: has gate beside": lambda: block_with("mlp", "gate", nn.Identity()),
    "mlp: norm is a torch.nn.modules.activation.Tanh": lambda: block_with("mlp", "norm", nn.Tanh()),
    f"attn: qkv is a {__name__}.Linear": lambda: block_with("attn", "qkv", Linear(WIDTH, 3 * WIDTH)),
    "attn_implementation is mine": lambda: vit_with(config=SimpleNamespace(_attn_implementation="mine")),
    "attention: its scale is 1.0": lambda: vit_with(scaling=1.0),
    "attention: it is causal": lambda: vit_with(is_causal=True),
    "has a patched forward": with_own_forward,
    "kdim or vdim differs": lambda: attention(kdim=4),
    "add_bias_kv or add_zero_attn is set": lambda: attention(add_bias_kv=True),
    "has no ordinary weight and bias": lambda: nn.LayerNorm(4, bias=False),
    "several dimensions": lambda: nn.LayerNorm((2, 4)),
    "no fast form": lambda: nn.RMSNorm(8),
    "compiled; accelerate it before": lambda: torch.compile(nn.LayerNorm(4)),
    "wrapped for several devices": lambda: nn.DataParallel(nn.LayerNorm(4)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_layer_that_is_left_has_a_row_that_says_why(reason: str) -> None:
    assert reason in reason_of(accelerated(LEFT[reason]()))


def test_a_class_that_is_not_what_like_says_is_left() -> None:
    linear = nn.Linear(2, 2)
    assert "has bias, weight" in reason_of(accelerate(linear, like={nn.Linear: "timm.Mlp"}))
    assert reason_of(accelerate(linear, like={nn.Linear: "mae.random_masking"})) == "has no random_masking"
    assert "no attribute 'num_heads'" in reason_of(accelerate(NoHeads(), like={NoHeads: "timm.Attention"}))


def test_layers_that_a_reader_expects_have_a_row() -> None:
    layer = type("RotaryDecoderLayer", (nn.Module,), {})()
    layer.attn, layer.norm = type("WindowAttention", (nn.Module,), {})(), nn.RMSNorm(8)
    rows = {row.name: row.kind for row in accelerate(nn.Sequential(layer, nn.ReLU())).rows}
    assert rows.keys() == {"0", "0.attn", "0.norm"}
    assert rows["0"] == f"{__name__}.RotaryDecoderLayer"


def test_without_a_device_nothing_is_bound_and_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.LayerNorm(4)
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        with dispatch.backend("auto"):
            assert ("no CUDA device in this process" in str(accelerate(norm))) == (not available)
        assert bool(bound(norm)) == available


def test_only_takes_classes_and_patterns_of_names() -> None:
    def names(**options: object) -> set[str]:
        with accelerated(VIT.model(), **options) as report:
            assert not report.left
            return {row.name for row in report.swapped}

    assert names(only=Block) == {"blocks.0", "blocks.1"}
    assert names(only="blocks.1*n*1") == {"blocks.1.norm1"}
    assert names(only=[Mlp, "norm"]) == {"blocks.0.mlp", "blocks.1.mlp", "norm"}


WRONG = {
    r"timm\.Attention \(2\), timm\.Block \(2\)": lambda: accelerated(VisionTransformer(), only="decoder.*"),
    "there are: none": lambda: accelerate(nn.Linear(2, 2), only="*"),
    "only takes classes .* got 3": lambda: accelerate(nn.Linear(2, 2), only=[3]),
    "model must .* got int": lambda: accelerate(3),
    r"'timm\.Blok'; choose from .*timm\.Block": lambda: accelerate(nn.ReLU(), like={Block: "timm.Blok"}),
    "module classes, got 'Block'": lambda: accelerate(nn.ReLU(), like={"Block": "timm.Block"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_say_what_is_known(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


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
        assert bound(norm)
    assert not bound(norm)


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-2)


class Model(nn.Module):
    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.block, self.unused, self.drop = cls(WIDTH, HEADS), cls(WIDTH, HEADS), nn.Dropout(0.5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.norm(input=self.block(self.drop(scale * x)))


@pytest.mark.parametrize("cls", [Block, Scaled])
def test_a_check_compares_both_forwards_on_what_reaches_each_layer(cls: type[nn.Module]) -> None:
    model = Model(cls)
    inputs = {"x": torch.ones(2, 5, WIDTH), "scale": 2.0} if cls is Scaled else torch.ones(2, 5, WIDTH)
    before = torch.get_rng_state()
    rows = {row.name: row for row in accelerate(model, like=LIKE | {Scaled: "timm.Block"}, check=inputs).rows}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert rows["block"].swapped == ("block" in bound(model)) == (cls is Block)
    differs = r"its fast form differs by \S+e-0\d of the largest of its outputs"
    assert re.fullmatch("" if cls is Block else differs, rows["block"].reason)
    assert rows["block.attn"].swapped
    assert rows["norm"].swapped
    assert rows["unused"].reason == "the inputs of check do not reach it"


class Detached(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x


class Root(Mlp):
    """Its gradient is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 * self.fc2.bias).sqrt()


@pytest.mark.parametrize(("cls", "difference"), [(Detached, ""), (Root, "nan ")])
def test_a_check_sees_a_difference_in_gradients_alone_also_in_inference_mode(
    cls: type[nn.Module], difference: str
) -> None:
    layer = cls(WIDTH, 40)
    with torch.inference_mode():
        report = accelerate(layer, like={cls: "timm.Mlp"}, check=torch.randn(2, WIDTH))
    assert f"{difference}of the largest of its gradients" in reason_of(report)


def test_the_table_folds_stacks_and_counts_layers() -> None:
    model = nn.Sequential(*(nn.LayerNorm(4) for _ in range(12)), nn.Linear(4, 4))
    model[3].forward = lambda x: x
    report = accelerate(model)
    model[5](torch.randn(0, 4))
    norm = "torch.nn.modules.normalization.LayerNorm"
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[1:] == [
        f"{{0,1,2,4,6,7,8,9,10,11}} x 10 {norm} swapped",
        f"3 {norm} left has a patched forward",
        f"5 {norm} swapped runs its own forward: input of shape (0, 4)",
        "12 torch.nn.modules.linear.Linear left no fast form",
        "11 swapped, 2 left",
    ]
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


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Use a fast layer in your own model\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "layers.0..3 x 4" in printed
    assert "16 swapped, 0 left" in printed
    assert printed.rstrip().endswith("torch.Size([2, 257, 384])")
