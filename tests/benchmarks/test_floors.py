"""Floors against the figures they were planned with, on a GPU of 4.3 TB/s, 790 TFLOP/s and 3.86 T exp/s."""

import pytest
import torch

from benchmarks.ceilings import copy_bandwidth
from benchmarks.exponentials import exponentials
from benchmarks.floors import (
    Ceilings,
    Passes,
    attention,
    bias_gelu,
    dropout_add_layer_norm,
    floor_seconds,
    layer_norm,
    mlp,
)
from lmim_fast.kernels import runtime

CEILINGS = Ceilings(4.3e12, 790e12, 3.86e12)
ROWS, VISIBLE_ROWS = 512 * 257, 512 * 52
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def microseconds(passes: Passes) -> tuple[float, float]:
    forward, backward = (
        floor_seconds(stages, CEILINGS) * 1e6 for stages in (passes.forward, passes.backward)
    )
    return forward, backward


@pytest.mark.parametrize(
    ("tokens", "width", "heads", "expected"),
    [(257, 384, 6, (95, 189)), (52, 384, 6, (19, 38)), (257, 512, 16, (140, 251))],
)
def test_floors_of_attention(tokens: int, width: int, heads: int, expected: tuple[float, float]) -> None:
    assert microseconds(attention(512, tokens, tokens, width, heads, 2)) == pytest.approx(expected, rel=0.015)


def test_decoder_attention_is_bound_by_exponentials_and_short_attention_by_memory() -> None:
    unbound = Ceilings(CEILINGS.bandwidth, CEILINGS.flops)
    decoder = attention(512, 257, 257, 512, 16, 2).forward
    assert decoder[0].exponentials == 512 * 16 * 257 * 257
    assert floor_seconds(decoder, unbound) < 0.95 * floor_seconds(decoder, CEILINGS)
    short = attention(512, 52, 52, 384, 6, 2).forward
    assert floor_seconds(short, CEILINGS) == short[0].bytes / CEILINGS.bandwidth


def test_cross_attention_reads_its_own_number_of_keys() -> None:
    (work,) = attention(1, 205, 257, 512, 16, 2).forward
    assert work.bytes == 2 * 512 * (2 * 205 + 2 * 257)
    assert work.flops == 4 * 205 * 257 * 512
    (work,) = attention(1, 205, 257, 512, 16, 2).backward
    assert work.bytes == 2 * 512 * (4 * 205 + 4 * 257)


def test_floors_of_add_and_layer_norm() -> None:
    forward, backward = microseconds(dropout_add_layer_norm(ROWS, 384, 2, 2, dropout=False))
    assert (forward, backward) == pytest.approx((94, 94), rel=0.005)
    visible, _ = microseconds(dropout_add_layer_norm(VISIBLE_ROWS, 384, 2, 2, dropout=False))
    assert visible == pytest.approx(19, rel=0.005)
    _, with_dropout = microseconds(dropout_add_layer_norm(ROWS, 384, 2, 2, dropout=True))
    assert with_dropout == pytest.approx(backward * 5 / 4)
    wide, _ = microseconds(dropout_add_layer_norm(ROWS, 384, 2, 4, dropout=False))
    assert wide == pytest.approx(forward * 6 / 4)


def test_floors_of_layer_norm_and_gelu_count_each_tensor_once() -> None:
    assert microseconds(layer_norm(ROWS, 384, 2, 2)) == pytest.approx((47, 70.5), rel=0.005)
    assert microseconds(bias_gelu(ROWS, 1536, 2)) == pytest.approx((188, 282), rel=0.005)


def test_floor_of_an_mlp_is_that_of_its_products() -> None:
    inference = mlp(ROWS, 384, 1536, 2, training=False).forward
    training = mlp(ROWS, 384, 1536, 2, training=True)
    assert floor_seconds(inference, CEILINGS) * 1e6 == pytest.approx(2 * 197, rel=0.01)
    assert [floor_seconds([stage], CEILINGS) * 1e6 for stage in training.forward] == pytest.approx(
        [211, 197], rel=0.01
    )
    assert sum(stage.flops for stage in training.backward) == 2 * sum(stage.flops for stage in inference)
    assert training.of("forward+backward") == training.forward + training.backward


def test_exponentials_are_computed_as_often_as_the_rate_assumes() -> None:
    if not runtime.can_run(DEVICE):
        pytest.skip(f"kernels cannot run on {DEVICE}")
    x = torch.rand(2048, device=DEVICE)
    truth = x.double()
    for _ in range(3):
        truth = torch.exp2(-truth)
    exponentials(x, 3)
    torch.testing.assert_close(x.double(), truth, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="multiple of 1024, got 1000"):
        exponentials(torch.rand(1000, device=DEVICE), 1)


def test_copy_bandwidth_counts_reading_and_writing() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu"), 2**24, rounds=3) < 1e12
