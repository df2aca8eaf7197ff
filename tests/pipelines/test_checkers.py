"""Checkers and ranker in the layouts of their repositories of 2022 and 2023, and prompts of any length."""

import json
import re
import shutil

import paint_support
import PIL.Image
import pytest
import torch
from paint_support import PAINT
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from viscpm_hf import ImageSafetyChecker, VisCPMPaint
from viscpm_hf.pipelines.prompt_safety import check_prompts, unsafe_label


# What older transformers called the tensors, buffers that were saved then included.
OLD_NAMES = {
    "image": [(r"^vision_model\.(?!vision_model)", "vision_model.vision_model.")],
    "prompt": [],
    "ranker": [],
}
BUFFERS = {
    "image": ["vision_model.vision_model.embeddings.position_ids"],
    "prompt": ["bert.embeddings.position_ids"],
    "ranker": ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"],
}


def write_old(folder, kind, model, processor):
    """A folder as the Hub has it: config.json, pytorch_model.bin and the processor's old files."""
    folder.mkdir(parents=True)
    state_dict = {}
    for name, tensor in model.state_dict().items():
        for pattern, old in OLD_NAMES[kind]:
            name = re.sub(pattern, old, name)
        state_dict[name] = tensor
    state_dict |= {name: torch.arange(5)[None] for name in BUFFERS[kind]}
    torch.save(state_dict, folder / "pytorch_model.bin")
    config = model.config.to_dict()
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.25.0.dev0"}), "utf-8")
    sizes = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    if kind == "image":
        old = {**sizes, "feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}
        old |= {"do_center_crop": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(old), "utf-8")
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    if kind == "ranker":
        old = {**sizes, "feature_extractor_type": "ChineseCLIPFeatureExtractor", "do_center_crop": False}
        old |= {"size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(old), "utf-8")
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}), "utf-8")


def parts(kind, folder):
    made = {
        "image": lambda: paint_support.safety_checker(is_strict=True),
        "prompt": lambda: paint_support.prompt_checker(folder, 0.9),
        "ranker": lambda: paint_support.ranker(folder),
    }[kind]()
    return tuple(made.values())


ARGUMENTS = {"image": "image_safety_checker", "prompt": "prompt_safety_checker", "ranker": "add_ranker"}
COMPONENTS = {"image": "safety_checker", "prompt": "prompt_checker", "ranker": "ranker"}


def load(folder, kind, source=True):
    wanted = {name: source if name == ARGUMENTS[kind] else False for name in ARGUMENTS.values()}
    return VisCPMPaint(folder, **wanted, device="cpu", candidates=2)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_the_repositories_files_load_whole(kind, tmp_path):
    model, processor = parts(kind, tmp_path)
    write_old(tmp_path / "old", kind, model, processor)
    painter = load(PAINT / "pytorch_model.bin", kind, tmp_path / "old")
    loaded = getattr(painter.pipeline, COMPONENTS[kind])
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    result = painter.generate_all("蓝色", generator=0, num_inference_steps=1) if kind != "prompt" else None
    if kind == "image":
        assert result.flags == [True]
        assert ImageSafetyChecker.from_pretrained(tmp_path / "old")(PIL.Image.new("RGB", (20, 20)))
    if kind == "ranker":
        assert result.scores == sorted(result.scores, reverse=True) and None not in result.scores


@pytest.mark.parametrize(("kind", "place"), [("image", "safety_checker"), ("prompt", "text-security-checker")])
def test_beside_the_model_as_in_its_repository(kind, place, tmp_path):
    for file in PAINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    model, processor = parts(kind, tmp_path)
    write_old(tmp_path / place, kind, model, processor)
    if kind == "image":  # diffusers' layout has the two side by side
        (tmp_path / "feature_extractor").mkdir()
        shutil.move(tmp_path / place / "preprocessor_config.json", tmp_path / "feature_extractor")
    assert getattr(load(tmp_path, kind).pipeline, COMPONENTS[kind]) is not None


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_file_that_lacks_weights_is_refused(kind, tmp_path):
    model, processor = parts(kind, tmp_path)
    write_old(tmp_path / "old", kind, model, processor)
    tensors = torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    tensors.pop(next(name for name in tensors if name.endswith("weight") and "layer" in name))
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(OSError, match="1 tensors of the .* are missing"):
        load(PAINT / "pytorch_model.bin", kind, tmp_path / "old")


# ---------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def finds_red(tmp_path_factory):
    """A classifier that finds the one word 红 wherever it stands among the tokens it is given, and its tokenizer."""
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            max_position_embeddings=32, num_labels=2,
        )
    ).eval()  # fmt: skip
    tokenizer = BertTokenizerFast(paint_support.bert_vocab(tmp_path_factory.mktemp("red")))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" not in name:
                weight.zero_()
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("红"), 0] = 1
        layer = model.bert.encoder.layer[0].attention
        for module in (layer.self.value, layer.output.dense, model.bert.pooler.dense):  # all else attends equally
            module.weight.copy_(torch.eye(8))
        model.classifier.weight[1, 0], model.classifier.bias[1] = 20, -10
    return model, tokenizer


@pytest.mark.parametrize("length", [1, 29, 30, 31, 53, 60, 500])
@pytest.mark.parametrize("place", ["first", "last", "middle", "nowhere"])
def test_the_whole_prompt_is_checked(finds_red, length, place):
    words = ["蓝"] * length
    if place != "nowhere":
        words[{"first": 0, "last": -1, "middle": length // 2}[place]] = "红"
    seen = []
    handle = finds_red[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    refused, other = check_prompts(*finds_red, ["".join(words), "猫"])
    handle.remove()
    assert (refused is None) == (place == "nowhere") and other is None
    tokenizer = finds_red[1]
    assert all(len(row) <= 32 and row[0] == tokenizer.cls_token_id for row in seen)
    assert all(tokenizer.sep_token_id in row for row in seen)


def test_padding_changes_nothing(finds_red):
    prompts = ["红", "蓝" * 100, "蓝" * 99 + "红", ""]
    together = check_prompts(*finds_red, prompts)
    assert together == [check_prompts(*finds_red, [prompt])[0] for prompt in prompts]
    assert [reason is not None for reason in together] == [True, False, True, False]


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, 1),
        ({0: "LABEL_1", 1: "LABEL_0"}, 0),
        ({0: "safe", 1: "Unsafe"}, 1),
        ({0: "违规", 1: "正常"}, 0),
    ],
)
def test_labels_are_the_configurations(labels, index, tmp_path):
    parts = paint_support.prompt_checker(tmp_path, 0.9)
    model = parts["prompt_checker"]
    model.config.id2label = labels
    assert unsafe_label(model.config) == index
    (reason,) = check_prompts(*parts.values(), ["蓝色"])
    assert (reason is not None) == (index == 1)
    assert reason is None or labels[index] in reason


@pytest.mark.parametrize("labels", [{0: "A", 1: "B"}, {0: "unsafe", 1: "nsfw"}, {0: "LABEL_1"}])
def test_labels_that_do_not_say(labels):
    with pytest.raises(ValueError, match="prompt checker's labels are"):
        unsafe_label(BertConfig(id2label=labels))
