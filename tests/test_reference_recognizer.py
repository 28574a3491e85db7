"""The oracle of the recogniser against tensors recorded from the released code."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from recognizers import ODD, RECORDED, assert_recorded_gradients, batch_of, counted, load_recorded, tensors

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.reference_recognizer import ReferenceRecognizer


@pytest.fixture
def model(recorded: Path) -> ReferenceRecognizer:
    model = ReferenceRecognizer(RECORDED).eval()
    load_recorded(model, recorded)
    return model


def test_logits_and_loss_equal_the_release(model: ReferenceRecognizer, recorded: Path) -> None:
    truth = tensors(recorded)
    output = model(truth["imgs"], truth["targets"])
    torch.testing.assert_close(output.loss, truth["loss_tf"], rtol=1e-5, atol=0)
    assert torch.equal(model(truth["imgs"], truth["targets"], truth["lengths"]).loss, output.loss)
    words = counted(truth["lengths"], 25)  # behind them the release hides the PAD tokens from each other
    torch.testing.assert_close(output.logits[words], truth["logits_tf"][words], rtol=0, atol=3e-5)
    torch.testing.assert_close(model.encode(truth["imgs"]), truth["memory"], rtol=0, atol=3e-5)


def test_every_gradient_of_the_recogniser_equals_the_release(
    model: ReferenceRecognizer, recorded: Path
) -> None:
    truth = tensors(recorded)
    model(truth["imgs"], truth["targets"]).loss.backward()
    assert_recorded_gradients(model, recorded)


def test_greedy_reading_equals_the_release(model: ReferenceRecognizer, recorded: Path) -> None:
    truth = tensors(recorded)
    reading = model.greedy(truth["imgs"])
    assert torch.equal(reading.ids, truth["ids_greedy"])
    torch.testing.assert_close(reading.probabilities, truth["probs_greedy"], rtol=0, atol=3e-5)
    torch.testing.assert_close(reading.maps, truth["attn_maps_greedy"], rtol=0, atol=3e-5)


def test_names_shapes_and_count_of_the_recogniser_equal_the_release(recorded: Path) -> None:
    official = json.loads((recorded / "official_recmodel_keys.json").read_text())
    with torch.device("meta"):
        model = ReferenceRecognizer(RecognizerConfig())
    ours = [(name, list(value.shape)) for name, value in model.state_dict().items()]
    assert ours == [(entry["key"], entry["shape"]) for entry in official["state_dict"]]
    assert sum(p.numel() for p in model.parameters()) == official["params_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == official["params_trainable"]


def test_dropout_is_drawn_in_training_mode_only() -> None:
    model = ReferenceRecognizer(dataclasses.replace(ODD, dropout=0.1))
    images, targets, _ = batch_of(ODD)
    losses = [model.train()(images, targets).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses = [model.eval()(images, targets).loss for _ in range(2)]
    assert losses[0] == losses[1]


def test_the_oracle_refuses_stochastic_depth() -> None:
    with pytest.raises(ValueError, match=r"drop_path must be 0, got 0\.1"):
        ReferenceRecognizer(dataclasses.replace(ODD, drop_path=0.1))
