"""Names that options take, known before the libraries behind them are imported."""

# Quantisations: name -> library that quantises and runs it.
QUANTIZATIONS = {
    "8bit": "bitsandbytes",
    "4bit": "bitsandbytes",
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8wo": "torchao",
    "int4wo": "torchao",
}


# What a model's dtype is called, with or without `torch.` before it.
DTYPE_NAMES = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip


# Bytes of a number of each kind that a file may hold.
ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


def full_dtype_name(name: str) -> str:
    """`"fp16"`, `"torch.float16"` ... -> `"float16"`; other texts as they are."""
    return DTYPE_NAMES.get(name.removeprefix("torch."), name)
