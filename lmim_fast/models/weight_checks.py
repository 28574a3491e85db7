"""What weights have to be before they enter a model, or leave it for a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lmim_fast.errors import WeightsError
from lmim_fast.models.weight_names import name_list

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PER_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_SAME = 1e-3  # positions that differ by less are the same, made or rounded by other arithmetic


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to write weights that could not be loaded again.

    Raises:
        WeightsError: a tensor holds a value that is not finite, or holds no floating-point numbers.
    """
    broken = [name for name, value in state.items() if not _storable(value) and not _reason(value)]
    if broken:
        raise WeightsError(f"not exported: non-finite values in {name_list(broken)}")
    _check_kinds(state, "not exported")


def check_entering(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights from outside that no training can start from; half and double precision are welcome.

    Raises:
        WeightsError: names a tensor of integers, complex or quantised numbers or none, or with a value that
            is not finite in fp32.
    """
    _check_kinds(state, f"{source} cannot be loaded")
    broken = [f"{name} ({_count(value)})" for name, value in state.items() if not _storable(value)]
    if broken:
        raise WeightsError(
            f"{source} cannot be loaded: values that are not finite in {name_list(broken)}; the training "
            "that made it diverged or the file is damaged: take an earlier checkpoint of it"
        )


def _check_kinds(state: Mapping[str, Tensor], lead: str) -> None:
    wrong = [f"{name} {reason}" for name, value in state.items() if (reason := _reason(value))]
    if wrong:
        told = "weights have to be dense tensors of float32, float16, bfloat16 or float64"
        raise WeightsError(
            f"{lead}: {name_list(wrong)}; {told}: take the file from before it was quantised or packed"
        )


def _reason(value: Tensor) -> str:
    """Why a tensor is no weight; empty if it is one."""
    if value.is_meta:
        return "is on the meta device, without values"
    if value.layout != torch.strided:
        return f"is sparse ({value.layout})"
    return "" if value.dtype in _FLOATS else f"is of {value.dtype}"


def _storable(value: Tensor) -> bool:
    """Whether all values are finite as fp32, in which models are trained."""
    return not _reason(value) and bool(torch.isfinite(value.float()).all())


def _count(value: Tensor) -> str:
    nan = int(value.isnan().sum())
    return f"{nan:,} NaN and {int((~value.float().isfinite()).sum()) - nan:,} infinite of {value.numel():,}"


def check_layout(encoder: Mapping[str, Tensor]) -> None:
    """Refuse an encoder with other tensors than ours, whatever its size: none could load it."""
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    layers = [
        "patch_embed.proj",
        "norm",
        *(f"blocks.{i}.{part}" for i in range(depth) for part in _PER_BLOCK),
    ]
    expected = {
        "cls_token",
        "pos_embed",
        *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")),
    }
    problems = [
        f"{len(names)} {word}: {name_list(sorted(names))}"
        for word, names in (("missing", expected - set(encoder)), ("extra", set(encoder) - expected))
        if names
    ]
    if problems:
        raise WeightsError(f"this encoder has another layout and could not be loaded; {'; '.join(problems)}")


def check_positions(table: Tensor, own: Tensor, source: str) -> list[str]:
    """Refuse the sin-cos table of another grid; what is to be said of a table that is of no grid.

    Args:
        table: (1, 1 + L, D) position table of the file `source`.
        own:   (1, 1 + L, D) the one that the model has by its config.
    Raises:
        WeightsError: names both grids and the option.
    """
    if float((table.float() - own.cpu()).abs().max()) <= _SAME:
        return []
    columns, here = _columns(table), _columns(own)
    if columns is None or columns == here:
        return ["its position table is not the sin-cos one: it is taken as it is, and not trained further"]
    patches = table.shape[1] - 1
    value = "released" if columns == math.isqrt(patches) else "true"
    grids = [f"{patches // number} x {number}" for number in (columns, here or patches)]
    raise WeightsError(
        f"{source} was trained with the positions of {grids[0]} patches, the model has those of {grids[1]}: "
        f"set --model.pos-grid {value} (of a fine-tuning: --model.encoder.pos-grid {value})"
    )


def _columns(table: Tensor) -> int | None:
    """Columns of the grid that a sin-cos table (1, 1 + L, D) is made for; None for a learned one."""
    cls, patches = table[0, 0].float(), table[0, 1:].float()
    x_sin, x_cos, y_sin, y_cos = patches.split(table.shape[-1] // 4, dim=-1)[:4]
    squares = torch.cat([x_sin**2 + x_cos**2, y_sin**2 + y_cos**2])
    if float(cls.abs().max()) > _SAME or float((squares - 1).abs().max()) > 0.01:
        return None
    again = ((x_sin - x_sin[0]).abs().amax(dim=-1) <= _SAME).nonzero().flatten().tolist()
    columns = int(again[1]) if len(again) > 1 else len(patches)
    return columns if len(patches) % columns == 0 else None
