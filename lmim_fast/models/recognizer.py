"""The recogniser on the fast ops: encoder, a linear with LayerNorm, autoregressive decoder."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.errors import UsageError
from lmim_fast.layers.norm import add_norm
from lmim_fast.layers.parts import hooks_on_all, is_plain
from lmim_fast.layers.plain import product_and_bias
from lmim_fast.models.encoder import Encoder, initialise
from lmim_fast.models.reading import Reading, beam_search, greedy
from lmim_fast.models.recognizer_decoder import RecognizerDecoder

ENGLISH = string.printable[:94]  # digits, lower case, upper case, 32 marks: the first 36 and 62 are sets too


@dataclass
class RecognizerOutput:
    """What a forward pass under targets computes."""

    logits: Tensor
    """(B, T, classes) in the compute dtype."""
    loss: Tensor
    """() fp32: cross-entropy of characters and EOS, summed over tokens, divided by B."""


class Recognizer(nn.Module):
    """Reads word crops; state dict names are the release's, with its two names for positions and projection.

    Equal to `reference_recognizer.ReferenceRecognizer` for dropout 0 and drop path 0. Linears and the patch
    projection start xavier-uniform with bias 0, embedding and cls normal(0, 0.02). The patch embedding that
    runs is `encoder.patch_embed`; `patch_embed` is its second name in the state dict.

    Args:
        config:     sizes.
        characters: those of classes 0, 1, ...; None: the first of 0-9 a-z A-Z and 32 punctuation marks.
    Raises:
        UsageError: the number of characters is not that of the config.
    Source: LMIM (CVPR 2025) and its released code.
    """

    def __init__(self, config: RecognizerConfig, characters: str | None = None) -> None:
        super().__init__()
        self.config, self.characters = config, _characters(config, characters)
        encoder, width = Encoder(config.encoder, drop_path=config.drop_path), config.decoder_width
        self.pos_embed = encoder.pos_embed
        self.encoder = encoder
        self.decoder = RecognizerDecoder(config)
        self.linear_norm = nn.Sequential(nn.Linear(config.encoder.width, width), nn.LayerNorm(width))
        self.patch_embed = encoder.patch_embed
        self.apply(initialise)
        nn.init.normal_(self.decoder.trg_word_emb.weight, std=0.02)

    def forward(self, images: Tensor, targets: Tensor, lengths: Tensor | None = None) -> RecognizerOutput:
        """Logits under the targets, and the loss.

        Args:
            images:  float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            targets: (B, T) int64, T <= max_length: characters, EOS, then PAD.
            lengths: (B,) tokens with EOS; None counts them up to EOS, or up to T without one.
        Raises:
            ValueError: targets or images of another layout or number.
        """
        config = self.config
        if targets.dim() != 2 or len(targets) != len(images) or targets.shape[1] > config.max_length:
            raise ValueError(
                f"targets {tuple(targets.shape)} must be ({len(images)}, T) with T <= {config.max_length}"
            )
        start = torch.full_like(targets[:, :1], config.start)
        logits = self.decoder(torch.cat([start, targets[:, :-1]], dim=1), self.encode(images))
        return RecognizerOutput(logits, self.loss(logits, targets, lengths))

    def encode(self, images: Tensor) -> Tensor:
        """Images, as `forward` takes them, to the decoder's memory (B, 1 + L, decoder width)."""
        features, parts = self.encoder.encode(images), self.linear_norm
        if not is_plain(parts, nn.Sequential) or len(parts) != 2 or hooks_on_all():
            memory: Tensor = parts(features)
            return memory.to(features.dtype)
        rows, bias = product_and_bias(features, parts[0])
        return add_norm(rows + bias.to(rows.dtype), None, None, parts[1], rows.dtype)[0]

    def loss(self, logits: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Cross-entropy of the tokens before `lengths`, summed and divided by B: see `forward`."""
        config = self.config
        if lengths is None:
            ended = (targets == config.eos).cumsum(dim=1)
            counted = (ended - (targets == config.eos).long()) == 0
        else:
            counted = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
        labels = torch.where(counted, targets, config.pad).flatten()
        logits = logits.flatten(0, 1).float()
        share = config.label_smoothing
        hard = F.cross_entropy(logits, labels, ignore_index=config.pad, reduction="sum")
        if not share:
            return hard / len(targets)
        log_p = logits.log_softmax(dim=-1)
        spread = (log_p[:, config.pad] - log_p.sum(dim=-1)) / (config.classes - 1)
        soft = torch.where(labels != config.pad, spread, 0.0).sum()
        return ((1 - share) * hard + share * soft) / len(targets)

    @torch.no_grad()
    def greedy(self, images: Tensor, *, early_stop: bool = True) -> Reading:
        """Read images by the likeliest token at each place.

        Args:
            images:     as `forward` takes them.
            early_stop: end when all words have ended. It reads from the device every few tokens: switch it
                        off to record a CUDA graph.
        Returns:
            Reading of B words.
        """
        with self._reading():
            keys = self.decoder.memory_keys(self.encode(images))
            return greedy(self.decoder, keys, self.config, self.characters, early_stop=early_stop)

    @torch.no_grad()
    def beam_search(self, images: Tensor, width: int) -> Reading:
        """Read images by beam search; a word is never less probable than the greedy one.

        Args:
            images: as `forward` takes them.
            width:  beams of an image; 1 is greedy reading.
        Returns:
            Reading of B words.
        Raises:
            UsageError: width is less than 1.
        """
        if width < 1:
            raise UsageError(f"beam search needs a width of at least 1, got {width}")
        with self._reading():
            keys = self.decoder.memory_keys(self.encode(images))
            return beam_search(self.decoder, keys, self.config, self.characters, width)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Inside, the model is in eval mode."""
        training = self.training
        if training:
            self.eval()
        try:
            yield
        finally:
            if training:
                self.train()


def _characters(config: RecognizerConfig, characters: str | None) -> str:
    if characters is None and config.characters > len(ENGLISH):
        raise UsageError(
            f"pass the {config.characters} characters of this recogniser: only {len(ENGLISH)} are known"
        )
    characters = ENGLISH[: config.characters] if characters is None else characters
    if len(characters) != config.characters:
        raise UsageError(
            f"{config.classes} classes need {config.characters} characters, got {len(characters)}: "
            f"set classes to {len(characters) + config.classes - config.characters}"
        )
    return characters
