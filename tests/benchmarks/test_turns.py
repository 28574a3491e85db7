"""Forms that are timed in turn."""

import functools

from benchmarks.turns import cpu_microseconds, in_turn


def test_the_order_changes_each_round_and_a_warm_up_does_not_count() -> None:
    order: list[str] = []

    def run(form: str) -> float:
        order.append(form)
        return len(order)

    runs = {form: functools.partial(run, form) for form in "ab"}
    assert in_turn(runs, rounds=2) == {"a": [3, 6], "b": [4, 5]}
    assert "".join(order) == "baabba"


def test_the_time_is_that_of_a_call() -> None:
    calls: list[int] = []
    spent = cpu_microseconds(lambda: calls.append(sum(range(20_000))), 50)
    assert len(calls) == 50
    assert 10 < spent < 10_000
