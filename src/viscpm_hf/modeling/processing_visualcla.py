"""Processor of VisualCLA: Alpaca's instruction format, one view an image."""

from .processing_vision_resampler import TEMPLATE_MACROS, VisionResamplerProcessor


PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# The space before the first line break of an instruction is the original's.
CHAT_TEMPLATE = f"""\
{TEMPLATE_MACROS}
{{{{- check_turns(messages, false) -}}}}
{{{{- '<s>{PREAMBLE}\\n\\n' -}}}}
{{%- for message in messages -%}}
    {{{{- '### Instruction: \\n' if message['role'] == 'user' else '### Response:' -}}}}
    {{{{- images_of(message, '<image>\\n') ~ text_of(message) ~ '\\n\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '### Response:' -}}}}{{%- endif -%}}
"""


class VisualCLAProcessor(VisionResamplerProcessor):
    r"""Makes model inputs of conversations (`apply_chat_template`) or prompts, and images. See
    [`VisionResamplerProcessor`].

    In a prompt an image is `<image>`; it becomes `<img>`, `num_query_tokens` times `<img_token>`, and `</img>`.
    """

    own_chat_template = CHAT_TEMPLATE
    image_tokens = ("<img>", "<img_token>", "</img>")
    strips_answers = False

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<img_token>")

    def view_text(self) -> str:
        return "<img>" + "<img_token>" * self.num_query_tokens + "</img>"


__all__ = ["VisualCLAProcessor"]
