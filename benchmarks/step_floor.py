"""The least time of a whole training step, by part, as the release computes it: every token is decoded.

Stages are those of a fused design: GELU in the epilogue of its product, residual streams and activations in
the type of the products, weights and optimiser state in fp32. A form that leaves out what the loss does not
read may pass it by a few percent.
"""

from __future__ import annotations

from benchmarks import floors
from benchmarks.floors import Ceilings, Passes, Work, floor_seconds
from lmim_fast.config import ModelConfig

ADAMW_BYTES = 28  # a parameter: weight and two moments in and out, gradient in; fp32


def step_passes(config: ModelConfig, batch: int, itemsize: int) -> dict[str, Passes]:
    """Stages of a step by part: teacher (where there is one), guidance, masked, decoder, loss, optimiser.

    Args:
        config:   of the model.
        batch:    images.
        itemsize: bytes of an activation.
    """
    full, shown = config.num_patches + 1, config.num_visible + 1
    parts = {"masked": _encoder(config, batch, shown, itemsize, training=True)}
    if config.guidance:
        parts["guidance"] = _encoder(config, batch, full, itemsize, training=True)
    if config.target == "teacher":
        parts["teacher"] = Passes(_encoder(config, batch, full, itemsize, training=False).forward, ())
    parts["decoder"] = _decoder(config, batch, itemsize)
    target = batch * (config.num_patches - config.num_visible) * config.target_width * itemsize
    parts["loss"] = Passes((Work(float(3 * target)),), ())  # prediction, target, gradient
    parts["optimiser"] = Passes((Work(float(ADAMW_BYTES * trained_parameters(config))),), ())
    return parts


def step_seconds(config: ModelConfig, batch: int, itemsize: int, ceilings: Ceilings) -> float:
    """Floor of the step."""
    parts = step_passes(config, batch, itemsize).values()
    return sum(floor_seconds(passes.forward + passes.backward, ceilings) for passes in parts)


def trained_parameters(config: ModelConfig) -> int:
    """Numbers that the optimiser updates."""
    width, deep, hidden = config.width, config.decoder_width, int(config.width * config.mlp_ratio)
    block = _linear_size(width, 3 * width) + _linear_size(width, width) + 4 * width
    block += _linear_size(width, hidden) + _linear_size(hidden, width)
    encoder = _linear_size(config.patch_pixels, width) + width + config.depth * block + 2 * width
    attention = _linear_size(deep, 3 * deep) + _linear_size(deep, deep)
    ffn = _linear_size(deep, config.decoder_ffn) + _linear_size(config.decoder_ffn, deep)
    decoder = config.decoder_depth * (2 * attention + ffn + 6 * deep)
    edges = 2 * _linear_size(width, deep) + deep + 2 * deep + _linear_size(deep, config.target_width)
    return encoder + decoder + edges


def _linear_size(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _together(*passes: Passes) -> Passes:
    forward = tuple(work for item in passes for work in item.forward)
    return Passes(forward, tuple(work for item in passes for work in item.backward))


def _encoder(config: ModelConfig, batch: int, tokens: int, itemsize: int, training: bool) -> Passes:
    """Embedding of the patches and all blocks; backward, the embedding reads its gradient and the images."""
    rows, width, hidden = batch * tokens, config.width, int(config.width * config.mlp_ratio)
    norm = floors.dropout_add_layer_norm(rows, width, itemsize, itemsize, dropout=False)
    block = _together(
        norm,
        floors.linear(rows, width, 3 * width, itemsize),
        floors.attention(batch, tokens, tokens, width, config.heads, itemsize),
        floors.linear(rows, width, width, itemsize),
        norm,
        floors.mlp(rows, width, hidden, itemsize, training),
    )
    embed = Work(float(rows * (config.patch_pixels + width) * itemsize))
    return _together(Passes((embed,), (embed,)), *[block] * config.depth)


def _decoder(config: ModelConfig, batch: int, itemsize: int) -> Passes:
    """From latent and memory to predictions of all tokens."""
    tokens, shown, width, deep = (
        config.num_patches + 1,
        config.num_visible + 1,
        config.width,
        config.decoder_width,
    )
    keys = tokens if config.guidance else shown
    rows = batch * tokens
    norm = floors.layer_norm(rows, deep, itemsize, itemsize)
    add_norm = Passes(
        (Work(3.0 * rows * deep * itemsize),), (Work(3.0 * rows * deep * itemsize),)
    )  # post-norm: the sum need not be written; backward reads it as the normalised rows
    layer = _together(
        floors.linear(rows, deep, 3 * deep, itemsize),
        floors.attention(batch, tokens, tokens, deep, config.decoder_heads, itemsize),
        floors.linear(rows, deep, deep, itemsize),
        add_norm,
        floors.linear(rows, deep, deep, itemsize),
        floors.linear(batch * keys, deep, 2 * deep, itemsize),
        floors.attention(batch, tokens, keys, deep, config.decoder_heads, itemsize),
        floors.linear(rows, deep, deep, itemsize),
        add_norm,
        floors.mlp(rows, deep, config.decoder_ffn, itemsize, training=True),
        add_norm,
    )
    entry = Work(float((batch * shown + rows) * deep * itemsize))  # the tokens in their order
    return _together(
        floors.linear(batch * shown, width, deep, itemsize),
        floors.linear(batch * keys, width, deep, itemsize),
        Passes((entry,), (entry,)),
        *[layer] * config.decoder_depth,
        norm,
        floors.linear(rows, deep, config.target_width, itemsize),
    )
