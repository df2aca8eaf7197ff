"""Decoding with graphs of fixed shapes: the tokens of ordinary decoding, and one graph for every shape class."""

import copy
import shutil

import pytest
import torch
from support import CHAT_CASES, Golden, message, reference_options
from torch._dynamo.utils import counters
from transformers import LogitsProcessor

from viscpm_hf import CpmBeeForCausalLM, VisCPMChat
from viscpm_hf.modeling import fast_decoding_cpm_bee
from viscpm_hf.modeling.fast_decoding import compilation_problem
from viscpm_hf.modeling.fast_decoding_cpm_bee import DecodingGraph, DecodingShape, room_for


QUESTIONS = ("图片是什么颜色？", "describe the picture 🙂 and ~ and 🙂, in a much longer question 😀", "^")


@pytest.fixture
def uncompiled(monkeypatch):
    """As on a machine without a compiler: the same steps over the same buffers, without the time for compiling."""
    monkeypatch.setattr(fast_decoding_cpm_bee, "compilation_problem", lambda model, device: "not in this test")


@pytest.fixture
def few_places(monkeypatch):
    """Classes so small that an answer passes through several."""
    monkeypatch.setattr(fast_decoding_cpm_bee, "LEAST_PLACES", 4)


@pytest.fixture
def traced(monkeypatch):
    """Compiles every class, but with the backend that takes no time; counts graphs, and allows no break in them."""
    monkeypatch.setattr(fast_decoding_cpm_bee, "BACKEND", "eager")
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def encode(processor, golden, questions=QUESTIONS):
    conversations = [
        [message("user", question, *([str(golden.image(index))] if index < 2 else []))]
        for index, question in enumerate(questions)
    ]
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )


# ----------------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("num_beams", [1, 3])
def test_reference_turns_are_the_reference_s(golden, own_chat, uncompiled, few_places, num_beams):
    """All golden conversations: several turns, unknown characters, extension tokens in answers."""
    for case in golden.expected["answers"]:
        options = {**reference_options(case["generate"]), "num_beams": num_beams}
        context, features = "", None
        image = None if case["image"] is None else str(golden.image(case["image"]))
        for turn in case["turns"]:
            plain = own_chat.ask(image, turn["question"], context, features, **options)
            fast = own_chat.ask(image, turn["question"], context, features, fast=True, **options)
            assert (fast.answer, fast.context) == (plain.answer, plain.context)
            image, context, features = None, plain.context, plain.vision_hidden_states
    assert len(own_chat.model.fast_decoder.graphs) > 1


def test_documents_with_several_answers(golden, own_chat, uncompiled):
    model, tokenizer = own_chat.model, own_chat.processor.tokenizer
    documents = [document for case in golden.expected["documents"] for document in case["documents"]]
    for mode, options in (("reference", {"num_beams": 3}), ("generate", {})):
        plain = model.fill(documents, tokenizer, mode=mode, max_new_tokens=8, **options)
        assert model.fill(documents, tokenizer, mode=mode, max_new_tokens=8, fast=True, **options) == plain


@pytest.mark.parametrize(
    "generation",
    [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}],
    ids=["greedy", "penalty", "sampling"],
)
def test_generate(golden, own_chat, uncompiled, few_places, generation):
    model, inputs = own_chat.model, encode(own_chat.processor, golden)
    torch.manual_seed(0)
    plain = model.generate(**inputs, max_new_tokens=20, **generation)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, fast=True, **generation), plain)
    assert {shape.rows for shape, *_ in model.fast_decoder.graphs} == {4 if plain.shape[0] == 3 else 8}


