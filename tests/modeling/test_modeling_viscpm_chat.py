"""VisCPM-Chat as a transformers model: batches, padding, attention implementations, caches, training, saving."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from support import Golden, message
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from viscpm_hf import VisCPMChatForConditionalGeneration
from viscpm_hf.modeling.compatibility import CHECKPOINTING


# Different images, none, different lengths, unknown strings that other rows lack, literal specials.
ROWS = (
    ("图片是什么颜色？", 0),
    ("describe the picture 🙂 and ~ and 🙂", 1),
    ("^", None),
    ("a literal <unk>, <image> and << in a much longer question 😀 than the others", 2),
    ("", 0),
)

tight = {"atol": 1e-5, "rtol": 1e-5}


def conversation(golden, question, image):
    return [message("user", question, *([] if image is None else [str(golden.image(image))]))]


def encode(processor, golden, rows=ROWS, **kwargs):
    return processor.apply_chat_template(
        [conversation(golden, *row) for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **kwargs},
    )


def train_inputs(processor, golden):
    documents = [
        {"image": "<image>", "context": "", "question": case["question"], "<ans>": case["answer"].replace("<", "<<")}
        for case in golden.expected["train"]
    ]
    images = [str(golden.image(case["image"])) for case in golden.expected["train"]]
    return processor(images=images, text=documents, return_labels=True, return_tensors="pt")


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ------------------------------------------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_batch_is_its_rows(golden, model, processor, side):
    inputs = encode(processor, golden, padding_side=side)
    logits = model(**inputs).logits
    assert logits.shape[-1] == model.config.text_config.vocab_size == len(processor.tokenizer)
    for row, source in enumerate(ROWS):
        alone = encode(processor, golden, [source])
        kept = inputs["attention_mask"][row].bool()
        assert_close(logits[row, kept], model(**alone).logits[0], **tight)


@torch.no_grad()
def test_left_padding_changes_nothing(golden, model, processor):
    alone = encode(processor, golden, ROWS[:1])
    padded = encode(processor, golden, ROWS[:1], pad_to_multiple_of=64)
    length = alone["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] == 64 > length
    outputs = model(**padded, output_hidden_states=True)
    assert_close(outputs.logits[:, -length:], model(**alone).logits, **tight)
    assert torch.isfinite(outputs.logits).all()
    for hidden_states in outputs.hidden_states:
        assert torch.isfinite(hidden_states).all()


@torch.no_grad()
def test_eager_attention_is_sdpa(golden, own_chat, processor):
    inputs, model = encode(processor, golden), own_chat.model
    assert model.config._attn_implementation == "sdpa"
    expected = model(**inputs)
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    kept = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[kept], expected.logits[kept], **tight)


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="flex attention needs a compiler")
@torch.no_grad()
def test_flex_attention_is_sdpa():
    """On one checkpoint: every shape is minutes of compiling on slow machines."""
    golden = Golden("chat_a")
    chat = golden.load_chat()
    inputs, model = encode(chat.processor, golden), chat.model
    expected = model(**inputs)
    torch.compiler.reset()  # for a second shape torch tries a graph of all shapes, which its CPU backend can't build
    model.set_attn_implementation({"text_config": "flex_attention", "vision_config": "eager"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    kept = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[kept], expected.logits[kept], **tight)


@torch.no_grad()
def test_eager_attention_gives_its_weights(golden, own_chat, processor):
    inputs, model = encode(processor, golden), own_chat.model
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    config = model.config.text_config
    length = inputs["input_ids"].shape[1]
    assert len(attentions) == config.num_hidden_layers
    assert attentions[0].shape == (len(ROWS), config.num_attention_heads, length, length)
    kept = inputs["attention_mask"].bool()
    for row in range(len(ROWS)):
        weights = attentions[0][row][:, kept[row]]
        assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert weights[:, :, ~kept[row]].abs().sum() == 0


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("kind", ["default", "dynamic", "static"])
@torch.no_grad()
def test_cached_decoding_is_one_pass(golden, model, processor, kind):
    """Prompt, then token by token, equals everything at once."""
    inputs = encode(processor, golden)
    length = inputs["input_ids"].shape[1]
    answer = torch.randint(9, 290, (len(ROWS), 5), generator=torch.Generator().manual_seed(0))
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    for name in ("attention_mask", "token_type_ids", "segment_ids"):
        whole[name] = torch.cat([inputs[name], inputs[name][:, -1:].expand_as(answer)], dim=1)
    expected = model(**whole).logits[:, length - 1 :]

    cache = {
        "default": None,
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=length + 8),
    }[kind]
    outputs = model(**inputs, past_key_values=cache, use_cache=True)
    steps = [outputs.logits[:, -1]]
    following = {name: inputs[name] for name in ("segment_ids", "segment_relations", "extension_table")}
    for step in range(answer.shape[1]):
        mask = whole["attention_mask"][:, : length + step + 1]
        outputs = model(
            answer[:, step : step + 1], attention_mask=mask, past_key_values=outputs.past_key_values, **following
        )
        steps.append(outputs.logits[:, -1])
    assert_close(torch.stack(steps, dim=1), expected, **tight)


# -------------------------------------------------------------------------------------------------------------- images


@torch.no_grad()
def test_encoded_images_stand_for_pixels(golden, model, processor):
    inputs = encode(processor, golden)
    expected = model(**inputs)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    assert_close(expected.image_hidden_states, encoded.pooler_output)
    for image_outputs in (encoded, BaseModelOutputWithPooling(pooler_output=list(encoded.pooler_output))):
        assert_close(model(**inputs, mm_encoder_outputs={"image": image_outputs}).logits, expected.logits)


@torch.no_grad()
def test_images_take_their_own_rows_places(golden, model, processor):
    """Exchanging two images exchanges the answers to the same question."""
    rows = [("颜色", 0), ("颜色", 1)]
    logits = model(**encode(processor, golden, rows)).logits
    exchanged = model(**encode(processor, golden, rows[::-1])).logits
    assert_close(exchanged, logits.flip(0), **tight)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


@torch.no_grad()
def test_inputs_embeds_stand_for_ids(golden, model, processor):
    inputs = encode(processor, golden)
    expected = model(**inputs).logits
    embeddings = model.model.language_model.embed(inputs.pop("input_ids"), inputs["extension_table"])
    encoded = model.get_image_features(inputs.pop("pixel_values")).pooler_output
    ids = encode(processor, golden)["input_ids"]
    embeddings[ids == model.config.image_token_id] = encoded.flatten(0, 1)
    assert_close(model(inputs_embeds=embeddings, **inputs).logits, expected, **tight)


@pytest.mark.parametrize("num_images", [1, 3])
def test_wrong_number_of_images_is_one_clear_error(golden, model, processor, num_images):
    inputs = encode(processor, golden, [("a", 0), ("b", 1)])
    inputs["pixel_values"] = inputs["pixel_values"][:1].repeat(num_images, 1, 1, 1)
    queries = golden.num_queries
    with pytest.raises(ValueError, match=f"tokens: {2 * queries}, features: {num_images * queries}"):
        model(**inputs)


def test_pixels_and_encoded_images_together(golden, model, processor):
    inputs = encode(processor, golden)
    encoded = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


# ------------------------------------------------------------------------------------------------------------ training


def test_answers_alone_are_learned(golden, model, processor):
    """Other labels in the question's place would change the loss; without answers there is nothing to learn."""
    inputs = train_inputs(processor, golden)
    question = inputs["labels"] == -100
    answered = (inputs["token_type_ids"] == 1) & inputs["attention_mask"].bool()
    assert not (answered & question).sum(1).gt(1).any()  # but the answer's `<s>`
    assert not (~answered & ~question).any()
    loss = model(**inputs).loss
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    targets = inputs["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][targets != -100], targets[targets != -100])
    assert_close(loss, expected)


def test_padding_side_of_training_batches(golden, model, processor):
    inputs = train_inputs(processor, golden)
    documents = [row.tolist() for row in inputs["input_ids"]]
    assert documents[0][0] == processor.tokenizer.pad_token_id
    assert_close(model(**inputs).loss, golden.tensors["train.loss"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(golden, own_chat, processor, use_reentrant):
    model, inputs = own_chat.model.train(), train_inputs(processor, golden)
    expected = gradients(model, inputs)
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    assert getattr(model, f"is_{CHECKPOINTING}")
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_every_parameter_in_use_learns(golden, own_chat, processor):
    found = gradients(own_chat.model.train(), train_inputs(processor, golden))
    silent = [name for name, _ in own_chat.model.named_parameters() if name not in found]
    # The last vision layer's image half: nothing after it looks at the image's own rows.
    last = f"vision_tower.layers.{golden.vision_config['vision_layers'] - 1}."
    assert all(".image" in name and (last in name or "vision_tower.layer_norm" in name) for name in silent), silent


@pytest.mark.parametrize(
    "target_modules",
    ["all-linear", ["q_proj", "v_proj"], r".*vision_tower.*\.q_experts\.query"],
)
def test_lora_trains(golden, own_chat, processor, target_modules):
    torch.manual_seed(0)
    model = get_peft_model(own_chat.model, LoraConfig(r=2, target_modules=target_modules))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = train_inputs(processor, golden)
    losses = []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert losses[1] < losses[0]
    assert changed
    assert all("lora_" in name for name in changed)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_is_loaded(golden, own_chat, tmp_path, dtype, shard_size):
    """In new names, safetensors and bit for bit, although the model came from an original file."""
    model = own_chat.model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) is (shard_size == "100KB")
    assert not list(tmp_path.glob("*.bin"))
    names = [name for file in files for name in safe_open(file, "pt").keys()]
    assert set(names) == set(model.state_dict()) - {"lm_head.weight"}
    assert not [name for name in names if name.startswith(("llm.", "vpm.", "query", "mapping."))]
    loaded = VisCPMChatForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "viscpm_chat"


def test_saved_twice_is_the_same(saved_folder, tmp_path):
    VisCPMChatForConditionalGeneration.from_pretrained(saved_folder).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (saved_folder / name).read_bytes()


@torch.no_grad()
def test_device_map(golden, saved_folder, model, processor):
    inputs = encode(processor, golden)
    mapped = VisCPMChatForConditionalGeneration.from_pretrained(saved_folder, device_map="cpu")
    assert_close(mapped(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("where", ["original", "saved"])
@torch.no_grad()
def test_eight_bits(golden, original_folder, saved_folder, model, processor, where):
    """bitsandbytes quantizes while loading, straight from the original file too."""
    folder = {"original": original_folder, "saved": saved_folder}[where]
    quantized = VisCPMChatForConditionalGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    for layer in quantized.model.language_model.layers:
        assert all(isinstance(layer.get_submodule(name), Linear8bitLt) for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert quantized.lm_head.weight is quantized.get_input_embeddings().weight
    inputs = encode(processor, golden)
    kept = inputs["attention_mask"].bool()
    similarity = torch.cosine_similarity(
        quantized(**inputs).logits[kept].float(), model(**inputs).logits[kept], dim=-1
    )
    assert similarity.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(golden, own_chat, processor, dtype):
    inputs = encode(processor, golden)
    kept = inputs["attention_mask"].bool()
    expected = own_chat.model(**inputs).logits[kept].softmax(-1)
    logits = own_chat.model.to(dtype)(**inputs).logits
    assert logits.dtype == dtype
    assert_close(logits[kept].float().softmax(-1), expected, atol=0.1, rtol=0)


def test_released_sizes():
    """The defaults are the 10B model: its parameters counted from the shapes in the released file."""
    from viscpm_hf import VisCPMChatConfig

    with torch.device("meta"):
        model = VisCPMChatForConditionalGeneration(VisCPMChatConfig())
    layer = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096
    language_model = 87040 * 4096 + 512 * 32 + 48 * layer + 4096
    projector = 4096 * 1024 + 4096 + 4096 * 4096 + 4096
    assert sum(parameter.numel() for parameter in model.parameters()) == language_model + projector + 607_220_736
    assert model.config.image_token_id == 87039
    assert model.config.num_query_tokens == 64
