"""What the configs check their values with."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_seed(seed: int) -> None:
    """Raise ValueError unless the seed fits in 64 bits."""
    require(0 <= seed < 2**64, f"seed must be in [0, 2^64), got {seed}")
