"""The demo page's tests need gradio (the extra `demo`), those in a browser selenium too."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from ray_support import ray_cluster, write_models
from sibling_folders import NAMES, write_folder
from support import CHAT_CASES, Golden

from viscpm_hf import SiblingChat


collect_ignore = []
if find_spec("selenium") is None:
    collect_ignore += ["test_docs_browser.py"]
if find_spec("av") is None:
    collect_ignore += ["test_live.py"]
if find_spec("gradio") is None:
    collect_ignore += ["test_demo.py"]
if any(find_spec(name) is None for name in ("gradio", "selenium", "axe_core_python")):
    collect_ignore += ["test_demo_browser.py"]


@dataclass(frozen=True)
class Family:
    """A small model of one of the systems."""

    name: str
    folder: Path
    chat: SiblingChat

    @property
    def is_viscpm(self) -> bool:
        return self.name in CHAT_CASES


def open_family(name, folder):
    return Golden(name).load_chat() if name in CHAT_CASES else SiblingChat(folder, device="cpu")


@pytest.fixture(scope="session", params=(*CHAT_CASES, *NAMES))
def family(request, tmp_path_factory):
    name, folder = request.param, tmp_path_factory.mktemp("family") / request.param
    if name not in CHAT_CASES:
        write_folder(name, folder)
    return Family(name, folder, open_family(name, folder))


@pytest.fixture
def own_family_chat(family):
    """For a test that changes the model."""
    return open_family(family.name, family.folder)


@pytest.fixture(scope="session")
def cluster():
    """A Ray of two CPUs."""
    with ray_cluster() as address:
        yield address


@pytest.fixture(scope="session")
def ray_models(tmp_path_factory):
    """A folder with the small models `chat-a` and `paint-a`."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """What the browser's camera shows: a film that never ends, as Chromium takes one."""
    return tmp_path_factory.mktemp("camera") / "film.y4m"


@pytest.fixture(scope="module")
def browser(camera):
    from browser_support import open_browser

    with open_browser(camera) as driver:
        yield driver
