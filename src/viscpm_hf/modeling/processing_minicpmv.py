"""Processor of MiniCPM-V 1.0 and 2.0: `<用户>` and `<AI>`, an overview and tiles of each image."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature

from .image_processing_minicpmv import MiniCPMVImageProcessor
from .processing_vision_resampler import TEMPLATE_MACROS, VisionResamplerProcessor


# What the later processors of this family write for an image.
IMAGE_MARK = "(<image>./</image>)"

# What the model says of places in an image, or of things in it.
GROUNDING_TOKENS = tuple(f"<{end}{name}>" for name in ("ref", "box", "quad", "point") for end in ("", "/"))

CHAT_TEMPLATE = f"""\
{TEMPLATE_MACROS}
{{%- macro answer_of(message) -%}}
    {{%- set answer = namespace(text=text_of(message)) -%}}
    {{%- for token in {[token[1:] for token in GROUNDING_TOKENS]} -%}}
        {{%- set answer.text = answer.text | replace('<\\ufdd0' ~ token, '<' ~ token) -%}}
    {{%- endfor -%}}
    {{{{- answer.text -}}}}
{{%- endmacro -%}}
{{{{- check_turns(messages, false) -}}}}
{{%- for message in messages -%}}
    {{{{- '<用户>' if message['role'] == 'user' else '<AI>' -}}}}
    {{{{- images_of(message, '{IMAGE_MARK}\\n') -}}}}
    {{{{- text_of(message) if message['role'] == 'user' else answer_of(message) -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}<AI>{{%- endif -%}}
"""


class MiniCPMVProcessor(VisionResamplerProcessor):
    r"""Makes model inputs of conversations (`apply_chat_template`) or prompts, and images.

    In a prompt an image is `(<image>./</image>)`. Each of its views becomes `<image>`, `num_query_tokens` placeholders
    and `</image>`: the overview, then between `<slice>` and `</slice>` the tiles, every row on a line of its own.

    Args:
        image_processor ([`MiniCPMVImageProcessor`]): prepares images.
        tokenizer ([`LegacySentencePieceTokenizer`]): encodes prompts.
        chat_template (`str`): Jinja template; MiniCPM-V's own if None.
        num_query_tokens (`int`): placeholders of one view.
        max_input_length (`int`): the most tokens of a prompt.
        image_token_id (`int`): the placeholder's id. The original writes `<unk>`, which also pads; here it becomes a
            reserved token that is nothing else.
        image_start_id, image_end_id (`int`): of `<image>` and `</image>`.
    """

    own_chat_template = CHAT_TEMPLATE
    image_token = IMAGE_MARK
    image_tokens = ("<image>", "<unk>", "</image>", "<slice>", "</slice>")
    answer_tokens = GROUNDING_TOKENS
    prompt_begins = ("<用户>",)

    def __init__(
        self,
        image_processor: MiniCPMVImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_query_tokens: int = 64,
        max_input_length: int = 2048,
        image_token_id: int = 113,
        image_start_id: int = 101,
        image_end_id: int = 102,
        **kwargs,
    ):
        self.image_token_id = image_token_id
        self.image_start_id = image_start_id
        self.image_end_id = image_end_id
        super().__init__(image_processor, tokenizer, chat_template, num_query_tokens, max_input_length)

    def view_text(self) -> str:
        return "<image>" + "<unk>" * self.num_query_tokens + "</image>"

    def image_text(self, grid: tuple[int, int] = (0, 0)) -> str:
        rows, columns = grid
        text = self.view_text()
        if rows:
            text += "<slice>" + "\n".join([self.view_text() * columns] * rows) + "</slice>"
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text, add_special_tokens)
        is_inside = False
        for place, token in enumerate(ids):
            if token == self.tokenizer.unk_token_id and is_inside:
                ids[place] = self.image_token_id
            else:
                is_inside = token == self.image_start_id
        return ids

    def settles(self, token: int, last: int | None = None) -> bool:
        """A text behind a special token gets a space before it if another one follows."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return super().settles(token, last) and (last not in special or token in special)

    def _answer_text(self, ids: list[int]) -> str:
        """Boxes and references (`<box>`, `<ref>`) are part of an answer."""
        left_out = (self.tokenizer.bos_token_id, self.tokenizer.unk_token_id)
        return self.tokenizer.decode([index for index in ids if index not in left_out])

    def _expansions(self, features: BatchFeature, num_images: int) -> tuple[list[str], list[int]]:
        grids = [tuple(grid) for grid in features.pop("grids").tolist()]
        return [self.image_text(grid) for grid in grids], features.pop("num_views").tolist()

    def grid_of(self, size: Sequence[int], **kwargs) -> tuple[int, int]:
        return self.image_processor.plan(*size, **kwargs).grid or (0, 0)


__all__ = ["MiniCPMVProcessor"]
