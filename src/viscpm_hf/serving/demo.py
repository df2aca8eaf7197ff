"""A page in the browser: chat and paint, for many visitors at once.

Nothing is fetched from other hosts, neither by the page nor by the process behind it.
"""

from __future__ import annotations

import gradio as gr

from ..tiny.embedded import EMBEDDED_NAME
from .demo_chat import ChatPage
from .demo_labels import Labels
from .demo_paint import PaintPage
from .demo_texts import LANGUAGES, preferred_language
from .engine import ChatEngine
from .paint_engine import PaintEngine


MAX_FILE_SIZE = "32mb"
# Uploaded and painted pictures are looked for every hour and go when they are six hours old.
DELETE_CACHE = (3600, 6 * 3600)

STYLE = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
.status { min-height: 1.5em; overflow-wrap: anywhere; }
.status-error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.buttons { gap: 8px; }
#language .wrap { flex-wrap: nowrap; }
#samples .grid-wrap { height: auto; min-height: 0; max-height: none; overflow: visible; }
#samples .grid-container { grid-template-columns: repeat(var(--grid-cols), 1fr); padding-top: 24px; }
#samples .grid-container, #gallery .grid-container { grid-template-rows: auto; grid-auto-rows: auto; }
#samples .thumbnail-item { width: 100%; height: auto; aspect-ratio: 1; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); padding-top: 24px; }
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 1px; }
@media (max-width: 640px) { .gradio-container main { padding: 8px !important; } }
"""


def create_demo(
    chat: ChatEngine | None = None,
    paint: PaintEngine | None = None,
    chat_name: str = EMBEDDED_NAME,
    paint_name: str = EMBEDDED_NAME,
    language: str = "en",
) -> gr.Blocks:
    """The app, with a tab for each engine that is given.

    Args:
        chat: answers.
        paint: draws; its painter has `candidates=1`.
        chat_name, paint_name: the models' names.
        language: `"zh"` or `"en"`, until the browser says what its user prefers.

    Raises:
        ValueError: without any engine.
    """
    if chat is None and paint is None:
        raise ValueError("A demo needs a model to show: give an engine for chat, for paint, or both.")
    labels = Labels(language)
    with gr.Blocks(title="VisCPM", analytics_enabled=False, delete_cache=DELETE_CACHE) as demo:
        with gr.Row():
            with gr.Column(scale=3, min_width=240):
                labels.make(gr.Markdown, {"value": "intro"})
            with gr.Column(scale=1, min_width=200):
                switch = labels.make(
                    gr.Radio,
                    {"label": "language"},
                    choices=[(name, key) for key, name in LANGUAGES.items()],
                    value=language,
                    elem_id="language",
                )
        if EMBEDDED_NAME in (chat and chat_name, paint and paint_name):
            labels.make(gr.Markdown, {"value": "tiny"})
        if chat is not None and paint is not None:
            with gr.Tabs():
                with labels.make(gr.Tab, {"label": "chat"}, id="chat"):
                    ChatPage(chat).build(labels, switch)
                with labels.make(gr.Tab, {"label": "paint"}, id="paint"):
                    PaintPage(paint, paint_name).build(labels, switch)
        elif chat is not None:
            ChatPage(chat).build(labels, switch)
        else:
            PaintPage(paint, paint_name).build(labels, switch)
        switch.change(labels.updates, switch, labels.components, show_progress="hidden", queue=False)
        demo.load(browser_language, None, switch, show_progress="hidden", queue=False)
    return demo


def browser_language(request: gr.Request) -> str:
    return preferred_language(request.headers.get("accept-language", ""))


def start(demo: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> str:
    """Serves the app in a thread of its own until `demo.close()`.

    Args:
        demo: of [`create_demo`].
        host, port: where; port 0 takes one that is free, from 7860 on.
        share: also at a public address for 72 hours, by gradio's service. This is the one thing that needs a network.

    Returns:
        The address, with `share` the public one.

    Raises:
        OSError: if the port is taken.
    """
    plain = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    try:
        _, local, shared = demo.launch(
            server_name=host,
            server_port=port or None,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            max_file_size=MAX_FILE_SIZE,
            footer_links=[],
            theme=gr.themes.Default(font=plain, font_mono=["ui-monospace", "Consolas", "monospace"]),
            css=STYLE,
        )
    except OSError as error:
        raise OSError(f"The page can't be served at port {port} of {host}: choose another port.") from error
    return shared or local
