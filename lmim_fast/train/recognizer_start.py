"""What a recogniser starts from: an encoder, or another recogniser, whose characters may differ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lmim_fast.config import FinetuneConfig
from lmim_fast.config.io import run_from_dict
from lmim_fast.data.charset import Charset, shared_classes
from lmim_fast.errors import CheckpointError, UsageError
from lmim_fast.models import weights
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import (
    CLASSIFIER,
    characters_of,
    describes_itself,
    is_recognizer,
    load_state,
)
from lmim_fast.models.weight_names import EMBEDDING, split_key
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.run_weights import Place, checkpoint_tensors, newest_of
from lmim_fast.train.start import load_student

BEST, LAST = Path("best") / "recognizer.safetensors", Path("recognizer.safetensors")
_SHOWN = 40  # characters that a message lists


def find_recognizer(name: str) -> Place | None:
    """The recogniser of a path; None where it has none.

    Args:
        name: `FILE`, `FILE::KEY`, one of the checkpoint folders of a fine-tuning, or its run folder, of which
            the best weights on `--val` are taken, or the newest.
    Raises:
        UsageError: a key behind a folder.
        CheckpointError: the checkpoint is damaged.
    """
    path, _ = split_key(name)
    if path.is_file():
        return Place(Path(name))
    if (path / folders.STATE_FILE).is_file():
        return Place(path, folders.read(path)) if _is_of_finetuning(path) else None
    run = path.parent if path.name == "checkpoints" else path
    if (run / BEST).is_file():
        return Place(run / BEST)
    if (run / LAST).is_file() or _has_finetuned(run):
        return newest_of(run, run / LAST)
    return None


def _has_finetuned(run: Path) -> bool:
    for checkpoint in folders.finished(run):
        with contextlib.suppress(CheckpointError):  # it says so when its weights are wanted
            return _is_of_finetuning(checkpoint)
    return False


def _is_of_finetuning(checkpoint: Path) -> bool:
    return "characters" in folders.state_of(checkpoint)["config"]


def recognizer_of(checkpoint: Checkpoint) -> Recognizer:
    """The recogniser in a checkpoint of a fine-tuning, of its averaged weights if it has any, in eval mode.

    Raises:
        WeightsError: its tensors do not fit; with names and shapes.
    """
    config = cast(FinetuneConfig, run_from_dict(checkpoint.state["config"]))
    model = Recognizer(config.model, config.characters)
    load_state(checkpoint_tensors(checkpoint), model, str(checkpoint.path))
    return model.eval()


def start_recognizer(name: str, model: Recognizer, say: Callable[[str], None]) -> None:
    """Load what `--init` names: an encoder alone, or all of a recogniser.

    From a recogniser with another character set the rows of shared characters, of EOS, PAD, UNK and of the
    start token are kept in embedding and classifier; the rows of new characters stay as they are.

    Raises:
        UsageError:   there is no such file.
        WeightsError: it does not fit; lists names and shapes.
    """
    if not split_key(name)[0].exists():
        raise UsageError(f"--init {name} does not exist; it should be a file or a run folder")
    place = find_recognizer(name)
    if place is None:
        load_student(name, model.encoder, say, whom="encoder")
        return
    path, notes = place.path, list(place.told())
    if place.checkpoint is not None:
        state, characters = (
            checkpoint_tensors(place.checkpoint),
            place.checkpoint.state["config"]["characters"],
        )
    else:
        found = weights.read_weights(path)
        state = found.state
        if not is_recognizer(state):
            load_student(name, model.encoder, say, whom="encoder")
            return
        notes += found.notes
        same_size = state[CLASSIFIER + ".weight"].shape[0] == model.config.classes
        undescribed = not describes_itself(path)  # a released file does not say its characters
        characters = model.characters if same_size and undescribed else characters_of(path, state)
    told = f"{path} ({'; '.join(notes)})" if notes else str(path)
    if characters == model.characters:
        load_state(state, model, str(path))
        say(f"recogniser starts from {told}")
        return
    load_state(transplant(state, characters, model), model, str(path))
    shared = [c for c in model.characters if c in characters]
    new = [c for c in model.characters if c not in characters]
    say(
        f"recogniser starts from {told}, which has other characters: "
        f"{len(shared)} of {len(model.characters)} kept"
    )
    if new:
        more = "" if len(new) <= _SHOWN else f" and {len(new) - _SHOWN} more"
        say(f"new characters, to be learned: {''.join(new[:_SHOWN])}{more}")
    lost = [c for c in characters if c not in model.characters]
    if lost:
        more = "" if len(lost) <= _SHOWN else f" and {len(lost) - _SHOWN} more"
        say(f"characters that are no longer read: {''.join(lost[:_SHOWN])}{more}")


def transplant(state: Mapping[str, Tensor], characters: str, model: Recognizer) -> dict[str, Tensor]:
    """A recogniser's tensors with the rows of `model`'s classes.

    Args:
        state:      of a recogniser of other characters.
        characters: its characters, in the order of their classes.
        model:      gives the rows of characters that the state lacks.
    Returns:
        A state dict that fits `model` if the other sizes do.
    """
    old, new = Charset(characters), Charset(model.characters)
    classes = shared_classes(old, new)
    result, own = dict(state), model.state_dict()
    for name in (EMBEDDING, CLASSIFIER + ".weight", CLASSIFIER + ".bias"):
        rows = [*classes, (old.start, new.start)] if name == EMBEDDING else classes
        old_rows, new_rows = (torch.tensor(part) for part in zip(*rows, strict=True))
        if own[name].shape[1:] != state[name].shape[1:]:
            continue  # other sizes: the load names them
        result[name] = own[name].clone().cpu()
        result[name][new_rows] = state[name][old_rows].to(result[name])
    return result
