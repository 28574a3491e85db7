"""Which checkpoint a run continues from, and whether it is the same run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmim_fast.config import RunConfig
from lmim_fast.config.io import differences, run_from_dict, to_dict
from lmim_fast.errors import CheckpointError, UsageError
from lmim_fast.train.checkpoint import folders, length, removal
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.checkpoint.state import FIELDS_OF_A_RUN, Fields
from lmim_fast.train.world import World

# Values that change no weight. `data` is decided by the fingerprint: a database may have moved; `charset` by
# the characters. `teacher` and `init` name what a run began with, and its folder holds that. `device` is the
# exception, so that a run can move to another machine: matmuls then differ by rounding, views by how CPU and
# GPU decode and resample. On one machine nothing need differ, so `loader.device` may not change. A record in
# the list of `loader.skip` gets the substitute that it gets as a broken one when it is met.
MAY_CHANGE = {
    "config.data",
    "config.output",
    "config.teacher",
    "config.init",
    "config.device",
    "config.accumulation",
    "config.parallel",
    "config.shard_size",
    "config.reshard",
    "config.activation_checkpointing",
    "config.cuda_graph",
    "config.resume",
    "config.checkpoint_every",
    "config.keep_checkpoints",
    "config.keep_every",
    "config.checkpoint_layout",
    "config.max_time",
    "config.timeout",
    "config.eval_data",
    "config.eval_every",
    "config.eval_images",
    "config.profile",
    "config.wandb",
    "config.log_every",
    "config.charset",
    "config.val",
    "config.validate_every",
    "config.loader.threads",
    "config.loader.prefetch",
    "config.loader.max_bad_fraction",
    "config.loader.skip",
}
_LENGTH = {"config.steps", "config.epochs"}  # for `length.check` to judge
_HASH = re.compile(r"data\.databases\[(\d+)\]\.(hash|images)")


def find(
    run: Path,
    config: RunConfig,
    fingerprint: dict[str, Any],
    world: World,
    say: Callable[[str], None],
) -> Checkpoint | None:
    """The checkpoint to continue from, None for a fresh start; every rank reads the same one.

    Rank 0 checks every byte of it. The tensors of a sharded one stay in its files until `content.restore`.

    Args:
        fingerprint: of the records that `config.data` names.
    Raises:
        UsageError: the folder has checkpoints, and the config says not to resume or is of another run.
        CheckpointError: it has checkpoints and none of them is whole.
        LmimError: a file of the newest cannot be read, which is no reason to take an older one.
    """
    saved = None
    with world.together():
        if world.is_main:
            saved = _choose(run, config, say, FIELDS_OF_A_RUN)
    path = world.gather(saved.path if saved else None)[0]
    if path is None:
        return None
    with world.together():
        saved = saved or folders.open_trusted(path)
        check_same_run(saved, config, fingerprint)
        length.check(saved, config, fingerprint["count"], say)
    return saved


def _choose(
    run: Path, config: RunConfig, say: Callable[[str], None], fields: Fields = MappingProxyType({})
) -> Checkpoint | None:
    if names := folders.misnamed(run):
        say(
            f"warning: {run / 'checkpoints'} holds {', '.join(map(repr, names))}: checkpoints are called "
            "like step-00000300, other names are not read"
        )
    if not folders.steps(run):
        return None
    if not config.resume:
        raise UsageError(f"{run} already has checkpoints: choose another --output, or drop --no-resume")
    damaged: list[tuple[Path, CheckpointError]] = []
    saved = folders.newest(
        run, lambda path, error: damaged.append((path, error)), in_memory=False, fields=fields
    )
    if saved is None:
        reasons = "; ".join(str(error) for _, error in damaged)
        raise CheckpointError(f"no checkpoint in {run} is whole ({reasons}); choose another --output")
    for path, error in damaged:
        aside = removal.set_aside(path)
        say(f"warning: {error}; set aside as {aside.name}, continuing from {saved.path.name}")
    return saved


def check_same_run(saved: Checkpoint, config: RunConfig, fingerprint: dict[str, Any]) -> None:
    """Refuse a checkpoint of other settings, or of other data than what the objective reads of it.

    Raises:
        UsageError: names the first fields that differ, with both values.
    """
    labels = config.objective == "recognizer"
    changed = [
        *differences(_completed(saved.state["config"]), to_dict(config), "config"),
        *differences(*_contents(saved.state["data"], fingerprint, labels=labels), "data"),
    ]
    changed = [line for line in changed if line[0].partition("[")[0] not in MAY_CHANGE | _LENGTH]
    if changed:
        told = [_told(*line, fingerprint) for line in changed[:3]]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"{saved.path} is of another run: {'; '.join(told)}{more}; "
            "use the same values or another --output"
        )


def _told(name: str, old: Any, new: Any, fingerprint: dict[str, Any]) -> str:
    """One difference, for the user."""
    if place := _HASH.fullmatch(name):
        what = fingerprint["databases"][int(place[1])].get("name", f"database {place[1]}")
        part = "images" if place[2] == "images" else "records"
        return f"the {part} of {what} are not those that the run began with ({old}, now {new})"
    told = f"{name.removeprefix('config.')} was {old!r}, now {new!r}"
    if isinstance(old, str | int | float) and name.startswith("config.") and "[" not in name:
        told += f" (--{name.removeprefix('config.').replace('_', '-')} {old})"
    return told


def _completed(saved: dict[str, Any], defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """A saved config with the defaults of fields, at any depth, that are newer than it."""
    if defaults is None:
        defaults = to_dict(run_from_dict({"data": [""], "objective": saved["objective"]}))
    older = {
        name: _completed(value, defaults[name]) if isinstance(defaults.get(name), dict) else value
        for name, value in saved.items()
    }
    return defaults | older


def _contents(
    saved: dict[str, Any], now: dict[str, Any], *, labels: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints of records, without what does not count: names of folders and, if not read, labels.

    Older checkpoints have one hash of images and labels together, and none of all targets.
    """
    older = not all("images" in database for database in saved["databases"])
    hidden = {"name"}
    hidden |= {"images"} if labels or older else {"hash", "has_labels"}
    both = []
    for fingerprint in (saved, now):
        databases = [
            {key: value for key, value in database.items() if key not in hidden}
            for database in fingerprint["databases"]
        ]
        both.append({**fingerprint, "databases": databases})
    if labels and "labels" in saved and "targets" not in saved["labels"] and "labels" in now:
        both[1]["labels"] = {key: value for key, value in now["labels"].items() if key != "targets"}
    return both[0], both[1]
