"""Which files of a checkpoint are opened, and how often; run as a program, since such a hook stays.

python opened.py CHAT SIBLING      # folders in the originals' layouts
"""

import collections
import json
import os
import sys


opened: collections.Counter[str] = collections.Counter()
sys.addaudithook(lambda event, arguments: opened.update([str(arguments[0])] if event == "open" else []))

from transformers import AutoModel, AutoTokenizer  # noqa: E402

from viscpm_hf import VisCPMChat  # noqa: E402


def counts(folder: str, load) -> dict[str, int]:
    opened.clear()
    load(folder)
    return {os.path.relpath(name, folder): count for name, count in opened.items() if name.startswith(folder + os.sep)}


chat, sibling = sys.argv[1:]
AutoTokenizer.from_pretrained(chat)  # whatever the libraries import for the first time
found = {
    "VisCPMChat": counts(chat, lambda folder: VisCPMChat(folder, device="cpu")),
    "AutoModel": counts(chat, AutoModel.from_pretrained),
    "sibling": counts(sibling, AutoModel.from_pretrained),
}
print(json.dumps(found))
