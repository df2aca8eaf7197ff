"""Prompts, to the byte, and model inputs of the siblings' processors."""

import json
import shutil

import pytest
import torch
from sibling_folders import NAMES, make_system
from test_image_processing_minicpmv import picture
from transformers import AutoProcessor, AutoTokenizer, TokenizersBackend

from viscpm_hf import (
    LegacySentencePieceTokenizer,
    MiniCPMVImageProcessor,
    MiniCPMVProcessor,
    OmniLMMProcessor,
    OriginalCheckpointError,
    VisCPMImageProcessor,
    VisualCLAProcessor,
)


IMAGE = picture(90, 60)
SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the human's "
    "questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def conversation(*texts, image=None):
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    if image is not None:
        part = {"type": "image"} if image is True else {"type": "image", "image": image}
        messages[0]["content"] = [part, {"type": "text", "text": texts[0]}]
    return messages


def encode(processor, *conversations, **options):
    return processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


@pytest.fixture(scope="module")
def processors(whole_folders):
    return {name: AutoProcessor.from_pretrained(folder) for name, folder in whole_folders.items()}


@pytest.fixture(params=NAMES)
def processor(request, processors):
    return processors[request.param]


def test_every_auto_class_finds_its_class(whole_folders):
    views, square = MiniCPMVImageProcessor, VisCPMImageProcessor
    sentencepiece = LegacySentencePieceTokenizer
    for name, expected in {
        "omnilmm": (OmniLMMProcessor, square, TokenizersBackend),
        "minicpmv-1.0": (MiniCPMVProcessor, views, sentencepiece),
        "minicpmv-2.0": (MiniCPMVProcessor, views, sentencepiece),
        "visualcla": (VisualCLAProcessor, square, sentencepiece),
    }.items():
        folder = whole_folders[name]
        # The siblings' repositories have no file that AutoImageProcessor could begin with; our class knows them.
        found = [found_by.from_pretrained(folder) for found_by in (AutoProcessor, expected[1], AutoTokenizer)]
        assert tuple(type(part) for part in found) == expected
        assert (type(found[0].image_processor), type(found[0].tokenizer)) == expected[1:]
        assert type(expected[0].from_pretrained(folder)) is expected[0]


def test_configurations_decide_the_views(processors, whole_folders, tmp_path):
    assert processors["minicpmv-1.0"].image_processor.slice_mode == "square"
    adaptive = processors["minicpmv-2.0"].image_processor
    assert (adaptive.slice_mode, adaptive.scale_resolution, adaptive.max_slice_nums) == ("adaptive", 56, 9)
    config = make_system("minicpmv-2.0").config
    for value, expected in ((False, "whole"), ("hd", None)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "slice_mode": value}))
        if expected is None:
            with pytest.raises(ValueError, match="slice_mode of the configuration is true or false, got 'hd'"):
                MiniCPMVImageProcessor.from_pretrained(tmp_path)
        else:
            assert MiniCPMVImageProcessor.from_pretrained(tmp_path).slice_mode == expected
    later = {**config, "version": 2.6}
    (tmp_path / "config.json").write_text(json.dumps(later))
    for found_by in (MiniCPMVProcessor, LegacySentencePieceTokenizer, MiniCPMVImageProcessor):
        with pytest.raises(ValueError, match="MiniCPM-V 2.6"):
            found_by.from_pretrained(tmp_path)
    omnilmm = make_system("omnilmm").config
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in omnilmm.items() if k != "image_size"}))
    with pytest.raises(ValueError, match="lacks image_size"):
        VisCPMImageProcessor.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_of_omnilmm(processors):
    processor = processors["omnilmm"]
    view = "<im_start>" + "<im_patch>" * 4 + "<im_end>"
    begin = f"<|system|>\n{SYSTEM}</s>\n<|user|>\n"
    assert processor.prompt_text(conversation("Hi?")) == f"{begin}Hi?</s>\n<|assistant|>\n"
    found = processor.prompt_text(conversation("What?", "A cat.", "Where?", image=True))
    turns = "</s>\n<|assistant|>\nA cat.</s>\n<|user|>\nWhere?</s>\n<|assistant|>\n"
    assert found == f"{begin}{view}\nWhat?{turns}"
    own = [{"role": "system", "content": "Be brief."}, *conversation("Hi?")]
    assert processor.prompt_text(own) == "<|system|>\nBe brief.</s>\n<|user|>\nHi?</s>\n<|assistant|>\n"


