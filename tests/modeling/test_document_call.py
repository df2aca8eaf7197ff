"""`generate(documents, tokenizer)` and `prepare_for_finetune`: the calls of the Hub's own classes."""

import copy
import logging

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from PIL import Image
from support import PRUNED_CASE, Golden, reference_options
from transformers import GenerationConfig

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM, CpmBeeTokenizer
from viscpm_hf.checkpoints.original import load_state_dict
from viscpm_hf.modeling.document_call_cpm_bee import DocumentDecodingConfig, document_decoding


HUB_DEFAULTS = {"temperature": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0}
DOCUMENTS = [
    {"input": "红色的圆形 is", "<ans>": ""},
    {"prompt": "蓝 🙂", "input": {"x": "月"}, "<ans>": {"one": {"p": "", "q": ""}, "two": ""}},
    {"input": "a much longer input than the first", "<ans>": {"a": ""}},
]


@pytest.fixture(scope="module")
def tokenizer() -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(Golden(PRUNED_CASE).vocab))


@pytest.fixture(scope="module")
def bee() -> CpmBeeForCausalLM:
    """CPM-Bee with the generation configuration that its Hub repositories have."""
    golden = Golden(PRUNED_CASE)
    model = CpmBeeForCausalLM.from_pretrained(
        None,
        config=CpmBeeConfig(**golden.llm_config),
        state_dict=load_state_dict(golden.weights),
        dtype=torch.float32,
    ).eval()
    model.generation_config = GenerationConfig(num_beams=3, max_length=100, pad_token_id=0)
    return model


# ------------------------------------------------------------------------------------------------------------- CPM-Bee


def test_answers_are_those_of_the_search(bee, tokenizer):
    """All documents with all parameters given: token for token the golden data's."""
    for case in Golden(PRUNED_CASE).expected["documents"]:
        options = reference_options(case["generate"])
        options["max_new_tokens"] += 2  # here they are all that is decoded
        assert [document["<ans>"] for document in bee.generate(case["documents"], tokenizer, **options)] == case[
            "results"
        ]


def test_defaults_are_the_hubs(bee, tokenizer):
    before = copy.deepcopy(DOCUMENTS)
    filled = bee.generate(DOCUMENTS, tokenizer)
    assert DOCUMENTS == before
    assert filled == bee.fill(DOCUMENTS, tokenizer, num_beams=3, max_new_tokens=99, **HUB_DEFAULTS)
    assert [list(document) for document in filled] == [list(document) for document in DOCUMENTS]
    assert bee.generate(DOCUMENTS[0], tokenizer) == filled[:1]
    assert bee.generate(data_list=DOCUMENTS[0], tokenizer=tokenizer) == filled[:1]
    assert bee.generate([], tokenizer) == []


def test_unreached_slots_are_none(bee, tokenizer):
    (filled,) = bee.generate(DOCUMENTS[1], tokenizer, max_new_tokens=3, min_new_tokens=3)
    assert filled["<ans>"] == {"one": {"p": filled["<ans>"]["one"]["p"], "q": None}, "two": None}
    assert filled["<ans>"]["one"]["p"] and filled["input"] == {"x": "月"}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_lengths_are_exact(bee, tokenizer, num_beams):
    """Of the answer, whatever the prompt's length; one slot, so that every token but the end is in it."""
    for wanted, kwargs in ((5, {"max_new_tokens": 5}), (6, {"max_length": 5})):
        least = {"min_length" if "max_length" in kwargs else "min_new_tokens": wanted}
        decoding = document_decoding(bee.generation_config, {**kwargs, **least, "num_beams": num_beams})
        assert (decoding.max_new_tokens, decoding.last_step, decoding.min_new_tokens) == (wanted, wanted - 1, wanted)
        encoded = tokenizer.encode_document(DOCUMENTS[0])
        inputs = tokenizer.collate([encoded.prompt()], return_tensors="pt")
        (result,) = bee.reference_search(inputs, [[encoded.answer_slots[0].segment_id]], decoding)
        assert result.num_tokens == len(result.token_ids[0]) == wanted


def test_the_answer_does_not_end_before_its_least_length(bee, tokenizer):
    ends = copy.deepcopy(bee)
    with torch.no_grad():  # every answer would end at once
        ends.lm_head = torch.nn.Linear(bee.config.hidden_size, bee.config.vocab_size)
        ends.lm_head.weight.copy_(bee.lm_head.weight)
        ends.lm_head.bias.zero_()[bee.config.eos_token_id] = 100.0
    assert ends.generate(DOCUMENTS[0], tokenizer)[0]["<ans>"] == ""
    (filled,) = ends.generate(DOCUMENTS[0], tokenizer, min_length=4)
    assert len(tokenizer.encode_text(filled["<ans>"])[0]) == 4


