"""Gradients of masked losses: made in the forward pass, scaled in the backward pass, as autograd asks."""

import itertools
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import DEVICE, DTYPES
from feature_loss_cases import (
    assert_loss_is_accurate,
    differentiate,
    draw,
    feature_inputs,
    pixel_inputs,
)
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from lmim_fast.kernels import feature_loss
from lmim_fast.ops import dispatch
from lmim_fast.ops.feature_loss import (
    masked_feature_loss,
    masked_pixel_loss,
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0, -3.0, 2.0**13])
def test_the_gradient_of_the_loss_scales_those_of_its_inputs(upstream: float, dtype: torch.dtype) -> None:
    assert_loss_is_accurate(masked_feature_loss, feature_inputs((3, 16, 5, 20), dtype), upstream)


def test_half_precision_gradients_do_not_vanish_before_they_meet_the_scale_of_the_loss() -> None:
    """Unscaled they are about 3e-8, half of the least that fp16 holds."""
    loss = partial(masked_pixel_loss, patch_size=4, normalise=False)
    product, images = torch.zeros(4, 4, 48, device=DEVICE), 1e-5 * draw(4, 3, 8, 8)
    ids = torch.arange(4, device=DEVICE).expand(4, 4)
    inputs, scale = (product.half(), product[0, 0].half(), images.half(), ids), 2.0**14
    truth = differentiate("eager", loss, (*(tensor.double() for tensor in inputs[:3]), ids), scale)
    ours = differentiate("triton", loss, inputs, scale)
    assert (2 / product.numel()) * 1e-5 < 2**-24
    assert (ours[1].double() - truth[1]).abs().max() <= 1e-3 * truth[1].abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_pass_gives_the_same_gradients(dtype: torch.dtype) -> None:
    product, bias, features, ids = feature_inputs((2, 8, 2, 20), dtype)
    leaves = product.requires_grad_(), bias.requires_grad_()
    with dispatch.backend("triton"):
        loss = masked_feature_loss(*leaves, features, ids)
    for upstream in (0.5, 1.0):
        kept = torch.autograd.grad(loss * upstream, leaves, retain_graph=True)
        again = torch.autograd.grad(loss * upstream, leaves, retain_graph=True)
        single = differentiate("triton", masked_feature_loss, (product, bias, features, ids), upstream)[1:]
        for first, second, third in zip(kept, again, single, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


def test_a_loss_may_be_part_of_two_losses() -> None:
    product, bias, features, ids = feature_inputs((2, 8, 2, 20), torch.float32)
    leaf = product.requires_grad_()
    with dispatch.backend("triton"):
        loss = masked_feature_loss(leaf, bias, features, ids)
        whole = differentiate("triton", masked_feature_loss, (product, bias, features, ids))[1]
    (0.25 * loss).backward(retain_graph=True)
    (loss + 3 * loss).backward()
    torch.testing.assert_close(leaf.grad, 4.25 * whole)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.usefixtures("kernels")
def test_saved_tensors_may_be_packed_and_forward_passes_repeated() -> None:
    inputs = feature_inputs((2, 8, 2, 20), torch.float32)
    truth = differentiate("triton", masked_feature_loss, inputs, 0.5)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        packed = differentiate("triton", masked_feature_loss, inputs, 0.5)

    def repeated(*arguments: Tensor, reentrant: bool) -> Tensor:
        result: Tensor = checkpoint(masked_feature_loss, *arguments, use_reentrant=reentrant)
        return result

    leaves = [tensor.requires_grad_() for tensor in inputs[:2]]
    for reentrant in (False, True):
        repeated(*inputs, reentrant=reentrant).mul(0.5).backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        for mine, other, expected in zip(found, packed[1:], truth[1:], strict=True):
            assert mine is not None
            assert torch.equal(mine, expected)
            assert torch.equal(other, expected)


@pytest.mark.usefixtures("kernels")
def test_gradients_are_made_only_where_they_are_wanted() -> None:
    product, bias, features, ids = feature_inputs((2, 8, 2, 20), torch.float32)
    features = features.requires_grad_()  # a teacher that is not frozen gets none

    def wanted() -> list[bool]:
        with mock.patch.object(feature_loss, "features_forward", wraps=feature_loss.features_forward) as run:
            loss = masked_feature_loss(product, bias, features, ids)
        assert loss.requires_grad == any(run.call_args.kwargs.values())
        return list(run.call_args.kwargs.values())

    assert wanted() == [False, False]
    for product_wanted, bias_wanted in itertools.product((False, True), repeat=2):
        product.requires_grad_(product_wanted)
        bias.requires_grad_(bias_wanted)
        assert wanted() == [product_wanted, bias_wanted]
        with torch.no_grad():
            assert wanted() == [False, False]
    whole = differentiate("triton", masked_feature_loss, (product, bias, features, ids))
    (alone,) = torch.autograd.grad(masked_feature_loss(product.detach(), bias, features, ids), bias)
    assert torch.equal(alone, whole[2])


def test_custom_ops_keep_the_rules_of_torch() -> None:
    ops = torch.ops.lmim_fast
    product, bias, features, ids = feature_inputs((2, 6, 2, 20), torch.float16)
    leaves = product.clone().requires_grad_(), bias.clone().requires_grad_()
    check = torch.library.opcheck
    check(ops.masked_feature_loss.default, (*leaves, features, ids, 1e-5, True, True))
    check(ops.masked_feature_loss.default, (leaves[0], None, features, ids, 1e-5, True, False))
    check(ops.masked_feature_loss.default, (product, bias, features, ids, 1e-5, False, False))
    product, bias, images, ids = pixel_inputs("uint8", torch.float32)
    leaves = product.clone().requires_grad_(), bias.clone().requires_grad_()
    check(ops.masked_pixel_loss.default, (*leaves, images, ids, 4, True, True, True))
    upstream = torch.tensor(0.5, device=DEVICE)
    check(ops.masked_loss_gradient.default, (product, upstream))


@pytest.mark.parametrize(
    ("backend", "compiler"), [("eager", "aot_eager"), ("triton", "aot_eager"), ("triton", "inductor")]
)
def test_compiles_as_one_graph(backend: str, compiler: str) -> None:
    inputs = feature_inputs((2, 8, 2, 20), torch.float32)
    compiled: Any = torch.compile(masked_feature_loss, fullgraph=True, backend=compiler)
    truth = differentiate(backend, masked_feature_loss, inputs, 0.5)
    torch.testing.assert_close(differentiate(backend, compiled, inputs, 0.5), truth)


def test_compiled_gradients_are_the_same_each_time() -> None:
    inputs = feature_inputs((2, 8, 2, 20), torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:2]]
    truth = differentiate("triton", masked_feature_loss, inputs, 0.5)[1:]
    compiled: Any = torch.compile(masked_feature_loss, fullgraph=True, backend="aot_eager")
    with dispatch.backend("triton"), functorch_config.patch(donated_buffer=False):  # a graph may be kept
        loss = 0.5 * compiled(*leaves, *inputs[2:])
        for keep in (True, True, False):
            found = torch.autograd.grad(loss, leaves, retain_graph=keep)
            torch.testing.assert_close(list(found), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_cuda_graph_replay_is_equal(upstream: float) -> None:
    product, bias, features, ids = feature_inputs((64, 256, 51, 384), torch.bfloat16)
    leaves = product.requires_grad_(), bias.requires_grad_()

    def run() -> list[Tensor]:
        with dispatch.backend("triton"):
            loss = masked_feature_loss(*leaves, features, ids)
        return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]

    plain = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(captured, plain, strict=True))
