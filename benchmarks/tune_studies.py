"""Launch configurations worth trying, by kernel: what `benchmarks/tune.py` measures.

A study changes constants of a kernel's module, or what its choosing function returns, in all combinations,
and tries each on operations of the sweep. The shipped configuration is always among them.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.operation import kernel_name
from lmim_fast.kernels import attention, attention_backward, linear_gelu, patch_embed
from lmim_fast.ops.attention_backends import backend

SHIPPED = "shipped"
BACKEND_STUDY = "attention backend"
_BACKEND = "backend"  # of attention: a name in place of a configuration


class Trial(NamedTuple):
    """An operation of the sweep, and the launches that it makes, both as regular expressions.

    operation: matches `str(Operation)`; "{B}" stands for the batch.
    case:      matches the labels in `benchmarks/static_cases/`.
    """

    operation: str
    case: str


class Candidate(NamedTuple):
    """A configuration: values by "module.NAME", or by "module.name()" for what a function returns.

    "backend" is the attention backend.
    """

    label: str
    changes: dict[str, Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The changes are in force inside.

        Raises:
            AttributeError: a module has no such name.
        """
        with ExitStack() as stack:
            for name, value in self.changes.items():
                if name == _BACKEND:
                    stack.enter_context(backend(value))
                    continue
                module, _, attribute = name.removesuffix("()").rpartition(".")
                place = importlib.import_module(f"lmim_fast.kernels.{module}")
                new = _returning(value) if name.endswith("()") else value
                stack.enter_context(mock.patch.object(place, attribute, new))
            yield


def _returning(value: Any) -> Any:
    return lambda *args, **kwargs: value


@dataclass(frozen=True)
class Study:
    """What is changed, on what it is tried, and why.

    grid:      values by name, as in `Candidate`; tried in all combinations.
    direction: "forward", or "forward+backward" for kernels of the backward pass.
    variant:   of the operation.
    idea:      what a better value would gain, for the reader of the table.
    """

    name: str
    idea: str
    trials: Sequence[Trial]
    grid: Mapping[str, Sequence[Any]]
    direction: str = "forward"
    variant: str = "ours"

    def candidates(self) -> list[Candidate]:
        """The shipped configuration first."""
        found = [Candidate(SHIPPED, {})]
        for values in itertools.product(*self.grid.values()):
            changes = dict(zip(self.grid, values, strict=True))
            label = ", ".join(_told(name.rpartition(".")[2], value) for name, value in changes.items())
            found.append(Candidate(label, changes))
        return found

    @property
    def compiles(self) -> bool:
        """Whether it changes kernels."""
        return _BACKEND not in self.grid

    def changes(self, kernel: Any) -> bool:
        """True for kernels of the modules that are changed."""
        return any(name.split(".")[0] == kernel_name(kernel).split(".")[0] for name in self.grid)


def _told(name: str, value: Any) -> str:
    """`NAME=value`; of a named tuple or a dataclass its fields, which say enough."""
    text = str(value)
    return text[text.index("(") + 1 : -1] if "(" in text else f"{name}={text}"


_ATTENTION = (
    Trial(r"^self_attention ViT-S B{B} N257$", r"^self-attention ViT-S 257 bfloat16, p=0\.0$"),
    Trial(r"^self_attention ViT-S B{B} N52$", r"^self-attention ViT-S 52 bfloat16, p=0\.0$"),
    Trial(r"^self_attention decoder B{B} N257$", r"^self-attention decoder 257 bfloat16, p=0\.0$"),
    Trial(r"^self_attention decoder B{B} N257 p0\.1$", r"^self-attention decoder 257 bfloat16, p=0\.1$"),
    Trial(
        r"^cross_attention decoder B{B} N205 M257$", r"^cross-attention decoder 205 x 257 bfloat16, p=0\.0$"
    ),
    Trial(
        r"^cross_attention decoder B{B} N205 M257 p0\.1$",
        r"^cross-attention decoder 205 x 257 bfloat16, p=0\.1$",
    ),
)
_NORM = (
    Trial(
        r"^dropout_add_layer_norm ViT-S B{B} N257$",
        r"^add \+ LayerNorm ViT-S \d+x384 bfloat16, residual bfloat16, p=0\.0$",
    ),
    Trial(
        r"^dropout_add_layer_norm decoder B{B} N257 p0\.1$",
        r"^add \+ LayerNorm decoder \d+x512 bfloat16, residual bfloat16, p=0\.1$",
    ),
)
_GELU = (
    Trial(r"^bias_gelu ViT-S B{B} N257$", r"^GELU ViT-S \d+x1536 bfloat16, p=0\.0$"),
    Trial(r"^bias_gelu decoder B{B} N257 p0\.1$", r"^GELU decoder \d+x2048 bfloat16, p=0\.1$"),
)
_EMBED_CASE = r"^patch embed ViT-S bfloat16, uint8 images, bfloat16 tokens$"  # both views
_EMBED = (
    Trial(r"^patch_embed ViT-S B{B} N257$", _EMBED_CASE),
    Trial(r"^patch_embed ViT-S B{B} N52$", _EMBED_CASE),
)
_LOSS = (Trial(r"^masked_feature_loss ViT-S B{B} N205$", r"^feature loss ViT-S .* bfloat16$"),)
_TOKENS = (Trial(r"^decoder_tokens decoder B{B} N257$", r"^tokens decoder .* bfloat16$"),)
_APPEND = (Trial(r"^append_table_rows decoder B{B} N257 columns1536$", r"^append rows .*x1536 bfloat16$"),)
_MLP = (Trial(r"^mlp ViT-S B{B} N257$", r"^linear \+ GELU ViT-S \d+x384 to 1536 bfloat16$"),)


