"""One optimiser step: eager, and as a captured graph with a stand-in for CUDA's capture."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmim_fast.config import ModelConfig, OptimConfig, PretrainConfig
from lmim_fast.data.batch import Batch
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops.photometric import ColorProgram
from lmim_fast.train import optim
from lmim_fast.train.graph import Captured, GraphedStep
from lmim_fast.train.parallel import World
from lmim_fast.train.step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = ModelConfig(
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    decoder_ffn=64,
    mae_decoder_depth=1,
    decoder_dropout=0.2,
)


def colors(batch: int) -> ColorProgram:
    affine = torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1).expand(batch, 3, 4) * (
        0.8 + 0.4 * torch.rand(batch, 1, 1)
    )
    return ColorProgram(
        before=affine,
        threshold=torch.full((batch,), 200.0),
        invert_above=torch.ones(batch, dtype=torch.bool),
        after=affine.clone(),
        coverage=torch.full((batch, 32, 128), 255, dtype=torch.uint8),
        border=torch.zeros(batch, 3),
        contrast=torch.rand(batch) + 0.5,
        final=affine.clone(),
    )


def batch_of(number: int, size: int = 4, *, guided: bool = True) -> Batch:
    torch.manual_seed(number)
    plain, warped = (torch.randint(0, 256, (size, 32, 128, 3), dtype=torch.uint8) for _ in range(2))
    return Batch(
        step=number,
        micro=0,
        indices=torch.arange(size) + 10 * number,
        epochs=torch.zeros(size, dtype=torch.int64),
        plain=plain.to(DEVICE),
        warped=warped.to(DEVICE) if guided else None,
        program=colors(size).to(DEVICE) if guided else None,
    )


def replaying(function: Callable[[], Tensor], warmup: int) -> Captured:
    """Stands in for CUDA's capture: a replay runs the function again, into the same output."""
    for _ in range(warmup):
        function()
    output = torch.full((4,), float("nan"))

    def replay() -> None:
        output.copy_(function())

    return Captured(replay, output)


def make_step(
    config: PretrainConfig, capture: Callable[..., Captured] = replaying
) -> tuple[TrainStep, torch.nn.Module, optim.SkippingAdamW]:
    torch.manual_seed(0)
    model = (LMIM if config.objective == "lmim" else MAE)(config.model).to(DEVICE).train()
    graphed = DEVICE if config.cuda_graph else None
    optimizer = optim.make_optimizer(model, config.optim, graphed=graphed)
    world = World(0, 1, DEVICE)
    return TrainStep(model, optimizer, config, world, capture=capture), model, optimizer


def config_of(**changes: object) -> PretrainConfig:
    settings = dict(data=("unused",), model=MODEL, optim=OptimConfig(clip_norm=1.0), batch_size=4)
    settings |= dict(precision="fp32") | changes
    return PretrainConfig(**settings)


@pytest.mark.parametrize("objective", ["lmim", "mae"])
def test_replayed_steps_are_bitwise_those_of_eager_steps(objective: str) -> None:
    curves, weights = [], []
    for cuda_graph in (False, True):
        step, model, optimizer = make_step(config_of(objective=objective, cuda_graph=cuda_graph))
        rows = []
        for number in range(5):
            batch = batch_of(number, guided=objective == "lmim")
            rows.append(step(number, iter([batch]), lr=1e-3 * (number + 1)))
        curves.append(torch.stack(rows))
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        moments = optimizer.state[model.mask_token]
        assert moments["step"] == 5
    assert torch.equal(*curves)
    assert len({row[0].item() for row in curves[0]}) == 5  # other data, other masks, other losses
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_warm_up_of_a_graph_changes_nothing() -> None:
    seen = []

    def capture(function: Callable[[], Tensor], warmup: int) -> Captured:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(warmup):
            seen.append(function())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(state["step"] == 0 for state in optimizer.state.values())
        assert all(not state["exp_avg"].any() for state in optimizer.state.values())
        return replaying(function, 0)

    step, model, optimizer = make_step(config_of(cuda_graph=True), capture)
    before = model.mask_token.detach().clone()
    step(0, iter([batch_of(0)]), lr=1e-2)
    assert len(seen) == 3
    assert all(row.isfinite().all() for row in seen)
    assert not torch.equal(model.mask_token, before)
    assert optimizer.state[model.mask_token]["step"] == 1


def test_results_of_earlier_replays_are_not_overwritten() -> None:
    step, _, _ = make_step(config_of(cuda_graph=True))
    first = step(0, iter([batch_of(0)]), lr=1e-3)
    kept = first.clone()
    step(1, iter([batch_of(1)]), lr=1e-3)
    assert torch.equal(first, kept)


def test_a_graph_refuses_inputs_of_other_shapes() -> None:
    graphed = GraphedStep(lambda x: x.sum().expand(4), [torch.zeros(2, 3)], capture=replaying)
    assert torch.equal(graphed(torch.ones(2, 3)), torch.full((4,), 6.0))
    with pytest.raises(
        ValueError, match=r"input 0 must be torch.float32 \(2, 3\) as captured, got .* \(3, 3\)"
    ):
        graphed(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"argument 2 is longer"):
        graphed(torch.ones(2, 3), torch.ones(2, 3))


def test_a_graph_is_refused_with_accumulation() -> None:
    with pytest.raises(ValueError, match="cuda_graph needs accumulation 1, got 2"):
        config_of(cuda_graph=True, accumulation=2)


def test_compiled_steps_follow_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, object]] = []
    original = torch.nn.Module.compile

    def traced(self: torch.nn.Module, **options: object) -> None:
        compiled.append(options)
        original(self, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    model = ModelConfig(**{**vars(MODEL), "decoder_dropout": 0.0})
    curves = []
    for compile_model in (False, True):
        step, _, _ = make_step(config_of(model=model, compile=compile_model))
        curves.append(torch.stack([step(i, iter([batch_of(i)]), lr=1e-3) for i in range(3)]))
    assert compiled == [{"dynamic": False}]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_graph_equals_eager_steps_on_a_device(precision: str) -> None:
    """Dropout is on: each replay draws new masks, those of the seed that the step sets."""
    from lmim_fast.train import graph

    curves = []
    for cuda_graph in (False, True):
        config = config_of(precision=precision, cuda_graph=cuda_graph)
        step, model, _ = make_step(config, graph.capture)
        if precision == "bf16":
            model.halve_teacher()
        curves.append(torch.stack([step(i, iter([batch_of(i)]), lr=1e-3) for i in range(8)]))
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=0)
    again = make_step(config_of(precision=precision, cuda_graph=True), graph.capture)[0]
    same = batch_of(0)
    first, second = (again(number, iter([same]), lr=0.0) for number in (0, 1))
    assert first[0] != second[0]  # the same weights and data: another step draws other dropout