@pytest.mark.parametrize("name", ["minicpmv-1.0", "minicpmv-2.0"])
def test_prompts_of_minicpmv(processors, name):
    processor = processors[name]
    view = "<image>" + "<unk>" * 4 + "</image>"
    assert processor.prompt_text(conversation("你好")) == "<用户>你好<AI>"
    found = processor.prompt_text(conversation("What?", "A cat.", "Where?", image=True))
    assert found == f"<用户>{view}\nWhat?<AI>A cat.<用户>Where?<AI>"
    tiled = processor.prompt_text(conversation("What?", image=True), grids=[(2, 3)])
    assert tiled == f"<用户>{view}<slice>{view * 3}\n{view * 3}</slice>\nWhat?<AI>"


def test_the_release_counts_tokens_of_an_image_so(processors):
    """Markers and line breaks included, with 64 placeholders a view."""
    tokenizer = processors["minicpmv-2.0"].tokenizer
    processor = MiniCPMVProcessor(MiniCPMVImageProcessor(), tokenizer)
    counts = {(448, 448): 66, (480, 640): 200, (600, 800): 333, (1344, 1344): 664, (1080, 1920): 597}
    counts |= {(1920, 1080): 599, (500, 3000): 530, (3000, 500): 536}
    for size, count in counts.items():
        grid = processor.image_processor.plan(*size).grid or (0, 0)
        assert len(processor.encode(processor.image_text(grid))) == 1 + count
        (tokens,) = processor._get_num_multimodal_tokens([size]).num_image_tokens
        assert tokens == processor.encode(processor.image_text(grid)).count(113)


def test_prompts_of_visualcla(processors):
    processor = processors["visualcla"]
    view = "<img>" + "<img_token>" * 4 + "</img>"
    assert processor.prompt_text(conversation("你好")) == f"<s>{ALPACA}### Instruction: \n你好\n\n### Response:"
    found = processor.prompt_text(conversation("What?", "A cat.", "Where?", image=True))
    assert found == (
        f"<s>{ALPACA}### Instruction: \n{view}\nWhat?\n\n### Response:A cat.\n\n"
        "### Instruction: \nWhere?\n\n### Response:"
    )


@pytest.mark.parametrize("typed", ["<image>", "</image>", "<s>", "</s>", "<unk>", "<slice>", "<im_start>", "<img>"])
def test_what_users_type_stays_text(processor, typed):
    text = f"a {typed} b < c"
    ids = encode(processor, conversation(text))["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids).count(typed[1:]) >= 1
    known = processor.tokenizer.convert_tokens_to_ids(typed)
    without = encode(processor, conversation("a  b"))["input_ids"][0].tolist()
    if typed in processor.image_tokens or typed in processor.tokenizer.all_special_tokens:
        assert ids.count(known) == without.count(known)
    with_image = encode(processor, conversation(text, image=IMAGE))["input_ids"][0]
    views = encode(processor, conversation("a", image=IMAGE))["num_views"][0]
    assert (with_image == processor.image_token_id).sum() == views * processor.num_query_tokens
    # In the prompt for people, nothing tells it was escaped.
    assert text in processor.prompt_text(conversation(text))


def test_prompts_begin_with_one_bos(processor):
    for turns in (("Hi",), ("Hi", "Hello", "How?")):
        ids = encode(processor, conversation(*turns))["input_ids"][0].tolist()
        assert ids[0] == processor.tokenizer.bos_token_id and ids.count(ids[0]) == 1


# -------------------------------------------------------------------------------------------------------------- inputs


def test_a_batch_is_its_rows_padded_on_the_left(processor):
    rows = [
        conversation("What is the image?", image=IMAGE),
        conversation("Hi"),
        conversation("图片", image=picture(30, 80)),
    ]
    batch = encode(processor, *rows)
    views = batch["num_views"].tolist()
    assert views[1] == 0 and sum(views) == len(batch["pixel_values"])
    offset = 0
    for index, row in enumerate(rows):
        alone = encode(processor, row)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, -length:], alone["input_ids"][0])
        assert batch["attention_mask"][index].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        if views[index]:
            height, width = alone["pixel_values"].shape[-2:]
            own = batch["pixel_values"][offset : offset + views[index], :, :height, :width]
            assert torch.equal(own, alone["pixel_values"])
            offset += views[index]
        else:
            assert "pixel_values" not in alone and "num_views" not in alone


