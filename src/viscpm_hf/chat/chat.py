"""All models that chat, behind the original VisCPM-Chat's own interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch

from ..checkpoints.adapters import AdapterFolder
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import WHOLE, Original, at_commit, chosen_file, find_original, hub_arguments, original_of
from ..families.family import CHAT, CHATS, FAMILIES, Family, family_of
from ..loading.from_pretrained import own_config
from ..loading.options import LoadOptions, find_original_file
from ..modeling.beam_search_cpm_bee import ReferenceDecodingConfig
from ..modeling.processing_viscpm_chat import ChatPrompt
from ..pipelines.safety import DEFAULT_SAFETY_CHECKER, ImageSafetyChecker
from ..tiny.embedded import resolve_model
from .answering import ChatRequest, answer_batch, prompt_of
from .turns import ChatTurn


SAFETY_POLICIES = ("raise", "refuse")


class VisCPMChat:
    """Answers questions about images, as the original class of this name.

    Args:
        model_path: an original `.pt`/`.bin` file, a folder or Hub id in the original's or our layout, one of a Hub
            repository's alternatives (`openbmb/VisCPM-Chat:v1.1`), or the folder of an adapter that fine-tuning left
            (`training`).
        config_path: the original's JSON of the language model (`dim_model` and so on). If None, one beside the file is
            used, and what it lacks follows from the tensors or is as in the 10B model.
        image_safety_checker: True for the original's (`CompVis/stable-diffusion-safety-checker`), a folder or Hub id
            of one, a function `image -> flagged`, or False.
        vision_config_path: JSON of the vision tower's sizes, for checkpoints of other sizes than the released ones.
        vocab_path: `vocab.txt`; if None, the one beside the model.
        device: CUDA, then MPS, then the CPU unless given.
        dtype: the checkpoint's own, unless the device is better off with another: on a CPU fp16 becomes bf16, or fp32
            where the CPU has no bf16, and torchao's formats make it bf16. "auto" is the checkpoint's own in any case.
            A torch dtype or any name of one (`"float16"`, `"fp16"`, `"torch.float16"`).
        image_safety_policy: what happens to flagged images: `"raise"` an [`UnsafeImageError`], or `"refuse"` with a
            fixed sentence as the answer. Either way nothing is said about the image.
        quantization: `"4bit"`, `"8bit"` (on a CPU packed for its kernels), `"nf4"`, `"fp4"`, `"int8"`, `"int8wo"` or
            `"int4wo"`: precision of the language model's layers. If None, as the checkpoint was saved.
        quantize_vision: also quantise the vision tower, which otherwise stays in `dtype`.
        quantize_embedding: also embedding and head, to 8 bits; with `"4bit"` and `"8bit"` on a CPU.
        device_map: `"auto"`, `"balanced"` or `{module: device}`, as of `from_pretrained`.
        max_memory: `{device: "8GB"}`: the most that `device_map` may put there.
        offload_folder: for weights that `device_map` leaves on the disk.
        fast: decode with a static cache and compiled graphs, whose first answer takes long, or on a CPU whose kernels
            read the weights, from huge pages (`docs/speed.md`). Where graphs are compiled, projections of the same
            input are fused if the weights are plain.
        revision: of the model's Hub repository.
        token, cache_dir: of the Hub, for the safety checker too.

    Raises:
        OriginalCheckpointError: if the checkpoint can't be used; the message says why.
        OSError: if a file can't be found or read.

    ```python
    >>> from viscpm_hf import VisCPMChat

    >>> chat = VisCPMChat("pytorch_model.bin")
    >>> answer, context, vision_hidden_states = chat.chat("figures/vision.png", "这张图片里有什么？")
    >>> answer, context, _ = chat.chat(None, "它是什么颜色的？", context, vision_hidden_states)
    ```
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        config_path: str | os.PathLike | None = None,
        image_safety_checker: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool] = False,
        *,
        vision_config_path: str | os.PathLike | None = None,
        vocab_path: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        image_safety_policy: str = "raise",
        quantization: str | None = None,
        quantize_vision: bool = False,
        quantize_embedding: bool = False,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike | None = None,
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        check_safety_policy(image_safety_policy)
        self.options = LoadOptions.checked(
            device=device,
            dtype=dtype,
            quantization=quantization,
            quantize_all=quantize_vision,
            quantize_embedding=quantize_embedding,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            fast=fast,
        )
        self.device = self.options.device
        self.image_safety_policy = image_safety_policy
        others = hub_arguments(token=token, cache_dir=cache_dir)
        self.image_safety_checker = open_safety_checker(image_safety_checker, self.device, **others)

        adapter = AdapterFolder.find(model_path)
        if adapter is not None:
            model_path = adapter.require_base()
        hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir)
        model_path = resolve_model(chosen_file(model_path, **hub), CHAT)
        original_file = find_original_file(model_path)
        source: Any = model_path
        if original_file is not None:
            source = original_of(original_file, config_path, vision_config_path, vocab_path)
        elif config_path is not None or vision_config_path is not None:
            raise ValueError(
                "config_path and vision_config_path belong to an original file; "
                f"{model_path} is a folder or Hub id and has its own config.json."
            )
        else:
            hub = at_commit(source, **hub)
        self.family, model, self.processor = self._load(find_original(source, **hub) or source, vocab_path, hub)
        problem = self.processor.vocabulary_problem(model)
        if problem is not None:
            raise OriginalCheckpointError(problem)
        if adapter is not None:
            self.processor = adapter.apply(model, self.processor)
        self.model = self.options.place(model).eval()
        if fast:
            self.model.enable_fast_decoding()
        if device_map is not None:
            self.device = self.model.device

    def _load(
        self, source: Original | str | os.PathLike, vocab_path: str | os.PathLike | None, hub: Mapping[str, Any]
    ) -> tuple[Family, Any, Any]:
        """The family that a checkpoint is of, its model and its processor."""
        family, stored, quantization = self._stored(source, hub)
        if vocab_path is not None and family.vocabulary_class is None:
            raise ValueError(
                f"vocab_path is a file of VisCPM-Chat's; the tokenizer of {family.title} is in its folder."
            )
        dtype = self.options.choose_dtype(stored) if stored is not None else self.options.dtype or "auto"
        arguments = self.options.from_pretrained_arguments(dtype, quantization)
        model = family.model_class.from_pretrained(source, dtype=dtype, **hub, **arguments)
        processor = family.processor_class.from_pretrained(source, **hub)
        if vocab_path is not None:
            processor.tokenizer = family.vocabulary_class(os.fspath(vocab_path))
        return family, model, processor

    def _stored(
        self, source: Original | str | os.PathLike, hub: Mapping[str, Any]
    ) -> tuple[Family, torch.dtype | None, Mapping[str, Any] | None]:
        """The family of a checkpoint, the dtype of its weights, and how they are quantised."""
        if isinstance(source, Original) and source.layout == WHOLE:
            if source.kind not in CHATS and source.shapes is None:  # else the tensors tell
                raise OriginalCheckpointError(
                    f"{source.name} is a {source.kind} checkpoint, but {type(self).__name__} needs one that chats: "
                    f"{', '.join(FAMILIES[kind].title for kind in CHATS)}."
                )
            floating = (tensor.dtype for tensor in source.tensors.values() if tensor.is_floating_point())
            family = FAMILIES[source.kind if source.kind in CHATS else CHAT]
            return family, next(floating, None), source.config.get("quantization_config")
        name = source.name if isinstance(source, Original) else source
        config = own_config(name, *CHATS, **hub)
        return family_of(config), config.dtype, getattr(config, "quantization_config", None)

    # ------------------------------------------------------------------------------------------------------ answering

    def chat(
        self,
        image: str | os.PathLike | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: torch.Tensor | None = None,
        **generation,
    ) -> tuple[str, str, torch.Tensor | None]:
        """Answers one question, with the original's results.

        Args:
            image: path or picture; None to go on with `vision_hidden_states`, or without a picture.
            question: any text.
            context: what the turn before returned, to go on with that conversation.
            vision_hidden_states: likewise; the image isn't encoded again.
            generation: see [`ask`].

        Returns:
            The answer, the context for the next turn in document syntax, and the encoded image
            `(images, queries, hidden)`.
        """
        turn = self.ask(image, question, context, vision_hidden_states, **generation)
        return turn.answer, turn.context, turn.vision_hidden_states

    def ask(
        self,
        image: str | os.PathLike | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: torch.Tensor | None = None,
        *,
        mode: str = "reference",
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        fast: bool | None = None,
        **generation,
    ) -> ChatTurn:
        """As [`chat`], with everything there is to know of the turn.

        Args:
            mode: `"reference"` decodes as the original did, with the parameters of [`ReferenceDecodingConfig`];
                `"generate"` with everything that transformers' `generate` offers.
            seed: makes sampling repeatable.
            on_text: called with every new piece of the answer (`"generate"` with one beam only).
            fast: see the class; if None, as the model was loaded.
            generation: `num_beams`, `max_new_tokens`, `temperature`, `repetition_penalty`, `length_penalty`, ...

        Raises:
            UnsafeImageError: if the safety checker flags the image and the policy is `"raise"`.
            ValueError: for an image that can't be used, a prompt longer than `processor.tokenizer.model_max_length`
                or a parameter outside its range.
        """
        request = ChatRequest(image, question, context, vision_hidden_states)
        (turn,) = answer_batch(
            self, [request], mode=mode, seed=seed, on_text=on_text, fast=fast, generation=generation
        )
        return turn

    def ask_batch(
        self,
        requests: Sequence[ChatRequest],
        *,
        mode: str = "reference",
        seed: int | Sequence[int | None] | None = None,
        return_exceptions: bool = False,
        fast: bool | None = None,
        **generation,
    ) -> list[ChatTurn]:
        """Answers several questions at once, each as [`ask`] would alone; see [`answer_batch`]."""
        return answer_batch(
            self,
            requests,
            mode=mode,
            seed=seed,
            return_exceptions=return_exceptions,
            fast=fast,
            generation=generation,
        )

    def prompt_length(self, request: ChatRequest) -> int:
        """Tokens of the request's prompt, as far as they are known before its image is opened; raises as
        [`prompt_of`]."""
        return len(prompt_of(self, request))

    def context_of(self, turns: Iterable[tuple[str, str]]) -> str:
        """The context of questions and their answers, as [`ask`] would have handed it on."""
        context = ""
        for question, answer in turns:
            context = self.continue_context(context, question, answer)
        return context

    def continue_context(self, context: str, question: str, answer: str) -> str:
        """The context with one more turn."""
        return self.processor.next_context(context, question, answer)

    def encode_image(self, image: PIL.Image.Image) -> Any:
        """The image as the language model sees it, as [`chat`] returns it and takes it."""
        return self.processor.hand_on(self.processor.encode_images(self.model, [self.processor.views_of(image)]))

    def _reference(
        self,
        document: Mapping[str, str],
        vision_hidden_states: torch.Tensor | None,
        decoding: ReferenceDecodingConfig,
        fast: bool | None = None,
    ) -> tuple[list[int], dict[int, str]]:
        """The original's search over a document as it is, special tokens in its texts included, as recorded cases of
        the original have it: token ids, and what those beyond the vocabulary stand for. Questions go through [`ask`],
        which escapes them."""
        num_images = 0 if vision_hidden_states is None else len(vision_hidden_states)
        prompt = self.processor.encode_prompt(ChatPrompt(dict(document), num_images)).prompt(open_slot=0)
        inputs = self.processor.pad_prompts([prompt], [vision_hidden_states], self.model)
        (answer,) = self.model.answers(inputs, decoding, self.processor.tokenizer, fast=fast)
        return answer.ids, prompt.strings(self.processor.tokenizer.num_words)

    def fill(self, documents: Sequence[Mapping[str, Any]], **generation) -> list[dict[str, Any]]:
        """Fills the answers of text documents with the language model; see `CpmBeeForCausalLM.fill`."""
        return self.model.fill(documents, self.processor.tokenizer, **generation)


# ------------------------------------------------------------------------------------------------------------ helpers


def check_safety_policy(policy: str) -> None:
    if policy not in SAFETY_POLICIES:
        raise ValueError(f"image_safety_policy is one of {', '.join(SAFETY_POLICIES)}, got {policy!r}.")


def open_safety_checker(
    source: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool], device: torch.device, **hub: Any
) -> Callable[[PIL.Image.Image], bool] | None:
    """`image -> flagged or not` of what the argument `image_safety_checker` takes; None for no check."""
    if source is True:
        source = DEFAULT_SAFETY_CHECKER
    if isinstance(source, (str, os.PathLike)):
        return ImageSafetyChecker.from_pretrained(source, device, **hub)
    return source or None
