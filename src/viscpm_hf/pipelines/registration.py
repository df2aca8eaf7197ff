"""Makes diffusers know our pipelines by name, as `DiffusionPipeline.from_pretrained` needs it.

diffusers has no plugins: it looks the class in `model_index.json` up as an attribute of its own module. That module is
a lazy one, and so are our attributes: importing all pipelines takes a second, which nobody who chats should wait for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any


# Pipelines, where they live, and the tables of diffusers' `AutoPipelineFor...` that they belong to.
PIPELINES = {
    "VisCPMPaintPipeline": ("pipeline_viscpm_paint", "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintControlNetPipeline": ("pipeline_viscpm_paint_controlnet", "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintImg2ImgPipeline": ("pipeline_viscpm_paint_img2img", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING"),
    "VisCPMPaintInpaintPipeline": ("pipeline_viscpm_paint_inpaint", "AUTO_INPAINT_PIPELINES_MAPPING"),
}
# Files of ours that a saved pipeline names for its components.
COMPONENT_MODULES = ("modeling_viscpm_paint", "tokenization_cpm_bee")
PIPELINE_MODULE = "diffusers.pipelines.pipeline_utils"
AUTO_PIPELINE_MODULE = "diffusers.pipelines.auto_pipeline"
AUTO_PIPELINE_KEY = "viscpm-paint"


def load_pipeline_class(name: str) -> type:
    prefer_installed()
    return getattr(importlib.import_module(f"{__package__}.{PIPELINES[name][0]}"), name)


def register_pipelines() -> None:
    """Registers everything, now or as soon as diffusers is imported; a second call changes nothing."""
    if "diffusers" in sys.modules:
        extend_diffusers()
    elif not any(isinstance(finder, DiffusersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DiffusersFinder())


class DiffusersFinder(importlib.abc.MetaPathFinder):
    """Waits for the import of diffusers, which alone takes 0.1 s, and extends it then."""

    def find_spec(self, name: str, path=None, target=None):
        if name != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_extend(module) -> None:
                load(module)
                extend_diffusers()

            spec.loader.exec_module = load_and_extend
        return spec


def extend_diffusers() -> None:
    """Gives the module of diffusers our pipelines as attributes."""
    diffusers = sys.modules["diffusers"]
    module_class = type(diffusers)
    if hasattr(module_class, "_viscpm_hf"):
        return
    if not hasattr(module_class, "__getattr__"):  # DIFFUSERS_SLOW_IMPORT: an ordinary module, all of it loaded
        for name in PIPELINES:
            setattr(diffusers, name, load_pipeline_class(name))
        register_auto_pipelines()
        return

    class DiffusersModule(module_class):
        _viscpm_hf = True

        def __getattr__(self, name: str):
            if name in PIPELINES:
                value = load_pipeline_class(name)
                setattr(self, name, value)
                return value
            value = super().__getattr__(name)
            if name == "DiffusionPipeline":
                prefer_installed()
            if name.startswith("AutoPipelineFor"):
                register_auto_pipelines()
            return value

        def __reduce__(self):
            return (importlib.import_module, ("diffusers",))

    diffusers.__class__ = DiffusersModule
    if PIPELINE_MODULE in sys.modules:
        prefer_installed()
    if AUTO_PIPELINE_MODULE in sys.modules:  # too late to notice its first use
        register_auto_pipelines()


def register_auto_pipelines() -> None:
    """Lets `AutoPipelineForImage2Image.from_pipe` and so on find ours."""
    auto_pipeline = importlib.import_module(AUTO_PIPELINE_MODULE)
    for name, (_, table) in PIPELINES.items():
        key = AUTO_PIPELINE_KEY + ("-controlnet" if "ControlNet" in name else "")
        getattr(auto_pipeline, table)[key] = load_pipeline_class(name)


def prefer_installed() -> None:
    """Makes diffusers take our classes for a saved pipeline that carries their code, without a flag to trust it."""
    pipeline_class = importlib.import_module(PIPELINE_MODULE).DiffusionPipeline
    stock = pipeline_class.load_config.__func__
    if hasattr(stock, "_viscpm_hf"):
        return

    @functools.wraps(stock)
    def load_config(cls, *args, **kwargs):
        loaded = stock(cls, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        _name_installed(config)
        return loaded

    load_config._viscpm_hf = True
    pipeline_class.load_config = classmethod(load_config)


def _name_installed(config: dict[str, Any]) -> None:
    """Replaces the files of a `model_index.json` by our modules."""
    name = config.get("_class_name")
    if not isinstance(name, (list, tuple)) or name[-1] not in PIPELINES or name[0] != PIPELINES[name[-1]][0]:
        return
    config["_class_name"] = name[-1]
    package = __package__.rpartition(".")[0]
    for component, value in config.items():
        if isinstance(value, (list, tuple)) and value[0] in COMPONENT_MODULES:
            config[component] = [f"{package}.modeling.{value[0]}", value[1]]
