"""Serving: the engine that answers many requests together, and what is built on it."""
