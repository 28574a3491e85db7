"""Drop-in layers against the modules whose place they take, with the same state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers import Attention, Block, DecoderLayer, DropoutAddLayerNorm, Mlp, MultiheadAttention
from lmim_fast.layers.rows import PlainRows
from lmim_fast.ops.linear import linear
from lmim_fast.reference import DecoderLayer as ReleasedDecoderLayer

WIDTH, HEADS, HIDDEN = 24, 3, 40
QUERIES, MEMORY = (2, 5, WIDTH), (2, 7, WIDTH)


class TimmAttention(nn.Module):
    """What timm's vision_transformer.Attention computes."""

    def __init__(self, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class TimmMlp(nn.Module):
    """What timm's Mlp computes."""

    def __init__(self, hidden: int = HIDDEN, out: int = WIDTH, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(WIDTH, hidden), nn.Linear(hidden, out), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class TimmBlock(nn.Module):
    """What timm's vision_transformer.Block computes."""

    def __init__(self, qkv_bias: bool = True, proj_drop: float = 0.0, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = TimmAttention(qkv_bias, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = TimmMlp(int(WIDTH * 2.5), drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainAddNorm(nn.LayerNorm):
    """Dropout, add and LayerNorm one after another."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__(WIDTH, eps=1e-6)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(x, self.p, self.training)
        return super().forward(total), total


def our_multihead(**options: object) -> MultiheadAttention:
    return MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


def torch_attention(**options: object) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


def torch_decoder(dropout: float = 0.0) -> nn.Module:
    return nn.TransformerDecoderLayer(
        WIDTH, HEADS, HIDDEN, dropout, activation="gelu", layer_norm_eps=1e-6, batch_first=True
    )


def released_decoder(order: str, dropout: float = 0.0) -> nn.Module:
    sizes = dict(decoder_width=WIDTH, decoder_heads=HEADS, decoder_ffn=HIDDEN)
    return ReleasedDecoderLayer(ModelConfig(decoder_dropout=dropout, decoder_order=order, **sizes))


def to_itself(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0]


def to_memory(module: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    return module(x, memory, memory, need_weights=False)[0]


def to_keys_and_values(module: nn.Module, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return module(x, key, value, need_weights=False)[0]


@dataclass(frozen=True)
class Pair:
    """A layer, the module it stands for, and how both are called."""

    ours: Callable[[], nn.Module]
    truth: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (QUERIES,)
    call: Callable[..., Tensor | tuple[Tensor, ...]] = lambda module, *inputs: module(*inputs)

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        """Both with the same weights, away from where they start (biases and norms too)."""
        ours, truth = self.ours(), self.truth()
        with torch.no_grad():
            for p in truth.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ours.load_state_dict(truth.state_dict(), strict=True)
        return ours.to(dtype), truth.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in self.shapes]

    def run(self, module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = self.call(module, *inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def decoder_pair(order: str) -> Pair:
    return Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order=order),
        lambda: released_decoder(order),
        (QUERIES, MEMORY),
    )


PAIRS = {
    "Attention": Pair(lambda: Attention(WIDTH, HEADS, True), TimmAttention),
    "Attention without qkv bias": Pair(lambda: Attention(WIDTH, HEADS), lambda: TimmAttention(False)),
    "Mlp": Pair(lambda: Mlp(WIDTH, HIDDEN), TimmMlp),
    "Mlp of rows": Pair(lambda: Mlp(WIDTH, HIDDEN), TimmMlp, ((7, WIDTH),)),
    "Mlp of other sizes": Pair(lambda: Mlp(WIDTH, out_features=9), lambda: TimmMlp(WIDTH, 9)),
    "Block": Pair(lambda: Block(WIDTH, HEADS, 2.5, True), TimmBlock),
    "Block without qkv bias": Pair(lambda: Block(WIDTH, HEADS, 2.5), lambda: TimmBlock(False)),
    "DropoutAddLayerNorm": Pair(lambda: DropoutAddLayerNorm(WIDTH), PlainAddNorm, (QUERIES, QUERIES)),
    "self-attention": Pair(lambda: our_multihead(), torch_attention, call=to_itself),
    "self-attention without bias": Pair(
        lambda: our_multihead(bias=False),
        lambda: torch_attention(bias=False),
        call=to_itself,
    ),
    "cross-attention": Pair(lambda: our_multihead(), torch_attention, (QUERIES, MEMORY), to_memory),
    "cross-attention without bias": Pair(
        lambda: our_multihead(bias=False),
        lambda: torch_attention(bias=False),
        (QUERIES, MEMORY),
        to_memory,
    ),
    "cross-attention with values of their own": Pair(
        lambda: our_multihead(),
        torch_attention,
        (QUERIES, MEMORY, MEMORY),
        to_keys_and_values,
    ),
    "self-attention with values of their own": Pair(
        lambda: our_multihead(),
        torch_attention,
        (QUERIES, QUERIES),
        lambda module, x, value: module(x, x, value, need_weights=False)[0],
    ),
    "DecoderLayer": decoder_pair("sa_ca"),
    "DecoderLayer, memory first": decoder_pair("ca_sa"),
    "torch's decoder layer": Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0), torch_decoder, (QUERIES, MEMORY)
    ),
}
DROPPING = {
    "attn_drop": Pair(
        lambda: Attention(WIDTH, HEADS, True, attn_drop=0.25), lambda: TimmAttention(True, 0.25)
    ),
    "proj_drop": Pair(
        lambda: Attention(WIDTH, HEADS, True, proj_drop=0.25), lambda: TimmAttention(True, 0, 0.25)
    ),
    "Mlp": Pair(lambda: Mlp(WIDTH, HIDDEN, drop=0.25), lambda: TimmMlp(drop=0.25)),
    "Block": Pair(
        lambda: Block(WIDTH, HEADS, 2.5, True, proj_drop=0.25, attn_drop=0.5),
        lambda: TimmBlock(True, 0.25, 0.5),
    ),
    "DropoutAddLayerNorm": Pair(
        lambda: DropoutAddLayerNorm(WIDTH, 0.25), lambda: PlainAddNorm(0.25), (QUERIES, QUERIES)
    ),
    "self-attention": Pair(
        lambda: our_multihead(dropout=0.25), lambda: torch_attention(dropout=0.25), call=to_itself
    ),
    "cross-attention": Pair(
        lambda: our_multihead(dropout=0.25),
        lambda: torch_attention(dropout=0.25),
        (QUERIES, MEMORY),
        to_memory,
    ),
    "DecoderLayer": Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.25),
        lambda: released_decoder("sa_ca", 0.25),
        (QUERIES, MEMORY),
    ),
}


def gradients(pair: Pair, module: nn.Module, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    outputs = pair.run(module, inputs)
    # In the order of names: the modules may register their parameters in another one.
    parameters = [p for _, p in sorted(module.named_parameters())]
    return list(torch.autograd.grad(outputs, [*inputs, *parameters], [up.to(outputs[0]) for up in upstream]))


def upstream_of(pair: Pair, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(output) for output in pair.run(module, inputs)]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_every_gradient_are_those_of_the_known_module(name: str) -> None:
    pair = PAIRS[name]
    ours, truth = pair.make(torch.float64)
    inputs = pair.inputs(torch.float64)
    for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
        torch.testing.assert_close(mine, expected)
    upstream = upstream_of(pair, truth, inputs)
    both = (gradients(pair, module, inputs, upstream) for module in (ours, truth))
    for mine, expected in zip(*both, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_names_and_shapes_of_weights_are_those_of_the_known_module(name: str) -> None:
    ours, truth = PAIRS[name].ours(), PAIRS[name].truth()
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (ours, truth)]
    assert shapes[0] == shapes[1]
    truth.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", PAIRS)
def test_inputs_in_any_layout_and_expanded_gradients_are_taken(name: str) -> None:
    pair = PAIRS[name]
    ours, _ = pair.make()
    inputs = pair.inputs()
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    found = []
    for variant in (inputs, strided):
        outputs = pair.run(ours, variant)
        found.append([*outputs, *torch.autograd.grad(sum(output.sum() for output in outputs), variant)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


def size(error: Tensor, by_mean: bool) -> Tensor:
    return error.square().mean().sqrt() if by_mean else error.abs().max()


def errors_in_half_precision(name: str, device: str) -> None:
    """Under autocast ours is at most three times as far from fp32 as the known module, or one rounding.

    By the largest error of outputs, by the mean square of gradients.
    """
    pair = PAIRS[name]
    ours, truth = (module.to(device) for module in pair.make())
    inputs = [x.detach().to(device).requires_grad_() for x in pair.inputs()]
    upstream = upstream_of(pair, truth, inputs)
    exact = [*pair.run(truth, inputs), *gradients(pair, truth, inputs, upstream)]
    with torch.autocast(device, dtype=torch.bfloat16):
        plain, mine = (
            [*pair.run(module, inputs), *gradients(pair, module, inputs, upstream)]
            for module in (truth, ours)
        )
    for number, (low, found, right) in enumerate(zip(plain, mine, exact, strict=True)):
        by_mean = number >= len(upstream)
        rounding = torch.finfo(torch.bfloat16).eps / 2 * size(right, by_mean)
        allowed = 3 * torch.maximum(size(low.float() - right, by_mean), rounding)
        assert size(found.float() - right, by_mean) <= allowed, f"tensor {number}"
        assert found.dtype == low.dtype, f"tensor {number}"


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_autocast_is_as_exact_as_the_known_module(name: str) -> None:
    errors_in_half_precision(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_bf16_autocast_on_a_device_is_as_exact_as_the_known_module(name: str) -> None:
    errors_in_half_precision(name, "cuda")


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_weights_give_bf16_results(name: str) -> None:
    pair = PAIRS[name]
    ours, _ = pair.make(torch.bfloat16)
    for output in pair.run(ours, pair.inputs(torch.bfloat16)):
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_acts_in_training_as_in_the_known_module_and_not_in_evaluation(name: str) -> None:
    """The same sequence many times in a batch: mean and deviation of each value are those of the truth."""
    pair, copies = DROPPING[name], 4000
    ours, truth = pair.make()
    inputs = [x.detach()[:1].expand(copies, -1, -1) for x in pair.inputs()]
    with torch.no_grad():
        for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
            error = (mine.mean(0) - expected.mean(0)).abs()
            deviation = ((mine.var(0) + expected.var(0)) / copies).sqrt()
            assert (error <= 5 * deviation + 1e-6).all()
            spread = mine.std(0).square().mean().sqrt() / expected.std(0).square().mean().sqrt()
            assert 0.97 < spread < 1.03
        ours.eval(), truth.eval()
        for mine, expected in zip(pair.run(ours, inputs), pair.run(truth, inputs), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_fresh_weights_are_drawn_as_torch_draws_them() -> None:
    for ours, truth in (
        (our_multihead, torch_attention),
        (lambda: Attention(WIDTH, HEADS, True), TimmAttention),
        (lambda: Block(WIDTH, HEADS, 2.5, True), TimmBlock),
    ):
        torch.manual_seed(1)
        mine = ours()
        torch.manual_seed(1)
        expected = truth().state_dict()
        for name, value in mine.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_attention_takes_its_place_in_torch_layers(training: bool) -> None:
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        layer = kind(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True).train(training)
        inputs = [torch.randn(QUERIES), torch.randn(MEMORY)][: 2 if kind is nn.TransformerDecoderLayer else 1]
        expected = layer(*inputs)
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                ours = our_multihead().train(training)
                ours.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, ours)
        for gradients_kept in (True, False):
            with torch.set_grad_enabled(gradients_kept):
                torch.testing.assert_close(layer(*inputs), expected)


def test_packed_blocks_equal_blocks_of_each_batch_apart() -> None:
    first, second = Block(WIDTH, HEADS, proj_drop=0.1).eval(), Block(WIDTH, HEADS)
    batches = torch.randn(3, 5, WIDTH), torch.randn(2, 4, WIDTH)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    segments = [batch.shape[:2] for batch in batches]
    residual, branch, bias = second.forward_packed(
        *first.forward_packed(rows, None, None, segments), segments
    )
    expected = torch.cat([second(first(batch)).flatten(0, 1) for batch in batches])
    torch.testing.assert_close(residual + branch + bias, expected)


def test_packed_dropout_of_the_last_branch_is_done_before_it_is_handed_on() -> None:
    block = Block(WIDTH, HEADS, proj_drop=0.5)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.fill_(3.0)
    _, branch, bias = block.forward_packed(torch.randn(50, WIDTH), None, None, [(10, 5)])
    assert bias is None
    assert branch.unique().tolist() == [0.0, 6.0]


def test_a_block_does_not_keep_its_normalised_rows() -> None:
    block, x = Block(WIDTH, HEADS), torch.randn(QUERIES, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    middle = x + block.attn(block.norm1(x))
    for normalised in (block.norm1(x), block.norm2(middle)):
        flat = normalised.flatten(0, 1)
        same = [t for t in kept if t.shape == flat.shape and torch.allclose(t, flat, atol=1e-5)]
        assert not same
    assert any(t.shape == (10, 4 * WIDTH) for t in kept), "the product of fc1 is kept"


@pytest.mark.parametrize("order", ["sa_ca", "ca_sa"])
def test_decoder_rows_asked_for_alone_are_the_last_rows_of_all(order: str) -> None:
    layer = DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order=order)
    x, memory = torch.randn(QUERIES), torch.randn(MEMORY)
    attention = layer.multihead_attn
    kv = linear(memory, attention.kv_weight)
    last = layer.forward_rows(PlainRows(x, 2), kv, attention.kv_bias, masked_only=True)
    torch.testing.assert_close(last, layer(x, memory)[:, 2:])


COMPILED = {
    "Block": lambda: (Block(WIDTH, HEADS), [torch.randn(QUERIES, requires_grad=True)]),
    "DecoderLayer": lambda: (
        DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0),
        [torch.randn(shape, requires_grad=True) for shape in (QUERIES, MEMORY)],
    ),
}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPILED)
def test_the_whole_layer_is_one_compiled_graph_equal_to_eager(name: str, backend: str, low: bool) -> None:
    torch.compiler.reset()
    layer, inputs = COMPILED[name]()
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            output = run(*inputs)
        sources = [*inputs, *layer.parameters()]
        found.append([output, *torch.autograd.grad(output, sources, torch.ones_like(output))])
    rtol, atol = (2**-6, 2**-5) if low else (1e-4, 1e-5)
    for compiled, eager in zip(*reversed(found), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Callable[..., object]]]] = {
    "Attention": lambda: (layer := Attention(WIDTH, HEADS), layer),
    "Block": lambda: (layer := Block(WIDTH, HEADS), layer),
    "MultiheadAttention": lambda: (layer := our_multihead(), lambda x: layer(x, x, x)),
    "DecoderLayer": lambda: (layer := DecoderLayer(WIDTH, HEADS), lambda x: layer(torch.ones(QUERIES), x)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, WIDTH), r"\(5, 24\) must be \(B, N, 24\)"),
        ((2, 5, 25), r"\(2, 5, 25\) must have 24 features in its last dimension"),
        ((0, 5, WIDTH), r"\(0, 5, 24\) must have at least one sequence and one token"),
        ((2, 0, WIDTH), r"\(2, 0, 24\) must have at least one sequence and one token"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    _, run = LAYERS[name]()
    with pytest.raises(ValueError, match=message):
        run(torch.ones(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_and_devices_that_do_not_fit_the_weights_are_named(name: str) -> None:
    _, run = LAYERS[name]()
    with pytest.raises(
        ValueError, match=r"is torch.float16, the layer's parameters are torch.float32.*autocast"
    ):
        run(torch.ones(QUERIES, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"is torch.int64"):
        run(torch.ones(QUERIES, dtype=torch.int64))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"is torch.float64"):
        run(torch.ones(QUERIES, dtype=torch.float64))
    with pytest.raises(ValueError, match="is on meta, the layer's parameters on cpu"):
        run(torch.ones(QUERIES, device="meta"))


def test_inputs_that_do_not_fit_each_other_are_named() -> None:
    attention, layer = our_multihead(), DecoderLayer(WIDTH, HEADS)
    x, memory, other = torch.ones(QUERIES), torch.ones(MEMORY), torch.ones(3, 7, WIDTH)
    with pytest.raises(ValueError, match=r"query \(2, 5, 24\), key \(3, 7, 24\), value \(3, 7, 24\)"):
        attention(x, other, other)
    with pytest.raises(ValueError, match=r"key \(2, 7, 24\), value \(2, 5, 24\)"):
        attention(x, memory, x)
    with pytest.raises(ValueError, match=r"x \(2, 5, 24\) and memory \(3, 7, 24\)"):
        layer(x, other)
    with pytest.raises(ValueError, match=r"\(2, 5, 24\) and residual \(2, 7, 24\)"):
        DropoutAddLayerNorm(WIDTH)(x, memory)
    with pytest.raises(ValueError, match=r"x \(2, 25\) must have 24 features"):
        Mlp(WIDTH)(torch.ones(2, 25))


def test_wrong_options_are_named() -> None:
    for make in (Attention, MultiheadAttention, Block, DecoderLayer):
        with pytest.raises(ValueError, match="width 24 must be a multiple of the number of heads, got 5"):
            make(24, 5)
        with pytest.raises(ValueError, match="got 0 heads"):
            make(24, 0)
    for probability in ("attn_drop", "proj_drop"):
        for make in (Attention, Block):
            with pytest.raises(ValueError, match=r"\[0, 1\), got 1.5"):
                make(24, 3, **{probability: 1.5})
    with pytest.raises(ValueError, match=r"\[0, 1\), got -1"):
        Mlp(24, drop=-1)
    with pytest.raises(ValueError, match="one of sa_ca, ca_sa, got 'casa'"):
        DecoderLayer(24, 3, order="casa")


def test_options_of_timm_that_are_not_supported_are_not_swallowed() -> None:
    for make in (Attention, Block):
        with pytest.raises(TypeError, match="qk_norm"):
            make(24, 3, qk_norm=True)
    with pytest.raises(TypeError, match="act_layer"):
        Mlp(24, act_layer=nn.ReLU)
    with pytest.raises(TypeError, match="positional"):
        Mlp(24, 24, 24, nn.ReLU)
    with pytest.raises(TypeError, match="positional"):
        Attention(24, 3, True, True)


@pytest.mark.parametrize(
    "option",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12}, {"vdim": 12}, {"batch_first": False}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_torch_attention_that_are_not_supported_say_what_to_use(option: dict[str, object]) -> None:
    name = next(iter(option))
    with pytest.raises(
        NotImplementedError, match=rf"{name}.*(use torch.nn.MultiheadAttention|give batch_first=True)"
    ):
        MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | option)
    our_multihead(kdim=WIDTH, vdim=WIDTH)


def test_masks_and_weights_are_refused_with_what_to_use() -> None:
    layer, x = our_multihead(), torch.ones(QUERIES)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"key_padding_mask of shape \(2, 5\).*leave padding out"):
        layer(x, x, x, key_padding_mask=mask)
    with pytest.raises(NotImplementedError, match=r"attn_mask of shape \(5, 5\)"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(NotImplementedError, match="is_causal"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(NotImplementedError, match=r"need_weights.*attention_weights"):
        layer(x, x, x, need_weights=True)
    assert layer(x, x, x)[1] is None
