"""Whether the disk of the run folder takes the checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

from lmim_fast import durable
from lmim_fast.config import RunConfig
from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.machine import amount
from lmim_fast.doctor.plan import Plan

_TIGHT = 1.2  # of what is needed: below it a warning


def check_disk(plan: Plan, findings: Findings) -> None:
    """Compare what the run will write with what is free. Needs the plan's model."""
    with findings.check("disk"):
        folder = Path(plan.config.output)
        place = _existing(folder)
        if not place.is_dir():
            findings.error(
                "disk", f"{place} is in the way of --output {folder}", "move it, or name another folder"
            )
            return
        if not os.access(place, os.W_OK | os.X_OK):
            findings.error(
                "disk", f"no permission to write in {place}", "change it, or name another --output"
            )
        _check_flush(place, findings)
        if plan.model is None:
            return
        needed, words = _needed(plan)
        free = durable.free_bytes(place)
        if free is None:
            findings.warning(
                "disk",
                f"{folder} needs {amount(needed)} ({words}); its file system does not say how much is free",
                "look yourself",
            )
            return
        free += _held(folder)
        findings.figures |= {"disk_needed_bytes": needed, "disk_free_bytes": free}
        text = f"{folder} needs {amount(needed)} ({words}), {amount(free)} are free"
        if free < needed:
            findings.error("disk", text, "free some, lower --keep-checkpoints, or name another --output")
        elif free < _TIGHT * needed:
            findings.warning("disk", text, "free some: little is left for logs and other runs")
        else:
            findings.ok("disk", text)


def _check_flush(place: Path, findings: Findings) -> None:
    try:
        reason = durable.refusal(place)
    except OSError as error:
        findings.error(
            "disk",
            f"{place} cannot be flushed: {error.strerror}",
            "have the disk checked, or name another --output",
        )
        return
    if reason is not None:
        findings.warning(
            "disk",
            f"the file system of {place} cannot flush folders ({reason}): "
            "a power cut may lose the newest checkpoint",
            "name an --output on a local disk or on NFS, or accept that",
        )


def _needed(plan: Plan) -> tuple[int, str]:
    """Bytes of all that the run will hold at once, and how they come about."""
    from lmim_fast.models.weight_names import TEACHER

    assert plan.model is not None
    config = plan.config
    one = teacher = 0
    for name, tensor in plan.model.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        if name.startswith(TEACHER):
            teacher += size
        else:
            one += size
    trained = sum(p.numel() * p.element_size() for p in plan.model.parameters() if p.requires_grad)
    weights = one
    one += (3 if config.optim.ema_decay else 2) * trained
    kept = config.keep_checkpoints + (1 if config.eval_every else 0) + _regular(plan, config)
    # One more while it is written, and the weights that the run leaves, of a recogniser also the best.
    total = (kept + 1) * one + teacher + 2 * weights
    return (
        total,
        f"{kept} checkpoints and one in flight of {amount(one)}, weights {amount(weights)}",
    )


def _regular(plan: Plan, config: RunConfig) -> int:
    """Checkpoints that --keep-every keeps for good."""
    from lmim_fast.train.optim import total_steps

    if not config.keep_every:
        return 0
    if plan.store is None and config.steps is None:
        return 1
    return total_steps(config, len(plan.store) if plan.store is not None else 1) // config.keep_every


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _held(run: Path) -> int:
    """Bytes of the checkpoints that the run has: they are among those that it will hold."""
    return sum(file.stat().st_size for file in run.glob("checkpoints/*/*") if file.is_file())