def test_a_penalty_sees_what_is_generated_alone(bee, tokenizer):
    """The prompt's own words cost nothing, as in the search that has no prompt to look at."""
    document = {"input": "方 blue 9", "<ans>": ""}
    options = {"repetition_penalty": 1.5, "max_new_tokens": 12}
    plain = bee.generate(document, tokenizer, **options)
    search = bee.fill([document], tokenizer, num_beams=3, **{**HUB_DEFAULTS, **options, "max_new_tokens": 10})
    assert plain == search and plain != bee.generate(document, tokenizer, max_new_tokens=12)


@pytest.mark.parametrize(
    ("defaults", "given", "expected"),
    [
        ({}, {}, {"num_beams": 3, "max_new_tokens": 101}),
        ({"num_beams": 1, "max_new_tokens": 7}, {}, {"num_beams": 1, "max_new_tokens": 7}),
        ({"num_beams": 5, "max_length": 7}, {"num_beams": 2}, {"num_beams": 2, "max_new_tokens": 8}),
        ({"max_length": 7}, {"max_new_tokens": 3}, {"max_new_tokens": 3}),
        ({"length_penalty": 0.5, "repetition_penalty": 1.2, "min_length": 2}, {"do_sample": False},
         {"length_penalty": 0.5, "repetition_penalty": 1.2, "min_new_tokens": 2}),
    ],
)  # fmt: skip
def test_what_a_call_asks_for(defaults, given, expected):
    assert document_decoding(GenerationConfig(**defaults), given) == DocumentDecodingConfig(**expected)
    for config in (defaults, GenerationConfig(**defaults)):
        assert document_decoding(GenerationConfig(), given, config) == DocumentDecodingConfig(**expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sample": True}, 'which has no do_sample; .*mode="generate"'),
        ({"streamer": object(), "top_p": 0.5}, "which has no streamer, top_p"),
        ({"generation_config": GenerationConfig(do_sample=True)}, "which has no do_sample"),
        ({"max_length": 3, "max_new_tokens": 3}, "max_new_tokens and max_length say the same"),
        ({"min_length": 9, "max_new_tokens": 3}, r"min_new_tokens \(9\) is more than max_new_tokens \(3\)"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
        ({"extension_mask": torch.ones(1, 1)}, "which has no extension_mask"),
    ],
)
def test_arguments_without_an_effect_are_refused(bee, tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        bee.generate(DOCUMENTS, tokenizer, **given)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("今天天气", "not text: model.generate"),
        (["今天天气"], "Document 0 is a dict of strings or dicts, got a str"),
        ({"input": "a"}, "Document 0 has no answer to fill"),
        ([DOCUMENTS[0], {"input": "a", "<ans>": "b"}], "Document 1 has text at <ans>"),
        ([DOCUMENTS[0], {"input": "a < b", "<ans>": ""}], "Document 1: The document's text at input"),
        ({"input_ids": torch.zeros(1, 1)}, r"model.generate\(\*\*inputs\)"),
    ],
)
def test_what_is_no_document_is_one_clear_error(bee, tokenizer, documents, message):
    with pytest.raises(ValueError, match=message):
        bee.generate(documents, tokenizer)
    for missing in ((), (GenerationConfig(),)):
        with pytest.raises(ValueError, match=r"needs the CpmBeeTokenizer of the model, got|not text|by their names"):
            bee.generate(documents, *missing)


# --------------------------------------------------------------------------------------------------------- VisCPM-Chat


def questions(golden: Golden, chat, indices=(0, 1, 2)):
    """Golden questions as the model card asks them, with their images."""
    placeholders = chat.processor.tokenizer.unk_token * chat.model.query_num
    cases = [golden.expected["answers"][index] for index in indices]
    cases = [case for case in cases if case["image"] is not None]
    documents = [
        {"context": "", "question": case["turns"][0]["question"], "image": placeholders, "<ans>": ""} for case in cases
    ]
    return cases, documents, [Image.open(golden.image(case["image"])).convert("RGB") for case in cases]


def test_chat_answers_as_the_reference(golden, chat):
    model, tokenizer, processor = chat.model, chat.processor.tokenizer, chat.processor.image_processor
    cases, documents, images = questions(golden, chat, range(len(golden.expected["answers"])))
    for case, document, image in zip(cases, documents, images, strict=True):
        options = reference_options(case["generate"])
        options["max_new_tokens"] += 2
        (filled,) = model.generate([document], tokenizer, processor, image, **options)
        assert filled == {**document, "<ans>": case["turns"][0]["answer"]}


