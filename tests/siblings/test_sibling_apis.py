"""The siblings' own interfaces: what their users know, without the faults they knew too."""

import base64
import copy
import json

import pytest
import torch
from reference import visualcla, write_visualcla_release
from sibling_folders import make_system, write_tokenizer
from sibling_tokenizers import VISUALCLA_VOCAB_SIZE
from test_image_processing_minicpmv import picture
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from viscpm_hf import MiniCPMVChat, OmniLMMChat, VisualCLAForConditionalGeneration, img2base64
from viscpm_hf.chat import visualcla as visualcla_api
from viscpm_hf.modeling import decoding_presets


IMAGE, OTHER = picture(90, 60), picture(120, 60, 1)
MESSAGES = [{"role": "user", "content": "What is the image?"}]
FEW = {"max_new_tokens": 6}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random models have no end."""
    for presets in decoding_presets._PRESETS.values():
        for preset in presets.values():
            monkeypatch.setitem(preset, "max_new_tokens", 6)


@pytest.fixture
def image_file(tmp_path):
    IMAGE.save(tmp_path / "image.png")
    return tmp_path / "image.png"


# --------------------------------------------------------------------------------------------------------- OmniLMMChat


@pytest.fixture(scope="module")
def omnilmm_chats(whole_folders):
    return {name: OmniLMMChat(folder, device="cpu") for name, folder in whole_folders.items() if name != "visualcla"}


@pytest.fixture(params=["omnilmm", "minicpmv-1.0", "minicpmv-2.0"])
def omnilmm_chat(request, omnilmm_chats):
    return omnilmm_chats[request.param]


def ask(chat, image, messages, seed=0):
    torch.manual_seed(seed)
    return chat.chat({"image": image, "question": json.dumps(messages)})


def test_pictures_come_in_base64(omnilmm_chat, image_file):
    assert MiniCPMVChat is OmniLMMChat
    encoded = img2base64(image_file)
    assert isinstance(encoded, bytes) and base64.b64decode(encoded) == image_file.read_bytes()
    answer = ask(omnilmm_chat, encoded, MESSAGES)
    assert isinstance(answer, str) and answer
    assert ask(omnilmm_chat, encoded.decode(), MESSAGES) == answer
    sibling = omnilmm_chat.sibling
    decoding = dict(decoding_presets.decoding_presets(sibling.model.config)["sampling"])
    if sibling.model.config.model_type == "minicpmv":
        decoding["temperature"] = 0.7  # as the original's wrapper asks for it
    torch.manual_seed(0)
    assert sibling.ask(IMAGE, MESSAGES[0]["content"], mode="generate", **decoding).answer == answer


def test_conversations_are_sent_whole(omnilmm_chat, image_file):
    encoded = img2base64(image_file)
    turns = [*MESSAGES, {"role": "assistant", "content": "the"}, {"role": "user", "content": "Where?"}]
    answer = ask(omnilmm_chat, encoded, turns)
    speakers = {"user": "human", "assistant": "gpt"}
    other = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]
    assert ask(omnilmm_chat, encoded, other) == answer


def test_text_alone_has_an_answer(omnilmm_chat):
    assert ask(omnilmm_chat, None, MESSAGES)
    torch.manual_seed(0)
    answer = omnilmm_chat.chat({"question": json.dumps(MESSAGES)})
    assert answer == ask(omnilmm_chat, None, MESSAGES)


@pytest.mark.parametrize("image", ["", "no base64!", base64.b64encode(b"no picture"), b"\xff"])
def test_an_unreadable_picture_is_the_answer(omnilmm_chat, image, image_file):
    assert ask(omnilmm_chat, image, MESSAGES) == "Image decode error"
    half = base64.b64encode(image_file.read_bytes()[:300])
    assert ask(omnilmm_chat, half, MESSAGES) == "Image decode error"


@pytest.mark.parametrize(
    ("question", "match"),
    [
        ("What?", "is no JSON"),
        ("[]", "non-empty list"),
        (json.dumps([{"role": "user"}]), "Message 0 is not"),
        (json.dumps([*MESSAGES, {"role": "assistant", "content": "a"}]), "it is the assistant's"),
        (json.dumps(MESSAGES * 2), "take turns"),
        (json.dumps([{"role": "user", "content": "is " * 3000}]), "more than the limit of 2,048"),
    ],
)
def test_bad_questions(omnilmm_chat, question, match):
    with pytest.raises(ValueError, match=match):
        omnilmm_chat.chat({"image": None, "question": question})
    with pytest.raises(ValueError, match='has no "question"'):
        omnilmm_chat.chat({"image": None})


# ----------------------------------------------------------------------------------------------- MiniCPM-V: model.chat


@pytest.fixture(params=["minicpmv-1.0", "minicpmv-2.0"])
def minicpmv(request, sibling_chats, whole_folders):
    """Model and tokenizer, as the model's page loads them."""
    return sibling_chats[request.param].model, AutoTokenizer.from_pretrained(whole_folders[request.param])


