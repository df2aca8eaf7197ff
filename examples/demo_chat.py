"""VisCPM-Chat in the browser, at http://127.0.0.1:7860.

python examples/demo_chat.py                    # viscpm-tiny, which comes with the package
python examples/demo_chat.py --model FOLDER     # any checkpoint; further options: viscpm-hf demo --help
"""

import sys

from viscpm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["demo", "chat", "--port", "7860", *sys.argv[1:]]))
