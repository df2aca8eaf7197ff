"""VisCPM-Paint in the browser, at http://127.0.0.1:7861.

python examples/demo_paint.py                         # viscpm-tiny, which comes with the package
python examples/demo_paint.py --paint-model FOLDER    # any checkpoint; further options: viscpm-hf demo --help
"""

import sys

from viscpm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["demo", "paint", "--port", "7861", *sys.argv[1:]]))
