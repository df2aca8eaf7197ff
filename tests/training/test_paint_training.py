"""Short runs of `train_paint` on a small random pipeline."""

import json
import os
import shutil
import signal

import pytest
import torch
from paint_training_support import (
    CAPTIONS,
    assert_equal_folders,
    run_config,
    save_pipeline,
    tensors_of,
    write_captions,
    write_rows,
)
from safetensors.torch import load_file
from transformers import TrainerCallback

from viscpm_hf import VisCPMPaintPipeline
from viscpm_hf.cli.main import main
from viscpm_hf.training import PaintTrainingConfig, load_projection, train_paint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("paint") / "model")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of all runs with pictures: nothing that is encoded depends on the run."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(tmp_path) -> str:
    return write_captions(tmp_path / "data")


def draw(pipeline: VisCPMPaintPipeline, prompt: str = CAPTIONS[0]):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=3, generator=generator, output_type="pt").images


class InterruptAt(TrainerCallback):
    """What Ctrl-C in the middle of a step does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


# --------------------------------------------------------------------------------------------------------- whole UNet


@pytest.fixture(scope="module")
def full_run(model, cache, tmp_path_factory):
    """UNet and projection with everything on: average, held-out data, drawings, TensorBoard."""
    folder = tmp_path_factory.mktemp("full")
    config = run_config(
        model,
        write_captions(folder / "data", 12),
        folder / "out",
        eval_data=[write_captions(folder / "held-out", 8, first=40)],
        cache=cache,
        train_projection=True,
        ema_decay=0.9,
        max_steps=40,
        eval_steps=10,
        validation_prompts=["a red picture", "never seen"],
        validation_steps=20,
        inference_steps=2,
        tensorboard=True,
    )
    return folder / "out", train_paint(config)


def test_loss_falls_on_held_out_pictures_and_the_best_is_kept(full_run):
    output, result = full_run
    evaluations = [entry["eval_loss"] for entry in result.log if "eval_loss" in entry]
    assert len(evaluations) == 4 and evaluations[-1] < 0.9 * evaluations[0]
    assert result.eval_loss == min(evaluations) and result.steps == 40 and result.best_step % 10 == 0
    summary = json.loads((output / "training.json").read_text("utf-8"))
    assert summary["result"]["eval_loss"] == result.eval_loss and summary["config"]["ema_decay"] == 0.9


def test_output_is_a_pipeline_with_the_averaged_weights(full_run, model):
    output, result = full_run
    pipeline, before = VisCPMPaintPipeline.from_pretrained(output), VisCPMPaintPipeline.from_pretrained(model)
    assert not torch.equal(draw(pipeline), draw(before))
    average = load_file(output / "checkpoints" / f"checkpoint-{result.best_step}" / "ema.safetensors")
    for name, tensor in pipeline.unet.named_parameters():
        assert torch.equal(tensor, average[f"unet.{name}"]), name
    assert torch.equal(pipeline.text_encoder.projection.weight, average["projection.projection.weight"])


def test_language_model_and_vae_stay_as_they_are(full_run, model):
    output, _ = full_run
    assert_equal_folders(output / "vae", model / "vae")
    ours, theirs = tensors_of(output / "text_encoder"), tensors_of(model / "text_encoder")
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    assert ours.keys() == theirs.keys()
    assert changed == {"projection.weight", "layer_norm.weight", "layer_norm.bias"}


def test_validation_prompts_are_drawn_into_files_and_tensorboard(full_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = full_run
    names = sorted(path.name for path in (output / "drawings").iterdir())
    assert names == [f"step-{step:06d}-{number}.png" for step in (20, 40) for number in (0, 1)]
    (events,) = (output / "checkpoints" / "runs").rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [event.step for event in accumulator.Images("drawings")] == [20, 40]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(model, cache, data, tmp_path):
    options = {"cache": cache, "train_projection": True, "ema_decay": 0.9, "max_steps": 5, "noise_offset": 0.1}
    train_paint(run_config(model, data, tmp_path / "whole", **options))
    config = run_config(model, data, tmp_path / "parts", **options, resume=True)
    stopped = train_paint(config, callbacks=[InterruptAt(3)])
    assert stopped.is_interrupted and stopped.steps == 3
    assert not (tmp_path / "parts" / "model_index.json").exists()
    resumed = train_paint(config)
    assert resumed.steps == 5 and resumed.num_encoded_images == 0
    for part in ("unet", "text_encoder"):
        assert_equal_folders(tmp_path / "whole" / part, tmp_path / "parts" / part)


def test_accumulated_batches_equal_one_batch(model, cache, data, tmp_path):
    train_paint(run_config(model, data, tmp_path / "one", cache=cache, batch_size=4, max_steps=2))
    train_paint(run_config(model, data, tmp_path / "two", cache=cache, batch_size=2, accumulation=2, max_steps=2))
    ours, theirs = tensors_of(tmp_path / "one" / "unet"), tensors_of(tmp_path / "two" / "unet")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_no_weight(model, cache, data, tmp_path):
    train_paint(run_config(model, data, tmp_path / "without", cache=cache, max_steps=2))
    train_paint(run_config(model, data, tmp_path / "with", cache=cache, max_steps=2, gradient_checkpointing=True))
    ours, theirs = tensors_of(tmp_path / "without" / "unet"), tensors_of(tmp_path / "with" / "unet")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_projection_alone_can_be_trained(model, cache, data, tmp_path):
    train_paint(run_config(model, data, tmp_path / "out", cache=cache, freeze_unet=True, train_projection=True))
    assert_equal_folders(tmp_path / "out" / "unet", model / "unet")
    ours, theirs = tensors_of(tmp_path / "out" / "text_encoder"), tensors_of(model / "text_encoder")
    assert not torch.equal(ours["projection.weight"], theirs["projection.weight"])


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapter_loads_into_the_pipeline_and_leaves_no_trace_when_unloaded(model, cache, data, tmp_path):
    config = run_config(
        model, data, tmp_path / "out", cache=cache, mode="lora", lora_alpha=8, learning_rate=1e-2, precision="bf16"
    )
    train_paint(config)
    pipeline = VisCPMPaintPipeline.from_pretrained(model)
    before = draw(pipeline)
    pipeline.load_lora_weights(tmp_path / "out")
    layer = pipeline.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    assert layer.scaling["default_0"] == 8 / 16
    assert not torch.equal(draw(pipeline), before)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)
    assert not (tmp_path / "out" / "unet").exists()


def test_projection_trained_with_an_adapter_loads_into_the_pipeline(model, cache, data, tmp_path):
    train_paint(run_config(model, data, tmp_path / "out", cache=cache, mode="lora", train_projection=True))
    pipeline = VisCPMPaintPipeline.from_pretrained(model)
    before = pipeline.encode_prompt(CAPTIONS[0])[0]
    load_projection(pipeline, tmp_path / "out")
    assert not torch.equal(pipeline.encode_prompt(CAPTIONS[0])[0], before)


# ------------------------------------------------------------------------------------------------ bad input, interface


def test_cache_serves_later_runs_and_only_what_is_new_is_encoded(model, data, tmp_path):
    first = train_paint(run_config(model, data, tmp_path / "one", cache=str(tmp_path / "cache"), max_steps=1))
    assert (first.num_encoded_prompts, first.num_encoded_images) == (1 + len(CAPTIONS), 8)
    more = write_captions(tmp_path / "data", 10, name="more.jsonl")
    second = train_paint(run_config(model, more, tmp_path / "two", cache=str(tmp_path / "cache"), max_steps=1))
    assert (second.num_encoded_prompts, second.num_encoded_images) == (0, 2)


def test_bad_rows_are_skipped_and_counted_or_fatal_with_file_and_line(model, tmp_path):
    write_captions(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = [{"image": f"{index}.png", "caption": CAPTIONS[0]} for index in range(3)]
    bad = [
        {"image": "missing.png", "caption": "x"},
        {"image": "0.png"},
        {"image": "0.png", "caption": " "},
        {"image": "broken.png", "caption": "x"},
        ["no object"],
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*bad, *good])
    result = train_paint(run_config(model, data, tmp_path / "out", max_steps=1))
    assert result.num_skipped == len(bad) and result.num_encoded_images == 3
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: there is no picture .*missing\.png"):
        train_paint(run_config(model, data, tmp_path / "failed", bad_rows="fail"))
    only_broken = write_rows(tmp_path / "broken.jsonl", bad[3:4])
    with pytest.raises(ValueError, match=r"broken\.jsonl line 1: .*not an image file"):
        train_paint(run_config(model, only_broken, tmp_path / "failed2", bad_rows="fail"))


def test_prompt_of_too_many_tokens_is_a_bad_row(model, tmp_path):
    short = shutil.copytree(model, tmp_path / "model")
    path = short / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_max_length": 30}), "utf-8")
    write_captions(tmp_path)
    data = write_rows(tmp_path / "long.jsonl", [{"image": "0.png", "caption": "花 " * 31}])
    with pytest.raises(ValueError, match=r"long\.jsonl.*line 1: The longest prompt has .* takes 30 at most"):
        train_paint(run_config(short, data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_unet": True}, "leaves nothing to train"),
        ({"freeze_unet": True, "train_projection": True, "mode": "lora"}, "choose one of the two"),
        ({"prompt_dropout": 1.0}, r"prompt_dropout must be in \[0, 1\)"),
        ({"mode": "qlora"}, "mode is one of full, lora"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"save_steps": 3, "eval_steps": 2, "eval_data": ["x"]}, "must be a multiple of eval_steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PaintTrainingConfig(output="out", **options)


def test_unusable_models_and_outputs_are_refused_before_any_work(model, data, tmp_path):
    import paint_support

    with pytest.raises(ValueError, match="viscpm-hf convert"):
        train_paint(run_config(paint_support.PAINT, data, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="isn't an empty folder"):
        train_paint(run_config(model, data, tmp_path / "full"))
    with pytest.raises(ValueError, match="no training data"):
        train_paint(PaintTrainingConfig(model=str(model), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_run_can_not_be_resumed_with_other_options(model, cache, data, tmp_path):
    train_paint(run_config(model, data, tmp_path / "out", cache=cache, max_steps=1))
    with pytest.raises(ValueError, match="ema_decay: 0.0 then, 0.9 now"):
        train_paint(run_config(model, data, tmp_path / "out", cache=cache, ema_decay=0.9, resume=True))
    again = {"cache": cache, "resume": True, "max_steps": 1}
    with pytest.raises(ValueError, match="learning_rate: 0.002 then, 0.1 now; adam_beta2: 0.999 then, 0.9 now"):
        train_paint(run_config(model, data, tmp_path / "out", learning_rate=0.1, adam_beta2=0.9, **again))
    write_captions(tmp_path / "data", 7)
    with pytest.raises(ValueError, match="samples: 8 then, 7 now"):
        train_paint(run_config(model, data, tmp_path / "out", **again))
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(ValueError, match="holds a model, but no run to go on with"):
        train_paint(run_config(model, data, tmp_path / "out", **again))


def test_command_trains_from_a_yaml_file_and_options(model, cache, data, tmp_path, capsys):
    (tmp_path / "train.yaml").write_text(f"max_steps: 3\ncache: {cache}\ntensorboard: false\nbatch_size: 2\n")
    out = tmp_path / "out"
    status = main(
        ["train", "paint", "--config", str(tmp_path / "train.yaml"), "--model", str(model), "--data", data]
        + ["--output", str(out), "--max-steps", "2", "--lora"]
    )
    printed = capsys.readouterr().out
    assert status == 0 and f"wrote {out}: 2 steps" in printed
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert main(["train", "paint", "--model", str(tmp_path / "none"), "--data", data, "--output", str(out)]) == 1
    assert "isn't an empty folder" in capsys.readouterr().err
