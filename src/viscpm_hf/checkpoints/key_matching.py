"""The key maps at work on names and shapes; `weight_transforms` is about the tensors."""

from __future__ import annotations

import math
import re

from ..families.key_maps import AS_MATRIX, THIRDS, TOKEN_ROWS, TRANSPOSED, WITHOUT_BATCH, Entry, KeyMap
from ..modeling.token_ids_cpm_bee import padded_vocab_size


def shape_after(operation: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an original tensor -> ours."""
    if operation == AS_MATRIX and len(shape) == 4:
        return (shape[0], math.prod(shape[1:]))
    if operation in THIRDS:
        return (shape[0] // 3, *shape[1:])
    if operation == WITHOUT_BATCH and shape[:1] == (1,):
        return shape[1:]
    if operation == TRANSPOSED:
        return shape[::-1]
    if operation == TOKEN_ROWS:
        return (padded_vocab_size(shape[0]), *shape[1:])
    return shape


def shape_before(operation: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one of our tensors -> the original's, of one that was split the part's; see [`revert_operation`]."""
    if operation == WITHOUT_BATCH:
        return (1, *shape)
    return shape[::-1] if operation == TRANSPOSED else shape


def name_pattern(name: str) -> str:
    return re.escape(name).replace(r"\{n\}", r"(\d+)").replace(r"\{name\}", r"(.+)")


def target_pattern(entry: Entry) -> str:
    return entry.target.replace("{n}", r"\1").replace("{name}", r"\1")


class KeyMatcher:
    """Finds the entry of an original name."""

    def __init__(self, key_map: KeyMap):
        self.key_map = key_map
        self._patterns = [(re.compile(name_pattern(entry.source)), entry) for entry in key_map.entries]
        self._target_patterns = [(re.compile(name_pattern(entry.target)), entry) for entry in key_map.entries]

    def match(self, name: str) -> tuple[str, Entry] | None:
        """Our name and the entry, or None for a name that the map doesn't have."""
        for pattern, entry in self._patterns:
            found = pattern.fullmatch(name)
            if found:
                return found.expand(target_pattern(entry)), entry
        return None

    def match_all(self, name: str) -> list[tuple[str, Entry]]:
        """As [`match`], for a name that may be split: every part."""
        first = self.match(name)
        if first is None:
            return []
        return [
            (found.expand(target_pattern(entry)), entry)
            for pattern, entry in self._patterns
            if entry.source == first[1].source and (found := pattern.fullmatch(name))
        ]

    def match_target(self, name: str) -> tuple[str, Entry] | None:
        """The original name of one of ours, and the entry; the way back of [`match`]."""
        for pattern, entry in self._target_patterns:
            found = pattern.fullmatch(name)
            if found:
                original = re.sub(r"\{(n|name)\}", r"\\1", entry.source)
                return found.expand(original), entry
        return None

    def dropped_reason(self, name: str) -> str | None:
        """Why the map leaves a name out; None if it doesn't."""
        for entry in self.key_map.dropped:
            pattern = name_pattern(entry.source) + (".*" if entry.source.endswith(".") else "")
            if re.fullmatch(pattern, name):
                return entry.reason
        return None
