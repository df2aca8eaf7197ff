"""Errors as users see them."""

import errno
import os

from ..plain_text import MAX_MESSAGE_CHARACTERS, plain


# As shells do for a program ended by Ctrl-C.
EXIT_INTERRUPTED = 130


def is_full_disk(error: BaseException) -> bool:
    """Whether it is of a disk without space, by the system's words, which libraries hand on in errors of their own."""
    return os.strerror(errno.ENOSPC) in str(error)


def describe(error: BaseException) -> str:
    """An error in one line, without what a terminal would obey: it may name what a file or a server says."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif is_full_disk(error):
        text = f"The disk to write to is full, free some of it: {error}"
    else:
        text = str(error)
    return plain(text, MAX_MESSAGE_CHARACTERS) or type(error).__name__
