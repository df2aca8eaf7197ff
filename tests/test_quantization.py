"""VisCPM-Chat in 8 and 4 bits: from every source, saved, run, and refused."""

import importlib.util
import json

import pytest
import quantization_support
import torch
from safetensors.torch import load_file
from support import Golden
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from viscpm_hf import CpmBeeForCausalLM, VisCPMChat, VisCPMChatForConditionalGeneration
from viscpm_hf.loading.options import LoadOptions
from viscpm_hf.loading.quantization import QUANTIZATIONS, quantization_config
from viscpm_hf.modeling.packed_linear import Int8Linear, PackedConfig


# What can be made on a CPU, and how close its logits are to those in full precision.
CLOSENESS = {"8bit": 0.999, "4bit": 0.96, "int8": 0.999, "int8wo": 0.999, "nf4": 0.96, "fp4": 0.94}
LAYER = "model.language_model.layers.0.mlp.up_proj"
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An original file whose layers are wide enough for 4 bits."""
    return quantization_support.write_chat(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def full(original):
    return VisCPMChat(original, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def quantized(original):
    """The file loaded in every way, once."""
    return {
        name: VisCPMChat(original, device="cpu", dtype=DTYPE, quantization=name, quantize_vision=False)
        for name in CLOSENESS
    }


@pytest.fixture(scope="module")
def converted(full, tmp_path_factory):
    """The same checkpoint as a folder in full precision."""
    folder = tmp_path_factory.mktemp("converted")
    full.model.save_pretrained(folder)
    full.processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(20, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits[..., : model.config.get_text_config().num_words].float()  # slots are masked


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", CLOSENESS)
def test_logits_are_close_to_full_precision(full, quantized, name):
    assert cosine(logits(quantized[name].model), logits(full.model)) >= CLOSENESS[name]


@pytest.mark.parametrize("name", ["8bit", "int8wo"])
def test_golden_logits_are_close_to_full_precision(golden, model, name):
    chat = golden.load_chat(quantization=name)
    assert cosine(logits(chat.model), logits(model)) >= 0.999


@pytest.mark.parametrize("name", CLOSENESS)
def test_answers(quantized, name):
    chat, image = quantized[name], Golden("chat_a").image(0)
    answer, context, encoded = chat.chat(image, "颜色", max_new_tokens=4)
    assert context.endswith(f"AI: {answer}\n")
    assert chat.ask(None, "shape?", context, encoded, mode="generate", max_new_tokens=4).num_tokens > 0


@pytest.mark.parametrize("name", CLOSENESS)
def test_what_keeps_its_precision(quantized, name):
    model = quantized[name].model
    layer = model.get_submodule(LAYER)
    is_plain = type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
    assert not is_plain or type(layer.weight.data) is not torch.Tensor
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    towers = [module for module in tower.modules() if isinstance(module, nn.Linear)]
    kept = [model.lm_head, projector.linear_1, projector.linear_2, *towers]
    for module in kept:
        assert isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
    assert model.lm_head.weight is model.get_input_embeddings().weight
    plain = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    assert plain == {DTYPE}
    stored = model.config.quantization_config.to_dict()
    skipped = stored.get("llm_int8_skip_modules") or stored.get("modules_to_not_convert")
    assert {"lm_head", "model.vision_tower", "model.multi_modal_projector"} <= set(skipped)


def test_the_vision_tower_on_request(original, full):
    chat = VisCPMChat(original, device="cpu", quantization="8bit", quantize_vision=True)
    modules = list(chat.model.model.vision_tower.modules())
    assert any(isinstance(module, Int8Linear) for module in modules)
    assert not any(isinstance(module, nn.Linear) for module in modules)
    assert chat.model.lm_head.weight.is_floating_point()
    image = Golden("chat_a").image(0)
    encoded, expected = chat.chat(image, "颜色", max_new_tokens=2)[2], full.chat(image, "颜色", max_new_tokens=2)[2]
    assert cosine(encoded.float(), expected) >= 0.99


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", CLOSENESS)
def test_from_pretrained_of_an_original_folder(original, quantized, name):
    config = quantization_config(name, DTYPE)
    model = AutoModelForImageTextToText.from_pretrained(original.parent, quantization_config=config, dtype=DTYPE)
    assert torch.equal(logits(model), logits(quantized[name].model))


@pytest.mark.parametrize("name", CLOSENESS)
def test_from_pretrained_of_a_converted_folder(converted, full, name):
    config = quantization_config(name, torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(converted, quantization_config=config, dtype=torch.float32)
    assert cosine(logits(model), logits(full.model)) >= CLOSENESS[name]
    assert model.generation_config.eos_token_id == full.model.generation_config.eos_token_id


def test_a_plain_configuration_keeps_what_ours_keeps(original, quantized):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForImageTextToText.from_pretrained(original.parent, quantization_config=config, dtype=DTYPE)
    assert same_weights(model, quantized["nf4"].model)


def test_as_transformers_quantises(original, full):
    """The way of GPUs, tensor by tensor; a CPU takes it for layouts that are not ours to make."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        original.parent, quantization_config=config, dtype=torch.float32
    )
    assert model.get_submodule(LAYER).weight.dtype == torch.float32 and model.is_quantized
    assert type(model.model.vision_tower.layers[0].mlp.image.fc1) is nn.Linear
    assert cosine(logits(model), logits(full.model)) >= 0.96


