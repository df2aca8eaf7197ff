"""In the place of transformers' file, which its source distribution lacks."""


class GenerationTesterMixin:
    """No tests: `--transformers PATH` brings them."""
