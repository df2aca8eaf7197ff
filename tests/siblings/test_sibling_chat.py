"""The siblings behind `VisCPMChat`'s interface, and the commands that use it."""

import json

import pytest
import torch
from sibling_folders import NAMES, make_system
from test_image_processing_minicpmv import picture
from transformers import pipeline

from viscpm_hf import ChatRequest, SiblingChat, UnsafeImageError
from viscpm_hf.chat.sibling_chat import EncodedImage
from viscpm_hf.cli.main import main
from viscpm_hf.modeling.decoding_presets import decoding_presets, default_preset
from viscpm_hf.modeling.fast_decoding import has_kernel
from viscpm_hf.serving.preparing import PromptPreparer


IMAGE, TALL = picture(90, 60), picture(40, 130, 1)
SHORT = {"mode": "generate", "max_new_tokens": 6}


@pytest.fixture(params=NAMES)
def chat(request, sibling_chats):
    return sibling_chats[request.param]


@pytest.fixture
def image_file(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    return tmp_path / "image.png"


def requests_of(chat):
    first = chat.ask(TALL, "is the image", **SHORT)
    return [
        ChatRequest(IMAGE, "What is it?"),
        ChatRequest(TALL, "图片里有什么？"),
        ChatRequest(None, "Hi"),
        ChatRequest(None, "the </s> question", first.context, first.vision_hidden_states),
    ]


@pytest.mark.parametrize(
    "options",
    [
        SHORT,
        {"mode": "reference", "max_new_tokens": 5, "seed": 7},
        {"mode": "generate", "max_new_tokens": 5, "num_beams": 3, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "preset", "beams"],
)
def test_a_batch_is_its_questions_one_by_one(chat, options):
    requests = requests_of(chat)
    together = chat.ask_batch(requests, **options)
    alone = [chat.ask(r.image, r.question, r.context, r.vision_hidden_states, **options) for r in requests]
    assert [turn.answer for turn in together] == [turn.answer for turn in alone]
    assert [turn.context for turn in together] == [turn.context for turn in alone]
    assert [turn.num_tokens for turn in together] == [turn.num_tokens for turn in alone]


def test_streamed_text_is_the_answer(chat):
    for seed in range(4):
        pieces = []
        turn = chat.ask(
            IMAGE, "What?", max_new_tokens=12, seed=seed, num_beams=1, do_sample=True, on_text=pieces.append
        )
        assert "".join(pieces) == turn.answer and all(pieces)
        assert (
            turn.answer == chat.ask(IMAGE, "What?", max_new_tokens=12, seed=seed, num_beams=1, do_sample=True).answer
        )
    with pytest.raises(ValueError, match="only at the end: on_text needs num_beams=1"):
        chat.ask(IMAGE, "What?", mode="generate", num_beams=2, on_text=pieces.append)


def test_the_next_turn_goes_on(chat):
    """With what the turn before returned, as with the whole conversation and the picture again."""
    answer, context, image = chat.chat(IMAGE, "What is <image>?", **SHORT)
    assert json.loads(context) == [
        {"role": "user", "content": "What is <image>?"},
        {"role": "assistant", "content": answer},
    ]
    assert context == chat.context_of([("What is <image>?", answer)])
    following = chat.ask(None, "Where?", context, image, **SHORT)
    assert following.context == chat.context_of([("What is <image>?", answer), ("Where?", following.answer)])
    again = chat.ask(IMAGE, "Where?", context, **SHORT)
    assert (following.answer, following.context) == (again.answer, again.context)
    conversation = [*json.loads(context), {"role": "user", "content": "Where?"}]
    conversation[0]["content"] = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is <image>?"}]
    inputs = chat.processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    ids = chat.model.generate(**inputs, max_new_tokens=6, eos_token_id=2)[0, inputs["input_ids"].shape[1] :]
    assert chat.processor.answer_text(ids.tolist()) == following.answer


def test_a_system_message_stays_before_the_image(chat):
    """A context may begin with it where the family knows any: the image belongs to the first question all the same."""
    system = {"role": "system", "content": "Be <b> brief."}
    context = json.dumps([system])
    if chat.family.kind != "omnilmm":
        with pytest.raises(ValueError, match="message 0 is the system's"):
            chat.ask(IMAGE, "What?", context, **SHORT)
        return
    first = chat.ask(IMAGE, "What?", context, **SHORT)
    second = chat.ask(None, "Where?", first.context, first.vision_hidden_states, **SHORT)
    said = [("user", "What?"), ("assistant", first.answer), ("user", "Where?"), ("assistant", second.answer)]
    messages = [system, *({"role": role, "content": text} for role, text in said)]
    assert json.loads(second.context) == messages
    messages[1]["content"] = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]
    for length, turn in ((2, first), (4, second)):
        inputs = chat.processor.apply_chat_template(
            messages[:length], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        ids = chat.model.generate(**inputs, max_new_tokens=6, eos_token_id=2)[0, inputs["input_ids"].shape[1] :]
        assert chat.processor.answer_text(ids.tolist()) == turn.answer


def test_an_image_waits_as_levels(chat):
    """In a quarter of the bytes that the tower takes, with the same result to the last bit."""
    for image in (IMAGE, TALL):
        (waiting,) = PromptPreparer(chat).turn(image, "What?").images
        inputs = chat.processor.image_processor(image, return_tensors="pt")
        assert 4 * waiting.views.pixel_values.nbytes == inputs["pixel_values"].nbytes
        (encoded,) = chat.processor.encode_images(chat.model, [waiting.views])
        inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        assert torch.equal(encoded.features, chat.model.get_image_features(**inputs).pooler_output)


def test_several_images_in_one_conversation(sibling_chats):
    """VisualCLA's users gave each question an image of its own; the others are asked about one."""
    chat = sibling_chats["visualcla"]
    first = chat.ask(IMAGE, "What?", **SHORT)
    second = chat.ask([TALL], "And this?", first.context, first.vision_hidden_states, **SHORT)
    third = chat.ask(None, "Where?", second.context, second.vision_hidden_states, **SHORT)
    messages = chat.processor.messages_of_turn("Where?", second.context, 2)
    texts = ["What?", "And this?", "Where?"]
    for message, text, image in zip(messages[::2], texts, [IMAGE, TALL, None], strict=True):
        parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": text}]
        assert [part.get("text") for part in parts] == [*([None] if image else []), text]
        message["content"] = [{**part, "image": image} if part["type"] == "image" else part for part in parts]
    inputs = chat.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    ids = chat.model.generate(**inputs, max_new_tokens=6, eos_token_id=2)[0, inputs["input_ids"].shape[1] :]
    assert chat.processor.answer_text(ids.tolist()) == third.answer
    both = chat.ask([IMAGE, TALL], "What?", **SHORT)
    assert len(both.vision_hidden_states) == 2
    assert chat.ask_batch([ChatRequest([IMAGE, TALL], "What?")], **SHORT)[0].answer == both.answer
    with pytest.raises(ValueError, match="conversation has 2 images, but 1 were given"):
        chat.ask(None, "Where?", second.context, first.vision_hidden_states, **SHORT)
    with pytest.raises(ValueError, match="A conversation with OmniLMM-12B is about one image, got a list of 2"):
        sibling_chats["omnilmm"].ask([IMAGE, TALL], "What?", **SHORT)


def test_greedy_answers_are_the_references(sibling_chats):
    for name, chat in sibling_chats.items():
        system = make_system(name)
        inputs = chat.processor.apply_chat_template(
            chat.processor.messages_of_turn("What is the image?"), tokenize=True, add_generation_prompt=True
        )
        expected = system.greedy(inputs[0], length=6, repetition_penalty=1.3, no_repeat_ngram_size=2)
        options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
        assert chat.ask(None, "What is the image?", **SHORT, **options).answer == chat.processor.answer_text(expected)


def test_presets_are_the_originals(sibling_chats):
    found = {name: decoding_presets(chat.model.config) for name, chat in sibling_chats.items()}
    sample = {"do_sample": True}
    assert found["omnilmm"] == {
        "sampling": sample
        | {"max_new_tokens": 1024, "temperature": 0.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}
    }
    assert found["minicpmv-1.0"] == {
        "beam": {"max_new_tokens": 2048, "num_beams": 3, "repetition_penalty": 1.2},
        "sampling": sample | {"max_new_tokens": 2048, "temperature": 0.6, "top_k": 100, "top_p": 0.8},
    }
    assert found["minicpmv-2.0"] == {
        "sampling": sample
        | {"max_new_tokens": 1024, "temperature": 0.7, "top_k": 100, "top_p": 0.8, "repetition_penalty": 1.05},
        "beam": {"max_new_tokens": 1024, "num_beams": 3, "repetition_penalty": 1.2},
    }
    assert default_preset(sibling_chats["visualcla"].model.config) == sample | {
        "max_new_tokens": 512, "temperature": 0.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 15,
    }  # fmt: skip


def test_one_bad_request_does_not_spoil_the_batch(chat):
    requests = [ChatRequest("nothing.png", "What?"), ChatRequest(IMAGE, "is " * 3000), ChatRequest(IMAGE, "What?")]
    missing, long, good = chat.ask_batch(requests, return_exceptions=True, **SHORT)
    assert isinstance(missing, ValueError) and "nothing.png" in str(missing)
    assert isinstance(long, ValueError) and "more than the limit" in str(long)
    assert good.answer == chat.ask(IMAGE, "What?", **SHORT).answer
    with pytest.raises(ValueError, match="nothing.png"):
        chat.ask_batch(requests, **SHORT)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, "mode is one of reference, generate"),
        ({"context": "User: hi"}, "context is not what an earlier turn returned"),
        ({"context": "[1]"}, "a JSON list of messages"),
        ({"context": '[{"role": "user", "content": ["a"]}]'}, "a JSON list of messages"),
        ({"context": '[{"role": "user", "content": [{"type": "text", "text": 1}]}]'}, "a JSON list of messages"),
        ({"vision_hidden_states": torch.zeros(1)}, "is an EncodedImage"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"question": 3}, "A question is a str, got int"),
    ],
)
def test_bad_arguments(chat, options, match):
    with pytest.raises(ValueError, match=match):
        chat.ask(**{"image": None, "question": "Hi", **options})


