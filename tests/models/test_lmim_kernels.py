"""The whole model on kernels alone, in Triton's interpreter or on a device, against the oracle."""

import dataclasses
from collections.abc import Iterator
from typing import Literal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition, nop
from micro import MICRO
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from twins import assert_same_gradients, batch_of, twins

from benchmarks.operation import kernel_name, launches
from lmim_fast.config import ModelConfig, preset
from lmim_fast.kernels import runtime
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.ops import attention, dispatch, dropout, norm_step
from lmim_fast.reference import ReferenceLMIM, ReferenceMAE

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="fp32 on a device goes to PyTorch's attention: test_lmim_cuda.py"
)
# Heads of 32 in the decoder too; one block of the encoder, as the interpreter is slow.
KERNELS = dataclasses.replace(MICRO, depth=1, decoder_width=64, gelu_epilogue="on")
CASES = {
    "teacher": KERNELS,
    "norm_pixel": dataclasses.replace(KERNELS, target="norm_pixel"),
    "pixel, no guidance": dataclasses.replace(KERNELS, target="pixel", guidance=False),
    "ca_sa": dataclasses.replace(KERNELS, decoder_order="ca_sa"),
    "one layer": dataclasses.replace(KERNELS, decoder_depth=1),
    "GELU in a separate pass": dataclasses.replace(KERNELS, gelu_epilogue="off"),
}
GELU = {
    "on": {"linear_gelu.linear_gelu_kernel", "linear_gelu.linear_gelu_backward_kernel"},
    "off": {"gelu._forward", "gelu._backward"},
}


# Cases that a test below or the targets' own tests have in another form.
ELSEWHERE = {"norm_pixel", "ca_sa", "one layer", "GELU in a separate pass"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ELSEWHERE else []) for name in CASES]
)
def test_loss_and_every_gradient_equal_the_oracle(name: str) -> None:
    oracle, fast = ReferenceLMIM(CASES[name]), LMIM(CASES[name])
    twins(oracle, fast)
    batch = batch_of(CASES[name], 2)
    expected = oracle(*batch).loss
    with dispatch.backend("triton"), launches() as names:
        loss = fast(*batch).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    assert_same_gradients(oracle, fast)
    assert {launched for launched in names if "gelu" in launched} == GELU[CASES[name].gelu_epilogue]


@pytest.mark.parametrize(
    ("name", "variable", "form"),
    [
        ("ca_sa", norm_step.VARIABLE, "recompute"),
        ("GELU in a separate pass", attention.BIAS_VARIABLE, "product"),
        pytest.param("ca_sa", attention.BIAS_VARIABLE, "product", marks=pytest.mark.slow),
        pytest.param("GELU in a separate pass", norm_step.VARIABLE, "recompute", marks=pytest.mark.slow),
    ],
)
def test_other_forms_give_the_oracles_loss_and_gradients_too(
    name: str, variable: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, form)
    test_loss_and_every_gradient_equal_the_oracle(name)


def test_every_mlp_at_the_released_sizes_has_its_gelu_in_the_epilogue() -> None:
    config = preset("small", depth=2, decoder_dropout=0.0, mae_decoder_depth=1, gelu_epilogue="on")
    images = torch.rand(1, 3, 32, 128)
    teacher, student, masked = (257, 1536, 384), (52 + 257, 1536, 384), (205, 2048, 512)
    encoder, all_rows = (65, 1536, 384), (257, 2048, 512)
    expected = {
        LMIM: ([teacher] * 2 + [student] * 2 + [all_rows, masked], [masked, all_rows] + [student] * 2),
        MAE: ([encoder] * 2 + [all_rows], [all_rows] + [encoder] * 2),
    }
    for kind, sizes in expected.items():
        model = kind(config)
        with dispatch.backend("triton"), runtime.recording((9, 0)) as recording:
            model(*([images] * (2 if kind is LMIM else 1))).loss.backward()
        launched = [one for one in recording.launches if "gelu" in kernel_name(one.kernel)]
        sizes_seen = [(kernel_name(one.kernel), one.arguments[-3:]) for one in launched]
        forward, backward = "linear_gelu.linear_gelu_kernel", "linear_gelu.linear_gelu_backward_kernel"
        assert sizes_seen == [(forward, size) for size in sizes[0]] + [(backward, size) for size in sizes[1]]
        kept = [one.arguments[3] is not None for one in launched[: len(sizes[0])]]
        assert kept == [size != teacher for size in sizes[0]], "the teacher keeps nothing"


