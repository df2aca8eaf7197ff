"""Lays out the site's sources in build/docs: these pages, and the READMEs as its front pages. See `make docs`."""

import re
import shutil
from pathlib import Path


ROOT = Path(__file__).parents[1]
# What the READMEs link to that is no page of the site becomes plain text.
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:LICENSE|CONTRIBUTING\.md|CHANGELOG\.md|notebooks/|docs/)\)")

SWITCH = re.compile(r"^\[(?:English|中文|中文说明)\]\([\w.-]+\.md\).*\n\n", re.M)


def of_the_site(text: str) -> str:
    """Without what the site has itself: a switch of languages, which all links follow."""
    return SWITCH.sub("", text).replace(".zh.md", ".md")


if __name__ == "__main__":
    sources = ROOT / "build" / "docs"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(ROOT / "docs", sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in sources.rglob("*.md"):
        path.write_text(re.sub(r"\]\(\.\./README\w*\.md", "](index.md", of_the_site(path.read_text("utf-8"))), "utf-8")
    for name, page in (("README.md", "index.md"), ("README_zh.md", "index.zh.md")):
        text = OUTSIDE.sub(r"\1", (ROOT / name).read_text("utf-8")).replace("](docs/", "](")
        (sources / page).write_text(of_the_site(text), "utf-8")
