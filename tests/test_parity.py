"""The reference implementation's inputs and outputs, through every way of loading its checkpoints."""

from dataclasses import dataclass

import pytest
import torch
from support import CHAT_LAYOUTS, CPM_BEE_LAYOUTS, Golden, reference_options, unescape
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from viscpm_hf import (
    CpmBeeConfig,
    CpmBeeForCausalLM,
    CpmBeeModel,
    CpmBeeTokenizer,
    VisCPMChat,
    VisCPMChatConfig,
    VisCPMChatForConditionalGeneration,
    VisCPMChatModel,
    VisCPMChatProcessor,
)
from viscpm_hf.checkpoints.key_matching import KeyMatcher, shape_after
from viscpm_hf.checkpoints.weight_transforms import factor_of
from viscpm_hf.families import key_maps
from viscpm_hf.modeling.token_space_cpm_bee import MASKED_LOGIT


ORIGINAL_FILE, SAVED, SAVED_IN_SHARDS = "original file", "saved", "saved in shards"
CPM_BEE_SAVED = "saved"
IMAGES = QUESTIONS = range(3)

close = {"atol": 1e-4, "rtol": 0}


@dataclass(frozen=True)
class Loaded:
    """One checkpoint as the Auto classes and as `VisCPMChat` load it."""

    model: VisCPMChatForConditionalGeneration
    processor: VisCPMChatProcessor
    chat: VisCPMChat


