"""Words of files and servers that nobody here has written, before they are put into a sentence of ours."""

from __future__ import annotations

from typing import Any


# What is left of a name; no released checkpoint has one of more than 100 characters.
MAX_NAME_CHARACTERS = 200

# What is left of an error as a whole, which names some of these and paths.
MAX_MESSAGE_CHARACTERS = 4000


def plain(value: Any, most: int = MAX_NAME_CHARACTERS) -> str:
    """A foreign name, or what else a file or a server says, on one line, in visible characters, and cut.

    What goes are controls (which a terminal obeys), formats (which hide text, or turn its direction) and halves of
    characters (which no stream takes).
    """
    text = value if isinstance(value, str) else _text_of(value)
    is_cut = len(text) > most
    # What is cut off isn't looked at: it may have gigabytes. Runs of what vanishes may make the rest shorter.
    words = "".join(
        " " if character.isspace() else character if character.isprintable() else "" for character in text[:most]
    ).split()
    return " ".join(words) + ("…" if is_cut else "")


def _text_of(value: Any) -> str:
    try:
        return repr(value) if isinstance(value, (list, tuple, dict, set)) else str(value)
    except (RecursionError, ValueError):  # of nested lists; of numbers with thousands of digits
        return f"a {type(value).__name__}"


def size_text(size: int) -> str:
    """For people: `20.6 GB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