def test_flagged_pictures_are_not_answered(whole_folders):
    folder = whole_folders["minicpmv-1.0"]
    chat = SiblingChat(folder, lambda image: image.size == TALL.size, device="cpu", image_safety_policy="refuse")
    flagged, good = chat.ask_batch([ChatRequest(TALL, "What?"), ChatRequest(IMAGE, "What?")], **SHORT)
    assert flagged.answer.startswith("抱歉") and flagged.vision_hidden_states is None
    assert isinstance(good.vision_hidden_states, EncodedImage)
    chat.image_safety_policy = "raise"
    with pytest.raises(UnsafeImageError):
        chat.ask(TALL, "What?", **SHORT)


def test_the_pipeline_answers(whole_folders, sibling_chats, image_file):
    for name, folder in whole_folders.items():
        answering = pipeline("image-text-to-text", model=str(folder), device="cpu")
        content = [{"type": "image", "path": str(image_file)}, {"type": "text", "text": "What?"}]
        (found,) = answering([{"role": "user", "content": content}], max_new_tokens=6, return_tensors=True)
        chat = sibling_chats[name]
        turn = chat.ask(IMAGE, "What?", **SHORT)
        assert chat.processor.answer_text(found["generated_token_ids"][-6:]) == turn.answer


# ------------------------------------------------------------------------------------------------------- the commands


