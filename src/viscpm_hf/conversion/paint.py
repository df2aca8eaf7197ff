"""What is particular to VisCPM-Paint: a checkpoint of three models, of which the original file holds two."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers.dynamic_module_utils import custom_object_save

from ..checkpoints.configurations import read_config, without_weights
from ..checkpoints.errors import ConversionError, OriginalCheckpointError
from ..checkpoints.headers import TensorHeader
from ..checkpoints.location import (
    MANIFEST_NAME,
    Location,
    diffusers_config,
    file_beside,
    json_object,
    original_unet_config,
)
from ..checkpoints.original import (
    DIFFUSION_CONFIG_NAME,
    PAINT,
    VOCAB_NAME,
    CheckpointProblems,
    check_state_dict,
    load_state_dict,
    paint_parts,
    read_json,
    text_encoder_config,
)
from ..checkpoints.readers import reader_of
from ..checkpoints.tensor_files import SafetensorsFolder, dtype_name, mapped_tensors
from ..families import key_maps
from ..families.diffusion_shapes import UNET_CONFIG, VAE_CONFIG
from ..loading.paint import VAE_ADVICE, VAE_NAME, reference_scheduler
from ..modeling.configuration_limits import check_layers
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from ..pipelines.saving_viscpm_paint import save_code as save_pipeline_code
from .folder_files import write_index, write_json
from .model_card import card
from .plan import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, Checkpoint, Part, check_vocabulary, extra_tensors
from .verify import LoadingReport, check_weights, empty_model, shapes_of


if TYPE_CHECKING:
    from .plan import ConversionPlan


TEXT_ENCODER, UNET, VAE = "text_encoder", "unet", "vae"
# The VAE comes from a file of its own; in `Checkpoint.tensors` its names begin with this.
VAE_PREFIX = "vae."
# Keeps the UNet's names apart from the text encoder's on the way back, while both are in one dict.
UNET_PREFIX = "unet:"
PARTS = (
    Part(TEXT_ENCODER, TRANSFORMERS_WEIGHTS, key_maps.PAINT_TEXT_ENCODER),
    Part(UNET, DIFFUSERS_WEIGHTS, key_maps.PAINT_UNET),
    Part(VAE, DIFFUSERS_WEIGHTS, key_maps.VAE, source_prefix=VAE_PREFIX),
)
PROMPT_CHECKER = "text-security-checker"
CONVERTED_PROMPT_CHECKER = ("prompt_checker", "prompt_checker_tokenizer")


@dataclass(frozen=True)
class DiffusionConfigs:
    """diffusers' configurations of what isn't the text encoder."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    prompt_checker: Path | None = None
    """The folder of the original's text classifier, if it is there."""


