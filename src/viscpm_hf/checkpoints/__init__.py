"""Reads checkpoints as they lie on disk: where they are, what they are, their tensors and processors."""
