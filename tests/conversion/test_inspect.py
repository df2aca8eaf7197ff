"""What `inspect` says of every kind of checkpoint, offline and without reading weights."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from support import CHAT_LAYOUTS, CPM_BEE_LAYOUTS, GOLDEN

from viscpm_hf import OriginalCheckpointError, VisCPMChatConfig, convert, inspect, tiny


PAINT = GOLDEN / "paint_a"


@pytest.mark.parametrize("way", [*CHAT_LAYOUTS, *CPM_BEE_LAYOUTS])
def test_original_folders(golden, tmp_path, way):
    found = inspect(golden.write_layout(tmp_path / "original", way))
    assert found.kind == ("chat" if way.startswith("chat") else "cpm_bee")
    assert found.layout == "original folder" and found.is_complete, found
    assert found.dtypes.keys() == {"float32"} and not found.is_sharded
    assert found.sizes["hidden_size"] == golden.llm_config["dim_model"]
    assert found.sizes["layers"] == golden.llm_config["num_layers"]
    if way.startswith("chat"):
        assert found.sizes["queries"] == golden.num_queries
        assert found.sizes["resolution"] == golden.vision_config["image_size"]
    assert "viscpm-hf convert" in found.next_command


def test_counts(golden, original_folder):
    state_dict = golden.state_dict()
    found = inspect(original_folder)
    assert found.num_parameters == sum(tensor.numel() for tensor in state_dict.values())
    assert found.parameters["language model"] == sum(t.numel() for n, t in state_dict.items() if n.startswith("llm."))
    memory = found.memory_bytes
    assert memory["fp16"] == 2 * found.num_parameters > memory["int8"] > memory["4-bit"]
    assert json.loads(json.dumps(asdict(found)))["kind"] == "chat"


def test_converted_folder(golden, converted):
    found = inspect(converted)
    assert (found.kind, found.layout, found.is_sharded) == ("chat", "transformers folder", True)
    assert found.is_complete and "viscpm-hf chat" in found.next_command
    expected = sum(
        t.numel() for n, t in golden.state_dict().items() if not n.startswith(("vpm.mim", "vpm.beit3.text"))
    )
    expected -= golden.vision_config["vision_dim"]  # the mask token is dropped
    text = VisCPMChatConfig.from_pretrained(converted).text_config
    slots = (text.vocab_size - text.num_words) * text.hidden_size
    assert found.num_parameters == expected + slots


def test_paint(converted_paint):
    for folder in (PAINT, converted_paint):
        found = inspect(folder)
        assert found.kind == "paint" and found.is_complete, found
        assert {"language model", "projection", "UNet"} <= found.parameters.keys()
        assert found.sizes["prompt_embedding"] == 24


def test_a_paint_folder_of_the_first_version_is_whole():
    """Its table has the rows of words alone; no head is tied to it."""
    found = inspect(tiny("paint"))
    assert found.is_complete and found.licence == "Apache-2.0"


def test_paint_without_vae(tmp_path):
    shutil.copytree(PAINT, tmp_path / "paint", ignore=shutil.ignore_patterns("vae.bin"))
    found = inspect(tmp_path / "paint")
    assert not found.is_complete and found.missing[0].startswith("vae/") and "--vae" in found.next_command


def test_alternatives_are_not_shards(golden, original_folder, tmp_path):
    folder = tmp_path / "several"
    shutil.copytree(original_folder, folder)
    shutil.copy(golden.weights, folder / "pytorch_model.v1.bin")
    found = inspect(folder)
    assert found.alternatives == ["pytorch_model.bin", "pytorch_model.v1.bin"] and found.kind == "chat"
    assert not found.is_complete
    with pytest.raises(OriginalCheckpointError, match="alternatives, not shards.*pytorch_model.v1.bin"):
        convert(folder, tmp_path / "out")
    assert inspect(folder / "pytorch_model.v1.bin").is_complete
    convert(folder / "pytorch_model.v1.bin", tmp_path / "out")


def test_a_folder_cut_short_has_nothing_to_go_on_with(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "cut")
    for file in folder.glob("model*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    found = inspect(folder)
    assert "cut short" in found.problems[0]
    assert found.next_command == "" and found.memory_bytes == {}


def test_missing_tensor_and_vocabulary(small_original):
    state_dict = torch.load(small_original / "pytorch_model.bin", weights_only=True)
    del state_dict["query"]
    torch.save({**state_dict, "strange": torch.ones(1)}, small_original / "pytorch_model.bin")
    (small_original / "vocab.txt").unlink()
    found = inspect(small_original)
    assert len(found.missing) == 2 and "vocab.txt" in found.missing
    assert found.surplus == ["strange"]


def test_files_of_others_among_the_alternatives(original_folder, tmp_path):
    shutil.copytree(original_folder, tmp_path / "several")
    torch.save({"step": torch.ones(1)}, tmp_path / "several" / "optimizer.pt")
    assert inspect(tmp_path / "several").problems == ["optimizer.pt: no VisCPM or CPM-Bee checkpoint"]


def test_next_command_of_paint_works(tmp_path):
    assert inspect(PAINT).is_complete
    assert convert(PAINT, tmp_path / "out", dry_run=True).kind == "paint"


def test_nothing_of_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(OriginalCheckpointError, match="holds no VisCPM checkpoint"):
        inspect(tmp_path)
    torch.save({"bert.weight": torch.ones(2)}, tmp_path / "model.bin")
    with pytest.raises(OriginalCheckpointError, match="other names .bert.weight"):
        inspect(tmp_path)


# --------------------------------------------------------------------------------------------------- Hub and offline


def make_cache(source, cache, repo_id: str, commit: str = "0" * 40):
    """A folder as the Hub's cache lays it out."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)


@pytest.fixture
def hub(monkeypatch, tmp_path, original_folder, converted):
    """The Hub's cache with two repositories, and no network."""
    import socket

    from huggingface_hub import constants

    cache = tmp_path / "hub"
    make_cache(original_folder, cache, "owner/original")
    make_cache(converted, cache, "owner/converted")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def test_hub_ids_from_the_cache(hub, tmp_path):
    assert inspect("owner/original").kind == "chat"
    assert inspect("owner/converted", revision="v1").layout == "transformers folder"
    convert("owner/original", tmp_path / "out")
    convert("owner/original/pytorch_model.bin", tmp_path / "out 2")
    convert("owner/converted", tmp_path / "back", to="original")
    with pytest.raises(FileNotFoundError, match="neither a path here nor a repository"):
        inspect("owner/nowhere")
    with pytest.raises(FileNotFoundError, match="neither a path here nor a repository"):
        convert("owner/original", tmp_path / "out 3", revision="v2")


def test_local_paths_never_ask_the_network(hub, golden, original_folder, converted, tmp_path, monkeypatch):
    inspect(original_folder), inspect(golden.weights), inspect(converted)
    convert(original_folder, tmp_path / "out", verify=True)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        inspect("./not/there")
    for name in ("folder/model.bin", f"{original_folder.parent.name}/{original_folder.name}/other.bin"):
        monkeypatch.chdir(original_folder.parent.parent)
        with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
            inspect(name)