def open_original_paint(
    location: Location,
    weights: Path,
    tensors: dict[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    llm: Mapping[str, Any],
    vocab: Path,
    original_configs: dict[str, Any],
    diffusion_config: str | os.PathLike | None,
    vae: Path | None,
) -> Checkpoint:
    """See `planning.open_original`.

    Raises:
        OriginalCheckpointError: if the checkpoint is incomplete, or its configurations are of another one.
        FileNotFoundError: if there is no VAE.
    """
    file = file_beside(location, diffusion_config, (DIFFUSION_CONFIG_NAME,), "diffusion configuration")
    given = read_json(file, "The diffusion configuration") if file is not None else {}
    if given:
        original_configs[DIFFUSION_CONFIG_NAME] = given
    config = text_encoder_config(llm, shapes)
    reader_of(PAINT).state_dict(tensors, VisCPMPaintTextEncoder, config, weights)
    check_vocabulary(vocab, config)
    vae_place = vae or next(
        (place for place in (location.folder / VAE, location.folder / VAE_NAME) if place.exists()), None
    )
    if vae_place is None:
        raise FileNotFoundError(f"There is no VAE beside {weights}. {VAE_ADVICE}")
    vae_file, vae_tensors = open_vae(vae_place)
    checker = location.folder / PROMPT_CHECKER
    diffusion = DiffusionConfigs(
        unet=given.get("unet") or diffusers_config(location.folder / UNET) or UNET_CONFIG,
        vae=given.get("vae") or diffusers_config(vae_file.parent) or VAE_CONFIG,
        scheduler=given.get("scheduler"),
        prompt_checker=checker if checker.is_dir() else None,
    )
    _, unet_tensors = paint_parts(tensors)
    for part, model_class, sizes, own, where in (
        (PARTS[1], UNet2DConditionModel, diffusion.unet, unet_tensors, weights),
        (PARTS[2], AutoencoderKL, diffusion.vae, vae_tensors, vae_file),
    ):
        problems = check_state_dict(own, part.key_map, shapes_of(empty_part(model_class, sizes)))
        if problems:
            raise OriginalCheckpointError(
                f"{where} doesn't fit the configuration of its {model_class.__name__}: {problems}. For sizes other "
                f"than the released ones give a {DIFFUSION_CONFIG_NAME} (--diffusion-config)."
            )
    everything = {**tensors, **{VAE_PREFIX + name: tensor for name, tensor in vae_tensors.items()}}
    return Checkpoint(
        location, PAINT, everything, list(PARTS), [weights, vae_file], config, vocab, original_configs, diffusion
    )


def open_vae(place: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of a VAE, and its tensors, mapped; `place` is the file or diffusers' folder of it."""
    file = place
    if place.is_dir():
        names = (f"{DIFFUSERS_WEIGHTS}.safetensors", f"{DIFFUSERS_WEIGHTS}.bin")
        file = next((place / name for name in names if (place / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"There is neither {' nor '.join(names)} in {place}.")
    return file, mapped_tensors(file) if file.suffix == ".safetensors" else load_state_dict(file)


def empty_part(model_class: type, config: Mapping[str, Any]) -> torch.nn.Module:
    """A diffusers model whose weights take no memory."""
    check_layers(config)
    return without_weights(lambda: model_class.from_config(dict(config)))


def check_original_paint(
    location: Location, config: VisCPMPaintTextEncoderConfig, headers: Mapping[str, TensorHeader]
) -> CheckpointProblems:
    """Compares an original file's tensors with the models of its configurations."""
    of_encoder, of_unet = paint_parts(headers)
    unet = empty_part(UNet2DConditionModel, original_unet_config(location))
    of_encoder = check_state_dict(of_encoder, PARTS[0].key_map, shapes_of(empty_model(config)))
    return of_encoder + check_state_dict(of_unet, PARTS[1].key_map, shapes_of(unet))


# ------------------------------------------------------------------------------------------------------ the new folder


def export_paint_folder(
    folder: Path, checkpoint: Checkpoint, plan: ConversionPlan, manifest: Mapping[str, Any]
) -> None:
    """Completes a folder of weights to one that `DiffusionPipeline.from_pretrained` loads."""
    encoder = empty_model(checkpoint.config)
    config = encoder.config
    config.architectures = [type(encoder).__name__]
    config.dtype = dtype_name(plan.stored_dtype(TEXT_ENCODER))
    config.name_or_path = ""
    custom_object_save(encoder, folder / TEXT_ENCODER)
    config.save_pretrained(folder / TEXT_ENCODER)
    for part in checkpoint.parts:
        write_index(folder, plan, part.weights_name, part.folder)
    diffusion: DiffusionConfigs = checkpoint.diffusion
    unet, vae = empty_part(UNet2DConditionModel, diffusion.unet), empty_part(AutoencoderKL, diffusion.vae)
    unet.save_config(folder / UNET)
    vae.save_config(folder / VAE)
    scheduler = reference_scheduler(diffusion.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    tokenizer = CpmBeeTokenizer(str(checkpoint.vocab))
    tokenizer.save_pretrained(folder / "tokenizer")
    shutil.copyfile(checkpoint.vocab, folder / "tokenizer" / VOCAB_NAME)
    components = {
        TEXT_ENCODER: encoder, UNET: unet, VAE: vae, "scheduler": scheduler, "tokenizer": tokenizer,
    }  # fmt: skip
    components |= save_prompt_checker(folder, diffusion.prompt_checker)
    write_json(folder / "model_index.json", model_index(components))
    save_pipeline_code(folder)
    write_json(folder / MANIFEST_NAME, manifest)
    (folder / "README.md").write_text(card(checkpoint, plan.num_parameters, manifest), "utf-8")


def save_prompt_checker(folder: Path, source: Path | None) -> dict[str, Any]:
    """The original's text classifier as safetensors, if the checkpoint has it."""
    if source is None:
        return {}
    from transformers import BertForSequenceClassification, BertTokenizerFast

    checker = BertForSequenceClassification.from_pretrained(source)
    tokenizer = BertTokenizerFast.from_pretrained(source)
    for component, name in zip((checker, tokenizer), CONVERTED_PROMPT_CHECKER, strict=True):
        component.save_pretrained(folder / name)
    return dict(zip(CONVERTED_PROMPT_CHECKER, (checker, tokenizer), strict=True))


def model_index(components: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' list of a pipeline's components."""
    from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline

    index: dict[str, Any] = {
        "_class_name": VisCPMPaintPipeline.__name__,
        "_diffusers_version": diffusers.__version__,
    }
    for name, component in sorted(components.items()):
        module = type(component).__module__
        library = module.partition(".")[0]
        index[name] = [library if library in ("diffusers", "transformers") else module, type(component).__name__]
    for name in VisCPMPaintPipeline._optional_components:
        index.setdefault(name, [None, None])
    return index


def check_paint_folder(folder: Path) -> None:
    """Compares the weights of a converted folder with the models of their configurations.

    Raises:
        ConversionError: if tensors are missing, surplus or of another shape, or the folder lacks a part.
    """
    if not (folder / "model_index.json").is_file():
        raise ConversionError(f"{folder} has no model_index.json.")
    for part, model in empty_parts(folder).items():
        check_weights(model, folder / part, TRANSFORMERS_WEIGHTS if part == TEXT_ENCODER else DIFFUSERS_WEIGHTS)


def empty_parts(folder: Path) -> dict[str, torch.nn.Module]:
    """The models of a converted folder's configurations, without weights."""
    configs = {part: diffusers_config(folder / part) for part in (UNET, VAE)}
    for part, config in configs.items():
        if config is None:
            raise ConversionError(f"{folder / part} has no configuration of a diffusers model.")
    return _empty_models(read_config(folder / TEXT_ENCODER), configs[UNET], configs[VAE])


def _empty_models(
    encoder: VisCPMPaintTextEncoderConfig, unet: Mapping[str, Any], vae: Mapping[str, Any]
) -> dict[str, torch.nn.Module]:
    return {
        TEXT_ENCODER: empty_model(encoder),
        UNET: empty_part(UNet2DConditionModel, unet),
        VAE: empty_part(AutoencoderKL, vae),
    }


def verify_loading_paint(checkpoint: Checkpoint, folder: Path) -> LoadingReport:
    """See `verify.verify_loading`; `verify_files` has compared the values."""
    check_paint_folder(folder)
    direct = _empty_models(checkpoint.config, checkpoint.diffusion.unet, checkpoint.diffusion.vae)
    num_parameters = 0
    for part, model in empty_parts(folder).items():
        if shapes_of(model) != shapes_of(direct[part]):
            raise ConversionError(f"The {part} of {folder} isn't the source's: names or shapes differ.")
        num_parameters += sum(parameter.numel() for parameter in model.parameters())
    return LoadingReport(num_parameters, None)


# -------------------------------------------------------------------------------------------------------- the way back


def open_converted_paint(location: Location, vocab: Path) -> Checkpoint:
    """See `planning.open_converted`. The VAE stays in diffusers' format, as in the original's repository."""
    folder = location.path
    encoder = SafetensorsFolder(folder / TEXT_ENCODER, TRANSFORMERS_WEIGHTS)
    unet = SafetensorsFolder(folder / UNET, DIFFUSERS_WEIGHTS)
    # By the names that the maps give them; those of the UNet carry no prefix of their own.
    tensors = {**encoder.state_dict(), **{UNET_PREFIX + name: tensor for name, tensor in unet}}
    tensors |= extra_tensors(folder)
    parts = [PARTS[0], Part(UNET, DIFFUSERS_WEIGHTS, key_maps.PAINT_UNET, source_prefix=UNET_PREFIX)]
    files = [folder / TEXT_ENCODER / file for file in encoder.files] + [folder / UNET / file for file in unet.files]
    config = read_config(folder / TEXT_ENCODER)
    return Checkpoint(location, PAINT, tensors, parts, files, config, vocab)


def copy_diffusion_parts(checkpoint: Checkpoint, folder: Path) -> None:
    """VAE and scheduler, as the original's repository has them beside its file, and the UNet's configuration."""
    source = checkpoint.location.path
    for part in (VAE, "scheduler"):
        shutil.copytree(source / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / UNET).mkdir(exist_ok=True)
    shutil.copyfile(source / UNET / "config.json", folder / UNET / "config.json")
    before = json_object(source / MANIFEST_NAME).get("original_configs") or {}
    if DIFFUSION_CONFIG_NAME in before:
        write_json(folder / DIFFUSION_CONFIG_NAME, before[DIFFUSION_CONFIG_NAME])
    for name in CONVERTED_PROMPT_CHECKER:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / PROMPT_CHECKER, dirs_exist_ok=True)
