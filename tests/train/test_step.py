"""One optimiser step: eager, and as a captured graph with a stand-in for CUDA's capture."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lmim_fast.config import ModelConfig, OptimConfig, PretrainConfig
from lmim_fast.data.batch import Batch
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops.photometric import ColorProgram
from lmim_fast.train import optim, parallel
from lmim_fast.train.graph import Captured, GraphedStep
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

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
        epochs=torch.full((size,), number),
        plain=plain.to(DEVICE),
        warped=warped.to(DEVICE) if guided else None,
        program=colors(size).to(DEVICE) if guided else None,
    )


def replaying(function: Callable[[], Tensor], warmup: int, *, size: int = 4) -> Captured:
    """Stands in for CUDA's capture: a replay runs the function again, into the same output."""
    for _ in range(warmup):
        function()
    output = torch.full((size,), float("nan"), device=DEVICE)

    def replay() -> None:
        output.copy_(function())

    return Captured(replay, output)


def make_step(
    config: PretrainConfig, capture: Callable[..., Captured] | None = None
) -> tuple[TrainStep, torch.nn.Module, optim.SkippingAdamW]:
    torch.manual_seed(0)
    world, task = World(0, 1, DEVICE), make_task(config)
    model = (LMIM if config.objective == "lmim" else MAE)(config.model)
    parallel.apply(model.train(), config, world)
    graphed = DEVICE if config.cuda_graph == "on" else None
    optimizer = optim.make_optimizer(optim.decay_groups(model, 0.05), config.optim, graphed=graphed)
    step = TrainStep(
        model, optimizer, task, world, capture=capture or partial(replaying, size=1 + len(task.loss_names))
    )
    if config.cuda_graph == "on":
        step.capture_graph()
    return step, model, optimizer


def config_of(**changes: object) -> PretrainConfig:
    settings = dict(data=("unused",), model=MODEL, optim=OptimConfig(clip_norm=1.0), batch_size=4)
    settings |= dict(precision="fp32") | changes
    return PretrainConfig(**settings)


@pytest.mark.parametrize("objective", ["lmim", "mae"])
def test_replayed_steps_are_bitwise_those_of_eager_steps(objective: str) -> None:
    curves, weights = [], []
    for cuda_graph in ("off", "on"):
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


@pytest.mark.parametrize("trained", [False, True])
def test_the_capture_of_a_graph_changes_nothing(trained: bool) -> None:
    seen = []

    def capture(function: Callable[[], Tensor], warmup: int) -> Captured:
        for _ in range(warmup):
            seen.append(function())
        return replaying(function, 0)

    torch.manual_seed(0)
    config = config_of(cuda_graph="on")
    model = LMIM(config.model).to(DEVICE).train()
    optimizer = optim.make_optimizer(optim.decay_groups(model, 0.05), config.optim, graphed=DEVICE)
    step = TrainStep(model, optimizer, make_task(config), World(0, 1, DEVICE), capture=capture)
    optim.set_learning_rate(optimizer, 1e-2)
    if trained:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step_unless(torch.zeros((), device=DEVICE))
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {p: {kind: t.clone() for kind, t in state.items()} for p, state in optimizer.state.items()}
    step.capture_graph()
    assert len(seen) == 3
    assert all(row.isfinite().all() for row in seen)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert all(state["step"] == int(trained) for state in optimizer.state.values())
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    for parameter, state in optimizer.state.items():
        expected = moments.get(parameter, {kind: torch.zeros_like(t) for kind, t in state.items()})
        assert all(torch.equal(tensor, expected[kind]) for kind, tensor in state.items())
    step(0, iter([batch_of(0)]), lr=1e-2)
    assert not torch.equal(model.mask_token, kept["mask_token"])
    assert optimizer.state[model.mask_token]["step"] == 1 + trained


