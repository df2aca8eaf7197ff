"""One token space of fixed width: what transformers, PEFT and trainers do with ids and logits holds as it is."""

import copy
import json
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from support import message
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from viscpm_hf import CpmBeeForCausalLM, VisCPMChat, tiny
from viscpm_hf.modeling.compatibility import CACHE
from viscpm_hf.modeling.token_space_cpm_bee import MASKED_LOGIT


UNKNOWN = "What 🦄 shapes ❤ are 🐉 there?"
PICTURE = Image.new("RGB", (64, 64), (255, 0, 0))
QUESTIONS = ("What shapes are there?", UNKNOWN, "Is ☃ or 🦄 there?")


@pytest.fixture(scope="module")
def loaded():
    folder = tiny("chat")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def processor(loaded):
    return loaded[1]


def encode(processor, *messages, **options):
    messages = messages or (message("user", UNKNOWN, PICTURE),)
    return processor.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def batch(processor, questions=QUESTIONS, **options):
    conversations = [[message("user", question, PICTURE)] for question in questions]
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
        **options,
    )  # fmt: skip


def wants_strings(processor, inputs):
    """Makes every row answer with its own strings, one after the other."""
    rows = [[token for token in row if token != 0] for row in inputs.extension_strings]
    begin = inputs["input_ids"].shape[1]

    def process(input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            own = rows[row * len(rows) // len(scores)]
            place = input_ids.shape[1] - begin
            token = own[place] if place < len(own) else processor.tokenizer.eos_token_id
            scores[row, token] = scores[row].max() + 50.0
        return scores

    return [process]


# ------------------------------------------------------------------------------------------- widths and embeddings


def test_everything_is_below_the_vocabularys_size(model, processor):
    inputs, config = batch(processor), model.config.text_config
    assert len(processor.tokenizer) == config.vocab_size == model.get_input_embeddings().num_embeddings
    assert config.vocab_size % 64 == 0 and inputs["input_ids"].max() < config.vocab_size
    logits = model(**inputs).logits
    assert logits.shape[-1] == config.vocab_size
    owned = (inputs["extension_table"][..., 1] > 0).sum(1)
    open_slots = (logits[:, -1, config.num_words :] != MASKED_LOGIT).sum(-1)
    assert open_slots.tolist() == owned.tolist() == [0, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("multiple", [None, 64, 100])
def test_resizing_changes_no_logit(model, processor, multiple, tmp_path):
    resized, changed = copy.deepcopy(model), copy.deepcopy(processor)
    num_old = len(changed.tokenizer)
    changed.tokenizer.add_tokens(["<loc_1>", "<loc_2>"])
    resized.resize_token_embeddings(len(changed.tokenizer), pad_to_multiple_of=multiple)
    resized.save_pretrained(tmp_path)
    changed.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32").eval()
    for ours, own in ((resized, changed), (again, AutoProcessor.from_pretrained(tmp_path))):
        assert own.image_token_id == processor.image_token_id
        assert own.tokenizer.encode_text("a<loc_2>")[0][-1] == num_old + 1
        inputs = batch(own)
        assert torch.equal(inputs["input_ids"], batch(processor)["input_ids"])
        assert_close(ours(**inputs).logits[..., :num_old], model(**inputs).logits)


def test_no_model_is_saved_that_could_not_be_loaded(model, tmp_path):
    fresh, size = type(model)(copy.deepcopy(model.config)), model.config.text_config.vocab_size
    fresh.resize_token_embeddings(size - 1)
    with pytest.raises(ValueError, match=f"has {size - 1:,} rows"):
        fresh.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    fresh.resize_token_embeddings(size)
    fresh.save_pretrained(tmp_path / "model")


def as_version_0_1(folder: Path, to: Path) -> Path:
    """The folder as version 0.1 wrote it: words alone in the embedding, the placeholder beyond them."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    text = config["text_config"]
    text["vocab_size"] = text.pop("num_words", text["vocab_size"])
    config["image_token_id"] = text["vocab_size"] + 65536
    (to / "config.json").write_text(json.dumps(config))
    tensors = load_file(to / "model.safetensors")
    name = "model.language_model.embed_tokens.weight"
    tensors[name] = tensors[name][: text["vocab_size"]].clone()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_folders_of_version_0_1(model, processor, tmp_path):
    folder = as_version_0_1(Path(tiny("chat")), tmp_path / "old")
    old = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    assert old.config.text_config.to_dict() == model.config.text_config.to_dict()
    assert old.config.image_token_id == model.config.image_token_id == processor.image_token_id
    for name, tensor in model.state_dict().items():
        assert torch.equal(old.state_dict()[name], tensor), name
    old.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert torch.equal(saved, model.get_input_embeddings().weight)


def test_original_names(model, tmp_path):
    """The original's file has the words alone; there is no place for added tokens, which must not vanish."""
    fresh = type(model)(copy.deepcopy(model.config))
    fresh.save_pretrained(tmp_path, save_original_format=True)
    words = load_file(tmp_path / "model.safetensors")["llm.input_embedding.weight"]
    assert len(words) == model.config.text_config.num_words
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32")
    assert_close(again.get_input_embeddings().weight, fresh.get_input_embeddings().weight)
    fresh.resize_token_embeddings(len(fresh.get_input_embeddings().weight) + 2)
    with pytest.raises(ValueError, match="2 rows more .* tokens were added"):
        fresh.save_pretrained(tmp_path / "more", save_original_format=True)


# ------------------------------------------------------------------------------------------------------- generating


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.3}])
def test_transition_scores(model, processor, options):
    """Of the tokens as they were chosen, and normalised as of the whole width."""
    inputs = batch(processor)
    outputs = model.generate(
        **inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True, **options
    )
    indices = getattr(outputs, "beam_indices", None)
    scores = model.compute_transition_scores(outputs.sequences, outputs.scores, indices, normalize_logits=False)
    new = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    rows = torch.arange(len(new)) if indices is None else None
    for step in range(scores.shape[1]):
        parents = rows if indices is None else indices[:, step]
        alive = parents >= 0
        assert_close(scores[alive, step], outputs.scores[step][parents[alive], new[alive, step]])
    normalised = model.compute_transition_scores(outputs.sequences, outputs.scores, indices, normalize_logits=True)
    assert torch.isfinite(normalised).all() and (normalised <= 1e-4).all()


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"encoder_repetition_penalty": 1.0 + 1e-9},
        {"encoder_no_repeat_ngram_size": 60},
        {"guidance_scale": 1.0 + 1e-9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_over_the_prompts_ids(model, processor, options):
    for inputs in (encode(processor), encode(processor, message("user", "What shapes are there?"))):
        expected = model.generate(**inputs, max_new_tokens=8)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, **options), expected)


