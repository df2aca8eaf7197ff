"""What is known of a checkpoint without torch is what the models say, and `inspect` says the same with and without."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from fuzz import only_models
from reference import write_visualcla_release
from safetensors.torch import save_file
from sibling_folders import NAMES, make_system, write_folder, write_tokenizer
from support import CHAT_LAYOUTS, CPM_BEE_LAYOUTS, GOLDEN, Golden

from viscpm_hf import convert, inspect, tiny
from viscpm_hf.conversion.inspection import as_dict
from viscpm_hf.conversion.paint import empty_part
from viscpm_hf.conversion.quantized import convert_quantized
from viscpm_hf.conversion.verify import empty_model, shapes_of, stored_shapes
from viscpm_hf.families.diffusion_shapes import UNET_CONFIG, VAE_CONFIG, unet_shapes, vae_shapes
from viscpm_hf.families.family import BEIT3, FAMILIES
from viscpm_hf.families.known_sizes import known_sizes
from viscpm_hf.families.model_shapes import model_shapes


MASK = [[False, False], [True, False], [False, True], [True, True]]
# Configurations of every system, the released one and what changes its shapes otherwise.
VARIANTS = [
    *((kind, {}) for kind in FAMILIES if kind != BEIT3),
    ("cpm_bee", {"num_hidden_layers": 4, "mask_modules": MASK, "head_dim": 40}),
    ("chat", {"text_config": {"num_hidden_layers": 4, "mask_modules": MASK}, "vision_config": {"image_size": 448}}),
    ("minicpmv", {"resampler_config": {"hidden_size": 1152, "key_positions": "interpolated"}}),
]
CHANGES = {
    UNet2DConditionModel: [
        {},
        {"layers_per_block": 3, "use_linear_projection": False, "norm_num_groups": 16},
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "block_out_channels": [32, 64],
         "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8},
    ],
    AutoencoderKL: [
        {},
        {"layers_per_block": 1, "mid_block_add_attention": False, "use_quant_conv": False, "latent_channels": 16},
        {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2,
         "up_block_types": ["UpDecoderBlock2D"] * 2, "use_post_quant_conv": False},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_the_systems_have_the_shapes_of_their_models(kind, changes):
    family = FAMILIES[kind]
    assert family.model_type == family.config_class.model_type
    config = family.config_class(**changes)
    sizes = known_sizes(kind, json.loads(config.to_json_string()))
    assert model_shapes(kind, sizes) == stored_shapes(empty_model(config))


@pytest.mark.parametrize(
    ("model_class", "released", "shapes"),
    [(UNet2DConditionModel, UNET_CONFIG, unet_shapes), (AutoencoderKL, VAE_CONFIG, vae_shapes)],
)
def test_unet_and_vae_have_the_shapes_of_diffusers(model_class, released, shapes):
    for changes in CHANGES[model_class]:
        model = empty_part(model_class, {**released, **changes})
        assert shapes(json.loads(model.to_json_string())) == shapes_of(model), changes
    assert shapes({**released, "act_fn": "mish"}) is shapes({**released, "norm_num_groups": 7}) is None


CHAT_CONFIG = json.loads(FAMILIES["chat"].config_class().to_json_string())


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_config", {"hidden_size": "4096"}),
        ("text_config", {"hidden_act": "nonsense"}),
        ("text_config", {"num_hidden_layers": 5000}),
        ("text_config", {"position_bias_num_buckets": 31}),
        ("text_config", {"pad_token_id": 90_000}),
        ("text_config", {"tie_word_embeddings": False}),
        ("text_config", {"unheard_of": 1}),
        ("vision_config", {"patch_size": 15}),
        ("vision_config", {"num_query_tokens": True}),
    ],
)
def test_what_only_the_classes_can_judge_is_left_to_them(part, change):
    assert known_sizes("chat", CHAT_CONFIG) is not None
    assert known_sizes("chat", {**CHAT_CONFIG, part: {**CHAT_CONFIG[part], **change}}) is None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Whole checkpoints of every kind, by what they are."""
    root, found = tmp_path_factory.mktemp("kinds"), {}
    for name in ("chat_a", "paint_a", "pruned_1"):
        found[name], found[f"{name} file"] = GOLDEN / name, GOLDEN / name / "pytorch_model.bin"
        convert(GOLDEN / name / "pytorch_model.bin", root / name, max_shard_size="300KB")
        found[f"{name} converted"] = root / name
    for way in (*CHAT_LAYOUTS, *CPM_BEE_LAYOUTS):
        found[way] = Golden("chat_a").write_layout(root / way, way)
    for name in NAMES:
        found[name] = write_folder(name, root / f"original {name}")
        convert(found[name], root / name)
        found[f"{name} converted"] = root / name
    convert_quantized(found["minicpmv-2.0"], root / "int8", "8bit")
    release = write_visualcla_release(make_system("visualcla"), root / "release")
    write_tokenizer("visualcla", release.adapter)
    (root / "lora").mkdir()
    save_file({}, root / "lora" / "adapter_model.safetensors")
    (root / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "viscpm-tiny", "r": 2}')
    return found | {
        "tiny chat": tiny("chat"), "tiny paint": tiny("paint"), "int8": root / "int8",
        "visualcla adapter": release.adapter, "lora": root / "lora",
    }  # fmt: skip


def test_inspect_imports_no_torch_for_what_is_as_it_should_be(checkpoints):
    program = [
        "import json, sys",
        "from viscpm_hf.cli import main",
        f"for path in {[os.fspath(path) for path in checkpoints.values()]}:",
        "    main(['inspect', path, '--json'])",
        "    heavy = {'torch', 'transformers', 'diffusers'} & set(sys.modules)",
        "    assert not heavy, (path, heavy)",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line, (kind, path) in zip(run.stdout.splitlines(), checkpoints.items(), strict=True):
        said = json.loads(line)
        with only_models():
            assert said == json.loads(json.dumps(as_dict(inspect(path)))), kind
        assert said["is_complete"] or kind == "visualcla adapter", kind


@pytest.mark.parametrize("name", ["chat_a converted", "paint_a converted", "chat_a", "paint_a", "omnilmm", "int8"])
def test_what_differs_is_told_as_the_models_tell_it(checkpoints, tmp_path, name):
    """A layer more in the configuration than in the weights."""
    folder = tmp_path / "folder"
    shutil.copytree(checkpoints[name], folder)
    names = ("text_encoder/config.json", "config.json", "cpm-bee.json")
    path = next(folder / file for file in names if (folder / file).exists())
    config = json.loads(path.read_text("utf-8"))
    text = config.get("text_config", config)
    key = "num_layers" if "num_layers" in text else "num_hidden_layers"
    text[key] += 1
    path.write_text(json.dumps(config), "utf-8")
    found = inspect(folder)
    assert found.missing or "tensors missing" in found.problems[0]
    with only_models():
        assert inspect(folder) == found
