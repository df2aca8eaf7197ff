"""Draws `docs/pivot.svg` from the results of `chat.py --pivot`: answers before and after a little Chinese.

python recipes/tiny/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

from viscpm_hf.shapes import QUESTION_TYPES


ROOT = Path(__file__).resolve().parents[2]
STAGES = {"english": "pictures with English only", "chinese": "then a little Chinese"}
BARS = {
    ("en", "right"): ("English questions: right", "#4c78a8"),
    ("zh", "right_content"): ("Chinese questions: right content, any language", "#f2b680"),
    ("zh", "right_language"): ("Chinese questions: answered in Chinese", "#b8b8b8"),
    ("zh", "right"): ("Chinese questions: right", "#d95f02"),
}
WIDTH, HEIGHT, LEFT, TOP, PLOT = 860, 520, 50, 90, 150
BAR, GAP = 20, 16


def draw_plot(answers: dict[str, dict]) -> str:
    """One panel a stage; a group of bars for every type of question."""
    shapes = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for number, (words, colour) in enumerate(BARS.values()):
        x, y = LEFT + 400 * (number % 2), 20 + 22 * (number // 2)
        shapes.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 20}" y="{y}">{words}</text>')
    for panel, (stage, title) in enumerate(STAGES.items()):
        bottom = TOP + PLOT + panel * (PLOT + 60)
        shapes.append(f'<text x="{LEFT}" y="{bottom - PLOT - 8}" font-weight="bold">{title}</text>')
        for percent in (0, 50, 100):
            y = bottom - PLOT * percent / 100
            shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            shapes.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{percent}</text>')
        for group, name in enumerate((*QUESTION_TYPES, "all")):
            x = LEFT + 8 + group * (len(BARS) * BAR + GAP)
            for bar, ((language, part), (_, colour)) in enumerate(BARS.items()):
                height = PLOT * answers[stage][language][name][part]["value"]
                shapes.append(
                    f'<rect x="{x + bar * BAR}" y="{bottom - height:.1f}" width="{BAR - 2}" height="{height:.1f}" '
                    f'fill="{colour}"/>'
                )
            middle = x + len(BARS) * BAR / 2
            shapes.append(f'<text x="{middle}" y="{bottom + 16}" text-anchor="middle">{name.replace("_", "-")}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    return "\n".join([head, *shapes, "</svg>"]) + "\n"


def main() -> None:
    report = json.loads((Path(__file__).parent / "results" / "pivot.json").read_text("utf-8"))
    answers = {stage["stage"]: stage["answers"] for stage in report["stages"] if "answers" in stage}
    (ROOT / "docs" / "pivot.svg").write_text(draw_plot(answers), "utf-8")


if __name__ == "__main__":
    main()
