"""Every promise that a run depends on has a test that carries its number: `test_r05_...` shows R5."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROMISES = [*range(1, 32)]
NAME = re.compile(r"test_r(\d\d)_\w+")


@pytest.fixture(scope="module")
def shown():
    """Where the tests of each promise are, by its number."""
    places = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (match := NAME.fullmatch(node.name)):
                places[int(match[1])].append(f"{path.relative_to(TESTS)}::{node.name}")
    return places


@pytest.mark.parametrize("number", PROMISES, ids="R{}".format)
def test_the_promise_has_a_test_of_its_name(shown, number):
    assert shown.get(number), f"R{number} has no function test_r{number:02d}_..."


def test_no_test_has_the_number_of_a_promise_that_does_not_exist(shown):
    assert [place for number, places in shown.items() if not 1 <= number <= 31 for place in places] == []