def test_several_questions_and_images(golden, chat):
    model, tokenizer = chat.model, chat.processor.tokenizer
    _, documents, images = questions(golden, chat)
    documents.insert(1, {"context": "", "question": "颜色", "<ans>": ""})
    alone = [
        model.generate(document, tokenizer, chat.processor, image, max_new_tokens=6)[0]
        for document, image in zip(documents, [images[0], None, *images[1:]], strict=True)
    ]
    for given in (images, [images[0], [], *images[1:]]):
        assert model.generate(documents, tokenizer, chat.processor, given, max_new_tokens=6) == alone
    assert alone[1] == model.fill([documents[1]], tokenizer, max_new_tokens=4, num_beams=3, **HUB_DEFAULTS)[0]


def test_images_and_placeholders_have_to_match(golden, chat):
    _, documents, images = questions(golden, chat)
    model, tokenizer, processor = chat.model, chat.processor.tokenizer, chat.processor.image_processor
    for given in (None, images[:-1], [*images, images[0]]):
        with pytest.raises(ValueError, match="image placeholders"):
            model.generate(documents, tokenizer, processor, given)
    with pytest.raises(ValueError, match="needs the model's image processor"):
        model.generate(documents, tokenizer, None, images)
    with pytest.raises(ValueError, match="Document 0: .*image field"):
        model.generate([{**documents[0], "image": "<unk>"}], tokenizer, processor, images[:1])


# ------------------------------------------------------------------------------------------------------------ training


def test_prepare_for_finetune_is_the_references_loss(golden, chat):
    """Without an image, which the documents of language models have none of: the processor's labels and loss."""
    data = [
        {"input": "红色的圆形 is", "<ans>": "蓝 🙂"},
        {"input": "a", "more": {"k": "月"}, "<ans>": {"x": "b", "y": {"z": "c c"}}},
    ]
    bee = CpmBeeForCausalLM(chat.model.config.text_config)
    bee.load_state_dict(
        {
            name.replace("language_model.", ""): tensor
            for name, tensor in chat.model.state_dict().items()
            if "language_model" in name or "lm_head" in name
        }
    )
    tokenizer = chat.processor.tokenizer
    encoded = tokenizer.prepare_for_finetune(data, max_length=512)
    loss = bee(**encoded).loss
    expected = chat.processor(text=data, return_labels=True, padding_side="right", return_tensors="pt")
    assert torch.equal(encoded["labels"], expected["labels"])
    assert torch.equal(loss, bee(**{name: expected[name] for name in encoded}).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in bee.parameters())
    counts, losses = [], []
    for document in data:
        alone = tokenizer.prepare_for_finetune(document)
        counts.append((alone["labels"] != -100).sum())
        losses.append(bee(**alone).loss * counts[-1])
    torch.testing.assert_close(loss, sum(losses) / sum(counts), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "needs at least one document"),
        ([{"input": "a", "<ans>": "b"}, {"input": "a", "<ans>": ""}], "Document 1 has no answer to learn"),
        ({"input": "a"}, "Document 0 has no answer to learn"),
        ({"input": "a" * 20, "<ans>": "b"}, r"Document 0 has \d\d tokens, more than max_length \(16\)"),
        ({"input": "a < b", "<ans>": "b"}, "Document 0: The document's text at input"),
    ],
)
def test_data_that_nothing_is_learned_of(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.prepare_for_finetune(data, max_length=16)


# --------------------------------------------------------------------------------------------------------- device maps


def test_dispatch_with_todays_class_names(bee, tokenizer, tmp_path, caplog):
    expected = bee.generate(DOCUMENTS, tokenizer, max_new_tokens=4)
    sizes = compute_module_sizes(bee)
    room = sizes["model.embed_tokens"] + sizes["model.position_bias"] + int(1.7 * sizes["model.layers.0"])
    for names, divides in ((["CpmBeeDecoderLayer"], False), (["CpmBeeTransformerBlock"], True)):
        model = copy.deepcopy(bee)
        device_map = infer_auto_device_map(model, {"cpu": room, "disk": 10**9}, no_split_module_classes=names)
        assert set(device_map.values()) == {"cpu", "disk"}
        caplog.clear()
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            model = dispatch_model(model, device_map, offload_dir=tmp_path / names[0])
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
        told = [record.getMessage() for record in caplog.records if "CpmBeeTransformerBlock" in record.getMessage()]
        assert bool(told) == divides and all('no_split_module_classes=["CpmBeeDecoderLayer"]' in it for it in told)
        assert model.generate(DOCUMENTS, tokenizer, max_new_tokens=4) == expected


@pytest.mark.parametrize("second", [1, "cpu"])
def test_a_layer_on_two_devices_is_one_clear_error(bee, second):
    device_map = {"model.embed_tokens": 0, "model.layers.0.self_attn": 1 if second == "cpu" else 0,
                  "model.layers.0.mlp": second}  # fmt: skip
    with pytest.raises(ValueError, match=r"divides 1 layers \(model.layers.0: .*CpmBeeDecoderLayer.*TransformerBlock"):
        copy.deepcopy(bee).hf_device_map = device_map