def test_chat_returns_the_answer_and_a_new_list(minicpmv):
    model, tokenizer = minicpmv
    messages = copy.deepcopy(MESSAGES)
    answer, context, decoding = model.chat(
        image=IMAGE, msgs=messages, context=None, tokenizer=tokenizer, sampling=False
    )
    assert messages == MESSAGES  # 1.0 appended to it
    assert context == [*MESSAGES, {"role": "assistant", "content": answer}]
    assert decoding == {"max_new_tokens": 6, "num_beams": 3, "repetition_penalty": 1.2}
    # JSON, which 1.0 failed at, is the same; so is any context.
    assert model.chat(IMAGE, json.dumps(messages), context, tokenizer, sampling=False)[0] == answer
    turns = [*context, {"role": "user", "content": "Where?"}]
    following, longer, _ = model.chat(image=IMAGE, msgs=turns, context=context, tokenizer=tokenizer, sampling=False)
    assert longer == [*turns, {"role": "assistant", "content": following}]


def test_the_first_releases_question(minicpmv):
    model, tokenizer = minicpmv
    question, options = MESSAGES[0]["content"], {"tokenizer": tokenizer, "sampling": False}
    expected = model.chat(image=IMAGE, msgs=MESSAGES, context=None, **options)
    for given in (question, MESSAGES):
        assert model.chat(image=IMAGE, question=given, context=None, **options) == expected
    context = expected[1]
    following = model.chat(image=IMAGE, question="Where?", context=context, **options)
    assert following == model.chat(IMAGE, [*context, {"role": "user", "content": "Where?"}], **options)
    for given in ({}, {"msgs": MESSAGES, "question": question}):
        with pytest.raises(ValueError, match="give one of them"):
            model.chat(image=IMAGE, **given, **options)


def test_the_versions_decode_by_their_own_presets(minicpmv):
    model, tokenizer = minicpmv
    is_second = decoding_presets.system_name(model.config) == "minicpmv-2.0"
    default = model.chat(IMAGE, MESSAGES, None, tokenizer)[2]
    assert ("do_sample" in default) == is_second
    sampled = model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=True, temperature=0.3, max_new_tokens=3)[2]
    assert (sampled["temperature"], sampled["top_k"], sampled["max_new_tokens"]) == (0.3, 100, 3)
    assert ("repetition_penalty" in sampled) == is_second


def test_what_a_decoding_has_not_is_ignored(minicpmv, monkeypatch):
    from viscpm_hf.modeling import chat_minicpmv

    told = []
    monkeypatch.setattr(chat_minicpmv.logger, "warning", lambda *arguments: told.append(arguments[1]))
    model, tokenizer = minicpmv
    plain = model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=False)
    assert model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=False, top_p=0.1) == plain
    assert told == ["top_p"]


def test_encoded_pictures_are_not_encoded_again(minicpmv, sibling_chats, monkeypatch):
    model, tokenizer = minicpmv
    answer = model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=False)[0]
    processor = next(chat.processor for chat in sibling_chats.values() if chat.model is model)
    views = processor.image_processor(IMAGE, return_tensors="pt")
    states = model.get_image_features(views["pixel_values"], views["image_sizes"]).pooler_output
    monkeypatch.setattr(model, "get_image_features", None)
    for given in (states, [states]):
        found = model.chat(IMAGE, MESSAGES, None, tokenizer, vision_hidden_states=given, sampling=False)[0]
        assert found == answer
    with pytest.raises(ValueError, match="needs the image too"):
        model.chat(None, MESSAGES, None, tokenizer, vision_hidden_states=states)


def test_chat_without_a_picture_and_with_typed_marks(minicpmv):
    model, tokenizer = minicpmv
    assert model.chat(None, MESSAGES, None, tokenizer, sampling=False)[0]
    typed = [{"role": "user", "content": "<image> and </image> <slice>"}]
    assert model.chat(IMAGE, typed, None, tokenizer, sampling=False)[0]
    assert model.chat(picture(20, 800), typed, None, tokenizer, sampling=False)[0]


