"""The demo page's tests need gradio (the extra `demo`) and selenium, and the browser's test a trained model."""

from importlib.util import find_spec

from viscpm_hf.embedded import FOLDER


collect_ignore = []
if find_spec("gradio") is None:
    collect_ignore += ["test_demo.py"]
if find_spec("gradio") is None or find_spec("selenium") is None or not (FOLDER / "chat").is_dir():
    collect_ignore += ["test_demo_browser.py"]
