"""In the place of transformers' file, which its source distribution lacks."""


class ExportTesterMixin:
    """No tests: `--transformers PATH` brings them."""
