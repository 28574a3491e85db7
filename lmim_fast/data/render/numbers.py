"""Numbers as signs and labels write them."""

from __future__ import annotations

import numpy as np


def formatted_number(rng: np.random.Generator) -> str:
    """A price, time, date, phone number, share, measure or house number."""
    a, b, c = (int(value) for value in rng.integers(0, 1000, 3))
    forms = (
        f"${a / 10:.2f}",
        f"{a}.{b % 100:02d}",
        f"{a % 24:02d}:{b % 60:02d}",
        f"{1 + a % 28:02d}/{1 + b % 12:02d}/{1950 + c % 100}",
        f"{1950 + a % 100}",
        f"0{a:03d}-{b:03d}{c:03d}",
        f"({a:03d}){b:03d}-{c:03d}{a % 10}",
        f"+{1 + a % 98}-{b:03d}-{c:03d}",
        f"{a % 101}%",
        f"-{a % 90}%",
        f"{1 + a}{('km', 'm', 'kg', 'ml', 'cm', 'GB', 'mm')[b % 7]}",
        f"No.{1 + a}",
        f"{1 + a % 300}-{2 + a % 300 + b % 9}",
        f"{1 + a},{b:03d}",
        f"#{a}",
    )
    return forms[int(rng.integers(len(forms)))]