def test_a_users_own_list_of_modules_counts(original):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", LAYER])
    model = VisCPMChatForConditionalGeneration.from_pretrained(original.parent, quantization_config=config)
    assert type(model.get_submodule(LAYER)) is nn.Linear
    assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.int8


@pytest.mark.parametrize("model_class", [AutoModel, CpmBeeForCausalLM])
def test_parts_of_a_chat_file(original, quantized, model_class):
    config = quantization_config("nf4", DTYPE)
    model = model_class.from_pretrained(original.parent, quantization_config=config, dtype=DTYPE)
    language_model = model.model.language_model if model_class is AutoModel else model.model
    assert same_weights(language_model, quantized["nf4"].model.model.language_model)


# ------------------------------------------------------------------------------------------------- embedding and head


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_embedding_and_head_on_request(original, full, quantized, tmp_path, name):
    options = {"device": "cpu", "dtype": "float32", "quantization": name, "quantize_embedding": True}
    chat = VisCPMChat(original, **options)
    model, head, embedding = chat.model, chat.model.lm_head, chat.model.get_input_embeddings()
    assert head.weight is embedding.weight and head.scale is embedding.scale and head.weight.dtype == torch.int8
    ids = torch.arange(model.config.get_text_config().vocab_size)
    looked_up, expected = embedding(ids), full.model.get_input_embeddings()(ids)
    assert looked_up.dtype == torch.float32 and cosine(looked_up, expected) >= 0.9999
    assert len(looked_up.unique(dim=0)) == len(expected.unique(dim=0))  # slots are told by their rows
    assert cosine(logits(model), logits(quantized[name].model)) >= 0.999

    image = Golden("chat_a").image(0)
    text = "龘龘 and 龘?"  # strings without a token
    answer = chat.ask(image, text, mode="generate", max_new_tokens=4).answer
    model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored and stored["model.language_model.embed_tokens.weight"].dtype == torch.int8
    loaded = VisCPMChat(tmp_path, device="cpu", dtype="float32")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model.lm_head.scale is loaded.model.get_input_embeddings().scale
    assert loaded.ask(image, text, mode="generate", max_new_tokens=4).answer == answer


def test_embedding_and_head_of_other_formats(original):
    with pytest.raises(ValueError, match="Embedding and head keep their precision with quantization='nf4' on cpu"):
        VisCPMChat(original, device="cpu", quantization="nf4", quantize_embedding=True)
    with pytest.raises(ValueError, match="More is to be quantised, but not how"):
        VisCPMChat(original, device="cpu", quantize_embedding=True)