def test_step_logits(golden, own_chat, uncompiled):
    inputs = encode(own_chat.processor, golden)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    plain = own_chat.model.generate(**inputs, **options)
    fast = own_chat.model.generate(**inputs, fast=True, **options)
    for ours, theirs in zip(fast.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fast.past_key_values is None


def test_text_alone(golden, tmp_path, uncompiled):
    """A CPM-Bee without vision, and ids without any structure."""
    model = CpmBeeForCausalLM.from_pretrained(golden.write_layout(tmp_path, "cpm-bee"))
    ids = torch.tensor([[6, 40, 41, 42]])
    assert torch.equal(
        model.generate(ids, max_new_tokens=10, fast=True), model.generate(ids, max_new_tokens=10, fast=False)
    )


def test_only_strings_of_the_own_prompt(golden, own_chat, uncompiled):
    """Slots that a row doesn't own are closed, as in ordinary decoding."""
    widths = []

    class Width(LogitsProcessor):
        def __call__(self, input_ids, scores):
            widths.append(torch.isfinite(scores).sum(-1).tolist())
            return scores

    inputs = encode(own_chat.processor, golden)
    own_chat.model.generate(**inputs, max_new_tokens=3, fast=True, logits_processor=[Width()])
    num_words = own_chat.processor.tokenizer.num_words
    # `<unk>` is a word that is open to rows with an unknown string, and its further numbers are slots.
    owned = [num_words - 1 + len(strings) for strings in inputs.extension_strings]
    assert widths == [owned] * len(widths)


# -------------------------------------------------------------------------------------------------------------- graphs


def test_one_graph_for_a_class(golden, own_chat, traced):
    """Other prompts, lengths, images, seeds and answers of the class add none, nor do batches up to its size."""
    model = own_chat.model
    for question in QUESTIONS:
        own_chat.ask(None, question, fast=True, max_new_tokens=6)
    assert traced() == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        own_chat.ask(str(golden.image(0)), "图片", fast=True, max_new_tokens=12, temperature=1.5)

    for questions in (QUESTIONS, (*QUESTIONS, "four")):
        model.generate(**encode(own_chat.processor, golden, questions), max_new_tokens=5, fast=True)
    assert traced() == 2  # four rows of one query
    model.generate(**encode(own_chat.processor, golden), max_new_tokens=5, fast=True, do_sample=True, top_k=3)
    own_chat.ask(None, "one", mode="generate", fast=True, max_new_tokens=3, min_new_tokens=3)
    assert traced() == 3


def test_an_answer_moves_on_to_larger_classes(golden, own_chat, traced, few_places):
    plain = own_chat.ask(str(golden.image(0)), "图片", mode="generate", max_new_tokens=24, min_new_tokens=24)
    options = {"mode": "generate", "max_new_tokens": 24, "min_new_tokens": 24, "fast": True}
    for _ in range(2):
        assert own_chat.ask(str(golden.image(0)), "图片", **options).answer == plain.answer
        places = sorted(shape.places for shape, *_ in own_chat.model.fast_decoder.graphs)
        assert traced() == len(places) > 1


def test_compiled_in_parts(golden, own_chat, traced, monkeypatch):
    """As for GPUs, which capture the step: the graph of one layer serves all of them."""
    whole = DecodingGraph._compile
    monkeypatch.setattr(DecodingGraph, "_compile", lambda graph, in_parts: whole(graph, True))
    assert len(own_chat.model.language_model().layers) > 1
    options = {"max_new_tokens": 8, "num_beams": 1}
    plain = own_chat.ask(str(golden.image(0)), QUESTIONS[1], **options).answer
    for _ in range(2):
        assert own_chat.ask(str(golden.image(0)), QUESTIONS[1], fast=True, **options).answer == plain
        assert traced() == 3  # before, within and after the layers


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
def test_compiled():
    golden = Golden(CHAT_CASES[0])
    chat = golden.load_chat(fast=True)
    assert compilation_problem(chat.model, chat.device) is None
    for mode in ("reference", "generate"):
        pieces = []
        options = {"mode": mode, "max_new_tokens": 16, "num_beams": 1}
        fast = chat.ask(str(golden.image(0)), QUESTIONS[1], **options, **{"on_text": pieces.append} if pieces else {})
        assert fast.answer == golden.load_chat().ask(str(golden.image(0)), QUESTIONS[1], **options).answer
    assert len(chat.model.fast_decoder.graphs) == 1  # one beam of the search is one query of `generate`


@pytest.mark.parametrize(
    ("places", "room"),
    [(1, 256), (256, 256), (257, 512), (513, 768), (769, 1024), (1025, 1536), (1537, 2048), (2049, 3072)],
)
def test_places(places, room):
    assert room_for(places) == room


def test_shape_has_room():
    shape = DecodingShape.of(rows=5, queries=3, places=300, segments=17)
    assert shape == DecodingShape(8, 3, 512, 32)
    assert DecodingShape.of(1, 1, 1, 1) == DecodingShape(1, 1, 256, 16)


# --------------------------------------------------------------------------------------------------- fused projections


def test_fused_is_not_fused(golden, own_chat, tmp_path):
    model, inputs = own_chat.model, encode(own_chat.processor, golden)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**inputs).logits
        model.fuse_projections()
        model.fuse_projections()  # nothing is left to do
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    assert not any("q_proj" in name or "up_proj" in name.split(".") for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    model.unfuse_projections()
    for state_dict in (loaded, model.state_dict()):
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_dict.items())