def test_the_chat_command(whole_folders, sibling_chats, image_file, capsys):
    for name, folder in whole_folders.items():
        arguments = ["chat", str(folder), str(image_file), "What?", "Where?", "--device", "cpu", "--json"]
        assert main([*arguments, "--mode", "generate", "--max-new-tokens", "6"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        chat = sibling_chats[name]
        first = chat.ask(IMAGE, "What?", **SHORT)
        second = chat.ask(None, "Where?", first.context, first.vision_hidden_states, **SHORT)
        assert [line["answer"] for line in lines] == [first.answer, second.answer]
    assert main([*arguments, "--fast"]) == 0
    assert main([*arguments, "--vocab", str(image_file)]) == 1
    assert "the tokenizer of VisualCLA-7B is in its folder" in capsys.readouterr().err


def test_the_batch_command(whole_folders, sibling_chats, image_file, tmp_path):
    rows = [
        {"id": 1, "image": image_file.name, "question": "What?"},
        {"id": 2, "question": "Hi"},
        {
            "id": 3,
            "image": image_file.name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "the"},
                {"from": "human", "value": "Where?"},
            ],
        },
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = sibling_chats["minicpmv-2.0"]
    arguments = ["batch", str(whole_folders["minicpmv-2.0"]), str(source), str(target), "--device", "cpu"]
    assert main([*arguments, "--mode", "generate", "--max-new-tokens", "6"]) == 0
    found = [json.loads(line)["answer"] for line in target.read_text().splitlines()]
    context = chat.context_of([("What?", "the")])
    asked = [(IMAGE, "What?", ""), (None, "Hi", ""), (IMAGE, "Where?", context)]
    assert found == [chat.ask(*request, **SHORT).answer for request in asked]


def test_fast_answers_are_the_plain_ones(whole_folders, sibling_chats):
    for name, folder in whole_folders.items():
        chat, plain = SiblingChat(folder, device="cpu", fast=True), sibling_chats[name]
        for mode in ("generate", "reference"):
            first, second = (
                own.ask(IMAGE, "What?", mode=mode, seed=0, max_new_tokens=8).answer for own in (chat, plain)
            )
            assert first == second
        assert has_kernel(chat.model.language_model), name
        requests = [ChatRequest(IMAGE, "What?"), ChatRequest(None, "Hi there")]
        batches = [[turn.answer for turn in own.ask_batch(requests, **SHORT)] for own in (chat, plain)]
        assert batches[0] == batches[1]
        assert chat.ask(IMAGE, "What?", fast=False, **SHORT).answer == batches[1][0]
