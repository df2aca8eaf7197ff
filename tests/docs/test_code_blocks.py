"""The code blocks of README and docs run, as they are printed, in a folder that has what they name.

Python blocks of a page run one after the other in one namespace; lines `viscpm-hf ...` of shell blocks go through the
command line, in this process. A comment before a block says otherwise:

    <!-- not run: REASON -->     its commands are read (options that don't exist fail), and not run
    <!-- given: CODE -->         what a Python block takes for granted

`openbmb/VisCPM-Chat` and the like are viscpm-tiny here: a folder of that name goes before the Hub.
"""

import contextlib
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import viscpm_hf
from viscpm_hf.cli.main import build_parser, main
from viscpm_hf.shapes import draw, make_scene


ROOT = Path(__file__).parents[2]
# What is in Chinese has the same code (`test_translations.py`).
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if ".zh" not in page.suffixes)]
BLOCK = re.compile(r"((?:^<!-- (?:not run|given): .*?-->\n)*)^```(python|bash)\n(.*?)^```", re.S | re.M)
MARK = re.compile(r"<!-- (not run|given): (.*?) *-->", re.S)
# What stands for a GPU here.
INSTEAD = {'"cuda"': '"cpu"', "torch.float16": "torch.float32"}


@dataclass
class Block:
    language: str
    code: str
    line: int
    marks: dict[str, str]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    assert text.count("```bash") + text.count("```python") == len(BLOCK.findall(text)), "a block is indented"
    return [
        Block(match[2], match[3], text[: match.start(3)].count("\n") + 1, dict(MARK.findall(match[1])))
        for match in BLOCK.finditer(text)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The arguments of each line, without the program's name.

    Raises:
        AssertionError: for a line of another program in a block that is to run.
    """
    commands = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "viscpm-hf":
            commands.append(words[1:])
        else:
            assert not words or "not run" in block.marks, f"line {block.line}: {line} needs a mark: not run, and why"
    return commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all that the blocks name."""
    folder = tmp_path_factory.mktemp("docs")
    chat, paint = viscpm_hf.tiny("chat"), viscpm_hf.tiny("paint")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["convert", str(chat), str(folder / "original"), "--to", "original"]) == 0
    for file in (folder / "original").iterdir():
        (folder / file.name).symlink_to(file)
    weights = next((folder / "original").glob("*.bin"))
    for name in ("pytorch_model.bin", "viscpm_chat_balance_checkpoint.pt"):
        if not (folder / name).exists():
            (folder / name).symlink_to(weights)
    for name, model in {
        "openbmb/VisCPM-Chat": chat,
        "openbmb/VisCPM-Paint": paint,
        "converted": chat,
        "path/to/paint": paint,
        "paint-folder": paint,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model, target_is_directory=True)
    whole = viscpm_hf.VisCPMChat(chat, device="cpu")
    bee = viscpm_hf.CpmBeeForCausalLM(whole.model.config.text_config)
    bee.model.load_state_dict(whole.model.model.language_model.state_dict())
    bee.save_pretrained(folder / "cpm-bee")
    whole.processor.tokenizer.save_pretrained(folder / "cpm-bee")
    (folder / "images").mkdir()
    for number, name in enumerate(("photo.jpg", "picture.png", "a.png", "images/a.jpg"), start=1):
        draw(make_scene("test", number), 224).save(folder / name)
    question = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "Red."}]
    (folder / "train.json").write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": question}]))
    rows = [{"id": number, "image": "a.png", "question": "What is it?"} for number in range(2)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    caption = {"image": "images/a.jpg", "caption": "a red circle"}
    (folder / "captions.jsonl").write_text("\n".join([json.dumps(caption)] * 2))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    namespace: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        reason = block.marks.get("not run")
        assert reason is None or len(reason) > 3, f"{page.name}, line {block.line}: why isn't it run?"
        if block.language == "bash":
            for words in commands_of(block):
                build_parser().parse_args(words)
                if reason is None:
                    assert main(words) == 0, f"{page.name}, line {block.line}: viscpm-hf {shlex.join(words)}"
        else:
            code = block.code
            for given, here in INSTEAD.items():
                code = code.replace(given, here)
            compiled = compile("\n" * (block.line - 1) + code, str(page), "exec")
            if reason is None:
                exec(block.marks.get("given", ""), namespace)
                exec(compiled, namespace)


def test_links_of_pages_lead_somewhere():
    """Those within the repository, with their headings."""
    lost = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
            path, _, heading = target.partition("#")
            file = (page.parent / path) if path else page
            if not file.exists():
                lost.append(f"{page.name}: {target}")
            elif heading and file.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                if heading not in anchors:
                    lost.append(f"{page.name}: {target}")
    assert not lost
