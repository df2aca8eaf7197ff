"""Short runs of `train_chat` on the golden checkpoints."""

import copy
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import PIL.Image
import pytest
import torch
from chat_training_support import colour_rows, conversation, half_a_picture, run_config, write_rows
from safetensors.torch import load_file
from support import Golden
from transformers import TrainerCallback

from viscpm_hf import VisCPMChat, VisCPMChatForConditionalGeneration
from viscpm_hf.training import ChatTrainingConfig, merge_adapter, train_chat
from viscpm_hf.training.chat import IDENTITY, check_same_run
from viscpm_hf.training.records import BadRowError


FAST = {"learning_rate": 3e-3, "batch_size": 4}
QUICK = {"epochs": 3, **FAST}

# One size suffices here: no constant of it gets into what these tests are about.
pytestmark = pytest.mark.parametrize("golden", ["chat_a"], indirect=True, scope="session")


@pytest.fixture
def rows(tmp_path) -> str:
    return write_rows(tmp_path / "train.json", colour_rows(9))


def weights_of(folder) -> dict[str, torch.Tensor]:
    (file,) = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    return load_file(file)


def assert_equal_folders(first, second) -> None:
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def losses(result) -> list[float]:
    return [entry["loss"] for entry in result.log if "loss" in entry]


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter_run(golden, tmp_path_factory):
    """A LoRA run on a converted folder, with held-out rows."""
    folder = tmp_path_factory.mktemp("lora")
    chat = golden.load_chat()
    chat.model.save_pretrained(folder / "base")
    chat.processor.save_pretrained(folder / "base")
    data = write_rows(folder / "train.json", colour_rows(12))
    held_out = write_rows(folder / "eval.json", colour_rows(3, first=100))
    config = run_config(
        golden, data, folder / "out", model=folder / "base", eval_data=[held_out], epochs=4, tensorboard=True, **FAST
    )
    return folder, train_chat(config)


def test_lora_lowers_the_loss_on_held_out_rows(adapter_run):
    folder, result = adapter_run
    evaluations = [entry["eval_loss"] for entry in result.log if "eval_loss" in entry]
    assert evaluations[-1] < 0.5 < 1 < evaluations[0]
    assert result.eval_loss == min(evaluations) and result.steps == 24
    assert set(weights_of(folder / "out")) and all("lora" in name for name in weights_of(folder / "out"))
    assert not any("vision_tower" in name for name in weights_of(folder / "out"))
    assert list((folder / "out" / "checkpoints" / "runs").rglob("events.out.tfevents*"))
    summary = json.loads((folder / "out" / "training.json").read_text("utf-8"))
    assert summary["result"]["eval_loss"] == result.eval_loss and summary["config"]["lora_rank"] == 16
    assert not list((folder / "out").glob("*.bin"))  # no pickles


def test_adapters_load_every_way(golden, adapter_run):
    from peft import PeftModel

    folder, _ = adapter_run
    out, base = folder / "out", folder / "base"
    chat = VisCPMChat(base, device="cpu")
    inputs = chat.processor(golden.image(1), "<image>what?", return_tensors="pt")
    with torch.no_grad():
        plain = chat.model(**inputs).logits
        chat.model.load_adapter(str(out))
        loaded = chat.model(**inputs).logits
        peft_model = PeftModel.from_pretrained(VisCPMChatForConditionalGeneration.from_pretrained(base), str(out))
        wrapped = peft_model.eval()(**inputs).logits
        merge_adapter(base, out, folder / "merged")
        merged = VisCPMChat(folder / "merged", device="cpu").model(**inputs).logits
        ours = VisCPMChat(out, device="cpu").model(**inputs).logits
    assert not torch.allclose(plain, loaded, atol=1e-2)
    torch.testing.assert_close(wrapped, loaded)
    torch.testing.assert_close(ours, loaded)
    torch.testing.assert_close(merged, loaded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["folder", "original file"])
def test_merged_weights_have_the_dtype_of_the_stored_ones(golden, adapter_run, tmp_path, layout):
    """Also fp16, which a CPU would not be given to compute with."""
    folder, _ = adapter_run
    base = tmp_path / "base"
    if layout == "folder":
        chat = VisCPMChat(folder / "base", device="cpu")
        chat.model.half().save_pretrained(base)
        chat.processor.save_pretrained(base)
    else:
        shutil.copytree(golden.folder, base)
        base /= golden.weights.name
        stored = torch.load(golden.weights, weights_only=True)
        torch.save(
            {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}, base
        )
    for dtype, expected in ((None, torch.float16), ("float32", torch.float32)):
        merged = merge_adapter(base, folder / "out", tmp_path / str(dtype), dtype=dtype)
        assert {tensor.dtype for tensor in weights_of(merged).values()} == {expected}


