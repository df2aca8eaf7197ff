"""Every call of the model cards, on replicas of the repositories: from a folder, from a Hub, from its cache."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import transformers
from packaging.version import Version
from replicas import REPLICAS
from sibling_folders import write_folder
from stub_hub import COMMIT, stub_hub
from support import Golden
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import viscpm_hf
from viscpm_hf import SiblingChat
from viscpm_hf.siblings import visualcla


HERE = Path(__file__).parent
IMAGE = Golden("chat_a").image(0)
PATH = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("repositories")
    for name, write in REPLICAS.items():
        write(root / name)
    return root


def run(program: Path, *arguments: object, **environment: str) -> dict:
    """What a program prints as JSON; nobody answers its questions."""
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, str(program), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "[y/N]" not in result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict) -> None:
    chat = Golden("chat_a").load_chat()
    assert found["VisCPMChat"] == chat.chat(IMAGE, "颜色", max_new_tokens=8)[0]
    data = [{"context": "", "question": "颜色", "image": "<image>", "<ans>": ""}]
    parts = (chat.processor.tokenizer, chat.processor.image_processor, PIL.Image.open(IMAGE))
    assert found["chat"] == chat.model.generate(data, *parts, max_new_tokens=8, num_beams=3)[0]["<ans>"]
    model_class = "VisCPMChatForConditionalGeneration"
    assert found["chat classes"] == ["CpmBeeTokenizer", "VisCPMImageProcessor", model_class]
    assert found["processor"] == "VisCPMChatProcessor"
    assert found["variants differ"]
    assert found["paint classes"] == ["VisCPMPaintTextEncoder", "CpmBeeTokenizer"]
    assert set(found["pipelines"]) <= {"VisCPMPaintPipeline", "VisCPMPaintBeePipeline"}
    assert found["pictures agree"] and found["steps_offset"] == 0
    assert len(set(found["cpm-bee"])) == 1
    assert found.get("release", True)


def test_calls_of_the_cards_from_a_folder(repositories):
    check(run(HERE / "calls.py", repositories, "plain", IMAGE, HF_HUB_OFFLINE="1"))


def test_calls_of_the_cards_from_a_hub_and_from_its_cache(repositories, tmp_path):
    with stub_hub(repositories) as (address, requests):
        where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        check(run(HERE / "calls.py", "hub", "trust", IMAGE, HF_HUB_OFFLINE="0", **where))
        asked = {request.partition(" ")[2] for request in requests if request.startswith("GET")}
        files = {path.partition("/resolve/")[2].partition("/")[2] for path in asked if "/resolve/" in path}
        assert not any(file.endswith(".py") for file in files), "nothing of the repositories' code is wanted"
        assert not any(file.startswith("unet/") and file.endswith(".bin") for file in files), "it is there already"
    check(run(HERE / "calls.py", "hub", "plain", IMAGE, HF_HUB_OFFLINE="1", **where))


@pytest.mark.parametrize("name", ["viscpm_chat_balance_checkpoint.pt", "viscpm_chat_chplus_checkpoint.pt"])
def test_a_file_of_2023_beside_its_configuration(tmp_path, name):
    golden = Golden("chat_a")
    folder = golden.write_layout(tmp_path / "model", "chat with vision.json")
    (folder / "pytorch_model.bin").rename(folder / name)
    expected = golden.load_chat().chat(IMAGE, "颜色", max_new_tokens=8)[0]
    assert viscpm_hf.VisCPMChat(folder, device="cpu").chat(IMAGE, "颜色", max_new_tokens=8)[0] == expected
    model = AutoModel.from_pretrained(folder)
    data = [{"context": "", "question": "颜色", "image": "<image>", "<ans>": ""}]
    parts = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder), PIL.Image.open(IMAGE)
    assert model.generate(data, *parts, max_new_tokens=8, num_beams=3)[0]["<ans>"]


def check_siblings(found: dict, chats: dict) -> None:
    assert found["queries"] == 256
    for name in ("openbmb/MiniCPM-V", "openbmb/MiniCPM-V-2"):
        answers = chats[name]
        assert found[name] and set(found[name]) == set(answers)
    assert found["visualcla"] == 2 * [chats["visualcla"]] and found["visualcla bare"] != chats["visualcla"]
    assert len(found["omnilmm"]) == 3 and len(set(found["omnilmm"])) == 1
    for size in ("1b", "2b", "5b"):
        *answers, blocks, has_loss = found[size]
        assert len(set(answers)) == 1 and answers[0] is not None
        assert blocks == [29, 24] and has_loss


def test_calls_of_the_siblings_and_of_pruned_models(repositories, tmp_path):
    chats = {}
    for name in ("openbmb/MiniCPM-V", "openbmb/MiniCPM-V-2"):
        chat = SiblingChat(repositories / name, device="cpu", dtype="bfloat16")
        chat.model.float()
        options = {"mode": "generate", "num_beams": 1, "do_sample": False, "repetition_penalty": 1.2}
        chats[name] = [chat.ask(IMAGE, "What?", max_new_tokens=6, **options).answer]
    merged, *_ = visualcla.get_model_and_tokenizer_and_processor(
        write_folder("visualcla", tmp_path / "merged"), torch_dtype="float32", default_device="cpu"
    )
    greedy = {"do_sample": False, "max_new_tokens": 6}
    chats["visualcla"] = visualcla.chat(merged, str(IMAGE), "What?", generation_config=greedy)[0]
    check_siblings(run(HERE / "sibling_calls.py", repositories, "plain", IMAGE, HF_HUB_OFFLINE="1"), chats)
    with stub_hub(repositories) as (address, requests):
        where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        check_siblings(run(HERE / "sibling_calls.py", "hub", "trust", IMAGE, HF_HUB_OFFLINE="0", **where), chats)
        assert not any(request.endswith(".py") for request in requests if request.startswith("GET"))
    check_siblings(run(HERE / "sibling_calls.py", "hub", "plain", IMAGE, HF_HUB_OFFLINE="1", **where), chats)


def test_commands_take_files_and_releases_of_the_hub(repositories, tmp_path):
    tokens: dict[str | None, list[str]] = {}
    folder, cache = tmp_path / "work", tmp_path / "cache"
    folder.mkdir()
    options = ["--revision", "v2", "--token", "hf_words", "--cache-dir", cache]
    with stub_hub(repositories, tokens) as (address, requests):
        where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        found = run(HERE / "commands.py", IMAGE, folder, *options, HF_HUB_OFFLINE="0", **where)
    chat = Golden("chat_a").load_chat()
    chat.model.model.multi_modal_projector.linear_2.weight.data *= 0.5  # what the replica's v1.1 is
    assert set(found["answers"]) == {chat.chat(IMAGE, "颜色", max_new_tokens=8, num_beams=1)[0]}
    assert found["paint"] == [0, 0] and found["convert"] == [0, ""]
    assert found["train"] == 3 * [[0, ""]] and found["recorded"] and "hf_words" not in found["recorded"]
    assert found["merge"] == [0, "", 0, ""] and found["memory"][0] == 0, found["memory"][2]
    marks = [place for place, request in enumerate(requests) if request == "GET mark"]
    for begin, end in itertools.pairwise(marks):
        asked = [request for request in requests[begin:end] if "openbmb/VisCPM-Chat" in request]
        assert len(asked) == 1, "looked up once, then loaded"
    assert len(marks) == 4
    assert "one set of weights" in found["sibling"][1] and "no release 'v7'" in found["unknown"][1]
    assert "--revision, --token, --cache-dir is of a Hub repository" in found["local"][1]
    files = [request.partition("/resolve/")[2] for request in requests if "/resolve/" in request]
    # A revision is one of the model; what comes with it, such as a base or a checker, is as it is now.
    assert files and all(file.startswith(("v2/", COMMIT)) or "/resolve/main/" in file for file in files)
    asked = {request.partition("/resolve/")[0] for request in requests if "/resolve/main/" in request}
    beside = ("someone/ranker", "someone/prompts", "someone/images", "clip-vit-large-patch14", "alpaca-plus-7b")
    assert all(name.endswith(beside) for name in asked)
    # The libraries list the files of a tokenizer's repository without it.
    without = {path for path in tokens.get(None, ()) if "/resolve/" in path}
    if Version(transformers.__version__) < Version("5.22"):  # whose configurations forget it: here those of checkers
        without = {path for path in without if not (path.startswith("someone/") and path.endswith("/config.json"))}
    assert "Bearer hf_words" in tokens and not without
    assert list(cache.glob("models--openbmb--VisCPM-*")) and not list(tmp_path.glob("home/hub/models--*"))


# ------------------------------------------------------------------------------------------------------- a good guest


def write_stock(root: Path) -> None:
    """A BERT, a LLaVA's configuration and processor, and a pipeline, none of them ours."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "<image>"]
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(root / "stock/bert")
    vocab = root / "vocab.txt"
    vocab.write_text("\n".join(words), "utf-8")
    tokenizer = BertTokenizer(str(vocab))
    tokenizer.save_pretrained(root / "stock/bert")
    LlavaConfig().save_pretrained(root / "stock/llava")
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(image_processor, tokenizer, patch_size=2).save_pretrained(root / "stock/llava")
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "stock/ddpm")


def test_other_models_are_loaded_as_if_this_package_were_not_there(tmp_path):
    write_stock(tmp_path / "hub")
    asked, found = {}, {}
    with stub_hub(tmp_path / "hub") as (address, requests):
        for way in ("without", "with"):
            requests.clear()
            where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / way), "HF_HUB_OFFLINE": "0"}
            found[way] = run(HERE / "guest.py", way, **where)
            asked[way] = sorted(requests)
    assert asked["with"] == asked["without"] and len(asked["with"]) > 10
    assert found["with"] == found["without"]
    assert found["with"]["kinds"] == ["BertModel", "LlavaConfig", "DDPMPipeline"]
    assert set(found["with"]["owners"]) == {"transformers", "huggingface_hub"}  # the latter checks arguments
