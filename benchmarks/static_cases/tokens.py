"""Cases of kernels/tokens.py and kernels/table_rows.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import DECODER, MASKED, TOKENS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named
from lmim_fast.kernels import table_rows, tokens

SHOWN, ALL = TOKENS


def cases() -> Iterator[Case]:
    width = DECODER.width
    for dtype in DTYPES:
        yield f"tokens {DECODER.name} {BATCH}x{ALL}x{width} {named(dtype)}", partial(_tokens, width, dtype)
        for columns in (width, 2 * width, 3 * width):
            name = f"append rows {DECODER.name} {BATCH}x{ALL}x{columns} {named(dtype)}"
            yield name, partial(_append, columns, dtype)


def _tokens(width: int, dtype: torch.dtype) -> None:
    visible, position = empty(BATCH, SHOWN, width, dtype=dtype), empty(1, ALL, width)
    ids = _ids(SHOWN - 1), _ids(MASKED)
    for result in (dtype, torch.float32):
        out = tokens.decoder_tokens(visible, empty(width), empty(1, 1, width), position, *ids, result)
        for visible_dtype in (dtype, None):
            for more in (None, visible):
                tokens.decoder_tokens_backward(
                    out, SHOWN, visible_dtype=visible_dtype, mask_token=True, grad_shown=more
                )


def _append(width: int, dtype: torch.dtype) -> None:
    table, ids = empty(ALL - 1, width, dtype=dtype), _ids(MASKED)
    out = table_rows.append_rows(empty(BATCH, SHOWN, width, dtype=dtype), table, ids)
    table_rows.append_rows(out[:, :SHOWN], table[:0], ids[:, :0])
    table_rows.table_gradient(out[:, SHOWN:], ids, ALL - 1)


def _ids(count: int) -> torch.Tensor:
    return empty(BATCH, count, dtype=torch.int64)
