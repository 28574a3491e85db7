"""The encoded images of the data's tests are fuzzed here, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