def test_merging_what_does_not_fit(golden, adapter_run, tmp_path):
    folder, _ = adapter_run
    with pytest.raises(ValueError, match="another model's"):
        merge_adapter(Golden("chat_b").weights, folder / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(FileNotFoundError, match="no adapter"):
        merge_adapter(folder / "base", folder / "base", tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="isn't an empty folder"):
        merge_adapter(folder / "base", folder / "out", tmp_path / "full")


def test_an_original_file_as_the_base(golden, rows, tmp_path):
    train_chat(run_config(golden, rows, tmp_path / "out", max_steps=1, **FAST))
    assert VisCPMChat(tmp_path / "out", device="cpu").chat(golden.image(0), "?", max_new_tokens=2)[0] is not None


def test_qlora(golden, chat, rows, tmp_path):
    """On a model whose widths 4-bit weights can have, and which nobody trained."""
    config = copy.deepcopy(chat.model.config)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    VisCPMChatForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    chat.processor.save_pretrained(tmp_path / "base")
    result = train_chat(run_config(golden, rows, tmp_path / "out", model=tmp_path / "base", mode="qlora", **QUICK))
    assert min(losses(result)) < losses(result)[0] - 0.3
    assert all("lora" in name for name in weights_of(tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()
    VisCPMChat(tmp_path / "out", device="cpu", quantization="nf4").chat(golden.image(0), "?", max_new_tokens=2)
    with pytest.raises(ValueError, match="multiples of 64 inputs"):
        train_chat(run_config(golden, rows, tmp_path / "none", mode="qlora"))


def test_targets(golden, rows, tmp_path):
    config = run_config(
        golden, rows, tmp_path / "out", max_steps=1, freeze_llm=True, lora_targets=[r".*vision_tower.*fc1"]
    )
    train_chat(config)
    assert all("vision_tower" in name and "fc1" in name for name in weights_of(tmp_path / "out"))
    for targets in (["q_prj"], [".*nothing.*"]):
        with pytest.raises(ValueError, match="lora_targets"):
            train_chat(run_config(golden, rows, tmp_path / "none", lora_targets=targets))


# ---------------------------------------------------------------------------------------------------- full fine-tuning


@pytest.mark.parametrize("frozen", [{}, {"freeze_vision": True}, {"freeze_llm": True}], ids=str)
def test_what_trains(golden, chat, rows, tmp_path, frozen):
    """And the result is an ordinary folder."""
    train_chat(run_config(golden, rows, tmp_path / "out", mode="full", max_steps=2, warmup=0, **FAST, **frozen))
    after = VisCPMChat(tmp_path / "out", device="cpu").model.state_dict()
    changed = {name for name, tensor in chat.model.state_dict().items() if not torch.equal(tensor, after[name])}
    assert not any("patch_embedding" in name for name in changed)
    assert any(".query." in name for name in changed) and any("multi_modal_projector" in name for name in changed)
    image_side = any("vision_tower" in name and ".image." in name for name in changed)
    assert image_side == (not frozen.get("freeze_vision"))
    assert ("model.vision_tower.embeddings.image_position_embedding.weight" in changed) == image_side
    assert any("language_model" in name for name in changed) == (not frozen.get("freeze_llm"))
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    chat.model.save_pretrained(tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "config.json").read_text("utf-8"))
    assert config == plain


def test_every_trained_weight_gets_a_gradient(golden, own_chat):
    """Processes that train together would otherwise wait for one."""
    from viscpm_hf.training.adapters import select_weights
    from viscpm_hf.training.chat_dataset import Draws, SampleLimits
    from viscpm_hf.training.collator import ChatCollator

    model = own_chat.model
    select_weights(model, freeze_vision=False, freeze_llm=False)
    draws = Draws([conversation(str(golden.image(0)), ("q", "a"))], seed=0)
    model(**ChatCollator(own_chat.processor, SampleLimits(512, 2))([draws[0]])).loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle == []
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():  # and no more is frozen than has to be
        parameter.requires_grad_(True)
    model(**ChatCollator(own_chat.processor, SampleLimits(512, 2))([draws[0]])).loss.backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    select_weights(model, freeze_vision=False, freeze_llm=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen - idle == {name for name in frozen if "patch_embedding" in name}


def test_accumulation_is_a_larger_batch(golden, tmp_path):
    """Also where samples differ in the number of tokens to learn. (Strings without a token would differ: the logits
    have columns for those of the rows in the same forward pass.)"""
    rows = write_rows(tmp_path / "train.json", [conversation("image_0.png", ("q", "a b c"[:n])) for n in (1, 5, 3, 1)])
    options = {"mode": "full", "max_steps": 3, "warmup": 0, "learning_rate": 1e-3, "group_by_length": False}
    results = [
        train_chat(run_config(golden, rows, tmp_path / name, batch_size=size, accumulation=steps, **options))
        for name, size, steps in (("large", 4, 1), ("small", 2, 2))
    ]
    torch.testing.assert_close(*map(losses, results), atol=1e-4, rtol=1e-4)
    large, small = (weights_of(tmp_path / name) for name in ("large", "small"))
    for name, tensor in large.items():
        torch.testing.assert_close(tensor, small[name], atol=1e-5, rtol=1e-3, msg=name)


def test_gradient_checkpointing_changes_nothing(golden, rows, tmp_path):
    for mode in ("full", "lora"):
        folders = [tmp_path / f"{mode}-{flag}" for flag in (False, True)]
        for folder in folders:
            flag = folder.name.endswith("True")
            options = {"mode": mode, "max_steps": 2, "gradient_checkpointing": flag, "lora_dropout": 0.0}
            train_chat(run_config(golden, rows, folder, **options, **FAST))
        assert_equal_folders(*folders)


def test_another_image_size(golden, rows, tmp_path):
    side = golden.vision_config["image_size"] + 2 * golden.vision_config["patch_size"]
    for mode in ("full", "lora"):
        out = tmp_path / mode
        train_chat(run_config(golden, rows, out, mode=mode, max_steps=1, image_size=side, **FAST))
        chat = VisCPMChat(out, device="cpu")
        assert chat.processor.image_processor.size["height"] == side
        assert chat.model.config.vision_config.image_size == side
        assert chat.encode_image(PIL.Image.open(golden.image(0))).shape[1] == golden.num_queries
    merge_adapter(golden.weights, tmp_path / "lora", tmp_path / "merged")
    merged = VisCPMChat(tmp_path / "merged", device="cpu")
    assert merged.chat(golden.image(0), "?")[0] == VisCPMChat(out, device="cpu").chat(golden.image(0), "?")[0]
    with pytest.raises(ValueError, match="no multiple of the vision tower's patch_size"):
        train_chat(run_config(golden, rows, tmp_path / "odd", image_size=side + 1))


def test_bfloat16(golden, rows, tmp_path):
    result = train_chat(run_config(golden, rows, tmp_path / "out", precision="bf16", **QUICK))
    assert min(losses(result)) < losses(result)[0] / 2


def test_datasets_in_memory(golden, own_chat, tmp_path):
    """Pictures drawn as they are asked for, text between them, every turn trained."""
    asked = []

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            asked.append(index)
            picture = PIL.Image.new("RGB", (32, 32), (index * 30, 0, 0)) if index % 2 else None
            return conversation(picture, ("what?", "a circle"), ("and?", "red"))

    config = ChatTrainingConfig(output=tmp_path / "out", mode="full", batch_size=4, epochs=2, tensorboard=False)
    result = train_chat(
        config, train_dataset=Drawn(), eval_dataset=Drawn(), model=own_chat.model, processor=own_chat.processor
    )
    assert result.steps == 4 and result.eval_loss is not None
    assert VisCPMChat(tmp_path / "out", device="cpu").model is not None
    assert {asked.count(index) for index in range(8)} == {4}  # two epochs of training, two evaluations


# ------------------------------------------------------------------------------------------------------------ resuming


class StopAt(TrainerCallback):
    """As if the machine had been switched off after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    ("mode", "optimizer"), [("full", "adamw_torch"), ("full", "muon"), ("lora", "adamw_torch"), ("lora", "muon")]
)
@pytest.mark.parametrize("stop", [4, 6], ids=["amid an epoch", "between epochs"])
def test_resumed_is_uninterrupted_to_the_bit(golden, tmp_path, mode, optimizer, stop):
    """Order, pictures, dropout, optimizer: 18 samples in batches of 3, over 2 epochs of 6 steps."""
    data = write_rows(tmp_path / "train.json", colour_rows(9))
    config = run_config(
        golden, [data + ":0.5", data + ":0.5"], tmp_path / "whole", mode=mode, batch_size=3, epochs=2, augment=True,
        learning_rate=1e-3, save_steps=2, eval_data=[data], optimizer=optimizer,
    )  # fmt: skip
    whole = train_chat(config)
    assert whole.steps == 12

    broken = dataclasses.replace(config, output=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="power cut"):
        train_chat(broken, callbacks=[StopAt(stop + 1)])
    assert not list((tmp_path / "broken").glob("*.safetensors"))
    torch.manual_seed(12345)  # whatever the new process did before
    resumed = train_chat(dataclasses.replace(broken, resume=True))
    assert losses(resumed) == losses(whole) and resumed.eval_loss == whole.eval_loss
    assert_equal_folders(tmp_path / "whole", tmp_path / "broken")


def test_a_half_written_checkpoint_is_passed_over(golden, rows, tmp_path):
    options = {"mode": "full", "max_steps": 4, "save_steps": 2, **FAST}
    config = run_config(golden, rows, tmp_path / "out", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train_chat(config, callbacks=[StopAt(3)])
    half = tmp_path / "out" / "checkpoints" / "checkpoint-3"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resumed = train_chat(dataclasses.replace(config, resume=True))
    whole = train_chat(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert losses(resumed) == losses(whole)


def test_resume_without_a_checkpoint_starts(golden, rows, tmp_path):
    """So that a job's script needs no case for its first run."""
    assert train_chat(run_config(golden, rows, tmp_path / "out", max_steps=1, resume=True)).steps == 1


def test_resuming_another_run_is_refused(golden, rows, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(golden.folder, model)
    config = run_config(
        golden, rows, tmp_path / "out", model=model / golden.weights.name, max_steps=2, save_steps=1, **FAST
    )
    train_chat(config)
    again = dataclasses.replace(config, resume=True)
    for options, message in (
        ({"batch_size": 2}, "batch_size: 4 then, 2 now"),
        ({"learning_rate": 1.0}, "learning_rate: 0.003 then, 1.0 now"),
        ({"lora_dropout": 0.5, "warmup": 7}, "lora_dropout: 0.05 then, 0.5 now; warmup: 0.03 then, 7.0 now"),
        ({"model": str(Golden("chat_b").weights)}, "model: "),
    ):
        with pytest.raises(ValueError, match=message):
            train_chat(dataclasses.replace(again, **options))
    with pytest.raises(ValueError, match="isn't an empty folder"):
        train_chat(config)
    facts = json.loads((tmp_path / "out" / "checkpoints" / "training.json").read_text("utf-8"))["facts"]
    assert (facts["samples"], facts["processes"]) == (18, 1)
    with pytest.raises(ValueError, match="processes: 1 then, 2 now"):
        check_same_run(config, {**facts, "processes": 2}, tmp_path / "out", IDENTITY)
    # The same model somewhere else is the same, and a run may last longer than was said.
    model = model.rename(tmp_path / "moved")
    longer = dataclasses.replace(again, model=str(model / golden.weights.name), max_steps=3)
    assert train_chat(longer).steps == 3
    write_rows(Path(rows), colour_rows(8))
    with pytest.raises(ValueError, match="samples: 18 then, 16 now"):
        train_chat(longer)


def test_there_is_nothing_to_resume_in_a_models_folder(golden, adapter_run, rows, tmp_path):
    folder, _ = adapter_run
    finished = tmp_path / "finished"
    shutil.copytree(folder / "out", finished, ignore=shutil.ignore_patterns("checkpoints"))
    for output in (finished, folder / "base"):
        before = sorted(output.iterdir())
        with pytest.raises(ValueError, match="holds a model, but no run to go on with; choose another output"):
            train_chat(run_config(golden, rows, output, max_steps=1, resume=True))
        assert sorted(output.iterdir()) == before


def test_an_interruption_leaves_a_checkpoint(golden, rows, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and not resuming:
                os.kill(os.getpid(), signal.SIGINT)

    resuming = False
    config = run_config(golden, rows, tmp_path / "out", mode="full", max_steps=5, **FAST)
    stopped = train_chat(config, callbacks=[Interrupt()])
    assert stopped.is_interrupted and stopped.steps == 3
    assert not (tmp_path / "out" / "config.json").exists()
    resuming = True
    resumed = train_chat(dataclasses.replace(config, resume=True), callbacks=[Interrupt()])
    whole = train_chat(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert resumed.steps == 5 and losses(resumed) == losses(whole)
    assert_equal_folders(tmp_path / "out", tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_best_checkpoint_is_the_result(golden, tmp_path):
    """Rows learned by heart make the others worse: the result is the model before."""
    train = write_rows(tmp_path / "train.json", [conversation("image_0.png", ("q", "z z z z"))])
    held_out = write_rows(tmp_path / "eval.json", [conversation("image_1.png", ("图片是什么颜色？", "蓝色 a b c"))])
    options = {"mode": "full", "max_steps": 12, "save_steps": 1, "learning_rate": 1e-2, "batch_size": 1}
    result = train_chat(run_config(golden, train, tmp_path / "out", eval_data=[held_out], **options))
    evaluations = {entry["step"]: entry["eval_loss"] for entry in result.log if "eval_loss" in entry}
    assert result.best_step == min(evaluations, key=evaluations.get) < 12
    assert result.eval_loss == evaluations[result.best_step] < evaluations[12]
    best = tmp_path / "out" / "checkpoints" / f"checkpoint-{result.best_step}"
    assert_equal_folders(tmp_path / "out", best)
    assert len(list(best.parent.glob("checkpoint-*"))) == 2


# ----------------------------------------------------------------------------------------------------------- bad input


def test_worker_processes_change_nothing(golden, rows, tmp_path):
    """Neither what is learned nor what is said of a bad picture."""
    runs = [run_config(golden, rows, tmp_path / str(n), workers=n, max_steps=3, augment=True, **FAST) for n in (0, 2)]
    assert losses(train_chat(runs[0])) == losses(train_chat(runs[1]))
    (tmp_path / "broken.png").write_bytes(golden.image(0).read_bytes()[:200])
    data = write_rows(tmp_path / "broken.json", [conversation("broken.png", ("q", "a"))])
    config = run_config(golden, data, tmp_path / "out", workers=2, bad_rows="fail", images=tmp_path)
    with pytest.raises(BadRowError) as error:
        train_chat(config)
    assert str(error.value).startswith(f"{data} row 1 (index 0), line 1: The image file is truncated")


def test_unreadable_held_out_pictures_do_not_count(golden, rows, tmp_path):
    """Neither with a loss of 0 nor otherwise."""
    for index in range(3):
        shutil.copy(golden.image(index), tmp_path)
    (tmp_path / "half.jpg").write_bytes(half_a_picture())
    good, bad = colour_rows(3), [conversation("half.jpg", ("q", "a"))]
    results = []
    for name, held_out in (("good", good), ("both", [*good, *bad])):
        data = write_rows(tmp_path / f"{name}.json", held_out)
        config = run_config(
            golden, rows, tmp_path / name, eval_data=[data], images=tmp_path, max_steps=2, eval_batch_size=1, **FAST
        )
        results.append(train_chat(config).eval_loss)
    assert results[0] == results[1]


def test_a_step_of_bad_samples_alone_changes_no_loss_to_nan(golden, own_chat, tmp_path):
    items = [conversation(None, ("q", "z" * 600)), conversation(None, ("q", "a"))]
    config = ChatTrainingConfig(output=tmp_path / "out", mode="full", epochs=1, tensorboard=False, log_steps=1)
    result = train_chat(config, train_dataset=items, model=own_chat.model, processor=own_chat.processor)
    assert all(loss == loss for loss in losses(result)) and 0.0 in losses(result)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "out").values())


def test_bad_input_leaves_nothing_behind(golden, rows, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    cases = [
        ({"data": []}, "no training data"),
        ({"data": ["missing.json"]}, "no training data at missing.json"),
        ({"data": [str(tmp_path / "empty.json")]}, "has no rows"),
        ({"images": "no/such/folder"}, "no images folder no/such/folder"),
        ({"model": "./no/such/model.bin"}, "no checkpoint at"),  # as a path: not a repository's name
        ({"model": None}, "which model"),
        ({"eval_data": ["missing.json"]}, "missing.json"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            train_chat(dataclasses.replace(run_config(golden, rows, tmp_path / "out"), **options))
        assert not (tmp_path / "out").exists(), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode is one of lora, qlora, full"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": "many"}, "epochs must be of type float"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"freeze_llm": True}, "freeze_llm leaves lora nothing to train"),
        ({"save_steps": 3, "eval_steps": 2, "eval_data": ["x"]}, "save_steps 3 must be a multiple of eval_steps 2"),
        ({"mode": "full", "weights": "fp16"}, "Full fine-tuning needs weights in fp32 or bf16"),
        ({"output": None}, "where the result goes"),
    ],
)
def test_options_that_can_not_be(golden, options, message):
    with pytest.raises(ValueError, match=message):
        ChatTrainingConfig(**{"output": "out", **options})
