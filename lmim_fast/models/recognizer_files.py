"""Files of a whole recogniser: ours, with its sizes and characters inside, and released ones."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lmim_fast import durable
from lmim_fast.config import ModelConfig, RecognizerConfig
from lmim_fast.config.io import from_dict, to_dict
from lmim_fast.config.recognizer import SPECIAL_CLASSES
from lmim_fast.errors import WeightsError
from lmim_fast.models import weights
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.weight_files import is_safetensors, with_step
from lmim_fast.models.weight_names import EMBEDDING, split_key

CLASSIFIER = "decoder.classifier"
_ABOUT = "lmim_fast.recognizer"  # entry of the metadata
_HEAD = 64  # width of a head in all released recognisers
_PRINTABLE = 94  # characters of the released English set, the first of `string.printable`


def is_recognizer(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a recogniser's."""
    return EMBEDDING in state


def recognizer_bytes(model: Recognizer, step: int | None = None) -> bytes:
    """The recogniser as a safetensors file: one copy of each tensor; config and characters as metadata.

    Args:
        model: the recogniser.
        step:  steps of the run that it is of, which the file then says.
    Raises:
        WeightsError: a weight is not finite.
    """
    import safetensors.torch

    state = weights.to_released(model)
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    # One entry: the order of several in the file would change from time to time.
    about = {_ABOUT: json.dumps({"config": to_dict(model.config), "characters": model.characters})}
    content: bytes = safetensors.torch.save({name: state[name] for name in state if name in names}, about)
    return content if step is None else with_step(content, step)


def save_recognizer(model: Recognizer, path: str | os.PathLike[str]) -> Path:
    """Write a recogniser as one safetensors file that `load_recognizer` reads, whole or not at all.

    Raises:
        WeightsError: a weight is not finite.
        OSError: the file cannot be written.
    """
    target = Path(path)
    durable.write_file(target, recognizer_bytes(model))
    return target


def load_recognizer(path: str | os.PathLike[str]) -> Recognizer:
    """The recogniser in a file, in eval mode on the CPU.

    Args:
        path: a file of `save_recognizer`, or a released one: its sizes are those of its tensors, with heads
              of 64; its characters the first of `string.printable`, if there are at most 94.
    Raises:
        WeightsError: no such file, no recogniser, or tensors that do not fit; with names and shapes.
    """
    path = Path(path)
    state = weights.read_state_dict(path)
    weights.check_entering(state, str(path))
    if not is_recognizer(state):
        raise WeightsError(f"{path} is no recogniser: it has no {EMBEDDING}; fine-tune the encoder first")
    described = _described(path)
    config = described[0] if described else _sizes(state, path)
    model = Recognizer(config, characters_of(path, state))
    load_state(state, model, str(path))
    return model.eval()


def characters_of(path: Path, state: Mapping[str, Tensor]) -> str:
    """The characters of the recogniser in `path`, whose tensors are `state`, in the order of their classes.

    Raises:
        WeightsError: a released file of a character set that is not known; it does not say its characters.
    """
    described = _described(path)
    if described:
        return described[1]
    count = state[CLASSIFIER + ".weight"].shape[0] - SPECIAL_CLASSES
    if count > _PRINTABLE:
        raise WeightsError(
            f"{path} has {count} characters and does not say which: pass it to `lmim finetune --init` "
            "with as many characters in --charset"
        )
    return string.printable[:count]


def load_state(state: Mapping[str, Tensor], model: Recognizer, source: str) -> None:
    """Copy a recogniser's tensors into `model`, only if all fit; second names of a tensor may be absent.

    Raises:
        WeightsError: tensors are missing, left over or misshaped; the message lists names and shapes.
    """
    complete = dict(state)
    for name in model.state_dict():
        other = "encoder." + name
        if name not in complete and other in complete:
            complete[name] = complete[other]
        elif other in model.state_dict() and other not in complete and name in complete:
            complete[other] = complete[name]
    weights.load_released(complete, model, source)


def describes_itself(path: Path) -> bool:
    """Whether a file says its characters: ours do, released ones do not."""
    return _described(path) is not None


def _described(path: Path) -> tuple[RecognizerConfig, str] | None:
    """Config and characters in the metadata of one of our files; None for others."""
    path, _ = split_key(path)
    if not is_safetensors(path):
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if _ABOUT not in about:
            return None
        document = json.loads(about[_ABOUT])
        return from_dict(RecognizerConfig, document["config"]), document["characters"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} does not describe a recogniser of this version: {error}") from error


def _sizes(state: Mapping[str, Tensor], path: Path) -> RecognizerConfig:
    """Sizes of a released recogniser, from the shapes of its tensors."""

    def depth(pattern: str) -> int:
        numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
        return max(numbers, default=-1) + 1

    try:
        width, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
        decoder_inner, decoder_width = state["decoder.layer_stack.0.self_attn.linear_q.weight"].shape
        classes = state[CLASSIFIER + ".weight"].shape[0]
        encoder = ModelConfig(
            patch_size=patch,
            width=width,
            depth=depth(r"encoder\.blocks\.(\d+)\."),
            heads=width // _HEAD,
            mlp_ratio=state["encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        )
        return RecognizerConfig(
            encoder=encoder,
            classes=classes,
            max_length=25 if classes - SPECIAL_CLASSES <= _PRINTABLE else 40,
            decoder_width=decoder_width,
            decoder_depth=depth(r"decoder\.layer_stack\.(\d+)\."),
            decoder_heads=decoder_inner // _HEAD,
            decoder_head_dim=_HEAD,
            decoder_ffn=state["decoder.layer_stack.0.mlp.w_1.weight"].shape[0],
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no recogniser that is known: {error}") from error
