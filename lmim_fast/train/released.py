"""What is lost, or does not fit, when a model is written in the released layout."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from lmim_fast.config import ModelConfig, RecognizerConfig, preset
from lmim_fast.config.finetune import recognizer_preset
from lmim_fast.config.io import differences, to_dict
from lmim_fast.models.mae import MAE
from lmim_fast.models.recognizer import Recognizer

_PRESETS = "small", "base"  # those of the released models
_FFN = 2048  # of torch's decoder layer, which the released code leaves at its default
_ENCODER = {"image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"}
_DECODER = {"decoder_width", "decoder_heads"}
_PRINTABLE = 94  # characters of the released English set, the first of `string.printable`
_LENGTHS = 25, 40  # of the released recognisers: English, Chinese
_READER = _DECODER | {"decoder_depth", "decoder_head_dim", "decoder_ffn"}


def of_model(model: nn.Module) -> list[str]:
    """What is to be said of an LMIM, an MAE or a recogniser: other sizes; characters that the file lacks."""
    if isinstance(model, Recognizer):
        return of_recognizer(model.config, model.characters)
    return of_pretraining(cast(ModelConfig, model.config), mae=isinstance(model, MAE))


def of_pretraining(config: ModelConfig, *, mae: bool) -> list[str]:
    """As `of_model`, of an LMIM or an MAE of these sizes."""
    names = _ENCODER | _DECODER | {"mae_decoder_depth" if mae else "decoder_depth"}
    return _sizes([preset(name) for name in _PRESETS], config, names)


def of_recognizer(config: RecognizerConfig, characters: str) -> list[str]:
    """As `of_model`, of a recogniser of these sizes and characters."""
    length = config.max_length if config.max_length in _LENGTHS else _LENGTHS[0]
    released = [recognizer_preset(name, max_length=length) for name in _PRESETS]
    names = _READER | {"max_length"} | {f"encoder.{name}" for name in _ENCODER}
    notes = _sizes(released, config, names)
    if characters != string.printable[: min(len(characters), _PRINTABLE)]:
        notes.append(
            f"warning: the released layout does not say which its {len(characters)} characters are, and they "
            "are not the first of the released set: keep what this file is made from, which says them, and "
            "pass the same --charset where `lmim finetune --init` takes this file"
        )
    return notes


def of_tensors(state: Mapping[str, Tensor]) -> list[str]:
    """Why the released class cannot hold these tensors: all but this size is an argument of it."""
    pattern = re.compile(r"decoder_blocks\.\d+\.linear1\.weight")
    wrong = {name: list(value.shape) for name, value in state.items() if pattern.fullmatch(name)}
    wrong = {name: shape for name, shape in wrong.items() if shape[0] != _FFN}
    if not wrong:
        return []
    name, shape = next(iter(wrong.items()))
    return [
        f"warning: the released class cannot load it: its decoder's feed-forward is {_FFN} wide, "
        f"here it is {shape[0]} ({name} {shape}); this package loads it, and a run with --model.decoder-ffn "
        f"{_FFN} fits the released class"
    ]


def _sizes(
    released: Sequence[ModelConfig | RecognizerConfig],
    config: ModelConfig | RecognizerConfig,
    names: set[str],
) -> list[str]:
    """Sizes that differ from those of the released model that is nearest."""
    found = [
        [
            f"{name.replace('_', '-')} {new} instead of {old}"
            for name, old, new in differences(to_dict(other), to_dict(config), "--model")
            if name.removeprefix("--model.").partition("[")[0] in names
        ]
        for other in released
    ]
    other_width = [any(".width " in size for size in sizes) for sizes in found]
    nearest = min(range(len(found)), key=lambda place: (other_width[place], len(found[place])))
    if not found[nearest]:
        return []
    return [
        f"warning: these sizes are not those of the released ViT-{_PRESETS[nearest]}: "
        f"{', '.join(found[nearest])}; the released class has to be made with them before it loads the file"
    ]
