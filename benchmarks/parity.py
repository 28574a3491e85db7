"""The whole model in bf16 against the oracle: the loss and every gradient.

    python -m benchmarks.parity [--device cuda] [--preset small] [--batch 64] [--results FILE]

The same weights, images and noise, no dropout. The truth is the oracle in fp32; an error may be twice (loss)
or three times (gradients, by relative L2 norm of a tensor) what the oracle shows under bf16 autocast. Once
with a bf16 residual stream in both, as in the step benchmark, once with an fp32 one. Exit code 1 if a tensor
is beyond that; the result has a row a tensor.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import Record
from benchmarks.step_plain import halve_residual
from lmim_fast.config import ModelConfig, preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.reference import ReferenceLMIM
from lmim_fast.train.parallel import frozen_to_bf16

LOSS_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
_ROUNDING = 1e-3  # relative error that is allowed however exact the oracle happens to be
_WORST = 5  # tensors in the headline

Batch = tuple[Tensor, Tensor, Tensor]  # images, guidance, noise


def loss_and_gradients(model: nn.Module, batch: Batch, *, low: bool) -> dict[str, Tensor]:
    """fp32 results by name, "loss" first; `low`: under bf16 autocast."""
    model.zero_grad()
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=low):
        loss = model(*batch).loss
    loss.backward()
    named = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            named[name] = _without_keys(name, parameter.grad.clone())
    return {name: tensor.float() for name, tensor in named.items()}


def _without_keys(name: str, grad: Tensor) -> Tensor:
    """Without the bias of keys, whose gradient is rounding noise around zero."""
    if not name.endswith(("qkv.bias", "in_proj_bias")):
        return grad
    q, _, v = grad.chunk(3)
    return torch.cat([q, v])


def compare(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], residual: str
) -> list[dict[str, Any]]:
    """A row a tensor: relative L2 errors of ours and of the oracle in bf16, and what is allowed.

    Raises:
        ValueError: the two models have gradients of other parameters.
    """
    if ours.keys() != truth.keys():
        raise ValueError(f"gradients of one model alone: {sorted(ours.keys() ^ truth.keys())}")
    rows = []
    for name, expected in truth.items():
        size = max(expected.norm().item(), torch.finfo(torch.float32).tiny)
        error, of_plain = ((found[name] - expected).norm().item() / size for found in (ours, plain))
        allowed = (LOSS_FACTOR if name == "loss" else GRADIENT_FACTOR) * of_plain + _ROUNDING
        row: dict[str, Any] = dict(tensor=name, residual=residual, error=error, plain_error=of_plain)
        rows.append(row | dict(allowed=allowed, right=bool(error <= allowed)))  # a NaN is not
    return rows


def check(config: ModelConfig, batch: Batch, record: Record) -> None:
    """File the rows of a configuration, and its failures."""
    device, residual = batch[0].device, config.residual
    torch.manual_seed(0)
    oracle, fast = ReferenceLMIM(config).to(device), LMIM(config).to(device)
    fast.load_state_dict(oracle.state_dict())
    frozen_to_bf16(fast)
    truth = loss_and_gradients(oracle, batch, low=False)
    if residual == "bf16":
        halve_residual(oracle)
    plain = loss_and_gradients(oracle, batch, low=True)
    rows = compare(loss_and_gradients(fast, batch, low=True), plain, truth, residual)
    record.result["rows"] += rows
    record.write()
    for row in rows:
        if not row["right"]:
            error = f"error {row['error']:.3g}, allowed {row['allowed']:.3g}"
            record.fail(error, tensor=row["tensor"], residual=residual)


def headline(rows: list[dict[str, Any]]) -> str:
    """The tensors that come nearest to what is allowed, or are furthest beyond it."""
    worst = sorted(rows, key=lambda row: -row["error"] / row["allowed"])[:_WORST]
    shown = (f"{row['tensor']} ({row['residual']}) {row['error'] / row['allowed']:.2f}" for row in worst)
    wrong = sum(not row["right"] for row in rows)
    return f"{len(rows)} tensors, {wrong} wrong; of what is allowed: {', '.join(shown)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--preset", choices=["tiny", "small", "base"], default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--results", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # the truth is fp32
    device, config = torch.device(args.device), preset(args.preset, decoder_dropout=0.0)
    record = Record(args.results, "parity", device, preset=args.preset, batch=args.batch)
    generator = torch.Generator().manual_seed(1)
    shape = args.batch, 3, *config.image_size
    images, guidance = (torch.rand(shape, generator=generator) * 2 - 1 for _ in range(2))
    noise = torch.rand(args.batch, config.num_patches, generator=generator)
    batch = images.to(device), guidance.to(device), noise.to(device)
    for residual in ("bf16", "fp32"):  # the first is what is timed
        check(replace(config, residual=residual), batch, record)
        record.result["headline"] = headline(record.result["rows"])
    for failure in record.result["failed"]:
        print(f"WRONG: {failure}")
    print(record.result["headline"])
    return record.end()


if __name__ == "__main__":
    sys.exit(main())
