"""The demo page's tests need gradio (the extra `demo`), those in a browser selenium too."""

from importlib.util import find_spec

import pytest
from ray_support import ray_cluster, write_models


collect_ignore = []
if find_spec("selenium") is None:
    collect_ignore += ["test_docs_browser.py"]
if find_spec("gradio") is None:
    collect_ignore += ["test_demo.py"]
if any(find_spec(name) is None for name in ("gradio", "selenium", "axe_core_python")):
    collect_ignore += ["test_demo_browser.py"]


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
def browser():
    from browser_support import open_browser

    with open_browser() as driver:
        yield driver
