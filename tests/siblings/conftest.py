"""Small random checkpoints of the four systems in their original layouts, and what loads from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from reference import SYSTEMS, System, VisualClaRelease, visualcla, write_visualcla_release
from sibling_folders import NAMES, write_folder
from transformers import AutoModelForImageTextToText

from viscpm_hf import SiblingChat


@pytest.fixture(scope="session", params=SYSTEMS)
def system(request) -> System:
    return SYSTEMS[request.param]()


@pytest.fixture(scope="session")
def sibling_folder(system, tmp_path_factory) -> Path:
    """The checkpoint as its authors would have published it."""
    return system.write(tmp_path_factory.mktemp("sibling") / system.name)


@pytest.fixture(scope="session")
def sibling(sibling_folder):
    """The model from that folder; a test that changes it loads its own."""
    return AutoModelForImageTextToText.from_pretrained(sibling_folder).eval()


@pytest.fixture(scope="session")
def visualcla_release(tmp_path_factory) -> VisualClaRelease:
    return write_visualcla_release(visualcla(), tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def whole_folders(tmp_path_factory) -> dict[str, Path]:
    """Original folders by the systems' names, tokenizers and all."""
    root = tmp_path_factory.mktemp("whole")
    return {name: write_folder(name, root / name) for name in NAMES}


@pytest.fixture(scope="session")
def sibling_chats(whole_folders) -> dict[str, SiblingChat]:
    return {name: SiblingChat(folder, device="cpu") for name, folder in whole_folders.items()}
