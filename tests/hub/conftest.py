"""Nothing of its own: the support files of the folder above are found here too."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
