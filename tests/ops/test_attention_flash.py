"""The flash-attn package as an attention backend: which version is found, and what it is given."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import DTYPE, attend, crossed, differentiate, packed

from lmim_fast.ops import attention


def test_flash_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with attention.backend("flash"), pytest.raises(RuntimeError, match="pip install flash-attn"):
        attend()


FLASH_2 = """
import torch
calls = []

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), dropout_p, softmax_scale, causal,
                  deterministic))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)
"""
FLASH_4 = """
import flash_attn.two
calls = flash_attn.two.calls

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return flash_attn.two.flash_attn_func(q, k, v, -1, softmax_scale, causal), None
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package flash_attn that is imported in place of an installed one."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "flash_attn"}
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(before)


def flash_calls(module: str) -> list[tuple[Any, ...]]:
    """Make a call of each kind on "flash", compare the results, and return what the package was given."""
    for form, inputs in (packed(2, 32, [(2, 5)], DTYPE), crossed(2, 32, (2, 3, 4), DTYPE)):
        with attention.backend("eager"):
            expected = form(*inputs)
        with attention.backend("flash"):
            torch.testing.assert_close(form(*inputs), expected, rtol=1e-2, atol=1e-2)
    return importlib.import_module(module).calls


def test_flash_attention_2_gets_its_layout_and_dropout(installed: Path) -> None:
    (installed / "flash_attn_interface.py").write_text(FLASH_2)
    (installed / "__init__.py").write_text("from flash_attn.flash_attn_interface import flash_attn_func\n")
    calls = flash_calls("flash_attn.flash_attn_interface")
    with attention.backend("flash"):
        attend(p=0.3)
        attend(causal=True)
    five, three, four = (2, 5, 2, 32), (2, 3, 2, 32), (2, 4, 2, 32)
    assert calls == [
        (five, five, five, 0.0, None, False, False),
        (three, four, four, 0.0, None, False, False),
        (three, three, three, 0.3, None, False, False),
        (three, three, three, 0.0, None, True, False),
    ]


def test_flash_attention_takes_its_deterministic_form_where_pytorch_is_asked_for_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "flash_attn_interface.py").write_text(FLASH_2)
    (installed / "__init__.py").write_text("from flash_attn.flash_attn_interface import flash_attn_func\n")
    monkeypatch.setenv("LMIM_FAST_ROUTES", "attention.backward=flash:deterministic")
    form, inputs = packed(1, 32, [(1, 5)], DTYPE)
    differentiate("triton", form, inputs)
    (call,) = importlib.import_module("flash_attn.flash_attn_interface").calls
    assert call[-1] is True
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attention_4_alone_is_found_and_refuses_dropout(installed: Path) -> None:
    (installed / "__init__.py").touch()
    (installed / "two.py").write_text(FLASH_2)
    (installed / "cute.py").write_text(FLASH_4)
    calls = flash_calls("flash_attn.cute")
    assert [call[1] for call in calls] == [(2, 5, 2, 32), (2, 4, 2, 32)]
    with (
        attention.backend("flash"),
        pytest.raises(RuntimeError, match=r"FlashAttention 4 has no dropout, got p = 0.3"),
    ):
        attend(p=0.3)
    assert len(calls) == 2
