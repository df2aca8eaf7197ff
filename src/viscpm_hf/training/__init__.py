"""Fine-tuning: Chat and Paint, on transformers' and diffusers' own machinery (the extra `train`)."""

# Public names and where they live; loaded when first used.
_EXPORTS = {
    "ChatRecord": "records",
    "ChatTrainingConfig": "chat_config",
    "ChatTrainingResult": "chat",
    "PaintTrainingConfig": "paint_config",
    "PaintTrainingResult": "paint",
    "load_projection": "paint_output",
    "merge_adapter": "adapters",
    "train_chat": "chat",
    "train_paint": "paint",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
