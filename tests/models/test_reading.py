"""Greedy reading and beam search against the release, the oracle and brute force."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from recognizers import ODD, RECORDED, batch_of, load_recorded, tensors
from torch import Tensor
from twins import twins

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.errors import UsageError
from lmim_fast.models import reading as reading_module
from lmim_fast.models.attention_maps import recognizer_maps
from lmim_fast.models.reading import Reading
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.reference_recognizer import ReferenceRecognizer

# Words of up to 4 tokens of 5 classes: all 5 + 4 * 5 + .. can be listed.
SHORT = dataclasses.replace(ODD, classes=5, max_length=4)


def lively(config: RecognizerConfig, seed: int = 0, eos_bias: float = 0.0) -> Recognizer:
    """A model whose words differ between images and end at various places."""
    torch.manual_seed(seed)
    model = Recognizer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        model.decoder.trg_word_emb.weight.mul_(20)
        model.decoder.classifier.weight.mul_(3)
        model.decoder.classifier.bias[config.eos] += eos_bias
    return model


def images_of(config: RecognizerConfig, size: int) -> Tensor:
    return batch_of(config, size)[0] * torch.linspace(0.2, 3, size)[:, None, None, None]


def uncached(model: Recognizer, images: Tensor) -> Reading:
    """Greedy reading by `forward` over all tokens so far."""
    config, memory = model.config, model.encode(images)
    inputs = torch.full((len(images), 1), config.start)
    probabilities = torch.ones(len(images), config.max_length)
    for number in range(config.max_length):
        p, token = model.decoder(inputs, memory)[:, -1].float().softmax(-1).max(-1)
        inputs, probabilities[:, number] = torch.cat([inputs, token[:, None]], 1), p
    ids = inputs[:, 1:]
    ended = (ids == config.eos).cumsum(1) - (ids == config.eos).long() > 0
    lengths = (~ended).sum(1)
    ids, probabilities = ids.masked_fill(ended, config.pad), probabilities.masked_fill(ended, 1.0)
    return Reading(ids, probabilities, lengths, model.characters)


def log_p_of(model: Recognizer, image: Tensor, words: list[tuple[int, ...]]) -> Tensor:
    """Log probability of words (all tokens listed, EOS included) in one image, by teacher forcing."""
    memory = model.encode(image[None]).expand(len(words), -1, -1)
    longest = max(map(len, words))
    targets = torch.tensor([[*word, *[model.config.pad] * (longest - len(word))] for word in words])
    start = torch.full((len(words), 1), model.config.start)
    log_p = model.decoder(torch.cat([start, targets[:, :-1]], 1), memory).log_softmax(-1)
    chosen = log_p.gather(2, targets[:, :, None])[:, :, 0].double()
    counted = torch.arange(longest) < torch.tensor([len(word) for word in words])[:, None]
    return torch.where(counted, chosen, 0.0).sum(1)


def all_words(config: RecognizerConfig) -> list[tuple[int, ...]]:
    """Every sequence that ends with its only EOS, or fills max_length without one."""
    others = [c for c in range(config.classes) if c != config.eos]
    words: list[tuple[int, ...]] = []
    for length in range(config.max_length):
        words += [(*word, config.eos) for word in itertools.product(others, repeat=length)]
    return words + list(itertools.product(others, repeat=config.max_length))


def test_greedy_reads_the_ids_of_the_release(recorded: Path) -> None:
    model, truth = Recognizer(RECORDED), tensors(recorded)
    load_recorded(model, recorded)
    reading = model.greedy(truth["imgs"])
    assert model.training, "reading leaves the mode as it was"
    assert torch.equal(reading.ids, truth["ids_greedy"])
    torch.testing.assert_close(reading.probabilities, truth["probs_greedy"].amax(-1), rtol=1e-5, atol=1e-6)
    assert reading.strings[0] == ">`{)BQq||||||||t0t0t0tp%t"
    expected = truth["probs_greedy"].amax(-1).double().prod(1)
    torch.testing.assert_close(reading.word_probabilities.double(), expected, rtol=1e-4, atol=0)


def test_maps_are_those_of_the_release_and_end_with_the_word(recorded: Path) -> None:
    model, truth = Recognizer(RECORDED), tensors(recorded)
    load_recorded(model, recorded)
    reading, maps = recognizer_maps(model, truth["imgs"])
    assert torch.equal(reading.ids, truth["ids_greedy"])
    expected = truth["attn_maps_greedy"][..., 1:].unflatten(2, (8, 32))
    torch.testing.assert_close(maps, expected, rtol=0, atol=3e-5)
    with torch.no_grad():
        model.decoder.classifier.bias[RECORDED.eos] += 1e4
    reading, maps = recognizer_maps(model, truth["imgs"])
    assert reading.lengths.tolist() == [1] * 4
    assert maps[:, 0].sum() > 0
    assert maps[:, 1:].abs().sum() == 0


def test_cached_greedy_is_uncached_greedy() -> None:
    model = lively(ODD)
    images = images_of(ODD, 12)
    ours, expected = model.greedy(images), uncached(model, images)
    assert torch.equal(ours.ids, expected.ids)
    assert torch.equal(ours.lengths, expected.lengths)
    torch.testing.assert_close(ours.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)
    assert len({*ours.lengths.tolist()}) > 1, "the words end at various places"


def test_greedy_is_the_greedy_of_the_oracle() -> None:
    model, oracle = lively(ODD), ReferenceRecognizer(ODD)
    oracle.load_state_dict(model.state_dict())
    images = images_of(ODD, 6)
    ours, expected = model.greedy(images), oracle.eval().greedy(images)
    kept = torch.arange(ODD.max_length) < ours.lengths[:, None]
    assert torch.equal(ours.ids[kept], expected.ids[kept])
    torch.testing.assert_close(ours.probabilities[kept], expected.probabilities.amax(-1)[kept])


def test_a_reading_ends_with_eos_pad_and_certainty() -> None:
    model = lively(ODD)
    reading = model.greedy(images_of(ODD, 12))
    for ids, p, length in zip(reading.ids, reading.probabilities, reading.lengths.tolist(), strict=True):
        if length < ODD.max_length:
            assert ids[length - 1] == ODD.eos
        assert (ids[: length - 1] != ODD.eos).all()
        assert (ids[length:] == ODD.pad).all()
        assert (p[length:] == 1).all()
    expected = reading.probabilities.double().prod(1).float()
    torch.testing.assert_close(reading.word_probabilities, expected)


def test_strings_leave_out_what_is_no_character() -> None:
    ids = torch.tensor([[1, 5, 0, 4, 3, 4, 4], [2, 3, 4, 4, 4, 4, 4]])
    reading = Reading(ids, torch.ones(2, 7), torch.tensor([5, 2]), "abc")
    assert reading.strings == ["ba", "c"]


@pytest.mark.parametrize("seed", range(3))
def test_early_stop_changes_nothing(seed: int) -> None:
    model = lively(ODD, seed, eos_bias=6.0)
    images = images_of(ODD, 5)
    stopped, full = model.greedy(images), model.greedy(images, early_stop=False)
    for name in ("ids", "probabilities", "lengths"):
        assert torch.equal(getattr(stopped, name), getattr(full, name)), name


def test_early_stop_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = lively(ODD, eos_bias=1e4), list[int]()
    step = reading_module.StepDecoder.step

    def counting(self: reading_module.StepDecoder, tokens: Tensor, number: int) -> Tensor:
        steps.append(number)
        return step(self, tokens, number)

    monkeypatch.setattr(reading_module.StepDecoder, "step", counting)
    model.greedy(images_of(ODD, 2))
    assert steps == [0, 1, 2, 3]
    model.greedy(images_of(ODD, 2), early_stop=False)
    assert steps == [0, 1, 2, 3, *range(ODD.max_length)]


@pytest.mark.parametrize("eos_bias", [-1e4, 0.0, 4.0])
def test_beam_search_of_width_one_is_greedy(eos_bias: float) -> None:
    model = lively(ODD, eos_bias=eos_bias)
    images = images_of(ODD, 8)
    greedy, beam = model.greedy(images), model.beam_search(images, 1)
    for name in ("ids", "probabilities", "lengths"):
        assert torch.equal(getattr(beam, name), getattr(greedy, name)), name


@pytest.mark.parametrize("width", [2, 3, 6])
def test_no_word_is_less_probable_than_the_greedy_one(width: int) -> None:
    better = 0
    for seed in range(3):
        model = lively(ODD, seed)
        images = images_of(ODD, 12)
        greedy, beam = model.greedy(images), model.beam_search(images, width)
        assert (beam.word_probabilities >= greedy.word_probabilities).all()
        better += int((beam.ids != greedy.ids).any(1).sum())
    assert better > 0, "search finds words that greedy reading does not"


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_most_probable_of_all_words(seed: int) -> None:
    model = lively(SHORT, seed)
    images, words = images_of(SHORT, 4), all_words(SHORT)
    reading = model.beam_search(images, 4**3)
    with torch.no_grad():
        for number, image in enumerate(images):
            scores = log_p_of(model, image, words)
            best = words[int(scores.argmax())]
            assert tuple(reading.ids[number, : len(best)].tolist()) == best
            assert reading.lengths[number] == len(best)
            torch.testing.assert_close(reading.log_probabilities[number], scores.max(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eos_bias", [-1e4, 0.0])
def test_the_score_of_a_beam_is_that_of_its_own_history(eos_bias: float) -> None:
    """The caches follow the histories: teacher forcing gives each chosen token the same probability."""
    model = lively(ODD, eos_bias=eos_bias)
    images = images_of(ODD, 8)
    reading = model.beam_search(images, 3)
    with torch.no_grad():
        for image, ids, length, score in zip(
            images, reading.ids.tolist(), reading.lengths.tolist(), reading.log_probabilities, strict=True
        ):
            expected = log_p_of(model, image, [tuple(ids[:length])])[0]
            torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


def test_a_beam_without_eos_reads_up_to_the_longest_word() -> None:
    model = lively(ODD, eos_bias=-1e4)
    reading = model.beam_search(images_of(ODD, 3), 3)
    assert reading.lengths.tolist() == [ODD.max_length] * 3
    assert not (reading.ids == ODD.eos).any()


def test_an_image_is_read_alike_in_any_batch() -> None:
    model = lively(ODD)
    images = images_of(ODD, 6)
    for read in (model.greedy, lambda some: model.beam_search(some, 3)):
        together = read(images)
        for number in range(6):
            assert torch.equal(read(images[number : number + 1]).ids[0], together.ids[number])


def test_reading_under_bf16_gives_fp32_probabilities_near_those_of_fp32() -> None:
    model = lively(ODD, eos_bias=-1e4)
    images = images_of(ODD, 6)
    exact = model.greedy(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.greedy(images)
    assert low.probabilities.dtype == torch.float32
    torch.testing.assert_close(low.probabilities[:, 0], exact.probabilities[:, 0], rtol=0, atol=0.05)


def test_reading_draws_no_dropout_in_training_mode() -> None:
    config = dataclasses.replace(ODD, dropout=0.5, drop_path=0.5)
    model = Recognizer(config)
    twins(ReferenceRecognizer(dataclasses.replace(config, drop_path=0.0)), model)
    images = images_of(config, 4)
    first, again = model.train().greedy(images), model.greedy(images)
    assert torch.equal(first.probabilities, again.probabilities)
    assert torch.equal(first.probabilities, model.eval().greedy(images).probabilities)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="width of at least 1, got 0"):
        lively(ODD).beam_search(images_of(ODD, 1), 0)


def test_a_model_reads_the_words_it_was_trained_on() -> None:
    model = Recognizer(dataclasses.replace(ODD, classes=39, decoder_depth=1))
    alphabet, config = model.characters, model.config
    words = ["a1b2", "zz", "recogni", "x"]
    images = torch.rand(4, 3, *config.encoder.image_size) * 2 - 1
    targets = torch.full((4, config.max_length), config.pad)
    for target, word in zip(targets, words, strict=True):
        target[: len(word) + 1] = torch.tensor([*map(alphabet.index, word), config.eos])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, targets).loss.backward()
        optimizer.step()
    for reading in (model.greedy(images), model.beam_search(images, 3)):
        assert reading.strings == words
        assert reading.word_probabilities.min() > 0.8
