"""docs/images/tiny.png: a conversation and two paintings of viscpm-tiny as they come, for the README.

Needs a font with Chinese: `python recipes/tiny/readme_image.py [FONT.ttc] [OUT.png]`.
"""

import sys

from PIL import Image, ImageDraw, ImageFont

from viscpm_hf import VisCPMChat, VisCPMPaint
from viscpm_hf.shapes import draw, make_scene


QUESTIONS = ("What color is the star?", "它在哪里？", "图中有几个图形？", "Describe the picture in one sentence.")
PROMPTS = ("a red circle on the left", "右边有一个蓝色的五角星")
WIDTH, HEIGHT, SIDE, GAP = 1280, 560, 330, 30
INK, QUIET, PAPER, ASKED, SAID = "#1f2328", "#59636e", "#ffffff", "#dbeafe", "#f0f1f3"


def main() -> None:
    font_file, out = (sys.argv[1:] + ["NotoSansCJK-Regular.ttc", "docs/images/tiny.png"][len(sys.argv) - 1 :])[:2]
    font, small = ImageFont.truetype(font_file, 22), ImageFont.truetype(font_file, 18)
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(page)

    scene = draw(make_scene("test", 54), SIDE)
    page.paste(scene, (GAP, GAP))
    pen.text((GAP, GAP + SIDE + 8), "VisCPM-Chat", fill=QUIET, font=small)
    chat, context, encoded = VisCPMChat("viscpm-tiny", device="cpu"), "", None
    left, right, y = 2 * GAP + SIDE, WIDTH - 2 * GAP - 250, GAP
    for question in QUESTIONS:
        turn = chat.ask(scene, question, context, encoded)
        context, encoded = turn.context, turn.vision_hidden_states
        for text, fill, is_question in ((question, ASKED, True), (turn.answer, SAID, False)):
            lines = wrapped(pen, text, font, right - left - 80)
            width = max(pen.textlength(line, font) for line in lines) + 28
            height = 31 * len(lines) + 14
            x = right - width if is_question else left
            pen.rounded_rectangle((x, y, x + width, y + height), 14, fill)
            for number, line in enumerate(lines):
                pen.text((x + 14, y + 6 + 31 * number), line, fill=INK, font=font)
            y += height + 10

    painter = VisCPMPaint(
        "viscpm-tiny", add_ranker=False, image_safety_checker=False, prompt_safety_checker=False, device="cpu"
    )
    for number, prompt in enumerate(PROMPTS):
        painted = painter.generate(prompt, generator=0).resize((190, 190), Image.Resampling.NEAREST)
        x, top = WIDTH - GAP - 230, GAP + number * 262
        page.paste(painted, (x + 20, top))
        pen.text((x + 115, top + 198), prompt, fill=INK, font=small, anchor="ma")
    pen.text((WIDTH - GAP - 115, HEIGHT - 22), "VisCPM-Paint", fill=QUIET, font=small, anchor="mm")
    page.quantize(64).save(out, optimize=True)


def wrapped(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The words of a text in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if pen.textlength(longer, font) <= width else [*lines, word]
    return lines


if __name__ == "__main__":
    main()