def test_an_assistant_helps(model, processor):
    inputs = encode(processor)
    expected = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, assistant_model=copy.deepcopy(model)), expected)


def test_guidance_never_answers_with_masked_slots(model, processor):
    """The half without a prompt knows the same strings, else their difference would be the largest of all."""
    inputs = encode(processor)
    outputs = model.generate(
        **inputs, max_new_tokens=3, guidance_scale=2.0, return_dict_in_generate=True, output_scores=True
    )
    first = model.config.text_config.num_words
    for scores in outputs.scores:
        assert torch.isinf(scores[0, first + 2 :]).all() and scores[0, first : first + 2].max() < 0


def test_max_length_is_the_most(model, processor):
    inputs = encode(processor)
    length = inputs["input_ids"].shape[1] + 2
    assert model.generate(**inputs, max_length=length, min_new_tokens=1).shape[1] <= length
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = None, length
    assert model.generate(**inputs, generation_config=config).shape[1] <= length


def test_the_cache_of_an_earlier_turn_is_refused(model, processor):
    first = encode(processor)
    outputs = model.generate(**first, max_new_tokens=4, return_dict_in_generate=True)
    more = encode(
        processor, message("user", UNKNOWN, PICTURE), message("assistant", "A circle."), message("user", "Where?")
    )
    with pytest.raises(ValueError, match="earlier turn, which CPM-Bee can't go on with: its prompt attends in both"):
        model.generate(**more, past_key_values=outputs.past_key_values, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"num_return_sequences": 2, "do_sample": True}, "one answer"), ({"return_dict_in_generate": True}, "answer is")],
)
def test_chat_refuses_what_it_would_ignore(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        chat().ask(None, "a", mode="generate", **options)


def test_stop_strings_of_a_question():
    whole = chat().ask(PICTURE, "Describe the picture.", mode="generate", max_new_tokens=12).answer
    stop = whole[3:6]
    answer = chat().ask(PICTURE, "Describe the picture.", mode="generate", max_new_tokens=12, stop_strings=stop).answer
    assert whole.startswith(answer) and stop in answer and len(answer) < len(whole)


_CHAT: list[VisCPMChat] = []


def chat() -> VisCPMChat:
    if not _CHAT:
        _CHAT.append(VisCPMChat("viscpm-tiny", device="cpu"))
    return _CHAT[0]


def test_seeds_of_threads_are_their_own():
    def ask(seed):
        options = {"do_sample": True, "temperature": 3.0, "seed": seed, "max_new_tokens": 6}
        answers[seed] = chat().ask(None, "Describe the picture.", mode="generate", **options).answer

    answers: dict[int, str] = {}
    for seed in range(3):
        ask(seed)
    alone = dict(answers)
    threads = [Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone and len(set(alone.values())) > 1


# --------------------------------------------------------------------------------------------------------- decoding


def test_strings_come_back_wherever_answers_become_text(model, processor):
    inputs = encode(processor)
    sequences = model.generate(**inputs, max_new_tokens=4, logits_processor=wants_strings(processor, inputs))
    begin = inputs["input_ids"].shape[1]
    expected = "".join(inputs.extension_strings[0].values())
    assert set(expected) == set("🦄❤🐉")
    new = sequences[:, begin:]
    ways = {
        "decode": processor.decode(new[0], skip_special_tokens=True),
        "tokenizer": processor.tokenizer.decode(sequences[0, begin:], skip_special_tokens=True),
        "rows": processor.decode(next(iter(new)), skip_special_tokens=True),
        "copied": processor.decode(copy.deepcopy(new.cpu().clone()[0]), skip_special_tokens=True),
        "batch_decode": processor.batch_decode(new, skip_special_tokens=True)[0],
        "post_process": processor.post_process_image_text_to_text(new)[0],
    }
    assert ways == dict.fromkeys(ways, expected)
    assert processor.decode(sequences[0], skip_special_tokens=True).endswith(expected)


def test_rows_and_samples_have_their_own_strings(model, processor):
    inputs = batch(processor)
    outputs = model.generate(
        **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=2, return_dict_in_generate=True,
        logits_processor=wants_strings(processor, inputs),
    )  # fmt: skip
    texts = processor.batch_decode(outputs.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [text for row in inputs.extension_strings for text in ["".join(row.values())] * 2]


def test_streamers_write_strings(model, processor):
    inputs = encode(processor)
    for decoder in (processor.tokenizer, processor):
        streamer = TextIteratorStreamer(decoder, skip_prompt=True, timeout=60, skip_special_tokens=True)
        options = {"max_new_tokens": 4, "logits_processor": wants_strings(processor, inputs)}
        thread = Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == "".join(inputs.extension_strings[0].values())
        thread.join()


def test_pipelines_write_strings(model, processor):
    inputs = encode(processor)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (result,) = pipe(
        text=[message("user", UNKNOWN, PICTURE)], max_new_tokens=4, return_full_text=False,
        generate_kwargs={"logits_processor": wants_strings(processor, inputs)},
    )  # fmt: skip
    assert result["generated_text"] == "".join(inputs.extension_strings[0].values())


def test_inputs_of_workers_know_their_strings(processor):
    def collate(questions):
        return batch(processor, questions)

    (inputs,) = DataLoader([UNKNOWN], num_workers=1, collate_fn=collate)
    assert inputs.extension_strings == collate([UNKNOWN]).extension_strings


# --------------------------------------------------------------------------------------------------------- training


def train_row(processor, question=UNKNOWN, answer="Red."):
    return encode(processor, message("user", question, PICTURE), message("assistant", answer), return_labels=True)


@torch.no_grad()
def test_labels_of_the_prompt_are_left_out(model, processor):
    row = train_row(processor)
    expected = model(**row).loss
    row["labels"] = row["input_ids"].clone()
    assert_close(model(**row).loss, expected)
    row["labels"] = row["input_ids"].masked_fill(row["token_type_ids"] == 1, -100)
    with pytest.raises(ValueError, match="labels are of the prompt, which attends in both directions"):
        model(**row)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_and_completion_joined(model, processor, side):
    """As trainers join them, with the padding moved to the right, with what they know of and without."""
    questions, answers = ("What colour is it?", "Is it a red picture of a circle?"), ("Red.", "Yes.")
    whole = [
        [message("user", question, PICTURE), message("assistant", answer)]
        for question, answer in zip(questions, answers, strict=True)
    ]
    texts = [processor.apply_chat_template(conversation) for conversation in whole]
    prompts = [processor.apply_chat_template(conversation[:1]) for conversation in whole]
    completions = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    options = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
    first = processor(images=[[PICTURE], [PICTURE]], text=prompts, padding_side="left", **options)
    second = processor(text=completions, padding_side="right", **options)
    joined = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    labels = torch.cat([torch.full_like(first["input_ids"], -100), second["input_ids"]], 1)
    labels = labels.masked_fill(joined["attention_mask"] == 0, -100)
    if side == "right":  # as trainers flush it
        order = joined["attention_mask"].argsort(dim=1, descending=True, stable=True)
        joined = {name: tensor.gather(1, order) for name, tensor in joined.items()}
        labels = labels.gather(1, order)
    expected = processor(images=[[PICTURE], [PICTURE]], text=texts, return_labels=True, return_tensors="pt")
    expected = model(**expected).loss
    pixels = {"pixel_values": first["pixel_values"]}
    assert_close(model(**{**first, **joined, "labels": labels}).loss, expected)
    # With ids, masks and pictures alone, as preferences are trained.
    assert_close(model(**joined, **pixels, labels=labels).loss, expected)


def test_segment_ids_that_are_too_short(model, processor):
    row = dict(train_row(processor))
    extra = torch.full((1, 3), 20)
    row["input_ids"] = torch.cat([row["input_ids"], extra], 1)
    row["attention_mask"] = torch.cat([row["attention_mask"], torch.ones_like(extra)], 1)
    row["labels"] = torch.cat([row["labels"], extra], 1)
    without_head = {name: value for name, value in row.items() if name != "labels"}
    for call in (lambda: model(**row), lambda: model.model(**without_head)):
        with pytest.raises(ValueError, match=r"segment_ids for \d+ input_ids, and they can't be told from the tokens"):
            call()


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(output_dir=folder, report_to=[], use_cpu=True, **options)


def test_label_smoothing_shifts(model, processor, tmp_path):
    row = train_row(processor)
    expected = float(model(**row).loss)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=1e-9))
    assert float(trainer.compute_loss(model, dict(row))) == pytest.approx(expected, abs=1e-3)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    assert torch.isfinite(trainer.compute_loss(model, dict(row)))


def test_metrics_over_batches_with_different_strings(model, processor, tmp_path):
    rows = [train_row(processor, question) for question in QUESTIONS]
    seen = []

    def metrics(predictions):
        seen.append(predictions.predictions.shape)
        return {"rows": len(predictions.label_ids)}

    options = arguments(tmp_path, per_device_eval_batch_size=1, remove_unused_columns=False)
    trainer = Trainer(model, options, data_collator=lambda batch: batch[0], eval_dataset=rows, compute_metrics=metrics)
    assert trainer.evaluate()["eval_rows"] == len(rows)
    assert seen[0][-1] == model.config.text_config.vocab_size


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
def test_virtual_tokens_in_front(model, processor, kind):
    """They are context that no segment has, and move nothing: tokens that say nothing change little."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    if kind == "prefix" and CACHE == "cache" and Version(version("peft")) < Version("0.22"):
        pytest.skip("peft before 0.22 gives the cache by its old name, and transformers 5.24 by the new one too")
    config_class = {"prompt": PromptTuningConfig, "p": PromptEncoderConfig, "prefix": PrefixTuningConfig}[kind]
    sizes = {"num_layers": 4, "num_attention_heads": 4, "token_dim": 128, "num_transformer_submodules": 1}
    hidden = {"encoder_hidden_size": 16} if kind != "prompt" else {}
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes, **hidden)
    wrapped = get_peft_model(copy.deepcopy(model), config).eval()
    if kind == "prefix":  # values of zero, and keys that nothing asks for
        torch.nn.init.zeros_(wrapped.prompt_encoder["default"].embedding.weight)
    row = train_row(processor)
    outputs = wrapped(**row)
    outputs.loss.backward()
    gradients = [value.grad for value in wrapped.parameters() if value.requires_grad and value.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    moved = {"labels": row["labels"], **{name: row[name] for name in row if name != "labels"}}
    without = dict(moved)
    without["token_type_ids"] = None
    assert_close(wrapped(**without).loss, outputs.loss)
    expected = float(model(**row).loss)
    assert abs(float(outputs.loss) - expected) < 3.0
    inputs = encode(processor)
    generated = wrapped.generate(**inputs, max_new_tokens=4)
    new = generated[:, inputs["input_ids"].shape[1] :].as_subclass(torch.Tensor)
    whole = {**inputs, "input_ids": generated.as_subclass(torch.Tensor)}
    for name in ("attention_mask", "token_type_ids", "segment_ids"):
        whole[name] = torch.cat([inputs[name], inputs[name][:, -1:].expand_as(new)], 1)
    logits = wrapped(**whole).logits[:, -new.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), new)


def test_the_language_model_alone(model, processor):
    """Ids without pictures, by the language model's own class."""
    alone = CpmBeeForCausalLM(model.config.text_config).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    inputs = encode(processor, message("user", UNKNOWN))
    assert_close(alone(**inputs).logits, model(**inputs).logits)
    assert torch.equal(alone.generate(**inputs, max_new_tokens=6), model.generate(**inputs, max_new_tokens=6))
    labels = inputs["input_ids"].clone()
    with pytest.raises(ValueError, match="labels are of the prompt"):
        alone(**inputs, labels=labels)
