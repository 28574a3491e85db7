"""Every part of every model is called once something is attached to it."""

from __future__ import annotations

import copy

import pytest
import torch
from attachments import Lora
from micro import MICRO
from recognizers import ODD
from torch import Tensor, nn

from lmim_fast.layers.reader_layer import ReaderAttention
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.models.recognizer import Recognizer

ENTERED_BY_METHODS = (Encoder, ReaderAttention, nn.ModuleList)  # as their docstrings say
MODELS = {"LMIM": lambda: LMIM(MICRO), "MAE": lambda: MAE(MICRO), "recogniser": lambda: Recognizer(ODD)}


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, Recognizer):
        images = torch.rand(2, 3, *ODD.encoder.image_size, generator=generator)
        return model(images, torch.tensor([[1, 2, ODD.eos, ODD.pad], [3, 4, 1, ODD.eos]])).loss
    views = torch.rand(2, 2, 3, *MICRO.image_size, generator=generator).unbind(0)
    noise = torch.rand(2, MICRO.num_patches, generator=generator)
    return model(*(views if isinstance(model, LMIM) else views[:1]), noise).loss


@pytest.mark.parametrize("name", MODELS)
def test_r29_every_part_is_called_where_it_is_hooked(name: str) -> None:
    """Alone, and together with all others."""
    model = MODELS[name]()
    expected, silent = loss_of(model), []
    parts = {part: module for part, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for part, module in parts.items():
        seen: list[int] = []
        with module.register_forward_hook(lambda *_, seen=seen: seen.append(1)):
            torch.testing.assert_close(loss_of(model), expected, rtol=1e-5, atol=0)
        silent += [] if seen else [part]
    assert [part for part in silent if not isinstance(parts[part], ENTERED_BY_METHODS)] == []
    fired: set[nn.Module] = set()
    for module in parts.values():
        module.register_forward_hook(lambda module, *_: fired.add(module))
    torch.testing.assert_close(loss_of(model), expected, rtol=1e-5, atol=0)
    quiet = [part for part, module in parts.items() if module not in fired]
    assert quiet == silent


@pytest.mark.parametrize("name", MODELS)
def test_r29_an_adapter_at_every_linear_acts_and_trains(name: str) -> None:
    """The loss is that of the model with the adapters added to its weights; every adapter gets a gradient."""
    torch.manual_seed(0)
    model = MODELS[name]()
    merged = copy.deepcopy(model)
    linears = {
        part: module
        for part, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    adapters = {}
    for part, linear in linears.items():
        holder, _, last = part.rpartition(".")
        adapters[part] = Lora(linear, linear.in_features, linear.out_features)
        setattr(model.get_submodule(holder), last, adapters[part])
        with torch.no_grad():
            merged.get_submodule(part).weight += adapters[part].up.weight @ adapters[part].down.weight
    loss = loss_of(model)
    torch.testing.assert_close(loss, loss_of(merged), rtol=1e-5, atol=0)
    assert not torch.isclose(loss, loss_of(MODELS[name]()))
    loss.backward()
    without = [
        part
        for part, adapter in adapters.items()
        for weight in (adapter.up.weight, adapter.down.weight)
        if weight.grad is None or not weight.grad.any()
    ]
    assert without == []