def test_chat_finds_its_tokenizer_and_says_what_is_wrong(minicpmv, tmp_path):
    model, tokenizer = minicpmv
    expected = model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=False)[0]
    assert model.chat(IMAGE, MESSAGES, sampling=False)[0] == expected
    for messages, match in (
        ([], "non-empty list"),
        ("{", "no JSON"),
        ([{"role": "user", "content": [1]}], "Message 0 is not"),
        ([{"role": "assistant", "content": "a"}], "take turns"),
    ):
        with pytest.raises(ValueError, match=match):
            model.chat(IMAGE, messages, None, tokenizer)
    with pytest.raises(ValueError, match="more than the limit of 10"):
        model.chat(IMAGE, MESSAGES, None, tokenizer, max_inp_length=10)
    with pytest.raises(ValueError, match="neither an image file"):
        model.chat("nothing.png", MESSAGES, None, tokenizer)


def test_a_converted_model_chats(minicpmv, sibling_chats, tmp_path):
    model, tokenizer = minicpmv
    processor = next(chat.processor for chat in sibling_chats.values() if chat.model is model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    expected = model.chat(IMAGE, MESSAGES, None, tokenizer, sampling=False)
    assert again.chat(IMAGE, MESSAGES, None, AutoTokenizer.from_pretrained(tmp_path), sampling=False) == expected


# ---------------------------------------------------------------------------------------------------------- VisualCLA


GREEDY = {"max_new_tokens": 6, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def visualcla_model(whole_folders):
    model, tokenizer, image_processor = visualcla_api.get_model_and_tokenizer_and_processor(
        whole_folders["visualcla"], torch_dtype=torch.float32, default_device="cpu"
    )
    assert (model.tokenizer, model.image_processor) == (tokenizer, image_processor)
    assert (model.num_patch, model.image_at_head) == (4, False)
    return model


def test_chat_appends_to_the_history(visualcla_model, image_file):
    response, history = visualcla_api.chat(visualcla_model, image_file, "What?", generation_config=GREEDY)
    assert history == [
        {"type": "instruction", "value": "What?", "first_instruction": True},
        {"type": "response", "value": response},
    ]
    before = list(history)
    following, longer = visualcla_api.chat(visualcla_model, IMAGE, "Where?", history, GREEDY)
    assert longer is history and history[:2] == before
    assert history[2:] == [{"type": "instruction", "value": "Where?"}, {"type": "response", "value": following}]
    assert visualcla_api.chat(visualcla_model, IMAGE, "Where?", list(before), GREEDY)[0] == following


def test_every_question_may_have_a_picture(visualcla_model, sibling_chats):
    """As in text-generation-webui: each before the text of its own question."""
    tall = picture(40, 130, 1)
    first, history = visualcla_api.chat(visualcla_model, IMAGE, "What?", generation_config=GREEDY)
    with pytest.raises(ValueError, match="list has 1 pictures, but the conversation 2 questions"):
        visualcla_api.chat(visualcla_model, [IMAGE], "Where?", history, GREEDY)
    found, _ = visualcla_api.chat(visualcla_model, [IMAGE, tall], "And this?", history, GREEDY)
    chat = sibling_chats["visualcla"]
    turn = chat.ask(IMAGE, "What?", mode="generate", **GREEDY)
    assert turn.answer == first
    following = chat.ask([tall], "And this?", turn.context, turn.vision_hidden_states, mode="generate", **GREEDY)
    assert following.answer == found


def test_chat_is_the_references(visualcla_model):
    system = make_system("visualcla")
    processor = visualcla_model.processor
    for image in (IMAGE, None):
        content = [*([] if image is None else [{"type": "image", "image": image}]), {"type": "text", "text": "What?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        )  # fmt: skip
        views = list(inputs["pixel_values"]) if image is not None else []
        expected = system.greedy(inputs["input_ids"][0].tolist(), views, length=6, repetition_penalty=1.1)
        found, _ = visualcla_api.chat(visualcla_model, image, "What?", generation_config=GREEDY)
        assert found == processor.answer_text(expected)


def test_conversations_share_nothing(visualcla_model, capsys):
    first = visualcla_api.chat(visualcla_model, IMAGE, "What?", generation_config=GREEDY)
    second = visualcla_api.chat(visualcla_model, None, "Hi", generation_config=GREEDY)
    assert first[1] is not second[1] and len(second[1]) == 2
    assert capsys.readouterr().out == ""  # the original printed both


def test_pixels_do_for_a_picture(visualcla_model):
    expected, _ = visualcla_api.chat(visualcla_model, IMAGE, "What?", generation_config=GREEDY)
    pixels = visualcla_model.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
    for image in (pixels, pixels[0]):
        assert visualcla_api.chat(visualcla_model, image, "What?", generation_config=GREEDY)[0] == expected
    with pytest.raises(ValueError, match=r"are \(1, 3, 56, 56\), got \(3, 5, 5\)"):
        visualcla_api.chat(visualcla_model, torch.zeros(3, 5, 5), "What?")


def test_streaming_ends_with_the_answer(visualcla_model):
    given = [{"type": "instruction", "value": "Hi"}, {"type": "response", "value": "the"}]
    history = list(given)
    expected, longer = visualcla_api.chat(visualcla_model, IMAGE, "What?", list(given), GREEDY)
    parts = list(visualcla_api.chat_in_stream(visualcla_model, IMAGE, "What?", history, GREEDY))
    assert history == given
    assert parts[-1] == (expected, longer)
    for (shorter, _), (text, own) in zip(parts, parts[1:], strict=False):
        assert text.startswith(shorter) and own[-1]["value"] == text
    default = GenerationConfig(**GREEDY)
    assert visualcla_api.chat(visualcla_model, IMAGE, "What?", list(given), default)[0] == expected
    assert visualcla_api.chat(visualcla_model, IMAGE, "What?")[0] is not None  # by its own preset


def test_streams_can_be_left(visualcla_model):
    endless = {"max_new_tokens": 2000, "eos_token_id": []}
    stream = visualcla_api.chat_in_stream(visualcla_model, None, "Hi", generation_config=endless)
    next(stream)
    stream.close()  # waits for the model, which stops
    with pytest.raises(ValueError, match="streamer"):
        list(visualcla_api.chat_in_stream(visualcla_model, None, "Hi", generation_config={"num_beams": 2}))


@pytest.mark.parametrize(
    ("history", "match"),
    [
        ([{"type": "question", "value": "a"}], "Entry 0 of the history is not"),
        (["a"], "Entry 0 of the history is not"),
        ([{"type": "instruction", "value": "a"}], "take turns"),
    ],
)
def test_bad_histories(visualcla_model, history, match):
    before = copy.deepcopy(history)
    with pytest.raises(ValueError, match=match):
        visualcla_api.chat(visualcla_model, None, "Hi", history)
    assert history == before


def test_what_to_load_has_to_be_said(whole_folders):
    load = visualcla_api.get_model_and_tokenizer_and_processor
    with pytest.raises(ValueError, match="text_model, vision_model, lora_model is missing"):
        load()
    with pytest.raises(ValueError, match="vision_model is missing"):
        load(text_model="a", lora_model="b")
    with pytest.raises(ValueError, match="load_in_8bit takes a merged model"):
        load(text_model="a", vision_model="b", lora_model="c", load_in_8bit=True)
    with pytest.raises(ValueError, match="type visualcla is needed here"):
        load(whole_folders["omnilmm"], default_device="cpu")


def test_the_released_adapter_answers_as_the_merged_model(visualcla_model, tmp_path):
    release = write_visualcla_release(visualcla(VISUALCLA_VOCAB_SIZE), tmp_path)
    write_tokenizer("visualcla", release.adapter)
    own_class = type(visualcla_model.image_processor)
    assert type(own_class.from_pretrained(release.adapter)) is own_class
    model, _, _ = visualcla_api.get_model_and_tokenizer_and_processor(
        text_model=release.text_model,
        vision_model=release.vision_model,
        lora_model=release.adapter,
        torch_dtype=torch.float32,
        default_device="cpu",
    )
    expected, _ = visualcla_api.chat(visualcla_model, IMAGE, "What?", generation_config=GREEDY)
    assert visualcla_api.chat(model, IMAGE, "What?", generation_config=GREEDY)[0] == expected
    model.resize_token_embeddings(len(model.tokenizer))
    assert visualcla_api.chat(model, IMAGE, "What?", generation_config=GREEDY)[0] == expected
    model.save_pretrained(tmp_path / "saved")
    saved = VisualCLAForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
    torch.testing.assert_close(saved, visualcla_model.state_dict(), atol=1e-5, rtol=0)
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(model, release.adapter)
    assert visualcla_api.chat(adapted, IMAGE, "What?", generation_config=GREEDY)[0] == expected
    inputs = visualcla_api._inputs(visualcla_model, IMAGE, "What?", [])
    logits = visualcla_model(**inputs).logits
    torch.testing.assert_close(adapted(**inputs).logits, logits, atol=1e-4, rtol=0)
    pixels = model.image_processor(IMAGE, return_tensors="pt")["pixel_values"]
    images = [each.get_image_features(pixels).pooler_output for each in (adapted, visualcla_model)]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    with adapted.disable_adapter():
        assert (adapted(**inputs).logits - logits).abs().max() > 0.1
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, logits, atol=1e-4, rtol=0)
