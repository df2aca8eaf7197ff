"""The package's version, and the oldest versions of other libraries that it works with."""

import re
from importlib.metadata import PackageNotFoundError, version


__version__ = "0.1.0"

# As in setup.cfg. What a single feature needs beyond that says so where it is used.
OLDEST = {"torch": "2.6", "transformers": "5.20", "diffusers": "0.42", "peft": "0.20"}


def require(**oldest: str) -> None:
    """Checks installed versions without importing anything.

    Args:
        oldest: the oldest version of each library that will do; a library that isn't installed at all will do too.

    Raises:
        ImportError: one sentence with what is installed, what is needed, and the command.
    """
    old = {}
    for name, needed in oldest.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # its import says so
        if _numbers(installed) < _numbers(needed):
            old[name] = (installed, needed)
    if old:
        facts = ", ".join(f"{name} {needed} or newer (installed is {there})" for name, (there, needed) in old.items())
        command = " ".join(f'"{name}>={needed}"' for name, (_, needed) in old.items())
        raise ImportError(f"viscpm-hf {__version__} needs {facts}: pip install --upgrade {command}")


def _numbers(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> `(2, 13, 0)`."""
    return tuple(int(number) for number in re.match(r"[\d.]*\d|", text)[0].split(".") if number)
