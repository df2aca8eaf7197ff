"""The Auto classes, the Hub's cache and the pipeline, as a user of transformers meets them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import Golden, message
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import viscpm_hf
from viscpm_hf import (
    CpmBeeTokenizer,
    VisCPMChat,
    VisCPMChatConfig,
    VisCPMChatForConditionalGeneration,
    VisCPMChatProcessor,
    VisCPMImageProcessor,
)
from viscpm_hf.loading.from_pretrained import register


GOLDEN_A = Golden("chat_a")
LENGTH = 8


@pytest.fixture(params=["original", "saved"])
def folder(request, original_folder, saved_folder):
    return {"original": original_folder, "saved": saved_folder}[request.param]


def test_every_auto_class_finds_its_class(folder):
    for auto_class, expected in (
        (AutoConfig, VisCPMChatConfig),
        (AutoTokenizer, CpmBeeTokenizer),
        (AutoImageProcessor, VisCPMImageProcessor),
        (AutoProcessor, VisCPMChatProcessor),
        (AutoModelForImageTextToText, VisCPMChatForConditionalGeneration),
    ):
        assert type(auto_class.from_pretrained(folder)) is expected


def test_concrete_classes_read_the_same(folder, chat):
    found, expected = VisCPMChatConfig.from_pretrained(folder).to_dict(), chat.model.config.to_dict()
    for part in ("text_config", "vision_config"):
        assert {**found[part], "dtype": None} == {**expected[part], "dtype": None}
    assert CpmBeeTokenizer.from_pretrained(folder).get_vocab() == chat.processor.tokenizer.get_vocab()
    processor = VisCPMChatProcessor.from_pretrained(folder)
    assert processor.num_query_tokens == chat.processor.num_query_tokens
    assert dict(processor.image_processor.size) == dict(chat.processor.image_processor.size)


def test_keyword_arguments_reach_what_is_loaded(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert AutoTokenizer.from_pretrained(folder, model_max_length=77).model_max_length == 77
    assert list(AutoImageProcessor.from_pretrained(folder, image_mean=[0.1] * 3).image_mean) == [0.1] * 3
    config = AutoConfig.from_pretrained(folder, projector_hidden_act="relu")
    assert config.projector_hidden_act == "relu"


def test_loading_says_what_was_loaded(folder):
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not {name: value for name, value in info.items() if value}


def test_original_dtype_is_kept(golden, tmp_path):
    folder = golden.write_layout(tmp_path)
    torch.save({name: tensor.half() for name, tensor in golden.state_dict().items()}, folder / "pytorch_model.bin")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float16


def test_name_given_too(folder):
    """transformers passes it on in places."""
    assert isinstance(AutoConfig.from_pretrained(folder, name_or_path="a/name"), VisCPMChatConfig)
    assert isinstance(AutoTokenizer.from_pretrained(folder, name_or_path="a/name"), CpmBeeTokenizer)


def test_registering_twice_changes_nothing(folder):
    before = AutoConfig.from_pretrained, VisCPMChatForConditionalGeneration.from_pretrained
    register()
    assert (AutoConfig.from_pretrained, VisCPMChatForConditionalGeneration.from_pretrained) == before
    assert type(AutoConfig.from_pretrained(folder)) is VisCPMChatConfig


def test_other_models_are_as_ever(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    model = BertModel(BertConfig(**sizes))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is BertModel
    assert torch.equal(loaded.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_folder_without_vocabulary_is_one_clear_error(tmp_path):
    folder = GOLDEN_A.write_layout(tmp_path)
    (folder / "vocab.txt").unlink()
    for auto_class in (AutoTokenizer, AutoProcessor):
        with pytest.raises(OSError, match="has no vocab.txt"):
            auto_class.from_pretrained(folder)


def test_folder_without_weights_is_one_clear_error(tmp_path):
    folder = GOLDEN_A.write_layout(tmp_path)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="pytorch_model.bin"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_language_model_needs_no_image_processor(tmp_path):
    folder = GOLDEN_A.write_layout(tmp_path, "cpm-bee")
    with pytest.raises(OSError, match="language model alone"):
        VisCPMImageProcessor.from_pretrained(folder)
    assert type(AutoProcessor.from_pretrained(folder)) is CpmBeeTokenizer


def test_missing_tensors_of_a_saved_folder_are_no_silent_noise(saved_folder, tmp_path):
    """transformers names them; loading goes on only because it says so."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved_folder / "model.safetensors")
    name = "model.language_model.norm.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved_folder / "config.json").read_bytes())
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name}


