"""Which tensors of a file are the model: where they stand in it, and under which prefix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lmim_fast.errors import UsageError, WeightsError, shared

STUDENT, TEACHER, RECOGNIZER = "model_maeenc.", "model_maeenc_momentum.", "encoder."
EMBEDDING = "decoder.trg_word_emb.weight"
MAX_NAMED = 12  # names that an error lists
_KEY = "::"  # between a file and the key of the weights in it
# Tensors by which a model is found: a recogniser, then LMIM, then an encoder (of an MAE too).
_LANDMARKS = (EMBEDDING, STUDENT + "cls_token", "cls_token")
_USUAL = ("model.", "module.", "state_dict.", "")  # where weights stand that have no landmark
_AVERAGES = {"ema", "swa", "avg", "average", "averaged", "momentum", "teacher", "target", "shadow"}
_MOMENTS = {"optimizer", "optim", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Weights:
    """The tensors of one model, without prefix, and what is to be said of how they were found."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """A model in a file: keys of the mapping it is in, prefix of its names there; both end in '.'."""

    keys: str
    prefix: str

    @property
    def whole(self) -> str:
        return self.keys + self.prefix

    @property
    def key(self) -> str:
        return self.whole.removesuffix(".")

    def parts(self) -> set[str]:
        return set(re.split(r"[._]", self.whole)) | set(self.whole.split("."))


def split_key(name: str | Path) -> tuple[Path, str | None]:
    """File and key of `FILE::KEY`; a name without `::`, or of a file that is there, has no key.

    Raises:
        UsageError: a key behind the name of a folder.
    """
    text = str(name)
    file, mark, key = text.rpartition(_KEY)
    if not mark or not file or not key or Path(text).exists():
        return Path(text), None
    if Path(file).is_dir():
        told = f"{text}: {file} is a folder, and {_KEY}{key} names one of the models in a file; leave it out"
        raise shared(UsageError(f"{told}, or name a file as FILE{_KEY}{key}"))
    return Path(file), key


def find_weights(content: Mapping[Any, Any], key: str | None, path: Path) -> Weights:
    """The tensors of the model in a file's `content`, without the prefix that they all have there.

    Of several the one that is no average (EMA, momentum, teacher) is taken, or what `key` names.

    Args:
        key:  where the wanted model stands: keys and prefix, such as `model_ema` or `state_dict.teacher`.
        path: what messages call the file.
    Raises:
        WeightsError: no tensors, no model under `key`, or several of which none is the first choice.
    """
    sets = dict[str, dict[str, Tensor]]()
    _collect(content, "", sets, set())
    if not sets:
        keys = ", ".join(printable(str(name)) for name in list(content)[:MAX_NAMED])
        raise WeightsError(f"{path} holds no tensors; its keys are {keys or 'none'}")
    by_landmark = [_places(sets, landmark) for landmark in _LANDMARKS]
    known = [place for places in by_landmark for place in places]
    if key is not None:
        by_landmark = [[place for place in places if _is_named(place, key)] for places in by_landmark]
    places = next((places for places in by_landmark if places), [])
    if not places:
        return _without_landmark(sets, key, path, known)
    place = _first_choice(places, sets, path)
    state = _tensors_at(place, places, sets)
    notes = []
    if place.prefix and place.prefix not in (STUDENT, TEACHER):
        notes.append(f"stripped `{printable(place.prefix)}` from {len(state)} names")
    others = _others(place, known)
    if key is not None:
        notes.append(f"took `{printable(place.key)}` as named")
    elif others:
        taken = f"took `{printable(place.key)}`" if place.key else "took the weights without a prefix"
        also = ", ".join(f"`{printable(other)}`" for other in others)
        notes.append(
            f"{taken}; the file also holds {also}: name {path}{_KEY}{printable(others[0])} to take it"
        )
    return Weights(state, tuple(notes))


def name_list(names: list[str]) -> str:
    """The first names, and how many more there are."""
    listed = ", ".join(printable(name) for name in names[:MAX_NAMED])
    return listed if len(names) <= MAX_NAMED else f"{listed} and {len(names) - MAX_NAMED} more"


def printable(text: str) -> str:
    """The text with control characters as escapes: names in files are anybody's."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def prefixes(names: list[str]) -> str:
    """The first parts of names, with how many have each: `backbone.` (150), `head.` (2)."""
    counts = dict[str, int]()
    for name in names:
        first, dot, _ = name.partition(".")
        counts[first + dot] = counts.get(first + dot, 0) + 1
    return name_list([f"`{prefix}` ({count})" for prefix, count in counts.items()])


