"""Messages that docs/TROUBLESHOOTING.md quotes are those of the package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUOTED = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/TROUBLESHOOTING.md").read_text(), re.M)
ENOUGH = 10  # letters that the package must have in one piece; less may be a value, or tyro's


def constants():
    """Texts of the package as a reader sees them: without values, backquotes and line ends."""
    texts = []
    for path in sorted((ROOT / "lmim_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(" ".join(node.value.replace("`", "").split()))
    return "\n".join(texts)


@pytest.fixture(scope="module")
def package():
    return constants()


def words(message):
    """Pieces of a message between values, which are numbers, options, names and `...`."""
    pieces = re.split(r"\.\.\.|--[\w.-]+|[^ ]*\d[^ ]*|[;:,()]", message)
    return [piece.strip() for piece in pieces]


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_package(package, message):
    pieces = [piece for piece in words(message) if len(piece) >= ENOUGH]
    missing = [piece for piece in pieces if piece not in package]
    assert pieces
    assert not missing


def test_a_message_that_nobody_prints_would_be_found(package):
    assert "start all ranks by the same command" in package
    assert "start all ranks by the same commands" not in package
    assert len(QUOTED) > 30