@pytest.fixture(scope="module", params=[ORIGINAL_FILE, *CHAT_LAYOUTS, SAVED, SAVED_IN_SHARDS])
def loaded(request, golden, tmp_path_factory) -> Loaded:
    if request.param == ORIGINAL_FILE:
        chat = golden.load_chat()
        return Loaded(chat.model, chat.processor, chat)
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param in CHAT_LAYOUTS:
        golden.write_layout(folder, request.param)
    else:
        chat = golden.load_chat()
        chat.model.save_pretrained(folder, max_shard_size="100KB" if request.param == SAVED_IN_SHARDS else "5GB")
        chat.processor.save_pretrained(folder)
    if "without model_type" in request.param:  # only our own classes know such a folder
        model = VisCPMChatForConditionalGeneration.from_pretrained(folder)
        return Loaded(model, VisCPMChatProcessor.from_pretrained(folder), VisCPMChat(folder, device="cpu"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return Loaded(model, AutoProcessor.from_pretrained(folder), VisCPMChat(folder, device="cpu"))


def question_inputs(processor, golden: Golden, index: int):
    """Inputs of a golden question as the chat template makes them; their last token is the answer's `<s>`."""
    case = golden.expected["decode_questions"][index]
    content = [
        {"type": "image", "path": str(golden.image(case["image"]))},
        {"type": "text", "text": case["question"]},
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def train_inputs(processor, golden: Golden):
    documents = [
        {"image": "<image>", "context": "", "question": case["question"], "<ans>": case["answer"].replace("<", "<<")}
        for case in golden.expected["train"]
    ]
    images = [str(golden.image(case["image"])) for case in golden.expected["train"]]
    return processor(images=images, text=documents, return_labels=True, padding_side="right", return_tensors="pt")


# --------------------------------------------------------------------------------------------------------- VisCPM-Chat


def test_tensors_are_the_original_file(golden, loaded):
    """Scaled ones rounded once, the others bit for bit; those of `VisCPMChat` and of the Auto classes alike."""
    ours, matcher = loaded.model.state_dict(), KeyMatcher(key_maps.CHAT)
    names = set()
    for name, tensor in golden.state_dict().items():
        match = matcher.match(name)
        if match is not None:
            target, entry = match
            scale = factor_of(entry.operation, tensor.shape)
            assert torch.equal(ours[target][: len(tensor)], (tensor.double() * scale).to(tensor.dtype)), name
            assert ours[target].shape == shape_after(entry.operation, tensor.shape), name
            names.add(target)
    assert set(ours) - names == {"lm_head.weight"}
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    for name, tensor in loaded.chat.model.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_vision(golden, loaded):
    for index in IMAGES:
        pixel_values = loaded.processor.image_processor(str(golden.image(index)), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixel_values[0], golden.tensors[f"image_{index}.pixel_values"], atol=1e-6, rtol=0)
        with torch.no_grad():
            outputs = loaded.model.get_image_features(pixel_values)
        for ours, name in (
            (outputs.last_hidden_state, "vision_tower"),
            (outputs.pooler_output, "vision_hidden_states"),
        ):
            torch.testing.assert_close(ours, golden.tensors[f"image_{index}.{name}"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_prompt_and_forced_decoding(golden, loaded):
    for index in QUESTIONS:
        expected = {name: golden.tensors[f"decode_{index}.{name}"] for name in ("prompt_logits", "forced_logits")}
        inputs = question_inputs(loaded.processor, golden, index)
        prompt_length = expected["prompt_logits"].shape[1]
        outputs = loaded.model(**inputs, use_cache=True)
        width = expected["prompt_logits"].shape[-1]  # the original's is the words and the prompt's extension tokens
        logits = outputs.logits[:, :prompt_length]
        torch.testing.assert_close(logits[..., :width], expected["prompt_logits"], **close)
        assert (logits[..., width:] == MASKED_LOGIT).all()
        steps, cache = [outputs.logits[:, -1]], outputs.past_key_values
        assert inputs["input_ids"].shape[1] == prompt_length + 1
        forced = golden.tensors[f"decode_{index}.forced_ids"]
        assert inputs["input_ids"][0, -1] == forced[0]
        following = {name: inputs[name] for name in ("segment_ids", "segment_relations", "extension_table")}
        for token in forced[1:]:
            outputs = loaded.model(token.reshape(1, 1), past_key_values=cache, **following)
            steps.append(outputs.logits[:, -1])
        torch.testing.assert_close(torch.stack(steps, dim=1)[..., :width], expected["forced_logits"], **close)


@torch.no_grad()
def test_forced_decoding_in_one_pass(golden, loaded):
    """The answer as a document's own text, as in training."""
    for index in QUESTIONS:
        inputs = question_inputs(loaded.processor, golden, index)
        forced = golden.tensors[f"decode_{index}.forced_ids"][None, 1:]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], forced], dim=1)
        for name in ("attention_mask", "token_type_ids", "segment_ids"):
            inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:].expand_as(forced)], dim=1)
        logits = loaded.model(**inputs).logits[:, -forced.shape[1] - 1 :]
        expected = golden.tensors[f"decode_{index}.forced_logits"]
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, **close)


def test_prompt_tokens(golden, loaded):
    known = loaded.processor.tokenizer.num_words
    for index in QUESTIONS:
        inputs = question_inputs(loaded.processor, golden, index)
        tensors = {name.removeprefix(f"decode_{index}."): tensor for name, tensor in golden.tensors.items()}
        ids, segments = inputs["input_ids"][:, :-1], inputs["segment_ids"][:, :-1]
        (begin, end) = tensors["image_bound"][0, 0]
        assert (ids[:, begin:end] == loaded.model.config.image_token_id).all()
        table = inputs["extension_table"][0]
        bases = torch.cat([table[:, 0], torch.tensor([loaded.processor.tokenizer.unk_token_id])])
        ids = ids.masked_fill(ids == loaded.model.config.image_token_id, loaded.processor.tokenizer.unk_token_id)
        is_token = ids < known
        base = torch.where(is_token, ids, bases[(ids - known).clamp(0, len(table))])
        subs = torch.cat([table[:, 1], torch.tensor([0])])
        sub = torch.where(is_token, 0, subs[(ids - known).clamp(0, len(table))])
        assert torch.equal(base, tensors["input_ids"].long())
        assert torch.equal(sub, tensors["input_id_subs"].long())
        assert torch.equal(segments, tensors["segment_ids"].long())
        assert torch.equal(1 - inputs["token_type_ids"][:, :-1], tensors["context"].long())
        assert torch.equal(inputs["segment_relations"].flatten(1), tensors["segment_rel"].long())
        table = table[table[:, 1] > 0]  # the original's has none for number 0
        assert table[:, 0].tolist() == tensors["batch_ext_table_ids"].tolist()
        assert table[:, 1].tolist() == tensors["batch_ext_table_sub"].tolist()


