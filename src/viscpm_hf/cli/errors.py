"""Errors as users see them."""

# As shells do for a program ended by Ctrl-C.
EXIT_INTERRUPTED = 130


def describe(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__
