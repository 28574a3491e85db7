"""The bias of a projection in front of attention: in its product, or added by attention on load."""

import dataclasses
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.ops import attention, dispatch
from lmim_fast.ops.attention import BIAS_VARIABLE, cross_attention, product_bias, self_attention
from lmim_fast.ops.linear import linear, shared_input_linears

SEGMENTS = [(2, 5), (1, 7)]
WIDTH, HEADS = 64, 2


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_()


@dataclasses.dataclass
class Inputs:
    """Rows and projections of a self-attention and a cross-attention."""

    x: Tensor = dataclasses.field(default_factory=lambda: draw(17, WIDTH))
    weight: Tensor = dataclasses.field(default_factory=lambda: draw(3 * WIDTH, WIDTH))
    bias: Tensor = dataclasses.field(default_factory=lambda: draw(3 * WIDTH))

    def self_attention(self, **options: Any) -> Tensor:
        added = product_bias(self.bias)
        qkv = linear(self.x, self.weight, added=added)
        return self_attention(qkv, self.bias, HEADS, SEGMENTS, added=added is not None, **options)

    def cross_attention(self, **options: Any) -> Tensor:
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            t.split([WIDTH, 2 * WIDTH]) for t in (self.weight, self.bias)
        )
        added = [product_bias(q_bias), product_bias(kv_bias)]
        q = linear(self.x[:12].view(3, 4, WIDTH), q_weight, added=added[0])
        (kv,) = shared_input_linears(self.x[2:].view(3, 5, WIDTH), [kv_weight], added[1:])
        return cross_attention(q, q_bias, kv, kv_bias, HEADS, added=added[0] is not None, **options)


def results(inputs: Inputs, kind: str, **options: Any) -> list[Tensor]:
    context = getattr(inputs, kind)(**options)
    torch.manual_seed(1)
    leaves = [inputs.x, inputs.weight, inputs.bias]
    return [context, *torch.autograd.grad(context, leaves, torch.randn_like(context))]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("kind", ["self_attention", "cross_attention"])
def test_context_and_every_gradient_are_the_same_wherever_the_bias_is_added(
    kind: str, backend: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = Inputs(), dict(p=p, seed=torch.tensor([7], device=DEVICE) if p else None)
    found = []
    with dispatch.backend(backend):
        for form in attention.BIAS_FORMS:
            monkeypatch.setenv(BIAS_VARIABLE, form)
            found.append(results(inputs, kind, **options))
    for loaded, added in zip(*found, strict=True):
        assert (loaded - added).norm() < 1e-4 * loaded.norm()
    queries, keys, values = found[1][-1].abs().view(3, WIDTH)
    assert keys.max() < 1e-4
    assert min(queries.max(), values.max()) > 0.1


@pytest.mark.parametrize("form", attention.BIAS_FORMS)
@pytest.mark.parametrize("kind", ["self_attention", "cross_attention"])
def test_a_kernel_reads_no_bias_that_the_product_has_and_sums_its_gradient_all_the_same(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BIAS_VARIABLE, form)
    with dispatch.backend("triton"), runtime.recording((9, 0)) as recording:
        results(Inputs(), kind)
    assert recording.launches
    for launch in recording.launches:
        named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        assert (named["q_bias_ptr"] is None) == (named["v_bias_ptr"] is None) == (form == "product")
        if "dq_bias_ptr" in named:
            assert named["dq_bias_ptr"] is not None
            assert named["dv_bias_ptr"] is not None


def test_an_unknown_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BIAS_VARIABLE, "epilogue")
    with pytest.raises(ValueError, match="'epilogue'; choose from load, product"):
        product_bias(torch.zeros(3))


@pytest.mark.usefixtures("kernels")
def test_opcheck_of_products_with_their_bias() -> None:
    ops = torch.ops.lmim_fast
    qkv, bias = draw(17, 3 * WIDTH), draw(3 * WIDTH)
    torch.library.opcheck(
        ops.self_attention.default, (qkv, bias, None, HEADS, [2, 5, 1, 7], 0.0, False, True)
    )
    q, q_bias, kv, kv_bias = draw(3, 4, WIDTH), draw(WIDTH), draw(3, 5, 2 * WIDTH), draw(2 * WIDTH)
    arguments = (q, q_bias, kv, kv_bias, None, HEADS, 0.0, None, True)
    torch.library.opcheck(ops.cross_attention.default, arguments)
    backward = (qkv[:, :WIDTH].detach(), qkv.detach(), None, None, qkv[:, :WIDTH].detach(), qkv.new_empty(0))
    torch.library.opcheck(ops.self_attention_backward.default, (*backward, HEADS, [2, 5, 1, 7], 0.0, True))
