"""Split of packed features and the alignment of their cls rows."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lmim_fast.ops.align import split_aligned

BATCH, SHOWN, FULL, WIDTH = 3, 4, 6, 5


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH * (SHOWN + FULL), WIDTH).to(dtype).requires_grad_()


def plain(x: Tensor, stop: str) -> tuple[Tensor, Tensor, Tensor]:
    latent, memory = x[: BATCH * SHOWN].view(BATCH, SHOWN, -1), x[BATCH * SHOWN :].view(BATCH, FULL, -1)
    masked, guidance = latent[:, 0], memory[:, 0]
    if stop == "masked":
        masked = masked.detach()
    if stop == "guidance":
        guidance = guidance.detach()
    return latent, memory, ((masked - guidance) ** 2).mean()


@pytest.mark.parametrize("stop", ["none", "masked", "guidance"])
def test_parts_loss_and_gradients_are_those_of_plain_operations(stop: str) -> None:
    x = features()
    ours, truth = split_aligned(x, BATCH, SHOWN, FULL, stop_gradient=stop), plain(x, stop)
    upstream = [torch.randn_like(part) for part in truth]
    for mine, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, expected)
    for used in ([0, 1, 2], [0], [1], [2], [0, 2]):
        mine, expected = (
            torch.autograd.grad([found[i] for i in used], x, [upstream[i] for i in used], retain_graph=True)[
                0
            ]
            for found in (ours, truth)
        )
        torch.testing.assert_close(mine, expected, msg=f"outputs {used}")


def test_gradcheck_with_gradients_into_both_branches() -> None:
    assert torch.autograd.gradcheck(partial(split_aligned, batch=BATCH, shown=SHOWN, full=FULL), features())


def test_parts_are_views_and_the_loss_of_bf16_features_is_fp32() -> None:
    x = features(torch.bfloat16)
    latent, memory, loss = split_aligned(x, BATCH, SHOWN, FULL)
    assert latent.data_ptr() == x.data_ptr()
    assert memory.data_ptr() == x[BATCH * SHOWN :].data_ptr()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(x.float(), "none")[2])
    (gradient,) = torch.autograd.grad(loss + latent.float().sum(), x)
    assert gradient.dtype == torch.bfloat16


def test_it_compiles_into_one_graph_with_the_same_gradients() -> None:
    x, other = features(), torch.randn(BATCH, FULL, WIDTH, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        latent, memory, loss = split_aligned(x, BATCH, SHOWN, FULL, stop_gradient="masked")
        return latent.square().sum() + (memory * other).sum() + loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(
        torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"features must be \(30, D\) for 3 x \(4 \+ 6\) tokens, got \(29, 5\)"
    ):
        split_aligned(torch.zeros(29, 5), BATCH, SHOWN, FULL)
    with pytest.raises(ValueError, match=r'stop_gradient must be .*"guidance", got \'both\''):
        split_aligned(torch.zeros(30, 5), BATCH, SHOWN, FULL, stop_gradient="both")
