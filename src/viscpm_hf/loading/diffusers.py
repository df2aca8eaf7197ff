"""Makes diffusers know our pipelines by name, as `DiffusionPipeline.from_pretrained` needs it.

diffusers has no plugins: it looks the class in `model_index.json` up as an attribute of its own module. That module is
a lazy one, and so are our attributes: importing all pipelines takes a second, which nobody who chats should wait for.

The one hook in another library's class is here, too ([`hook_diffusion_pipeline`]): the original's repository has its
models in other places than diffusers looks, and names its own code, so that `DiffusionPipeline.from_pretrained` has to
leave such a repository to our class as soon as it has read its `model_index.json`. Nothing is asked of the Hub for it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextvars import ContextVar
from typing import Any


# Named, not imported: this file is read without them (see `registration`).
PIPELINES_PACKAGE, MODELING_PACKAGE = (
    f"{__package__.rpartition('.')[0]}.{room}" for room in ("pipelines", "modeling")
)

# Pipelines, where they live, and the tables of diffusers' `AutoPipelineFor...` that they belong to.
PIPELINES = {
    "VisCPMPaintPipeline": ("pipeline_viscpm_paint", "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintControlNetPipeline": ("pipeline_viscpm_paint_controlnet", "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintImg2ImgPipeline": ("pipeline_viscpm_paint_img2img", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintInpaintPipeline": ("pipeline_viscpm_paint_inpaint", "AUTO_INPAINT_PIPELINES_MAPPING"),
}
# Files of ours that a saved pipeline names for its components.
COMPONENT_MODULES = ("modeling_viscpm_paint", "tokenization_cpm_bee")
# The original's name of its class, in whose place ours stands.
ORIGINAL_PIPELINE = "VisCPMPaintBeePipeline"
PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"
AUTO_PIPELINE_MODULE = "diffusers.pipelines.auto_pipeline"
AUTO_PIPELINE_KEY = "viscpm-paint"


def load_pipeline_class(name: str) -> type:
    hook_diffusion_pipeline()
    if name == ORIGINAL_PIPELINE:
        own_class = load_pipeline_class("VisCPMPaintPipeline")
        load = classmethod(lambda cls, *args, **kwargs: own_class.from_pretrained(*args, **kwargs))
        return type(name, (own_class,), {"from_pretrained": load, "__module__": __name__})
    return getattr(importlib.import_module(f"{PIPELINES_PACKAGE}.{PIPELINES[name][0]}"), name)


def open_pipeline(*args: Any, **kwargs: Any) -> Any:
    """See `paint.open_pipeline`, which is imported when it is needed."""
    from .paint import open_pipeline

    return open_pipeline(*args, **kwargs)


def extend_diffusers() -> None:
    """Gives the module of diffusers our pipelines as attributes."""
    diffusers = sys.modules["diffusers"]
    module_class = type(diffusers)
    if hasattr(module_class, "_viscpm_hf"):
        return
    if not hasattr(module_class, "__getattr__"):  # DIFFUSERS_SLOW_IMPORT: an ordinary module, all of it loaded
        for name in (*PIPELINES, ORIGINAL_PIPELINE):
            setattr(diffusers, name, load_pipeline_class(name))
        register_auto_pipelines()
        return

    class DiffusersModule(module_class):
        _viscpm_hf = True

        def __getattr__(self, name: str):
            if name in PIPELINES or name == ORIGINAL_PIPELINE:
                value = load_pipeline_class(name)
                setattr(self, name, value)
                return value
            value = super().__getattr__(name)
            if name == "DiffusionPipeline":
                hook_diffusion_pipeline()
            if name.startswith("AutoPipelineFor"):
                register_auto_pipelines()
            return value

        def __reduce__(self):
            return (importlib.import_module, ("diffusers",))

    diffusers.__class__ = DiffusersModule
    if PIPELINE_MODULE in sys.modules:
        hook_diffusion_pipeline()
    if AUTO_PIPELINE_MODULE in sys.modules:  # too late to notice its first use
        register_auto_pipelines()


def register_auto_pipelines() -> None:
    """Lets `AutoPipelineForImage2Image.from_pipe` and so on find ours."""
    auto_pipeline = importlib.import_module(AUTO_PIPELINE_MODULE)
    for name, (_, table) in PIPELINES.items():
        key = AUTO_PIPELINE_KEY + ("-controlnet" if "ControlNet" in name else "")
        getattr(auto_pipeline, table)[key] = load_pipeline_class(name)
    table = getattr(auto_pipeline, PIPELINES["VisCPMPaintPipeline"][1])
    table[f"{AUTO_PIPELINE_KEY}-original"] = load_pipeline_class(ORIGINAL_PIPELINE)


class _OursInstead(Exception):
    """Ends diffusers' loading of a checkpoint of ours; the argument is the name of the pipeline's class."""


_may_leave: ContextVar[bool] = ContextVar("_may_leave", default=False)


def hook_diffusion_pipeline() -> None:
    """Makes `DiffusionPipeline.from_pretrained` leave our checkpoints to our classes, and to nobody's code.

    Which pipeline it is, it learns from the file that it reads first. So no checkpoint is looked at twice, and for
    others nothing happens.
    """
    pipeline_class = importlib.import_module(PIPELINE_MODULE).DiffusionPipeline
    stock, stock_read = pipeline_class.from_pretrained.__func__, pipeline_class._dict_from_json_file.__func__
    if hasattr(stock, "_viscpm_hf"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        before = _may_leave.set(cls is pipeline_class)
        try:
            return stock(cls, pretrained_model_name_or_path, **kwargs)
        except _OursInstead as ours:
            (name,) = ours.args
        finally:
            _may_leave.reset(before)
        for argument in ("custom_pipeline", "custom_revision", "trust_remote_code"):
            kwargs.pop(argument, None)
        return load_pipeline_class(name).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @functools.wraps(stock_read)
    def read(cls, json_file):
        config = stock_read(cls, json_file)
        name = config.get("_class_name") if isinstance(config, dict) else None
        is_original = name == ORIGINAL_PIPELINE or (isinstance(name, list) and name[-1:] == [ORIGINAL_PIPELINE])
        if _may_leave.get() and (is_original or _is_converted(config)):
            raise _OursInstead(ORIGINAL_PIPELINE if is_original else config["_class_name"][-1])
        _name_installed(config)
        return config

    from_pretrained._viscpm_hf = True
    pipeline_class.from_pretrained = classmethod(from_pretrained)
    pipeline_class._dict_from_json_file = classmethod(read)


def _is_converted(config: Any) -> bool:
    """Whether a `model_index.json` names our own files as its code."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    return isinstance(name, list) and name[-1] in PIPELINES and name[0] == PIPELINES[name[-1]][0]


def _name_installed(config: dict[str, Any]) -> None:
    """Replaces the files of a `model_index.json` by our modules."""
    if not _is_converted(config):
        return
    config["_class_name"] = config["_class_name"][-1]
    for component, value in config.items():
        if isinstance(value, (list, tuple)) and value[0] in COMPONENT_MODULES:
            config[component] = [f"{MODELING_PACKAGE}.{value[0]}", value[1]]