@pytest.mark.parametrize("cuda_graph", ["off", "on"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_r10_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(
    cuda_graph: str, clip: float | None
) -> None:
    config = config_of(cuda_graph=cuda_graph, optim=OptimConfig(clip_norm=clip))
    step, model, optimizer = make_step(config)
    step(0, iter([batch_of(0)]), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = optimizer.state[model.mask_token]["exp_avg"].clone()
    hook = model.mask_token.register_hook(lambda gradient: gradient * float("inf"))
    row = step(1, iter([batch_of(1)]), lr=1e-3)
    hook.remove()
    assert row[:3].isfinite().all()
    assert not row[3].isfinite()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(optimizer.state[model.mask_token]["exp_avg"], moments)
    assert optimizer.state[model.mask_token]["step"] == 1
    assert step(2, iter([batch_of(2)]), lr=1e-3).isfinite().all()
    assert not torch.equal(model.mask_token, before["mask_token"])


def test_r10_a_loss_that_is_not_finite_is_skipped_though_the_gradient_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, model, _ = make_step(config_of())
    before, forward = model.mask_token.detach().clone(), LMIM.forward

    def poisoned(self: LMIM, *inputs: Tensor, **named: object) -> object:
        output = forward(self, *inputs, **named)
        output.loss_align = output.loss_align.detach() * float("nan")
        return output

    with monkeypatch.context() as patched:
        patched.setattr(LMIM, "forward", poisoned)
        row = step(0, iter([batch_of(0)]), lr=1e-3)
    assert row[3].isfinite()
    assert torch.equal(model.mask_token, before)
    step(1, iter([batch_of(1)]), lr=1e-3)
    assert not torch.equal(model.mask_token, before)


def test_every_pass_of_every_step_draws_dropout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    losses = []
    for accumulation in (1, 2):
        step, _, _ = make_step(config_of(accumulation=accumulation))
        for number in range(2):
            batch = batch_of(0)
            losses.append(step(number, iter([batch] * accumulation), lr=0.0))
    drawn = [seed for seed in seeds if seed > 2**16]  # those of the tests are small
    assert drawn[:2] == drawn[2::2]  # the first pass of steps 0 and 1, whatever the accumulation
    assert len(set(drawn)) == 4


def test_results_of_earlier_replays_are_not_overwritten() -> None:
    step, _, _ = make_step(config_of(cuda_graph="on"))
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
    with pytest.raises(ValueError, match="cuda_graph on needs accumulation 1, got 2"):
        config_of(cuda_graph="on", accumulation=2)


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
    for cuda_graph in ("off", "on"):
        config = config_of(precision=precision, cuda_graph=cuda_graph)
        step, _, _ = make_step(config, graph.capture)
        curves.append(torch.stack([step(i, iter([batch_of(i)]), lr=1e-3) for i in range(8)]))
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=0)
    again = make_step(config_of(precision=precision, cuda_graph="on"), graph.capture)[0]
    same = batch_of(0)
    first, second = (again(number, iter([same]), lr=0.0) for number in (0, 1))
    assert first[0] != second[0]  # the same weights and data: another step draws other dropout


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_r17_a_step_never_waits_for_the_device(cuda_graph: str) -> None:
    from lmim_fast.train import graph

    step, _, _ = make_step(config_of(precision="bf16", cuda_graph=cuda_graph), graph.capture)
    batches = [batch_of(number) for number in range(4)]
    for number in range(2):
        step(number, iter([batches[number]]), lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (2, 3):
            step(number, iter([batches[number]]), lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_on_a_device_give_the_same_bits(precision: str) -> None:
    curves = []
    for _ in range(2):
        step, _, _ = make_step(config_of(precision=precision, batch_size=64))
        curves.append(torch.stack([step(i, iter([batch_of(i, 64)]), lr=1e-3) for i in range(4)]))
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=0)


def test_a_bf16_step_reads_copies_of_its_weights_and_has_the_bits_of_casts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = []
    for copied in (True, False):
        if not copied:
            monkeypatch.setattr(parallel, "copied_weights", lambda *_: [])
        step, model, _ = make_step(config_of(precision="bf16", accumulation=2))
        for number in range(3):
            batches = [batch_of(number, 2), batch_of(number + 5, 2)]
            step(number, iter(batches), lr=1e-2)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(mine, other) for mine, other in zip(*weights, strict=True))


@pytest.mark.parametrize("cuda_graph", ["off", "on"])
def test_a_step_sees_weights_that_others_have_changed_in_whatever_way(cuda_graph: str) -> None:
    step, model, _ = make_step(config_of(precision="bf16", cuda_graph=cuda_graph))
    step(0, iter([batch_of(0)]), lr=0.0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.zeros_like(parameter)  # no version counter tells
    losses = step(1, iter([batch_of(1)]), lr=0.0)
    assert losses[1].item() == pytest.approx(1.0, abs=0.01)  # predictions are 0, targets normalised


@pytest.mark.parametrize("changes", [dict(precision="fp32"), dict(compile=True)])
def test_no_copies_are_kept_where_nothing_would_read_them(changes: dict[str, object]) -> None:
    config = config_of(**dict(precision="bf16") | changes)
    assert parallel.copied_weights(LMIM(MODEL), config) == []
