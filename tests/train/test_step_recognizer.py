"""The recogniser's step: as one graph it is bitwise the eager one, the average of the weights included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmim_fast.config import AugmentConfig, FinetuneConfig, ModelConfig, OptimConfig, RecognizerConfig
from lmim_fast.data.batch import Batch
from lmim_fast.train import optim, parallel
from lmim_fast.train.graph import Captured
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = RecognizerConfig(
    encoder=ModelConfig(width=32, depth=2, heads=1, decoder_width=32, decoder_heads=1),
    **dict(classes=13, max_length=6, decoder_width=32, decoder_depth=1, decoder_heads=1),
    **dict(decoder_head_dim=32, decoder_ffn=32, dropout=0.1, drop_path=0.3, label_smoothing=0.1),
)


def batch_of(number: int) -> Batch:
    torch.manual_seed(number)
    targets = torch.full((4, 6), 11)
    for row in range(4):
        length = 1 + (row + number) % 5
        targets[row, :length] = torch.randint(0, 10, (length,))
        targets[row, length] = 10
    plain = torch.randint(0, 256, (4, 32, 128, 3), dtype=torch.uint8, device=DEVICE)
    numbers = torch.arange(4)
    return Batch(number, 0, numbers, numbers, plain, None, None, targets.to(DEVICE))


def replaying(function: Callable[[], Tensor], warmup: int) -> Captured:
    """Stands in for CUDA's capture: a replay runs the function again, into the same output."""
    for _ in range(warmup):
        function()
    output = torch.full((2,), float("nan"), device=DEVICE)

    def replay() -> None:
        output.copy_(function())

    return Captured(replay, output)


@pytest.mark.parametrize("kind", ["abinet", "none"])
def test_replayed_steps_are_bitwise_those_of_eager_steps(kind: str) -> None:
    results = []
    for cuda_graph in ("off", "on"):
        config = FinetuneConfig(
            data=("unused",),
            characters="0123456789",
            batch_size=4,
            model=MODEL,
            optim=OptimConfig(ema_decay=0.9, layer_decay=0.5),
            augment=AugmentConfig(kind=kind),
            precision="fp32",
            cuda_graph=cuda_graph,
        )
        task, world = make_task(config), World(0, 1, DEVICE)
        model = task.build()
        parallel.apply(model.train(), config, world)
        graphed = DEVICE if cuda_graph == "on" else None
        optimizer = optim.make_optimizer(task.parameter_groups(model), config.optim, graphed=graphed)
        step = TrainStep(model, optimizer, task, world, capture=replaying)
        if cuda_graph == "on":
            step.capture_graph()
        rows = [step(number, iter([batch_of(number)]), lr=1e-3) for number in range(4)]
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        with optim.averaged_weights(optimizer):
            averages = {name: p.detach().clone() for name, p in model.named_parameters()}
        results.append((torch.stack(rows), weights, averages))
    (rows, weights, averages), (other_rows, other_weights, other_averages) = results
    assert torch.equal(rows, other_rows)
    assert len(set(rows[:, 0].tolist())) == 4
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert all(torch.equal(value, other_averages[name]) for name, value in averages.items())
    trained = [name for name in weights if not torch.equal(weights[name], averages[name])]
    assert "decoder.classifier.weight" in trained
