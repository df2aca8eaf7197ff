"""A page says the same in both languages: the same headings, code, links and figures, and nothing left in English."""

import re
from collections import Counter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# For those who change the code, who read English code.
ENGLISH_ONLY = {"api.md", "architecture.md", "conformance.md", "conformance-paint.md"}
PAIRS = [(ROOT / "README.md", ROOT / "README_zh.md")] + [
    (page, page.with_suffix(".zh.md"))
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.name not in ENGLISH_ONLY and not page.name.endswith(".zh.md")
]
CODE = re.compile(r"^(<!-- .*? -->\n)*```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\(([^)]*)\)")
LONG_ENGLISH = re.compile(r"(?:[A-Za-z'’,;-]+ ){7}")


def read(page: Path) -> tuple[str, list[str]]:
    """The prose, and the code without its comments."""
    text = page.read_text("utf-8")
    blocks = []
    for marks, language, code in (match.groups() for match in CODE.finditer(text)):
        lines = [re.sub(r"(^|\s+)(#|//) .*", "", line) for line in code.splitlines()]
        blocks.append("\n".join([marks or "", language, *filter(None, lines)]))
    return CODE.sub("", text), blocks


def figures(prose: str) -> Counter:
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", prose)
    return Counter(number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", prose))


def targets(page: Path, prose: str) -> Counter:
    """What a page links to, but for its other language."""
    links = LINK.findall(prose)
    if page.name.endswith(("_zh.md", ".zh.md")):
        for link in (link.partition("#")[0] for link in links):
            if link.endswith(".md") and not link.endswith((".zh.md", "README.md", page.name.replace(".zh.md", ".md"))):
                assert not (page.parent / link).with_suffix(".zh.md").is_file(), f"{link}: there is a page in Chinese"
    links = [link.replace("_zh.md", ".md").replace(".zh.md", ".md") for link in links]
    return Counter(link for link in links if link != page.name.replace("_zh.md", ".md").replace(".zh.md", ".md"))


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: page.name)
def test_both_languages_say_the_same(english, chinese):
    (prose, code), (prose_zh, code_zh) = read(english), read(chinese)
    levels = [re.findall(r"^(#+) ", text, re.M) for text in (prose, prose_zh)]
    assert levels[0] == levels[1], "headings"
    assert code == code_zh, "code"
    spans = [Counter(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)) for text in (prose, prose_zh)]
    assert spans[0] == spans[1], f"`code`: {spans[0] - spans[1]} and {spans[1] - spans[0]}"
    links = [targets(english, prose), targets(chinese, prose_zh)]
    assert links[0] == links[1], f"links: {links[0] - links[1]} and {links[1] - links[0]}"
    numbers = [figures(text) for text in (prose, prose_zh)]
    assert numbers[0] == numbers[1], f"figures: {numbers[0] - numbers[1]} and {numbers[1] - numbers[0]}"
    assert not (left := LONG_ENGLISH.findall(re.sub(r"`[^`]*`|<!--.*?-->", "", prose_zh, flags=re.S))), (
        f"in English: {left}"
    )
