"""Models on several devices, in RAM and on the disk: the answers of a model in memory, to the bit."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paint_support import PAINT, components
from support import Golden
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.accelerate import infer_auto_device_map

from viscpm_hf import (
    VisCPMChat,
    VisCPMChatConfig,
    VisCPMChatForConditionalGeneration,
    VisCPMPaint,
    VisCPMPaintPipeline,
)
from viscpm_hf.loading.options import default_dtype
from viscpm_hf.loading.placement import check_device_map, main_device, parse_size


LANGUAGE_MODEL = "model.language_model"
DOCUMENTS = [{"input": "a㊣c", "<ans>": ""}, {"input": "abc", "<ans>": {"a": "", "b": ""}}]
# What is where: everything on the disk, the vision tower alone, all but the vision tower, layers apart.
MAPS = {
    "all": {"": "disk"},
    "vision": {"": "cpu", "model.vision_tower": "disk"},
    "language model": {"": "disk", "model.vision_tower": "cpu"},
    "embedding and one layer": {
        "": "cpu",
        f"{LANGUAGE_MODEL}.embed_tokens": "disk",
        "lm_head": "disk",
        f"{LANGUAGE_MODEL}.layers.1": "disk",
    },
}


def answers(chat: VisCPMChat, golden: Golden) -> list:
    turn = chat.ask(golden.image(0), "这是什么？", max_new_tokens=5)
    generate = {"mode": "generate", "max_new_tokens": 5}
    return [
        turn.answer,
        turn.vision_hidden_states.tolist(),
        chat.ask(None, "a㊣c?", turn.context, turn.vision_hidden_states, num_beams=2, **generate).answer,
        chat.ask(golden.image(1), "What?", do_sample=True, seed=3, **generate).answer,
        chat.ask(golden.image(1), "What?", cache_implementation="static", **generate).answer,
        chat.fill(DOCUMENTS, max_new_tokens=3),
        chat.fill(DOCUMENTS, mode="generate", max_new_tokens=3),
    ]


@functools.cache
def answers_in_memory(name: str) -> list:
    golden = Golden(name)
    return answers(golden.load_chat(), golden)


def num_on_disk(model: torch.nn.Module) -> int:
    return sum(parameter.device.type == "meta" for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------- in-memory = on disk


@pytest.mark.parametrize("name", MAPS)
def test_an_original_file_is_read_where_it_lies(golden, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = VisCPMChat(golden.weights, device_map=MAPS[name])
    assert num_on_disk(chat.model) > 0
    assert answers(chat, golden) == answers_in_memory(golden.name)
    assert not list(tmp_path.iterdir())  # no copy of anything


def test_an_original_file_with_a_folder_for_copies(golden, tmp_path):
    chat = VisCPMChat(golden.weights, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    assert num_on_disk(chat.model) == len(list(chat.model.parameters()))
    assert len(list((tmp_path / "off").iterdir())) == num_on_disk(chat.model)
    assert answers(chat, golden) == answers_in_memory(golden.name)


@pytest.mark.parametrize("name", ["all", "embedding and one layer"])
def test_a_saved_folder(golden, saved_folder, name):
    chat = VisCPMChat(saved_folder, device_map=MAPS[name])
    assert num_on_disk(chat.model) > 0
    assert answers(chat, golden) == answers_in_memory(golden.name)


def test_in_other_dtypes_too(golden):
    """Weights of the disk are rounded as those in memory are."""
    options = {"max_new_tokens": 5, "mode": "generate"}
    for dtype in (torch.bfloat16, torch.float16):
        expected = golden.load_chat(dtype=dtype)
        chat = VisCPMChat(golden.weights, device_map={"": "disk"}, dtype=dtype)
        assert chat.model.dtype == dtype
        turn, known = (model.ask(golden.image(0), "这是什么？", **options) for model in (chat, expected))
        assert turn.answer == known.answer
        assert torch.equal(turn.vision_hidden_states, known.vision_hidden_states)


def test_sizes_decide_what_goes_to_the_disk(golden):
    whole = golden.load_chat().model
    layer = sum(p.nbytes for p in whole.language_model().layers[0].parameters())
    total = sum(p.nbytes for p in whole.parameters())
    chat = VisCPMChat(golden.weights, device_map="sequential", max_memory={"cpu": total - layer})
    in_memory = sum(p.nbytes for p in chat.model.parameters() if p.device.type == "cpu")
    assert 0 < in_memory <= total - layer
    assert answers(chat, golden) == answers_in_memory(golden.name)
    roomy = VisCPMChat(golden.weights, device_map="auto")
    assert num_on_disk(roomy.model) == 0


def test_from_pretrained_of_all_models(golden, original_folder, saved_folder, tmp_path):
    ids = torch.arange(5, 12)[None]
    for folder in (original_folder, saved_folder):
        expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map={"": "disk"})
        assert num_on_disk(model) > 0
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
    cpm_bee = golden.write_layout(tmp_path / "cpm_bee", "cpm-bee")
    expected = AutoModelForCausalLM.from_pretrained(cpm_bee)
    model = AutoModelForCausalLM.from_pretrained(cpm_bee, device_map={"": "disk", "model.layers.0": "cpu"})
    base = type(model.model).from_pretrained(cpm_bee, device_map={"": "disk"})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert torch.equal(base(ids).last_hidden_state, expected.model(ids).last_hidden_state)
    assert model.device == torch.device("cpu")  # where inputs go, not where the weights are


def test_a_model_on_the_disk_can_be_saved(golden, chat, tmp_path):
    VisCPMChat(golden.weights, device_map={"": "disk"}).model.save_pretrained(tmp_path)
    model = VisCPMChatForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in chat.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_paint(tmp_path):
    VisCPMPaintPipeline(**components()).save_pretrained(tmp_path / "saved")
    original = {"config_path": PAINT / "cpm-bee.json"}
    places = [{"device_map": {"": "disk"}}, {"device_map": {"": "cpu", "model.layers.0": "disk"}}]
    with_copies = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    for path, options, variants in (
        (PAINT / "pytorch_model.bin", original, [*places, with_copies]),
        (tmp_path / "saved", {}, places),
    ):
        expected = VisCPMPaint(path, False, False, False, device="cpu", **options)
        image = expected.generate("一只猫", generator=0, num_inference_steps=2)
        embeds = expected.pipeline.encode_prompt("一只猫㊣", negative_prompt="狗")
        for variant in variants:
            painter = VisCPMPaint(path, False, False, False, **options, **variant)
            assert num_on_disk(painter.pipeline.text_encoder) > 0
            assert painter.generate("一只猫", generator=0, num_inference_steps=2).tobytes() == image.tobytes()
            own = painter.pipeline.encode_prompt("一只猫㊣", negative_prompt="狗")
            assert all(torch.equal(one, other) for one, other in zip(own, embeds, strict=True))


# ----------------------------------------------------------------------------------------------------- several devices


def test_two_devices(golden, saved_folder):
    """On devices that don't exist (see `pretend_devices`), in a process of their own."""
    if golden.name != "chat_a":
        pytest.skip("slow; one size is enough, since nothing here depends on it")
    script = Path(__file__).parent / "several_devices.py"
    run = subprocess.run(
        [sys.executable, script, golden.name, saved_folder],
        env={**os.environ, "HF_DEACTIVATE_ASYNC_LOAD": "1"},  # the mode works in one thread
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert all(report["chat"].values()), report
    assert report["paint"]
    assert report["bias moves"] == 1  # for four layers


# ----------------------------------------------------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def full_size() -> VisCPMChatForConditionalGeneration:
    """10 billion parameters without values."""
    with torch.device("meta"):
        return VisCPMChatForConditionalGeneration(VisCPMChatConfig()).to(torch.float16)


@pytest.mark.parametrize("gigabytes", [(6, 6), (12, 12, 12), (3, 30), (8,), (2, 2, 2)])
def test_layers_stay_in_one_piece_and_the_head_with_its_embedding(full_size, gigabytes):
    sizes = {index: size * 10**9 for index, size in enumerate(gigabytes)} | {"cpu": 9 * 10**9}
    device_map = infer_auto_device_map(full_size, sizes, full_size._no_split_modules)
    assert set(device_map.values()) >= {0}
    check_device_map(full_size, device_map)  # raises where a layer is split, or head and embedding are apart
    layers = [name for name in device_map if name.startswith(f"{LANGUAGE_MODEL}.layers")]
    assert all(len(name.split(".")) <= 4 for name in layers)


def test_the_full_size_fits_where_it_should(full_size):
    weights = sum(parameter.nbytes for parameter in full_size.parameters())
    assert 20.4e9 < weights < 20.6e9
    device_map = infer_auto_device_map(full_size, {0: 22 * 10**9, "cpu": 10**9}, full_size._no_split_modules)
    assert set(device_map.values()) == {0}


# ----------------------------------------------------------------------------------------------------------- bad input


def load(golden: Golden, **placement) -> VisCPMChat:
    return VisCPMChat(golden.weights, **placement)


@pytest.mark.parametrize(
    "placement, message",
    [
        ({"device_map": "auto", "device": "cpu"}, "give one of the two"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory says how to spread .* needs a device_map"),
        ({"offload_folder": "off"}, "offload_folder says how to spread .* needs a device_map"),
        (
            {"device_map": "everywhere"},
            "auto, balanced, balanced_low_0, sequential, a device, or a dict.*'everywhere'",
        ),
        ({"device_map": {"": 17}}, "puts 'the model' on '17', but the devices here are: .*cpu, disk"),
        ({"device_map": {"": "tpu:0"}}, "'tpu:0', but the devices here are"),
        ({"device_map": "auto", "max_memory": {17: "1GB"}}, "names the device 17, but the devices here are"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, r"max_memory\['cpu'\] is a number of bytes, or as 1g"),
        ({"device_map": "auto", "max_memory": {"cpu": "900TB"}}, "900TB|asks for 9e.05 GB on device 'cpu', which has"),
        ({"device_map": "auto", "max_memory": {"cpu": 1000}}, "1 KB, but .*, the largest part .* give at least"),
        ({"device_map": {"vision": "cpu"}}, "names 'vision', but .* has no such part; its parts are model, lm_head"),
        ({"device_map": {"model.vision_tower": "cpu"}}, "gives .* parameters no device, model.multi_modal"),
        (
            {"device_map": {"": "cpu", f"{LANGUAGE_MODEL}.layers.1.mlp": "disk"}},
            r"parts of model.language_model.layers.1 on cpu, disk, but a CpmBeeDecoderLayer stays in one piece",
        ),
        (
            {"device_map": {"": "cpu", "lm_head": "disk"}},
            "lm_head.weight on 'disk' and .*embed_tokens.weight on 'cpu', but they are one and the same tensor",
        ),
    ],
)
def test_bad_placements_are_one_sentence(golden, placement, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(golden, **placement)
    assert "\n" not in str(raised.value)


def test_devices_of_a_map_by_any_name(full_size):
    device_map = {"model": "cuda:1", "model.vision_tower": torch.device("cpu"), "model.multi_modal_projector": 0}
    checked = check_device_map(full_size, device_map)
    assert checked == {
        "model.vision_tower": "cpu", "model.multi_modal_projector": 0, "model.language_model": 1, "lm_head": 1
    }  # fmt: skip


def test_the_head_follows_its_embedding(golden):
    chat = load(golden, device_map={"model": "disk"})
    assert chat.model.hf_device_map == {"model": "disk", "lm_head": "disk"}


def test_a_folder_that_can_not_be_made(golden, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"offload_folder .* can't be made"):
            load(golden, device_map="auto", offload_folder=folder)


def test_quantised_weights_do_not_go_to_the_disk(golden):
    with pytest.raises(ValueError, match="quantised weights stay in RAM or on a GPU"):
        load(golden, device_map={"": "disk"}, quantization="8bit")


@pytest.mark.parametrize(
    "size, number", [("1g", 2**30), ("8gb", 8 * 10**9), ("8GB", 8 * 10**9), ("0.5 MiB", 2**19), ("7", 7), (7, 7)]
)
def test_sizes(size, number):
    assert parse_size(size) == number


@pytest.mark.parametrize("size", ["", "GB", "1x", "-1", -1, 1.5, True, None])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="A size is a number of bytes, or as 1g, 500m, 2GB, 2GiB"):
        parse_size(size)


def test_inputs_go_to_the_first_gpu_of_a_map():
    assert main_device({"a": "cpu", "b": 1, "c": 0, "d": "disk"}) == torch.device("cuda", 0)
    assert main_device({"a": "cpu", "b": "cuda:1"}) == torch.device("cuda", 1)
    assert main_device({"a": "cpu", "b": "disk"}) == main_device("disk") == torch.device("cpu")


# ----------------------------------------------------------------------------------------- dtypes that suit the device


class NoDoubles(TorchDispatchMode):
    """MPS has no float64: fails wherever a tensor of it is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise AssertionError(f"{func} makes a tensor of {value.dtype}")
        return result


def test_nothing_that_runs_is_of_double_precision(golden, chat):
    with NoDoubles():
        answers(chat, golden)


def test_nothing_that_paints_is_of_double_precision():
    painter = VisCPMPaint(
        PAINT / "pytorch_model.bin", False, False, False, config_path=PAINT / "cpm-bee.json", device="cpu"
    )
    with NoDoubles():
        painter.generate("一只猫", generator=0, num_inference_steps=2)


def test_dtypes_that_suit_the_device():
    cpu, mps, cuda = torch.device("cpu"), torch.device("mps"), torch.device("cuda")
    half = (torch.float16, torch.bfloat16)
    assert {default_dtype(cpu, dtype) for dtype in half} in ({torch.bfloat16}, {torch.float32})
    assert {default_dtype(mps, dtype) for dtype in half} == {torch.float16}
    assert [default_dtype(cuda, dtype) for dtype in half] == list(half)
    assert {default_dtype(device, torch.float32) for device in (cpu, mps, cuda)} == {torch.float32}