# -------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", CLOSENESS)
def test_saved_is_loaded_before_and_after_running(original, tmp_path, name):
    model = VisCPMChat(original, device="cpu", quantization=name).model
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(model), expected)  # saving changes nothing
    for folder in ("before", "after"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        assert loaded.is_quantized and loaded.dtype == model.dtype
        assert torch.equal(logits(loaded), expected)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_quantised_folder_in_another_dtype(quantized, tmp_path):
    chat = quantized["8bit"]
    chat.model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    loaded = VisCPMChat(tmp_path, device="cpu", dtype="float32")
    layer = loaded.model.get_submodule(LAYER)
    assert layer.scale.dtype == torch.bfloat16 and loaded.model.lm_head.weight.dtype == torch.float32
    assert cosine(logits(loaded.model), logits(chat.model)) >= 0.999


# ----------------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_name(original):
    with pytest.raises(ValueError, match=r"quantization is one of 8bit, 4bit, .*, got '3bit'"):
        VisCPMChat(original, quantization="3bit")


def test_a_missing_library(original, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torchao: pip install torchao"):
        VisCPMChat(original, device="cpu", quantization="int8wo")


def test_what_the_names_mean_on_a_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name, bits in (("8bit", 8), ("4bit", 4), ("int4wo", 4)):
        assert quantization_config(name, DTYPE, device=cpu).bits == bits
        assert not isinstance(quantization_config(name, DTYPE, device=cuda), PackedConfig)
    for name in ("int8", "nf4", "fp4"):
        assert isinstance(quantization_config(name, DTYPE, device=cpu), BitsAndBytesConfig)


def test_torchaos_formats_compute_in_bf16():
    """Its int4 has no other dtype, and in fp16 its int8 leaves the range."""
    cuda = torch.device("cuda")
    for name, refused in (("int4wo", ("auto", torch.float16, torch.float32)), ("int8wo", ("auto", torch.float16))):
        chosen = LoadOptions(cuda, quantization=name).choose_dtype(torch.float16)
        assert isinstance(quantization_config(name, chosen, device=cuda), TorchAoConfig)
        for dtype in refused:
            asked = LoadOptions(cuda, dtype=dtype, quantization=name).choose_dtype(torch.float16)
            with pytest.raises(ValueError, match=f"{name}' computes in bfloat16 on cuda, not in float(16|32): say"):
                quantization_config(name, asked, device=cuda)
    assert LoadOptions(cuda, quantization="int8wo").choose_dtype(torch.float32) == torch.float32
    assert LoadOptions(cuda, quantization="nf4").choose_dtype(torch.float16) == torch.float16


def test_int4wo_where_no_kernel_reads_it(original, monkeypatch):
    monkeypatch.setattr("viscpm_hf.loading.quantization.HAS_4_BIT_KERNEL", False)
    with pytest.raises(ValueError, match="runs on CUDA and on CPUs with AVX-512, not on this cpu: use nf4"):
        VisCPMChat(original, device="cpu", quantization="int4wo")
    assert isinstance(quantization_config("4bit", DTYPE, device=torch.device("cpu")), BitsAndBytesConfig)


def test_a_folder_for_another_device(converted, tmp_path, quantized):
    chat = quantized["int8wo"]
    chat.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Int4WeightOnlyConfig"
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"is quantised to 4 bits \(torchao\), which runs on CUDA only, not on cpu"):
        VisCPMChatForConditionalGeneration.from_pretrained(tmp_path)


def test_layers_too_narrow_for_4_bits(golden):
    with pytest.raises(ValueError, match=r"has (48|64) inputs and (64|72) outputs, but 4-bit weights need multiples"):
        golden.load_chat(quantization="nf4")


def test_quantised_otherwise_already(quantized, tmp_path):
    chat = quantized["8bit"]
    chat.model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised to 8 bits \(packed\) already, so it can't be loaded in 4 bits"):
        VisCPMChat(tmp_path, device="cpu", quantization="nf4")
    VisCPMChat(tmp_path, device="cpu", quantization="8bit")


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_fast_decoding_of_bitsandbytes_on_a_cpu_is_refused(quantized, name):
    with pytest.raises(ValueError, match=r"bitsandbytes' weights on a CPU.*without --fast.*'8bit'"):
        quantized[name].ask(None, "^", max_new_tokens=2, fast=True)


def test_any_4_bits_are_4bit(quantized, tmp_path):
    chat = quantized["nf4"]
    chat.model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    assert (
        type(VisCPMChat(tmp_path, device="cpu", quantization="4bit").model.get_submodule(LAYER)).__name__
        == "Linear4bit"
    )


def test_the_vision_tower_alone(original):
    with pytest.raises(ValueError, match="More is to be quantised, but not how"):
        VisCPMChat(original, device="cpu", quantize_vision=True)


def test_every_name_has_a_configuration():
    for name, library in QUANTIZATIONS.items():
        config = quantization_config(name, DTYPE, device=torch.device("cuda"))
        assert isinstance(config, TorchAoConfig if library == "torchao" else BitsAndBytesConfig)
