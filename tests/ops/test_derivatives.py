"""Eager forms are ordinary differentiable PyTorch; kernels say what they cannot do."""

import functools
from collections.abc import Iterator, Sequence

import pytest
import torch
from derivative_cases import CASES, OPS, layers
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lmim_fast.config import ModelConfig
from lmim_fast.layers import Block, DecoderLayer, plain
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import attention, dispatch
from lmim_fast.ops.align import Stop, split_aligned
from lmim_fast.ops.mlp import gelu_linear
from lmim_fast.ops.transforms import by_autograd


@pytest.fixture
def eager() -> Iterator[None]:
    """Attention too: PyTorch's fused one has no second derivative on a CPU."""
    with dispatch.backend("eager"), attention.backend("eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_are_right_also_many_at_once(name: str) -> None:
    case = CASES[name]
    leaves = case.leaves()
    assert gradcheck(
        case.form,
        leaves,
        fast_mode=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(case.form, leaves, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("name", ["Attention", "MultiheadAttention", "Mlp", "Block", "DecoderLayer"])
def test_layers_of_many_rows_on_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "has_few_rows", lambda _: False)
    case = layers(10, 26)[name]
    leaves = case.leaves()
    assert gradcheck(case.form, leaves, fast_mode=True, check_batched_grad=True)  # with fused attention
    with attention.backend("eager"):
        assert gradgradcheck(case.form, leaves, fast_mode=True)


def flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CASES)
def test_transforms_go_through(name: str) -> None:
    case = CASES[name]
    samples, numbers = [case.leaves(), case.leaves()], tuple(range(len(case.shapes)))

    def loss(*leaves: Tensor) -> Tensor:
        return flat(case.form(*leaves)).sin().sum()

    stacked = [torch.stack(pair).detach() for pair in zip(*samples, strict=True)]
    together = torch.func.vmap(torch.func.grad(loss, numbers))(*stacked)
    for number, leaves in enumerate(samples):
        alone = torch.autograd.grad(loss(*leaves), leaves)
        for mine, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[number], expected)
    for changed in numbers:  # one input is batched, the others are not
        dims = tuple(0 if number == changed else None for number in numbers)
        mixed = [stacked[number] if number == changed else samples[0][number].detach() for number in numbers]
        first = torch.func.vmap(loss, dims)(*mixed)[0]
        torch.testing.assert_close(first, loss(*samples[0]).detach())


def assert_mapped(output: Tensor, leaves: Sequence[Tensor]) -> None:
    """Two backward passes of an output (N,) at once are those one by one, by either way to ask."""
    upstream = torch.randn(2, len(output), dtype=output.dtype)
    one = functools.partial(torch.autograd.grad, output, leaves, retain_graph=True)
    ways = torch.func.vmap(one)(upstream), one(upstream, is_grads_batched=True)
    for number in range(2):
        for *many, alone in zip(*ways, one(upstream[number]), strict=True):
            for mine in many:
                torch.testing.assert_close(mine[number], alone)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", OPS)
def test_backward_passes_can_be_mapped(name: str) -> None:
    leaves = OPS[name].leaves()
    assert_mapped(flat(OPS[name].form(*leaves)), leaves)


@pytest.mark.parametrize("stop", ["masked", "guidance"])
def test_backward_passes_of_an_alignment_that_is_stopped_can_be_mapped(stop: Stop) -> None:
    features = torch.randn(2 * (3 + 4), 6, requires_grad=True)
    latent, memory, loss = split_aligned(features * 1, 2, 3, 4, stop_gradient=stop)
    assert_mapped(flat((latent, memory, loss)), [features])
    assert_mapped(loss[None], [features])


@pytest.mark.usefixtures("eager")
def test_backward_passes_of_a_model_can_be_mapped() -> None:
    sizes = dict(width=64, depth=1, heads=2, decoder_width=64, decoder_depth=2, decoder_heads=2)
    model = LMIM(ModelConfig(image_size=(8, 16), decoder_dropout=0.0, pos_grid="true", **sizes))
    images = torch.rand(2, 3, 8, 16)
    output = model(images, images.flip(0), torch.rand(2, model.num_patches))
    losses = torch.stack([output.loss_recon, output.loss])
    assert_mapped(losses, [parameter for parameter in model.parameters() if parameter.requires_grad])


def test_gradients_of_an_input_that_is_made_from_another_are_its_own_share() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    double = 2 * x
    found = by_autograd(lambda x, double: x * double, (x, double), (True, True), (torch.tensor(1.0),))
    assert [grad.item() for grad in found if grad is not None] == [6.0, 3.0]


@pytest.mark.usefixtures("eager")
def test_a_view_of_a_leaf_is_not_taken_over() -> None:
    leaf = torch.randn(6, 4, requires_grad=True)
    before = leaf.detach().clone()
    gelu_linear(leaf.view(6, 4), torch.ones(4), torch.randn(2, 4)).sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert leaf.grad is not None


WIDE = 64  # two heads of 32, for the kernels of attention
KERNELS = [
    name for name in OPS if "attention" not in name and name not in ("shared_input_linears", "split_aligned")
]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse_second_derivatives_and_many_at_once(name: str) -> None:
    frozen = {"decoder_tokens": [3], "patch_embed": [0, 3]}.get(name, [])  # without a gradient by the kernel
    leaves = OPS[name].leaves(torch.float32)
    for number in frozen:
        leaves[number].requires_grad_(False)
    output = flat(OPS[name].form(*leaves))
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    with pytest.raises(RuntimeError, match="for create_graph run the forward pass under"):
        torch.autograd.grad(output.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="for is_grads_batched run the forward pass under"):
        torch.autograd.grad(output, inputs, torch.ones(2, len(output)), is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"no kernel under a torch\.func transform or forward-mode"):
        torch.func.jvp(OPS[name].form, tuple(leaves), tuple(torch.ones_like(leaf) for leaf in leaves))


@pytest.mark.usefixtures("kernels")
def test_a_block_of_kernels_has_no_second_derivative() -> None:
    x = torch.randn(1, 3, WIDE, requires_grad=True)
    for layer, inputs in ((Block(WIDE, 2, 1.0), (x,)), (DecoderLayer(WIDE, 2, 32, 0.0), (x, x))):
        with pytest.raises(RuntimeError, match="for create_graph run the forward pass under"):
            torch.autograd.grad(layer(*inputs).sum(), x, create_graph=True)


def test_kernels_leave_transforms_to_eager_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors = [torch.ones(4)]
    assert dispatch.refusal(tensors) is None
    with torch.autograd.forward_ad.dual_level():
        assert "torch.func transform" in str(dispatch.refusal(tensors))
    seen: list[str | None] = []
    torch.func.vmap(lambda x: seen.append(dispatch.refusal([x])) or x)(torch.ones(2, 3))
    assert "torch.func transform" in str(seen[0])
