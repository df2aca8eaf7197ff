"""`generate`, `fill` and the reference decoding of a batch: every way of decoding gives what plain decoding gives."""

from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from support import message, reference_options
from torch._dynamo.utils import counters
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from viscpm_hf import CpmBeeForCausalLM, CpmBeeTokenizer, ReferenceDecodingConfig
from viscpm_hf.modeling.processing_viscpm_chat import ChatPrompt


ROWS = (
    ("图片是什么颜色？", 0),
    ("describe the picture 🙂 and ~ and 🙂", 1),
    ("^", None),
    ("a literal <unk>, <image> and << in a much longer question 😀 than the others", 2),
)
LENGTH = 12


def encode(processor, golden, rows=ROWS):
    conversations = [
        [message("user", question, *([] if image is None else [str(golden.image(image))]))] for question, image in rows
    ]
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )


def answers(model, processor, inputs, **generation) -> list[str]:
    sequences = model.generate(**inputs, **{"max_new_tokens": LENGTH, **generation})
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, extension_strings=inputs.extension_strings)


@contextmanager
def calls_of(module):
    """The shapes of the first argument of every call of the module."""
    shapes = []

    def note(module, args, kwargs):
        shapes.append(tuple((args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))).shape))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "generation",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "penalty", "best two"],
)
def test_batch_is_its_rows(golden, model, processor, generation):
    together = answers(model, processor, encode(processor, golden), **generation)
    alone = [
        answer for row in ROWS for answer in answers(model, processor, encode(processor, golden, [row]), **generation)
    ]
    assert [trimmed(answer) for answer in together] == [trimmed(answer) for answer in alone]
    assert len(set(together)) > 1


def trimmed(answer: str) -> str:
    """Without what follows the end in a row that ends before others."""
    return answer.split("</s>")[0].split("<pad>")[0]


def test_reference_batch_is_its_rows(golden, model, tokenizer):
    """Documents of all golden cases at once: different lengths, numbers of slots and unknown strings."""
    cases = golden.expected["documents"]
    documents = [document for case in cases for document in case["documents"]]
    options = {"num_beams": 3, "max_new_tokens": 8}
    together = model.fill(documents, tokenizer, **options)
    assert together == [model.fill([document], tokenizer, **options)[0] for document in documents]
    assert together == model.fill(documents, tokenizer, batch_size=2, **options)


def test_reference_batch_with_images_is_its_rows(golden, model, processor):
    def search(rows):
        encoded = [
            processor.encode_prompt(
                ChatPrompt(
                    {"context": "", "question": processor.tokenizer.escape(question), "<ans>": ""}, image is not None
                )
            )
            for question, image in rows
        ]
        inputs = processor.tokenizer.collate([document.prompt() for document in encoded], return_tensors="pt")
        images = [str(golden.image(image)) for _, image in rows if image is not None]
        if images:
            inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        slots = [[document.answer_slots[0].segment_id] for document in encoded]
        results = model.reference_search(inputs, slots, ReferenceDecodingConfig(max_new_tokens=LENGTH))
        return [
            processor.tokenizer.decode(result.token_ids[0], extension_table=strings)
            for result, strings in zip(results, inputs.extension_strings, strict=True)
        ]

    assert search(ROWS) == [search([row])[0] for row in ROWS]


def test_only_strings_of_the_own_prompt_can_be_answered(golden, model, processor):
    """Even if the model wants nothing else: the columns of other rows' strings and of a free `<unk>` are closed."""
    inputs, known = encode(processor, golden, [*ROWS, ("cat", None)]), processor.tokenizer.num_words

    def want_extensions(input_ids, scores):
        wanted = torch.full_like(scores, -1e4)
        wanted[:, known:] = 0.0
        wanted[:, processor.tokenizer.unk_token_id] = 1.0
        return torch.where(torch.isinf(scores), scores, wanted)

    sequences = model.generate(**inputs, max_new_tokens=2, logits_processor=[want_extensions])
    for row, strings in enumerate(inputs.extension_strings):
        new = sequences[row, inputs["input_ids"].shape[1] :].tolist()
        if strings:
            assert set(new) <= set(strings)
        else:
            assert all(token < known and token != processor.tokenizer.unk_token_id for token in new)
    assert inputs.extension_strings[-1] == {}


# --------------------------------------------------------------------------------------------------- caches and graphs


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "generation", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"]
)
def test_cache_changes_no_answer(golden, model, processor, num_beams, generation):
    inputs = encode(processor, golden)
    expected = answers(model, processor, inputs, num_beams=num_beams)
    assert answers(model, processor, inputs, num_beams=num_beams, **generation) == expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_static_decoding_is_one_graph(golden, own_chat, processor, backend):
    """All steps of two requests of one shape run in one graph without breaks."""
    torch.compiler.reset()
    model, inputs = own_chat.model, encode(processor, golden)
    expected = answers(model, processor, inputs)
    counters.clear()
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only
    for _ in range(2):
        compiled = answers(model, processor, inputs, cache_implementation="static", compile_config=compile_config)
        assert compiled == expected
    assert counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------------------------------------------- images and beams


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_image_is_encoded_once(golden, model, processor, generation, use_cache):
    inputs = encode(processor, golden, ROWS[:2])
    with calls_of(model.model.vision_tower) as shapes:
        answers(model, processor, inputs, use_cache=use_cache, max_new_tokens=4, **generation)
    assert shapes == [tuple(inputs["pixel_values"].shape)]


