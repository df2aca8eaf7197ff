"""The demo world of `viscpm-tiny`: pictures of flat shapes, questions about them, prompts to paint them, and checks.

Everything follows from a split (`train`, `validation`, `test`) and an index, see `scene`.
"""

from ..tiny.checking import AnswerVerdict, PaintingVerdict, check_answer, check_painting
from ..tiny.dataset import ShapesDataset
from ..tiny.prompts import PaintPrompt, judged_prompts, make_paint_example, prompt_of, word_prompt
from ..tiny.questions import QUESTION_TYPES, Question, make_question, questions_of
from ..tiny.scene import SPLITS, Scene, Shape, draw, make_scene, make_shape, scene_rng
from ..tiny.words import COLOURS, KINDS, LANGUAGES, PLACES


__all__ = [
    "COLOURS",
    "KINDS",
    "LANGUAGES",
    "PLACES",
    "QUESTION_TYPES",
    "SPLITS",
    "AnswerVerdict",
    "PaintPrompt",
    "PaintingVerdict",
    "Question",
    "Scene",
    "Shape",
    "ShapesDataset",
    "check_answer",
    "check_painting",
    "draw",
    "make_paint_example",
    "make_question",
    "make_scene",
    "make_shape",
    "prompt_of",
    "questions_of",
    "scene_rng",
    "judged_prompts",
    "word_prompt",
]
