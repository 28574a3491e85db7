"""What a recogniser starts from: an encoder, or another recogniser, whose characters may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lmim_fast.data.charset import Charset, shared_classes
from lmim_fast.errors import UsageError
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
from lmim_fast.train.start import load_student

BEST, LAST = Path("best") / "recognizer.safetensors", Path("recognizer.safetensors")
_SHOWN = 40  # characters that a message lists


def recognizer_file(name: str) -> Path | None:
    """The recogniser file of a path: the file, or of a run folder its best or its last one; else None."""
    path = Path(name)
    if split_key(name)[0].is_file():
        return path
    return next((path / inside for inside in (BEST, LAST) if (path / inside).is_file()), None)


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
    path = recognizer_file(name)
    if path is None and (Path(name) / "checkpoints").is_dir():
        latest = folders.latest(Path(name))
        if latest is not None and "characters" in folders.read_state(latest / folders.STATE_FILE)["config"]:
            raise UsageError(
                f"--init {name}: this fine-tuning has no {LAST} yet; let it finish, or give it --val"
            )
    if path is None or not is_recognizer(weights.read_state_dict(path)):
        load_student(name, model.encoder, say, whom="encoder")
        return
    state = weights.read_state_dict(path)
    same_size = state[CLASSIFIER + ".weight"].shape[0] == model.config.classes
    undescribed = not describes_itself(path)  # a released file does not say its characters
    characters = model.characters if same_size and undescribed else characters_of(path, state)
    if characters == model.characters:
        load_state(state, model, str(path))
        say(f"recogniser starts from {path}")
        return
    load_state(transplant(state, characters, model), model, str(path))
    shared = [c for c in model.characters if c in characters]
    new = [c for c in model.characters if c not in characters]
    say(
        f"recogniser starts from {path}, which has other characters: "
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