def test_reference_reads_prompt_and_image_once(golden, chat):
    with calls_of(chat.model.model.vision_tower) as images, calls_of(chat.model.model.language_model) as prompts:
        chat.chat(str(golden.image(0)), "颜色", num_beams=3, max_new_tokens=4)
    assert [shape[0] for shape in images] == [1]
    assert prompts[0][0] == 1
    assert prompts[0][1] > 3
    assert {shape[:2] for shape in prompts[1:]} == {(1, 3)}


@pytest.mark.parametrize("mode", ["reference", "generate"])
def test_encoded_image_handed_on_is_the_image(golden, chat, mode):
    image = str(golden.image(1))
    options = {"mode": mode, "max_new_tokens": LENGTH}
    first = chat.ask(image, "图片", **options)
    again = chat.ask(image, "颜色", first.context, **options)
    with calls_of(chat.model.model.vision_tower) as shapes:
        handed_on = chat.ask(None, "颜色", first.context, first.vision_hidden_states, **options)
    assert not shapes
    assert (handed_on.answer, handed_on.context) == (again.answer, again.context)


def test_several_answers_to_an_image(golden, model, processor):
    inputs = encode(processor, golden)
    sampled = answers(model, processor, inputs, do_sample=True, temperature=1.5, num_return_sequences=3)
    assert len(sampled) == 3 * len(ROWS)
    assert len(set(sampled)) > len(ROWS)
    greedy = answers(model, processor, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert greedy == [answer for answer in answers(model, processor, inputs) for _ in range(3)]


def test_sampling_with_a_seed_repeats(golden, model, processor):
    inputs = encode(processor, golden)
    torch.manual_seed(1)
    first = answers(model, processor, inputs, do_sample=True, temperature=1.5)
    assert answers(model, processor, inputs, do_sample=True, temperature=1.5) != first
    torch.manual_seed(1)
    assert answers(model, processor, inputs, do_sample=True, temperature=1.5) == first


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("row", ROWS, ids=["plain", "unknown strings", "no image", "literals"])
def test_streamed_is_not_streamed(golden, model, processor, row):
    inputs = encode(processor, golden, [row])
    (expected,) = answers(model, processor, inputs)
    streamer = TextIteratorStreamer(
        processor.tokenizer, skip_prompt=True, timeout=60, extension_table=inputs.extension_strings[0]
    )
    generation = {**inputs, "max_new_tokens": LENGTH, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=generation)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_text_streamer_prints_the_answer(golden, model, processor, capsys):
    inputs = encode(processor, golden, ROWS[:1])
    (expected,) = answers(model, processor, inputs)
    answers(model, processor, inputs, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == expected + "\n"


# ------------------------------------------------------------------------------------------------ the rest of generate


def test_prompt_lookup_is_greedy(golden, model, processor):
    for row in ROWS:
        inputs = encode(processor, golden, [row])
        assert answers(model, processor, inputs, prompt_lookup_num_tokens=3) == answers(model, processor, inputs)


def test_stopping_criteria(golden, model, processor):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= length + 3)

    inputs = encode(processor, golden)
    length = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, max_new_tokens=LENGTH, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert sequences.shape[1] == length + 3
    assert torch.equal(sequences, model.generate(**inputs, max_new_tokens=LENGTH)[:, : length + 3])


def test_stop_string(golden, model, processor):
    inputs = encode(processor, golden, ROWS[:1])
    whole = model.generate(**inputs, max_new_tokens=LENGTH)[0, inputs["input_ids"].shape[1] :].tolist()
    last = whole[len(whole) // 2]
    stop, first = processor.tokenizer.decode([last]), whole.index(last)
    stopped = model.generate(**inputs, max_new_tokens=LENGTH, stop_strings=[stop], tokenizer=processor.tokenizer)
    assert stopped[0, inputs["input_ids"].shape[1] :].tolist() == whole[: first + 1]


def test_default_length_and_tokens(model, saved_folder):
    for defaults in (model.generation_config, type(model).from_pretrained(saved_folder).generation_config):
        assert defaults.max_new_tokens == 512
        assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (6, 7, 0)
        assert not defaults.do_sample
        assert defaults.num_beams in (None, 1)


def test_prompt_in_pieces_is_refused(golden, model, processor):
    with pytest.raises(ValueError, match="prefill_chunk_size.*both directions"):
        model.generate(**encode(processor, golden), prefill_chunk_size=8)


# ---------------------------------------------------------------------------------------------------------------- fill


@pytest.fixture
def cpm_bee(golden, tmp_path) -> tuple[CpmBeeForCausalLM, CpmBeeTokenizer]:
    folder = golden.write_layout(tmp_path, "cpm-bee")
    return CpmBeeForCausalLM.from_pretrained(folder), CpmBeeTokenizer.from_pretrained(folder)


def test_fill_by_generate(golden, cpm_bee):
    model, tokenizer = cpm_bee
    documents = [
        {"input": "the ~ river", "<ans>": {"a": "", "b": ""}},
        {"input": "春山 🙂 and a longer input", "options": {"<option_0>": "红"}, "<ans>": ""},
    ]
    filled = model.fill(documents, tokenizer, mode="generate", max_new_tokens=4)
    assert [list(document) for document in filled] == [list(document) for document in documents]
    assert all(filled[0]["<ans>"][name] for name in "ab")
    assert filled == [
        model.fill([document], tokenizer, mode="generate", max_new_tokens=4)[0] for document in documents
    ]
    assert documents[0]["<ans>"] == {"a": "", "b": ""}


def test_second_slot_sees_the_first_answer(golden, cpm_bee):
    """As if the first answer had been given: its `</s>` is not fed, as in the reference."""
    model, tokenizer = cpm_bee
    document = {"input": "the ~ river", "<ans>": {"a": "", "b": ""}}
    (filled,) = model.fill([document], tokenizer, mode="generate", max_new_tokens=4)
    given = {"input": "the ~ river", "<ans>": {"a": filled["<ans>"]["a"], "b": ""}}
    inputs = tokenizer.collate([tokenizer.encode_document(given).prompt(open_slot=1)], return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, extension_table=inputs.extension_strings[0]) == filled["<ans>"]["b"]
    other = {"input": "the ~ river", "<ans>": {"a": "another answer", "b": ""}}
    changed = tokenizer.collate([tokenizer.encode_document(other).prompt(open_slot=1)], return_tensors="pt")
    with torch.no_grad():
        first, second = (model(**entry).logits[0, -1] for entry in (inputs, changed))
    assert not torch.allclose(first, second, atol=1e-3)


def test_one_reference_beam_is_greedy(golden, cpm_bee):
    model, tokenizer = cpm_bee
    for case in golden.expected["documents"]:
        for document in case["documents"]:
            if not isinstance(document["<ans>"], str):
                continue
            plain = {"num_beams": 1, "temperature": 1.0, "repetition_penalty": 1.0}
            (reference,) = model.fill([document], tokenizer, max_new_tokens=6, **plain)
            # The reference counts neither the first token nor the last.
            (greedy,) = model.fill([document], tokenizer, mode="generate", max_new_tokens=8)
            assert reference == greedy


@pytest.mark.parametrize(
    ("documents", "options", "complaint"),
    [
        ({"<ans>": ""}, {}, "list of documents; put a single one into a list"),
        (["text"], {}, "Document 0: .*got str"),
        ([{"<ans>": ""}, {"a": 3}], {}, "Document 1: .*got int at a"),
        ([{}], {}, "Document 0: .*empty dict"),
        ([{"input": "x"}], {}, "Document 0 has no answer to fill"),
        ([{"<ans>": {"a": "", "b": "done"}}], {}, "Document 0 has text at <ans> > b, which is to be filled"),
        ([{"<ans>": ""}], {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ([{"<ans>": ""}], {"max_new_tokens": -5}, "max_new_tokens must be .*got -5"),
        ([{"<ans>": ""}], {"max_new_tokens": 1.5}, "max_new_tokens must be .*got 1.5"),
        ([{"<ans>": ""}], {"num_beams": 0}, "num_beams must be .*got 0"),
        ([{"<ans>": ""}], {"mode": "generate", "num_beams": 0}, "num_beams must be .*got 0"),
        ([{"<ans>": ""}], {"mode": "generate", "max_new_tokens": 0}, "max_new_tokens.* must be .*0"),
        ([{"<ans>": ""}], {"mode": "generate", "max_new_tokens": -2}, "max_new_tokens.* must be .*-2"),
        ([{"<ans>": ""}], {"temperature": 0}, "temperature must be greater than 0, got 0"),
        ([{"<ans>": ""}], {"repetition_penalty": -1}, "repetition_penalty must be greater than 0, got -1"),
        ([{"<ans>": ""}], {"top_p": 0.9}, "no parameter top_p; it has num_beams"),
        ([{"<ans>": ""}], {"mode": "best"}, '"reference" or "generate", got \'best\''),
    ],
)
def test_bad_request_is_one_clear_error(golden, model, tokenizer, documents, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        model.fill(documents, tokenizer, **options)


def test_no_documents(model, tokenizer):
    assert model.fill([], tokenizer) == []


def test_unreached_slots_are_none(golden, model, tokenizer):
    case = golden.expected["documents"][1]
    (filled,) = model.fill(case["documents"], tokenizer, **reference_options(case["generate"]))
    assert filled["<ans>"]["b"] is None
