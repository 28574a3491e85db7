"""Reading token by token: greedily, and by beam search whose cache follows the histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.models.recognizer_decoder import RecognizerDecoder, StepDecoder

_STOP_EVERY = 4  # tokens between two looks at whether all words have ended: each waits for the device


@dataclass
class Reading:
    """Words of B crops."""

    ids: Tensor
    """(B, longest) int64 classes: of the characters, EOS, then PAD. A word of full length has no EOS."""
    probabilities: Tensor
    """(B, longest) fp32 of the chosen tokens; 1 behind EOS."""
    lengths: Tensor
    """(B,) int64 tokens of the word, EOS included."""
    characters: str
    """Those of classes 0, 1, ...; behind them come EOS, PAD and UNK."""

    @cached_property
    def log_probabilities(self) -> Tensor:
        """(B,) fp64: sum over the characters and EOS."""
        return self.probabilities.double().log().sum(dim=1)

    @property
    def word_probabilities(self) -> Tensor:
        """(B,) fp32: product over the characters and EOS."""
        return self.log_probabilities.exp().float()

    @cached_property
    def strings(self) -> list[str]:
        """The words; PAD and UNK inside a word are left out. Reads from the device."""
        known = len(self.characters)
        rows = zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        return ["".join(self.characters[i] for i in row[:length] if i < known) for row, length in rows]


def greedy(
    decoder: RecognizerDecoder,
    keys: Sequence[Tensor],
    config: RecognizerConfig,
    characters: str,
    *,
    early_stop: bool,
) -> Reading:
    """The likeliest token at each place.

    Args:
        keys:       of each layer (B, M, 2 * heads * head_dim), from `RecognizerDecoder.memory_keys`.
        early_stop: look every few tokens whether all words have ended, which waits for the device.
    """
    batch, longest = len(keys[0]), config.max_length
    steps = StepDecoder(decoder, keys, 1, longest)
    tokens = torch.full((batch,), config.start, device=keys[0].device)
    ids = torch.full((batch, longest), config.pad, device=tokens.device)
    probabilities = torch.ones(batch, longest, device=tokens.device)
    reading = torch.ones_like(tokens, dtype=torch.bool)
    lengths = torch.zeros_like(tokens)
    for number in range(longest):
        log_p, tokens = steps.step(tokens, number).max(dim=-1)
        ids[:, number] = torch.where(reading, tokens, config.pad)
        probabilities[:, number] = torch.where(reading, log_p.exp(), 1.0)
        lengths += reading
        reading &= tokens != config.eos
        if early_stop and (number + 1) % _STOP_EVERY == 0 and not reading.any():
            break
    return Reading(ids, probabilities, lengths, characters)


def beam_search(
    decoder: RecognizerDecoder,
    keys: Sequence[Tensor],
    config: RecognizerConfig,
    characters: str,
    width: int,
) -> Reading:
    """The most probable word that `width` beams come across, or the greedy one if that is more probable.

    A word's score is its log probability with EOS, without normalisation by length. Each step keeps the
    `width` best continuations of an image; those that end leave the beam and wait as the best word so far.

    Args:
        keys: of each layer (B, M, 2 * heads * head_dim), from `RecognizerDecoder.memory_keys`.
    """
    plain = greedy(decoder, keys, config, characters, early_stop=True)
    beams = _Beams(config, len(keys[0]), width, keys[0].device)
    steps = StepDecoder(decoder, keys, width, config.max_length)
    for number in range(config.max_length):
        rows = beams.advance(steps.step(beams.tokens.flatten(), number), number)
        if number + 1 == config.max_length or ((number + 1) % _STOP_EVERY == 0 and beams.finished()):
            break
        steps.reorder(rows, number)
    found = beams.reading(characters)
    better = found.log_probabilities > plain.log_probabilities
    ids = torch.where(better[:, None], found.ids, plain.ids)
    probabilities = torch.where(better[:, None], found.probabilities, plain.probabilities)
    return Reading(ids, probabilities, torch.where(better, found.lengths, plain.lengths), characters)


class _Beams:
    """Histories and scores of W beams for each of B images, and the best ended word of each image."""

    def __init__(self, config: RecognizerConfig, batch: int, width: int, device: torch.device) -> None:
        self.config, self.width = config, width
        longest = config.max_length
        self.tokens = torch.full((batch, width), config.start, device=device)
        self.scores = torch.full((batch, width), -torch.inf, device=device)  # of dead beams
        self.scores[:, 0] = 0.0  # all beams are alike at the start: one of them goes on
        self.ids = torch.full((batch, width, longest), config.pad, device=device)
        self.log_p = torch.zeros(batch, width, longest, device=device)
        self.best_score = torch.full((batch,), -torch.inf, device=device)
        self.best_ids, self.best_log_p = self.ids[:, 0].clone(), self.log_p[:, 0].clone()
        self.best_length = torch.zeros(batch, dtype=torch.int64, device=device)

    def advance(self, log_p: Tensor, number: int) -> Tensor:
        """Choose token `number` by its log probabilities (B * W, classes).

        Returns:
            (B * W,) rows whose histories the beams go on from.
        """
        classes = log_p.shape[-1]
        log_p = log_p.view(-1, self.width, classes)
        scores, chosen = (self.scores[:, :, None] + log_p).flatten(1).topk(self.width, dim=1)
        parents, self.tokens = chosen // classes, chosen % classes  # (B, W)
        places = parents[:, :, None].expand_as(self.ids)
        self.ids, self.log_p = self.ids.gather(1, places), self.log_p.gather(1, places)
        self.ids[:, :, number] = self.tokens
        self.log_p[:, :, number] = log_p.flatten(1).gather(1, chosen)
        last = number + 1 == self.config.max_length
        ended = torch.ones_like(self.tokens, dtype=torch.bool) if last else self.tokens == self.config.eos
        self._keep_best(torch.where(ended, scores, -torch.inf), number + 1)
        self.scores = torch.where(ended, -torch.inf, scores)
        first = torch.arange(len(parents), device=parents.device)[:, None] * self.width
        return (first + parents).flatten()

    def _keep_best(self, scores: Tensor, length: int) -> None:
        """Remember the best of the ended words, `scores` (B, W), where it beats those before."""
        score, beam = scores.max(dim=1)
        better = score > self.best_score
        place = beam[:, None, None].expand(-1, 1, self.ids.shape[2])
        self.best_score = torch.where(better, score, self.best_score)
        self.best_length = torch.where(better, length, self.best_length)
        for name, histories in (("best_ids", self.ids), ("best_log_p", self.log_p)):
            kept = torch.where(better[:, None], histories.gather(1, place)[:, 0], getattr(self, name))
            setattr(self, name, kept)

    def finished(self) -> bool:
        """Whether no beam can still win: scores only fall. Reads from the device."""
        return bool((self.scores.amax(dim=1) <= self.best_score).all())

    def reading(self, characters: str) -> Reading:
        """The best words."""
        return Reading(self.best_ids, self.best_log_p.exp(), self.best_length, characters)
