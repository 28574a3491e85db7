"""What stands for a measurement whose process dies; it imports little."""

import os
from typing import Any


def die(*arguments: Any) -> None:
    os._exit(7)
