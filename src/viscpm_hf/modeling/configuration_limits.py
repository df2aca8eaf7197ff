"""How many layers a configuration may ask for: each becomes a module before anything is compared with the weights."""

from collections.abc import Mapping
from typing import Any


# The largest model here has 63; of today's language models none has 200.
MAX_LAYERS = 1000


def check_layers(config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: if a number of layers, or a list with an entry for every layer or block, is above the limit, here
            or in a configuration within.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_layers(value)
            continue
        numbers = []
        if isinstance(value, (list, tuple)) and ("layer" in name or "block" in name):
            numbers.append(len(value))
        if "layers" in name:
            values = value if isinstance(value, (list, tuple)) else [value]
            numbers += [number for number in values if isinstance(number, (int, float))]
        if numbers and max(numbers) > MAX_LAYERS:
            raise ValueError(
                f"The configuration asks for {max(numbers):,} in {name}, but {MAX_LAYERS:,} is the limit here."
            )