def _collect(
    content: Mapping[Any, Any], keys: str, sets: dict[str, dict[str, Tensor]], seen: set[int]
) -> None:
    """Every mapping with tensors, once, by the keys that lead to it."""
    seen.add(id(content))  # a pickle may hold itself
    tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        sets[keys] = tensors
    for name, value in content.items():
        if (
            isinstance(value, Mapping)
            and isinstance(name, str)
            and id(value) not in seen
            and keys.count(".") < 8
        ):
            _collect(value, f"{keys}{name}.", sets, seen)


def _places(sets: Mapping[str, Mapping[str, Tensor]], landmark: str) -> list[_Place]:
    places = []
    for keys, tensors in sets.items():
        for name in tensors:
            if name == landmark or name.endswith("." + landmark):
                place = _Place(keys, name.removesuffix(landmark))
                if not place.parts() & _MOMENTS and _is_whole(place.prefix, landmark, tensors):
                    places.append(place)
    return places


def _is_whole(prefix: str, landmark: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a landmark has an encoder's first tensors beside it; other layouts have a cls_token too."""
    inner = {EMBEDDING: RECOGNIZER, "cls_token": ""}.get(landmark, STUDENT)
    first = prefix + inner
    return first + "patch_embed.proj.weight" in tensors and any(
        n.startswith(first + "blocks.0.") for n in tensors
    )


def _is_named(place: _Place, key: str) -> bool:
    wanted = key.removesuffix(".") + "."
    return place.whole.startswith(wanted) or place.prefix == wanted


def _first_choice(places: list[_Place], sets: Mapping[str, Mapping[str, Tensor]], path: Path) -> _Place:
    trained = [place for place in places if not place.parts() & _AVERAGES] or places
    if len(trained) > 1:
        keys = [printable(place.key) for place in trained]
        listed = ", ".join(f"`{key}`" for key in keys)
        raise WeightsError(
            f"{path} holds {len(trained)} models, at {listed}: name one as {path}{_KEY}{keys[-1]}"
        )
    return trained[0]


def _tensors_at(
    place: _Place, places: list[_Place], sets: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors under a prefix but those of another model under a longer one."""
    longer = tuple(
        other.prefix
        for other in places
        if other.keys == place.keys and other.prefix != place.prefix and other.prefix.startswith(place.prefix)
    )
    return {
        name.removeprefix(place.prefix): value
        for name, value in sets[place.keys].items()
        if name.startswith(place.prefix) and not (longer and name.startswith(longer))
    }


def _others(chosen: _Place, known: list[_Place]) -> list[str]:
    """Keys of the models that were not taken; not of the parts of one."""
    others = list[str]()
    for place in known:
        parts = chosen, *(other for other in known if other.key in others)
        if not any(place.keys == part.keys and place.prefix.startswith(part.prefix) for part in parts):
            others.append(place.key)
    return others


def _without_landmark(
    sets: Mapping[str, dict[str, Tensor]], key: str | None, path: Path, known: list[_Place]
) -> Weights:
    if key is None:
        keys = next((usual for usual in _USUAL if usual in sets), max(sets, key=lambda keys: len(sets[keys])))
        return Weights(sets[keys])
    found = {place.key for place in known} or {keys.removesuffix(".") for keys in sets}
    raise WeightsError(f"{path} has no model at `{printable(key)}`; it has {name_list(sorted(found))}")