def test_a_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    rows = [conversation("What </s> is it?", "the", "图片", image=IMAGE), conversation("Hi")]
    expected = encode(processor, *rows)
    found = encode(again, *rows)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_padding_and_token_types_as_asked_for(processor):
    right = encode(processor, conversation("Hi"), conversation("What is the image?"), padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    wide = encode(processor, conversation("Hi"), pad_to_multiple_of=64)
    assert wide["input_ids"].shape[1] % 64 == 0
    kinds = encode(processor, conversation("Hi", image=IMAGE), return_mm_token_type_ids=True)
    assert torch.equal(kinds["mm_token_type_ids"] == 1, kinds["input_ids"] == processor.image_token_id)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_long_prompts_are_refused_and_never_cut(processor):
    long = conversation("is " * 3000, image=IMAGE)
    with pytest.raises(ValueError, match=r"has [\d,]+ tokens, more than the limit of 2,048"):
        encode(processor, long)
    assert encode(processor, long, max_length=20_000)["input_ids"].shape[1] > 3000
    with pytest.raises(ValueError, match="more than the limit of 3"):
        encode(processor, conversation("Hi"), max_length=3)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "no messages"),
        (conversation("a", "b")[1:], "User and assistant take turns"),
        ([*conversation("a"), *conversation("b")], "take turns, the user first; message 1"),
        ([{"role": "tool", "content": "a"}], "message 0 is the tool's"),
        ([*conversation("a"), {"role": "system", "content": "b"}], "message 1 is the system's"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "text and images, not audio"),
        ([*conversation("a"), {"role": "assistant", "content": [{"type": "image"}]}], "Images belong to the user"),
    ],
)
def test_conversations_out_of_turn(processor, messages, match):
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template(messages, add_generation_prompt=True)


def test_images_and_marks_have_to_match(processor):
    prompt = processor.apply_chat_template(conversation("a", image=True), add_generation_prompt=True)
    with pytest.raises(ValueError, match="has 1 image placeholders .* but 0 images"):
        processor(text=prompt)
    with pytest.raises(ValueError, match="has 1 image placeholders .* but 2 images"):
        processor(text=prompt, images=[IMAGE, IMAGE])
    with pytest.raises(ValueError, match="Text 0 has 1 image placeholders, but 0 images"):
        processor(text=[prompt, prompt], images=[[], [IMAGE]])
    with pytest.raises(ValueError, match="needs text"):
        processor(images=IMAGE)
    with pytest.raises(ValueError, match="at least one text"):
        processor(text=[])
    with pytest.raises(ValueError, match="A text is a str, but text 1 is of type int"):
        processor(text=["a", 1])


def test_a_tokenizer_of_another_model_is_told(processors):
    wrong = VisualCLAProcessor(processors["visualcla"].image_processor, processors["minicpmv-1.0"].tokenizer, None, 4)
    with pytest.raises(ValueError, match="0 placeholders after tokenisation, but its 1 views take 4"):
        encode(wrong, conversation("a", image=IMAGE))


def test_omnilmms_tokens_are_added_where_the_folder_lacks_them(whole_folders, tmp_path):
    folder = shutil.copytree(whole_folders["omnilmm"], tmp_path / "omnilmm")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = content["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    given, lacking = (AutoProcessor.from_pretrained(path) for path in (whole_folders["omnilmm"], folder))
    assert lacking.image_token_id == given.image_token_id and len(lacking.tokenizer) == len(given.tokenizer)
    example = conversation("What?", image=IMAGE)
    assert torch.equal(encode(lacking, example)["input_ids"], encode(given, example)["input_ids"])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}), "utf-8")
    with pytest.raises(OriginalCheckpointError, match="it is another model's"):
        AutoTokenizer.from_pretrained(folder)


def test_the_reference_reads_the_prompt(processors, sibling_chats):
    """Prompt, pixels and model agree on what goes where."""
    for name, processor in processors.items():
        system = make_system(name)
        inputs = encode(processor, conversation("What is the image?", image=IMAGE))
        views = inputs["pixel_values"]
        sizes = inputs.get("image_sizes", torch.tensor([views.shape[-2:]] * len(views))).tolist()
        crops = [view[:, :height, :width] for view, (height, width) in zip(views, sizes, strict=True)]
        expected = system.logits(inputs["input_ids"][0].tolist(), crops)
        with torch.no_grad():
            found = sibling_chats[name].model(**inputs).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