def test_compiled_loss_and_every_gradient_equal_the_eager_ones() -> None:
    oracle, fast = ReferenceLMIM(CASES["one layer"]), LMIM(CASES["one layer"])
    twins(oracle, fast)
    batch = batch_of(CASES["one layer"], 2)
    graphs: list[torch.fx.GraphModule] = []

    def forward(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition
    )
    with dispatch.backend("triton"), launches() as names:
        loss = torch.compile(fast, backend=backend, fullgraph=True)(*batch).loss
        loss.backward()
    expected = oracle(*batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(oracle, fast)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    # two norms a block and the last, of student and teacher, three of the decoder's layer and its last
    assert called.count("lmim_fast.dropout_add_layer_norm.default") == 3 + 3 + 3 + 1
    # MLPs of student, teacher and decoder; the teacher has no backward pass, and none recomputes a GELU
    launched = [name for name in names if "gelu" in name]
    assert (
        launched == ["linear_gelu.linear_gelu_kernel"] * 3 + ["linear_gelu.linear_gelu_backward_kernel"] * 2
    )


@pytest.mark.parametrize("setting", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_mae_loss_and_every_gradient_equal_the_oracle(setting: Literal["on", "off"]) -> None:
    config = dataclasses.replace(KERNELS, gelu_epilogue=setting)
    oracle, fast = ReferenceMAE(config), MAE(config)
    twins(oracle, fast)
    images, _, noise = batch_of(KERNELS, 2)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    expected = oracle(pixels, noise).loss
    with dispatch.backend("triton"), launches() as names:
        loss = fast(pixels, noise).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    assert_same_gradients(oracle, fast)
    assert {launched for launched in names if "gelu" in launched} == GELU[setting]


def exported_masks(config: ModelConfig, seeds: list[Tensor], batch: int) -> Iterator[Tensor]:
    """What each dropout of the oracle's decoder keeps, tokens in the order cls, visible, masked.

    The fast decoder leaves the last layer's other rows out: they are kept whole, no loss reads them.
    """
    tokens, masked = config.num_patches + 1, config.num_patches - config.num_visible
    heads, width, hidden = config.decoder_heads, config.decoder_width, config.decoder_ffn
    drawn = iter(seeds)

    def whole(keep: Tensor) -> Tensor:
        return F.pad(keep, (0, 0, tokens - keep.shape[-2], 0), value=True)

    def attention(rows: int) -> Tensor:
        keep = dropout.keep_mask(next(drawn), torch.arange(batch * heads), rows, tokens, 0.25)
        return whole(keep.unflatten(0, (batch, heads)))

    def features(rows: int, columns: int) -> Tensor:
        keep = dropout.keep_mask(next(drawn), torch.zeros(1, dtype=torch.int64), batch * rows, columns, 0.25)
        return whole(keep.view(batch, rows, columns))

    for layer in range(config.decoder_depth):
        rows = masked if layer == config.decoder_depth - 1 else tokens
        for _ in ("self-attention", "cross-attention"):
            yield attention(rows)
            yield features(rows, width)
        yield features(rows, hidden)
        yield features(rows, width)
    assert next(drawn, None) is None


def oracle_loss(
    oracle: ReferenceLMIM,
    images: Tensor,
    guidance: Tensor,
    ids: tuple[Tensor, Tensor],
    masks: Iterator[Tensor],
) -> Tensor:
    """The oracle's modules with these dropout masks, on tokens in the order cls, visible, masked."""
    visible, masked = ids
    latent, memory = (
        oracle.model_maeenc.forward_encoder(*view) for view in ((images, visible), (guidance, None))
    )
    order = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1, masked + 1], dim=1)
    hidden = oracle.mask_token.expand(len(images), masked.shape[1], -1)
    x = torch.cat([oracle.decoder_embed(latent), hidden], dim=1) + oracle.decoder_pos_embed[0][order]

    def apply(x: Tensor, p: float, *_: object) -> Tensor:
        return x * next(masks) / (1 - p)

    keys = oracle.decoder_embed2(memory)
    with mock.patch.object(F, "dropout", apply):
        for layer in oracle.decoder_blocks:
            x = layer(x, keys)
    pred = oracle.decoder_pred(oracle.decoder_norm(x))[:, visible.shape[1] + 1 :]
    target = oracle.make_target(images).gather(1, masked[:, :, None].expand_as(pred))
    return (pred - target).square().mean() + (latent[:, 0] - memory[:, 0]).square().mean()


def test_with_dropout_loss_and_every_gradient_equal_the_oracle_under_the_exported_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(KERNELS, decoder_dropout=0.25)
    oracle, fast = ReferenceLMIM(config).train(), LMIM(config).train()
    twins(oracle, fast)
    images, guidance, noise = batch_of(config, 2)
    seeds: list[Tensor] = []
    draw = dropout.draw_seed

    def record(device: torch.device) -> Tensor:
        seeds.append(draw(device))
        return seeds[-1]

    monkeypatch.setattr(dropout, "draw_seed", record)
    with dispatch.backend("triton"):
        output = fast(images, guidance, noise)
    masks = exported_masks(config, seeds, len(images))
    expected = oracle_loss(oracle, images, guidance, (output.ids_visible, output.ids_masked), masks)
    assert next(masks, None) is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    output.loss.backward()
    assert_same_gradients(oracle, fast)
    with dispatch.backend("triton"):
        assert fast(images, guidance, noise).loss != output.loss  # the next masks are others