def test_training(golden, loaded):
    inputs, expected = train_inputs(loaded.processor, golden), golden.tensors
    targets = expected["train.target"].long()
    for row, length in enumerate(expected["train.length"].tolist()):  # ours ends with one token more, `</s>`
        assert inputs["labels"][row, 1 : length + 1].tolist() == targets[row, :length].tolist()
        assert inputs["attention_mask"][row].sum() == length + 1
    loaded.model.zero_grad()
    outputs = loaded.model(**inputs)
    torch.testing.assert_close(outputs.loss, expected["train.loss"], atol=0, rtol=1e-4)
    where = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
    width = expected["train.target_logits"].shape[-1]
    torch.testing.assert_close(outputs.logits[where][:, :width], expected["train.target_logits"], **close)

    outputs.loss.backward()
    parameters, matcher = dict(loaded.model.named_parameters()), KeyMatcher(key_maps.CHAT)
    named = {
        name.removeprefix("train.grad."): grad for name, grad in expected.items() if name.startswith("train.grad")
    }
    assert len(named) == 5
    for name, gradient in named.items():
        target, entry = matcher.match(name)
        ours = parameters[target].grad
        ours = ours[: len(gradient)] * factor_of(entry.operation, ours.shape)  # dL/dW = dL/dW' · dW'/dW
        assert (ours - gradient).norm() <= 1e-4 * gradient.norm(), name
    loaded.model.zero_grad()


def test_answers(golden, loaded):
    """Every turn; the image's encoding and the context handed on from turn to turn."""
    for case in golden.expected["answers"]:
        options, context, encoded = reference_options(case["generate"]), "", None
        for turn in case["turns"]:
            assert context == turn["context"]
            image = golden.image(case["image"]) if encoded is None else None
            answer, context, encoded = loaded.chat.chat(image, turn["question"], context, encoded, **options)
            assert answer == unescape(turn["answer"])
        assert context == case["context"]


def test_documents(golden, loaded):
    for case in golden.expected["documents"]:
        filled = loaded.chat.fill(case["documents"], **reference_options(case["generate"]))
        assert [document["<ans>"] for document in filled] == case["results"]
        for before, after in zip(case["documents"], filled, strict=True):
            assert after == {**before, "<ans>": after["<ans>"]}


def test_tokens(golden, loaded):
    tokenizer = loaded.processor.tokenizer
    for case in golden.expected["tokenize"]:
        if "error" not in case:
            ids, table = tokenizer.encode_text(case["text"])
            assert ids == case["ids"]
            assert tokenizer.decode(ids, extension_table=table) == case["decoded"]


@pytest.mark.parametrize("way", [way for way in CHAT_LAYOUTS if "without model_type" not in way])
def test_classes(golden, tmp_path, way):
    folder = golden.write_layout(tmp_path, way)
    assert type(AutoConfig.from_pretrained(folder)) is VisCPMChatConfig
    assert type(AutoModel.from_pretrained(folder)) is VisCPMChatForConditionalGeneration  # as in its own auto_map
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is VisCPMChatForConditionalGeneration
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is VisCPMChatForConditionalGeneration
    assert type(AutoTokenizer.from_pretrained(folder)) is CpmBeeTokenizer
    assert type(AutoProcessor.from_pretrained(folder)) is VisCPMChatProcessor
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.num_query_tokens == golden.num_queries
    assert processor.image_token_id == AutoConfig.from_pretrained(folder).image_token_id
    side = golden.vision_config["image_size"]
    assert dict(processor.image_processor.size) == {"height": side, "width": side}


