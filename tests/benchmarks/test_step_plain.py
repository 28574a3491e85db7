"""The plain variants of a step against the oracle, and the floor of a step against its plan."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.floors import Ceilings, floor_seconds
from benchmarks.step_floor import step_passes, step_seconds, trained_parameters
from benchmarks.step_plain import fused_model, halve_residual
from lmim_fast.config import ModelConfig, preset
from lmim_fast.reference import Block, DecoderLayer, ReferenceLMIM

CONFIG = preset("tiny", depth=2, decoder_depth=1, decoder_dropout=0.0)


def crops(config: ModelConfig) -> tuple[Tensor, ...]:
    images, guidance = torch.rand(2, 2, 3, *config.image_size) * 2 - 1
    return images, guidance, torch.rand(2, config.num_patches)


def twins(config: ModelConfig) -> tuple[ReferenceLMIM, ReferenceLMIM]:
    reference, plain = ReferenceLMIM(config), fused_model(config)
    plain.load_state_dict(reference.state_dict())
    return reference, plain


@pytest.mark.parametrize("order", ["sa_ca", "ca_sa"])
def test_fused_attention_changes_neither_loss_nor_gradients(order: Any) -> None:
    config = dataclasses.replace(CONFIG, decoder_order=order)
    reference, plain = twins(config)
    inputs = crops(config)
    losses = [model(*inputs).loss for model in (reference, plain)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, theirs), ours in zip(reference.named_parameters(), plain.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if theirs.grad is not None and ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_all_attention_of_the_fused_model_is_fused_and_drops_out_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*tensors: Tensor, dropout_p: float) -> Tensor:
        seen.append(dropout_p)
        return fused(*tensors, dropout_p=dropout_p)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    config = dataclasses.replace(CONFIG, decoder_dropout=0.25)
    model = fused_model(config).train()
    model(*crops(config))
    assert seen == [0.0] * 6 + [0.25] * 2  # two layers of three encoder passes, then the decoder's two
    seen.clear()
    model.eval()(*crops(config))
    assert seen == [0.0] * 8


def test_the_residual_stream_of_the_compiled_model_is_bf16_and_its_loss_near() -> None:
    reference, plain = twins(CONFIG)
    inputs = crops(CONFIG)
    expected = reference(*inputs).loss
    halve_residual(plain)
    streams: list[torch.dtype] = []
    for module in plain.modules():
        if isinstance(module, Block | DecoderLayer):
            module.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(*inputs).loss
    assert streams == [torch.bfloat16] * 7
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert plain.model_maeenc.cls_token.grad is not None


def test_the_floor_of_a_step_is_the_planned_one() -> None:
    config = preset("small")
    planned = Ceilings(4.3e12, 790e12)
    assert step_seconds(config, 512, 2, planned) * 1e3 == pytest.approx(57.7, rel=0.03)
    parts = step_passes(config, 512, 2)
    for name, forward, backward in [
        ("guidance", 10.65, 18.85),
        ("masked", 2.15, 3.81),
        ("teacher", 10.46, 0.0),
        ("decoder", 4.16, 7.58),
        ("loss", 0.056, 0.0),
        ("optimiser", 0.2, 0.0),
    ]:
        found = [
            floor_seconds(stages, planned) * 1e3 for stages in (parts[name].forward, parts[name].backward)
        ]
        assert found == pytest.approx([forward, backward], rel=0.02)
    bound = Ceilings(4.3e12, 790e12, 3.86e12)
    assert step_seconds(config, 512, 2, bound) > step_seconds(config, 512, 2, planned)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_the_floor_of_the_optimiser_counts_the_parameters_that_are_trained(name: str) -> None:
    with torch.device("meta"):
        model = ReferenceLMIM(preset(name))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(preset(name)) == trained


@pytest.mark.parametrize("changes", [dict(guidance=False), dict(target="pixel")])
def test_a_step_without_a_part_has_no_floor_of_it(changes: dict[str, Any]) -> None:
    whole, less = step_passes(CONFIG, 8, 4), step_passes(dataclasses.replace(CONFIG, **changes), 8, 4)
    assert set(whole) - set(less) == {"guidance" if "guidance" in changes else "teacher"}