# ----------------------------------------------------------------------------------------------------- the Hub's cache


def write_hub_cache(cache, name: str, way: str):
    """A repository in the layout of the Hub's cache, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    if way == "original":
        GOLDEN_A.write_layout(snapshot)
    else:
        chat = GOLDEN_A.load_chat()
        chat.model.save_pretrained(snapshot)
        chat.processor.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("way", ["original", "saved"])
def test_repository_in_the_hubs_cache(tmp_path, way):
    """By its id, in a program of its own: where the cache is, is read when it starts."""
    write_hub_cache(tmp_path / "hub", "someone/VisCPM-Chat", way)
    program = """if True:
        import json, sys
        import viscpm_hf
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        name, image = sys.argv[1:]
        kinds = [
            type(auto_class.from_pretrained(name)).__name__
            for auto_class in (AutoConfig, AutoModelForImageTextToText, AutoProcessor)
        ]
        chat = viscpm_hf.VisCPMChat(name, device="cpu")
        print(json.dumps([kinds, chat.chat(image, "颜色", max_new_tokens=8)[0]]))
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, "someone/VisCPM-Chat", str(GOLDEN_A.image(0))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    kinds, answer = json.loads(result.stdout)
    assert kinds == ["VisCPMChatConfig", "VisCPMChatForConditionalGeneration", "VisCPMChatProcessor"]
    assert answer == GOLDEN_A.load_chat().chat(GOLDEN_A.image(0), "颜色", max_new_tokens=8)[0]


@pytest.mark.parametrize("way", ["original", "saved"])
def test_cache_folder_given(tmp_path, way):
    write_hub_cache(tmp_path, "someone/VisCPM-Chat", way)
    where = {"cache_dir": tmp_path}
    assert type(AutoConfig.from_pretrained("someone/VisCPM-Chat", **where)) is VisCPMChatConfig
    model = AutoModelForImageTextToText.from_pretrained("someone/VisCPM-Chat", **where)
    processor = AutoProcessor.from_pretrained("someone/VisCPM-Chat", **where)
    assert type(model) is VisCPMChatForConditionalGeneration
    assert type(processor) is VisCPMChatProcessor


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoProcessor.from_pretrained, VisCPMChat])
def test_unknown_repository_is_transformers_own_error(load):
    with pytest.raises(OSError, match="couldn't find them in the cached files|no-one/nothing"):
        load("no-one/nothing")


# ------------------------------------------------------------------------------------------------------------ pipeline


def generated(golden, model, processor, messages) -> str:
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True, extension_strings=inputs.extension_strings)[0]


def test_pipeline(golden, folder, model, processor):
    answer = pipeline("image-text-to-text", model=str(folder), device="cpu")
    messages = [message("user", "图片是什么颜色？", str(golden.image(0)))]
    (output,) = answer(text=messages, max_new_tokens=LENGTH, return_full_text=False)
    first = generated(golden, model, processor, messages)
    assert output["generated_text"] == first

    messages += [message("assistant", first), message("user", "描述")]
    (output,) = answer(text=messages, max_new_tokens=LENGTH)
    last = output["generated_text"][-1]
    assert last["role"] == "assistant"
    assert last["content"] == generated(golden, model, processor, messages)


def test_pipeline_of_a_batch(golden, folder, model, processor):
    answer = pipeline("image-text-to-text", model=str(folder), device="cpu")
    conversations = [
        [message("user", "图片", str(golden.image(0)))],
        [message("user", "what shape is this?", str(golden.image(1)))],
    ]
    outputs = answer(text=conversations, max_new_tokens=LENGTH, return_full_text=False)
    for conversation, (output,) in zip(conversations, outputs, strict=True):
        assert output["generated_text"] == generated(golden, model, processor, conversation)


# --------------------------------------------------------------------------------------------------------- the package


def test_public_names():
    for name in viscpm_hf.__all__:
        assert getattr(viscpm_hf, name) is not None
    assert set(viscpm_hf.__all__) == set(dir(viscpm_hf))
    with pytest.raises(AttributeError, match="no attribute 'VisCPMSing'"):
        viscpm_hf.VisCPMSing  # noqa: B018


def test_importing_is_silent_and_light():
    """No pipelines, quantizers or training tools before they are used."""
    program = """if True:
        import sys
        import viscpm_hf
        heavy = ("diffusers.models", "diffusers.pipelines.pipeline_utils", "bitsandbytes", "peft", "viscpm_hf.chat")
        print([name for name in heavy if name in sys.modules])
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")
