"""Errors as users see them."""

from ..plain_text import MAX_MESSAGE_CHARACTERS, plain


# As shells do for a program ended by Ctrl-C.
EXIT_INTERRUPTED = 130


def describe(error: BaseException) -> str:
    """An error in one line, without what a terminal would obey: it may name what a file or a server says."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    return plain(text, MAX_MESSAGE_CHARACTERS) or type(error).__name__
