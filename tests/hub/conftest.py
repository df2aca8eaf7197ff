"""Nothing of its own: the support files of the folder above, and those of the siblings, are found here too."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "siblings")]
