"""VisCPM-Chat as a model of VLMEvalKit.

    git clone https://github.com/open-compass/VLMEvalKit && pip install . -e VLMEvalKit
    python examples/vlmevalkit_viscpm.py OUT VLMEvalKit/run.py --model VisCPM-Chat --data MMBench_DEV_CN --mode infer

The first argument is the checkpoint, the second VLMEvalKit's script; all others are its own.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from typing import Any

from viscpm_hf import VisCPMChat


try:
    from vlmeval.vlm.base import BaseModel
except ImportError:  # the class can be tried without
    BaseModel = object

NAME = "VisCPM-Chat"


class VisCPMChatVLM(BaseModel):
    """Answers messages `[{"type": "image" or "text", "value": path or text}, ...]`.

    Args:
        model_path: see [`VisCPMChat`].
        mode: `"generate"`, or `"reference"` for the original's beam search.
        max_new_tokens: length of an answer.
        options: further arguments of [`VisCPMChat`], such as `quantization`.
    """

    INSTALL_REQ = False
    INTERLEAVE = False

    def __init__(
        self,
        model_path: str = "openbmb/VisCPM-Chat",
        mode: str = "generate",
        max_new_tokens: int = 512,
        **options: Any,
    ) -> None:
        super().__init__()
        self.chat = VisCPMChat(model_path, **options)
        self.generation = {"mode": mode, "max_new_tokens": max_new_tokens}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer; of several pictures the first, as VLMEvalKit asks of models that take one."""
        images = [part["value"] for part in message if part["type"] == "image"]
        question = "\n".join(part["value"] for part in message if part["type"] == "text")
        return self.chat.ask(images[0] if images else None, question, **self.generation).answer


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit("usage: vlmevalkit_viscpm.py MODEL path/to/VLMEvalKit/run.py [options of run.py]")
    from vlmeval.config import supported_VLM

    model, script, *rest = sys.argv[1:]
    supported_VLM[NAME] = partial(VisCPMChatVLM, model_path=model)
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
