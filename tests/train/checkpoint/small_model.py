"""A small model with moments and averages, plain or sharded, and a save that is waited for."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lmim_fast.train.checkpoint import content
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Small(nn.Module):
    """Sizes that two ranks cannot share evenly, a 1-row token, a frozen table and a buffer."""

    def __init__(self, width=6):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(5, width), requires_grad=False)
        self.blocks = nn.ModuleList([nn.Linear(width, 7), nn.Linear(7, width)])
        self.norm = nn.LayerNorm(width)
        self.register_buffer("seen", torch.tensor([3, 4]))

    def forward(self, images):
        tokens = images + self.cls_token + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def make(seed=0, mesh=None, shard=False, width=6):
    torch.manual_seed(seed)
    model = Small(width)
    if shard:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)


def step(model, optimizer):
    """One optimiser step, and averages beside the moments."""
    width = model.norm.normalized_shape[0]
    model(torch.linspace(-1, 1, 10 * width).view(2, 5, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for parameter, state in optimizer.state.items():
        state["average"] = parameter.detach() * 0.5


def whole_tensors(model, optimizer):
    """Every tensor of a checkpoint, gathered and copied, by name."""
    own, moments = content.live_tensors(model, optimizer)
    named = {f"model.{n}": t for n, t in own.items()} | {f"optimizer.{n}": t for n, t in moments.items()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in named.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def save_now(run, state, model, optimizer, keep=3):
    """Folder of a checkpoint that is written when this returns."""
    with Saver(run, ALONE, keep=keep) as saver:
        saver.save(state, model, optimizer)
        saver.wait()
        return saver.published()[0]