def test_quantised_projections_are_not_fused(own_chat):
    projection = own_chat.model.language_model().layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)
    projection.__class__ = type("Linear8bit", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is a Linear8bit.*before quantising"):
        own_chat.model.fuse_projections()
    assert not any("qkv_proj" in name for name in own_chat.model.state_dict())


# ----------------------------------------------------------------------------------------------- the rest of the house


def test_streamed_is_not_streamed(golden, own_chat, uncompiled):
    pieces = []
    options = {"mode": "generate", "max_new_tokens": 12, "fast": True}
    turn = own_chat.ask(str(golden.image(1)), QUESTIONS[0], on_text=pieces.append, **options)
    assert "".join(pieces) == turn.answer == own_chat.ask(str(golden.image(1)), QUESTIONS[0], **options).answer


def test_loaded_fast(golden, uncompiled):
    chat, plain = golden.load_chat(fast=True), golden.load_chat()
    names = [name for name in chat.model.state_dict() if "layers.0." in name]
    assert any("qkv_proj" in name for name in names) and any("gate_up_proj" in name for name in names)
    assert (
        chat.ask(None, QUESTIONS[1], max_new_tokens=8).answer == plain.ask(None, QUESTIONS[1], max_new_tokens=8).answer
    )
    assert chat.model.fast_decoder.graphs
    chat.model.fast_decoder.graphs.clear()
    chat.ask(None, QUESTIONS[1], max_new_tokens=2, fast=False)
    assert not chat.model.fast_decoder.graphs


def test_changed_weights_get_new_graphs(own_chat, uncompiled):
    def ask(fast):
        return own_chat.ask(None, QUESTIONS[0], max_new_tokens=8, fast=fast).answer

    ask(True)
    (graph,) = own_chat.model.fast_decoder.graphs.values()
    ask(True)
    assert list(own_chat.model.fast_decoder.graphs.values()) == [graph]
    own_chat.model.to(torch.bfloat16).float()
    assert ask(True) == ask(False)
    assert list(own_chat.model.fast_decoder.graphs.values()) != [graph]


def test_inference_mode_and_none_in_turns(own_chat, uncompiled):
    plain = own_chat.ask(None, QUESTIONS[0], max_new_tokens=8).answer
    with torch.inference_mode():
        assert own_chat.ask(None, QUESTIONS[0], max_new_tokens=8, fast=True).answer == plain
    assert own_chat.ask(None, QUESTIONS[0], max_new_tokens=8, fast=True).answer == plain


def test_a_copy_has_graphs_of_its_own(own_chat, uncompiled):
    own_chat.ask(None, "^", max_new_tokens=2, fast=True)
    twin = copy.deepcopy(own_chat.model)
    assert own_chat.model.fast_decoder.graphs and not twin.fast_decoder.graphs


def test_goes_without_a_compiler(own_chat, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in compilation_problem(own_chat.model, own_chat.device)
    assert (
        own_chat.ask(None, "^", max_new_tokens=4, fast=True).answer == own_chat.ask(None, "^", max_new_tokens=4).answer
    )


def test_a_failed_compilation_is_said_and_gone_without(own_chat, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("this compiler is broken")

    monkeypatch.setattr(fast_decoding_cpm_bee, "BACKEND", backend)
    torch.compiler.reset()
    messages = []
    monkeypatch.setattr(fast_decoding_cpm_bee.logger, "warning", messages.append)
    turn = own_chat.ask(None, "^", max_new_tokens=4, fast=True)
    assert turn.answer == own_chat.ask(None, "^", max_new_tokens=4).answer
    assert len(messages) == 1 and "this compiler is broken" in messages[0]


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        ({"num_beams": 3}, "not for beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "not for assisted_generation"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fast_decoding_does_not_do(golden, own_chat, uncompiled, generation, reason):
    with pytest.raises(ValueError, match=reason):
        own_chat.model.generate(**encode(own_chat.processor, golden), max_new_tokens=4, fast=True, **generation)


def test_placed_models_are_refused(golden, own_chat, tmp_path):
    own_chat.model.language_model().layers[0].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match=r"layers\.0 has hooks.*fast=False"):
        own_chat.ask(None, "^", fast=True)
    folder = tmp_path / "offload"
    folder.mkdir()
    with pytest.raises(ValueError, match="one device"):
        VisCPMChat(golden.weights, device_map={"": "disk"}, offload_folder=folder, fast=True)
