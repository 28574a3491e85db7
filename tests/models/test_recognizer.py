"""The fast recogniser against the release and the oracle."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from recognizers import ODD, RECORDED, assert_recorded_gradients, batch_of, counted, load_recorded, tensors
from twins import assert_same_gradients, twins

from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.errors import UsageError
from lmim_fast.layers.drop_path import drop_path
from lmim_fast.models.encoder import Encoder
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.reference_recognizer import ReferenceRecognizer


def test_logits_loss_and_every_gradient_equal_the_release(recorded: Path) -> None:
    model, truth = Recognizer(RECORDED).eval(), tensors(recorded)
    load_recorded(model, recorded)
    output = model(truth["imgs"], truth["targets"])
    torch.testing.assert_close(output.loss, truth["loss_tf"], rtol=1e-5, atol=0)
    words = counted(truth["lengths"], 25)
    torch.testing.assert_close(output.logits[words], truth["logits_tf"][words], rtol=0, atol=3e-5)
    output.loss.backward()
    assert_recorded_gradients(model, recorded)


def test_names_shapes_and_count_equal_the_release(recorded: Path) -> None:
    official = json.loads((recorded / "official_recmodel_keys.json").read_text())
    with torch.device("meta"):
        model = Recognizer(RecognizerConfig())
    ours = [(name, list(value.shape)) for name, value in model.state_dict().items()]
    assert ours == [(entry["key"], entry["shape"]) for entry in official["state_dict"]]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 35_791_457
    assert model.patch_embed.proj.weight is model.encoder.patch_embed.proj.weight
    assert model.pos_embed is model.encoder.pos_embed


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [9, 6])
def test_loss_and_every_gradient_equal_the_oracle(smoothing: float, tokens: int) -> None:
    config = dataclasses.replace(ODD, label_smoothing=smoothing, max_length=tokens)
    oracle, fast = ReferenceRecognizer(config), Recognizer(config)
    twins(oracle, fast)
    images, targets, lengths = batch_of(config)
    expected, output = oracle(images, targets), fast(images, targets)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=3e-5)
    torch.testing.assert_close(fast(images, targets, lengths).loss, output.loss)
    expected.loss.backward()
    output.loss.backward()
    assert_same_gradients(oracle, fast)


def test_smoothing_spreads_over_all_classes_but_pad() -> None:
    config = dataclasses.replace(ODD, label_smoothing=0.1)
    model = Recognizer(config)
    _, targets, lengths = batch_of(config)
    logits = torch.randn(*targets.shape, config.classes)
    total = 0.0
    for row, target, length in zip(logits.double(), targets, lengths, strict=True):
        for place in range(length):
            log_p = row[place].log_softmax(0)
            others = [log_p[c] for c in range(config.classes) if c != config.pad]
            total -= 0.9 * log_p[target[place]] + 0.1 * sum(others) / len(others)
    assert model.loss(logits, targets).item() == pytest.approx(float(total) / 3, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padded_tokens_contribute_no_loss_and_no_gradient(smoothing: float) -> None:
    model = Recognizer(dataclasses.replace(ODD, label_smoothing=smoothing))
    _, targets, lengths = batch_of(ODD)
    logits = torch.randn(*targets.shape, ODD.classes, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.loss(logits, targets), logits)
    moved = gradient.abs().sum(-1) > 0
    assert torch.equal(moved, counted(lengths, 9))


def test_a_target_without_eos_counts_all_its_tokens() -> None:
    model = Recognizer(ODD)
    targets, logits = torch.randint(ODD.characters, (2, 9)), torch.randn(2, 9, ODD.classes)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 2
    torch.testing.assert_close(model.loss(logits, targets), expected)


def test_uint8_images_give_the_logits_of_the_float_images() -> None:
    model = Recognizer(ODD)
    _, targets, _ = batch_of(ODD)
    pixels = torch.randint(0, 256, (3, 16, 64, 3), dtype=torch.uint8)
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(model(pixels, targets).logits, model(floats, targets).logits)


@pytest.mark.parametrize("part", ["self_attn", "enc_attn", "mlp"])
def test_dropout_moves_the_logits_as_much_as_in_the_oracle(part: str) -> None:
    """Of the decoder alone: the encoder has none. Large weights make the dropout of one part count most."""
    config = dataclasses.replace(ODD, dropout=0.3, decoder_depth=1)
    oracle, fast = ReferenceRecognizer(config), Recognizer(config)
    twins(oracle, fast)
    with torch.no_grad():
        for p in getattr(oracle.decoder.layer_stack[0], part).parameters():
            p.mul_(5)
        fast.load_state_dict(oracle.state_dict())
        images, targets, _ = batch_of(config)
        start = torch.full_like(targets[:, :1], config.start)
        inputs = torch.cat([start, targets[:, :-1]], dim=1)
        many, memory = inputs.repeat(50, 1), oracle.encode(images).repeat(50, 1, 1)
        expected = torch.cat([oracle.decoder(many, memory)[0] for _ in range(12)]).unflatten(0, (600, -1))
        ours = torch.cat([fast.decoder(many, memory) for _ in range(12)]).unflatten(0, (600, -1))
    assert (ours.std(0).mean() / expected.std(0).mean()).item() == pytest.approx(1, abs=0.03)
    deviation = (expected.var(0) / 600 + ours.var(0) / 600).sqrt()
    assert ((ours.mean(0) - expected.mean(0)) / deviation).abs().max() < 5


def test_bf16_autocast_stays_near_fp32_as_the_oracle_does() -> None:
    oracle, fast = ReferenceRecognizer(ODD), Recognizer(ODD)
    twins(oracle, fast)
    images, targets, _ = batch_of(ODD)
    truth = oracle(images, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, ours = oracle(images, targets), fast(images, targets)
    assert ours.logits.dtype == torch.bfloat16
    assert ours.loss.dtype == torch.float32
    error = (ours.logits.float() - truth.logits).norm()
    assert error < 2 * (plain.logits.float() - truth.logits).norm()
    assert (ours.loss - truth.loss).abs() / truth.loss < 5e-3
    ours.loss.backward()
    truth.loss.backward()
    for name, p in fast.named_parameters():
        if p.requires_grad:
            theirs = dict(oracle.named_parameters())[name].grad
            assert (p.grad - theirs).norm() < 0.1 * theirs.norm() + 1e-3, name


def test_drop_path_keeps_whole_sequences_and_their_expectation() -> None:
    segments = [(4000, 2), (3000, 3)]
    dropped = drop_path(torch.ones(17000, 2), segments, 0.3)
    first, second = dropped.split([8000, 9000])
    for rows, segment in ((first, segments[0]), (second, segments[1])):
        sequences = rows.unflatten(0, segment).flatten(1)
        assert torch.equal(sequences.amin(1), sequences.amax(1)), "a sequence is dropped as a whole"
    kept = dropped > 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.7))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_drop_path_rises_linearly_over_the_blocks_and_spares_eval_mode() -> None:
    config = dataclasses.replace(ODD, drop_path=0.4)
    model = Recognizer(config)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0.0, 0.2, 0.4])
    images, targets, _ = batch_of(config, 16)
    with torch.no_grad():
        assert not torch.equal(model.encode(images), model.encode(images))
        model.eval()
        plain = Encoder(config.encoder)
        plain.load_state_dict(model.encoder.state_dict())
        assert torch.equal(model.encoder.encode(images), plain.encode(images))
        assert torch.equal(model(images, targets).loss, model(images, targets).loss)


def test_a_dropped_block_passes_its_input_on() -> None:
    """At a rate of almost 1 no branch is left: the encoder is patch embedding and the last norm."""
    encoder = Encoder(ODD.encoder)
    for block in encoder.blocks:
        block.drop_path = 1 - 1e-9
    images, _, _ = batch_of(ODD)
    rows = encoder.embed([(images, None)])
    expected = encoder.norm(rows).unflatten(0, (3, -1))
    torch.testing.assert_close(encoder.encode(images), expected)


def test_stochastic_depth_has_gradients_of_the_blocks_that_ran() -> None:
    encoder = Encoder(ODD.encoder, drop_path=0.5)
    for block in encoder.blocks:
        block.drop_path = 1 - 1e-9
    encoder.blocks[0].drop_path = 0.0
    encoder.encode(batch_of(ODD)[0]).sum().backward()
    assert encoder.blocks[0].mlp.fc2.bias.grad.abs().sum() > 0
    assert encoder.blocks[1].mlp.fc2.bias.grad.abs().sum() == 0


def test_wrong_inputs_are_named() -> None:
    model = Recognizer(ODD)
    images, targets, _ = batch_of(ODD)
    with pytest.raises(ValueError, match=r"targets \(2, 9\) must be \(3, T\) with T <= 9"):
        model(images, targets[:2])
    with pytest.raises(ValueError, match=r"targets \(3, 10\)"):
        model(images, torch.zeros(3, 10, dtype=torch.int64))
    with pytest.raises(UsageError, match="14 classes need 11 characters, got 3: set classes to 6"):
        Recognizer(ODD, "abc")
    with pytest.raises(UsageError, match="pass the 7934 characters"):
        Recognizer(dataclasses.replace(ODD, classes=7937))