def test_model_without_head_is_the_model_within(golden, tmp_path):
    folder = golden.write_layout(tmp_path)
    bare, whole = (cls.from_pretrained(folder) for cls in (VisCPMChatModel, VisCPMChatForConditionalGeneration))
    within = whole.model.state_dict()
    assert bare.state_dict().keys() == within.keys()
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, within[name]), name


# ------------------------------------------------------------------------------------------------------- CPM-Bee alone


@pytest.fixture(scope="module", params=[*CPM_BEE_LAYOUTS, CPM_BEE_SAVED])
def cpm_bee(request, golden, tmp_path_factory) -> tuple[CpmBeeForCausalLM, CpmBeeTokenizer]:
    folder = tmp_path_factory.mktemp("cpm-bee")
    golden.write_layout(folder, "cpm-bee" if request.param == CPM_BEE_SAVED else request.param)
    if request.param == CPM_BEE_SAVED:
        saved = folder / "saved"
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(saved)
        AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
        folder = saved
    if "without model_type" in request.param:
        return CpmBeeForCausalLM.from_pretrained(folder), CpmBeeTokenizer.from_pretrained(folder)
    assert type(AutoConfig.from_pretrained(folder)) is CpmBeeConfig
    expected = CpmBeeModel if request.param == CPM_BEE_SAVED else CpmBeeForCausalLM
    assert type(AutoModel.from_pretrained(folder)) is expected
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_cpm_bee_classes(cpm_bee):
    model, tokenizer = cpm_bee
    assert type(model) is CpmBeeForCausalLM
    assert type(tokenizer) is CpmBeeTokenizer
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_cpm_bee_fills_documents(golden, cpm_bee):
    model, tokenizer = cpm_bee
    for case in golden.expected["documents"]:
        filled = model.fill(case["documents"], tokenizer, **reference_options(case["generate"]))
        assert [document["<ans>"] for document in filled] == case["results"]


@torch.no_grad()
def test_cpm_bee_logits(golden, cpm_bee):
    """From the reference's embeddings on, images included."""
    model, _ = cpm_bee
    for index in QUESTIONS:
        tensors = {name.removeprefix(f"decode_{index}."): tensor for name, tensor in golden.tensors.items()}
        num_segments = int(tensors["num_segments"].max())
        table = torch.stack([tensors["batch_ext_table_ids"], tensors["batch_ext_table_sub"]], dim=-1)[None].long()
        logits = model(
            inputs_embeds=tensors["prompt_embeds"],
            token_type_ids=1 - tensors["context"].long(),
            segment_ids=tensors["segment_ids"].long(),
            segment_relations=tensors["segment_rel"].reshape(1, num_segments, num_segments).long(),
            extension_table=table,
        ).logits
        expected = tensors["prompt_logits"]
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, **close)


@torch.no_grad()
def test_cpm_bee_embeddings(golden, cpm_bee):
    model, tokenizer = cpm_bee
    for index, case in enumerate(golden.expected["decode_questions"]):
        document = {"image": "<unk>" * golden.num_queries, "context": "", "question": case["question"], "<ans>": ""}
        encoded = tokenizer.encode_document(document)
        inputs = tokenizer.collate([encoded.prompt()], return_tensors="pt")
        embeddings = model.model.embed(inputs["input_ids"], inputs["extension_table"])
        ((begin, end),) = encoded.image_bounds
        expected = golden.tensors[f"decode_{index}.prompt_embeds"]
        for part in (slice(0, begin), slice(end, None)):
            torch.testing.assert_close(embeddings[:, part], expected[:, part], atol=1e-5, rtol=0)