def studies(only: str = "") -> list[Study]:
    """Those whose names match a regular expression, the largest share of a step first."""
    return [study for study in _studies() if re.search(only, study.name)]


def _studies() -> list[Study]:
    return [
        Study(
            "attention backward",
            "hide latency: more programs or warps a multiprocessor, or loads ahead of their use",
            _ATTENTION,
            {
                "attention_backward._blocks()": [
                    attention_backward.Blocks(queries, 32, keys, warps, stages)
                    for queries in (32, 64)
                    for keys in (64, 128, 256)
                    for warps in (4, 8, 16)
                    for stages in (1, 2)
                ]
            },
            direction="forward+backward",
        ),
        Study(
            "attention forward",
            "programs that fit on a multiprocessor against queries a product, and loads ahead of their use",
            _ATTENTION,
            {
                "attention.BLOCKS": [
                    attention.Blocks(queries, transposed, 64, warps, stages)
                    for queries in (32, 64, 128)
                    for transposed in (0, 32)
                    for warps in (4, 8, 16)
                    for stages in (1, 2)
                ]
            },
        ),
        Study(
            BACKEND_STUDY,
            "the kernel against PyTorch's attention with its sums and copies around it, without gradients",
            [trial for trial in _ATTENTION if "p0" not in trial.operation],
            {_BACKEND: ("triton", "cudnn", "sdpa", "flash")},
        ),
        Study(
            "GELU forward",
            "bytes in flight",
            _GELU,
            {
                "gelu.MAX_BLOCK": (256, 512, 1024),
                "gelu.FORWARD_TILE": (2048, 4096, 8192),
                "gelu.NUM_WARPS": (4, 8),
            },
        ),
        Study(
            "GELU backward",
            "bytes in flight: tiles, programs on a multiprocessor, tiles loaded ahead",
            _GELU,
            {
                "gelu.BACKWARD_TILE": (1024, 2048, 4096),
                "gelu.BACKWARD_PROGRAMS": (4, 5, 6, 8),
                "gelu.BACKWARD_STAGES": (2, 3, 4),
            },
            direction="forward+backward",
        ),
        Study(
            "add + LayerNorm forward",
            "bytes in flight",
            _NORM,
            {"norm.TILE": (1024, 2048, 4096), "norm.NUM_WARPS": (2, 4, 8)},
        ),
        Study(
            "add + LayerNorm backward",
            "bytes in flight: tiles, programs on a multiprocessor, tiles loaded ahead",
            _NORM,
            {
                "norm.TILE": (1024, 2048, 4096),
                "norm.BACKWARD_PROGRAMS": (2, 3, 4, 6),
                "norm.BACKWARD_STAGES": (1, 2, 3, 4),
            },
            direction="forward+backward",
        ),
        Study(
            "GELU in the epilogue",
            "a tile whose epilogue hides behind the next product",
            _MLP,
            {
                "linear_gelu.blocks()": [
                    linear_gelu.Blocks(rows, columns, depth, warps, stages)
                    for rows, columns, warps in ((128, 128, 4), (128, 128, 8), (64, 256, 4), (128, 256, 8))
                    for depth in (32, 64)
                    for stages in (3, 4)
                ],
                "linear_gelu.RESIDENT": (1, 2, 3),
            },
            direction="forward+backward",
            variant="epilogue",
        ),
        Study(
            "patch embedding forward",
            "programs on a multiprocessor against values loaded once for more columns",
            _EMBED,
            {
                "patch_embed._forward_tiles()": [
                    patch_embed.Tiles(patches, columns, 64, programs, warps, stages)
                    for patches, columns, warps in ((64, 128, 8), (64, 128, 4), (32, 128, 4), (64, 256, 8))
                    for programs in (2, 3, 4)
                    for stages in (1, 2)
                ]
            },
        ),
        Study(
            "patch embedding backward",
            "programs on a multiprocessor, tiles loaded ahead",
            _EMBED,
            {
                "patch_embed_backward._tiles()": [
                    patch_embed.Tiles(patches, columns, 64, programs, warps, stages)
                    for patches, columns, warps in ((64, 128, 8), (64, 128, 4), (32, 128, 4), (64, 256, 8))
                    for programs in (1, 2, 3)
                    for stages in (2, 3)
                ]
            },
            direction="forward+backward",
        ),
        Study(
            "feature loss",
            "bytes in flight",
            _LOSS,
            {
                "feature_loss.TILE": (1024, 2048, 4096),
                "feature_loss.PROGRAMS": (2, 3, 4, 6),
                "feature_loss.STAGES": (2, 3, 4),
            },
            direction="forward+backward",
        ),
        Study(
            "decoder tokens forward",
            "bytes in flight",
            _TOKENS,
            {"tokens.FORWARD_TILE": (2048, 4096, 8192), "tokens.NUM_WARPS": (4, 8)},
        ),
        Study(
            "decoder tokens backward",
            "bytes in flight",
            _TOKENS,
            {
                "tokens.BACKWARD_TILE": (1024, 2048, 4096),
                "tokens.PROGRAMS": (3, 4, 6, 8),
                "tokens.STAGES": (2, 3, 4),
            },
            direction="forward+backward",
        ),
        Study(
            "table rows backward",
            "programs that sum",
            _APPEND,
            {
                "table_rows.BACKWARD_TILE": (1024, 2048, 4096),
                "table_rows.PROGRAMS": (4, 6, 8, 12),
                "table_rows.STAGES": (2, 3, 4),
            },
            direction="forward+backward",
        ),
    ]
