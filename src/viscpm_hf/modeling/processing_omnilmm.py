"""Processor of OmniLMM-12B: Zephyr's chat format, one square view an image."""

from .processing_vision_resampler import TEMPLATE_MACROS, VisionResamplerProcessor


SYSTEM_MESSAGE = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the human's "
    "questions."
)

CHAT_TEMPLATE = f"""\
{TEMPLATE_MACROS}
{{{{- check_turns(messages, true) -}}}}
{{%- if messages[0]['role'] != 'system' -%}}
    {{{{- "<|system|>\\n{SYSTEM_MESSAGE}</s>\\n" -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
    {{{{- '<|' ~ message['role'] ~ '|>\\n' ~ images_of(message, '<image>\\n') ~ text_of(message) ~ '</s>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|assistant|>\\n' -}}}}{{%- endif -%}}
"""


class OmniLMMProcessor(VisionResamplerProcessor):
    r"""Makes model inputs of conversations (`apply_chat_template`) or prompts, and images. See
    [`VisionResamplerProcessor`].

    In a prompt an image is `<image>`; it becomes `<im_start>`, `num_query_tokens` times `<im_patch>`, and `<im_end>`.
    """

    prompt_begins = ("<|system|>", "<|user|>")
    own_chat_template = CHAT_TEMPLATE
    image_tokens = ("<im_start>", "<im_patch>", "<im_end>")

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<im_patch>")

    def view_text(self) -> str:
        return "<im_start>" + "<im_patch>" * self.num_query_tokens + "<im_end>"


__all__ = ["OmniLMMProcessor"]
