"""Reading words from the encoder's features: with caches, by beam search, and by decoding all tokens again.

"cached" is `Recognizer.greedy`; "again" runs the whole decoder for every token, as the release does; "keys
once" does so with the keys and values of the memory made once. The encoder, the same for all, is timed apart.
Weights are random and EOS is ruled out, so all words read `max_length` tokens.

    OMP_NUM_THREADS=1 python -m pytest -n 0 benchmarks/bench_reading.py --batches 8
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DEVICE, DTYPE
from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.models.reading import beam_search, greedy
from lmim_fast.models.recognizer import Recognizer

VARIANTS = ("cached", "beam of 5", "keys once", "again", "encoder")


@dataclass
class Case:
    """A recogniser and the features of some images."""

    model: Recognizer
    images: Tensor
    memory: Tensor

    def run(self, variant: str) -> Tensor:
        """The ids that the variant reads, (B, longest); the features of the "encoder"."""
        model, decoder = self.model, self.model.decoder
        if variant == "encoder":
            return model.encode(self.images)
        if variant == "again":
            return self._again(lambda inputs: decoder(inputs, self.memory))
        keys = decoder.memory_keys(self.memory)
        if variant == "keys once":
            return self._again(lambda inputs: decoder(inputs, self.memory, keys))
        if variant == "cached":
            return greedy(decoder, keys, model.config, model.characters, early_stop=False).ids
        return beam_search(decoder, keys, model.config, model.characters, 5).ids

    def _again(self, decode: Callable[[Tensor], Tensor]) -> Tensor:
        ids = torch.full((len(self.images), 1), self.model.config.start, device=DEVICE)
        for _ in range(self.model.config.max_length):
            ids = torch.cat([ids, decode(ids)[:, -1:].argmax(dim=-1)], dim=1)
        return ids[:, 1:]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    torch.manual_seed(0)
    model = Recognizer(RecognizerConfig()).eval().to(DEVICE)
    torch.nn.init.constant_(model.decoder.classifier.bias[model.config.eos : model.config.eos + 1], -99.0)
    images = torch.rand(request.config.option.batches[0], 3, 32, 128, device=DEVICE) * 2 - 1
    with torch.no_grad(), torch.autocast(DEVICE.type, DTYPE, enabled=torch.float32 != DTYPE):
        case = Case(model, images, model.encode(images))
        if torch.float32 == DTYPE:  # in bf16 the random logits of other shapes differ in their order
            expected = case.run("again")
            for variant in ("cached", "keys once"):
                assert torch.equal(case.run(variant), expected), variant
        yield case


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading(benchmark: Any, case: Case, variant: str) -> None:
    def run() -> None:
        case.run(variant)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(batch=len(case.images), variant=variant)
