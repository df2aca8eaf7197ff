"""A page in the browser: chat and paint, for many visitors at once.

Nothing is fetched from other hosts, neither by the page nor by the process behind it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import gradio as gr

from ..tiny.embedded import EMBEDDED_NAME
from .demo_chat import ChatPage
from .demo_labels import Labels
from .demo_live import add_live_route, live_page
from .demo_paint import PaintPage
from .demo_texts import LANGUAGES, preferred_language
from .engine import ChatEngine
from .live import Eyes
from .paint_engine import PaintEngine


MAX_FILE_SIZE = "32mb"
# Uploaded and painted pictures are looked for every hour and go when they are six hours old.
DELETE_CACHE = (3600, 6 * 3600)

STYLE, *SCRIPTS = (Path(__file__).with_name(name).read_text("utf-8") for name in ("demo.css", "demo.js", "live.js"))


def create_demo(
    chat: ChatEngine | None = None,
    paint: PaintEngine | None = None,
    chat_name: str = EMBEDDED_NAME,
    paint_name: str = EMBEDDED_NAME,
    language: str = "en",
    eyes: Eyes | None = None,
) -> gr.Blocks:
    """The app, with a tab for each of `chat`, `eyes` (live) and `paint` that is given.

    Args:
        chat: answers.
        paint: draws; its painter has `candidates=1`.
        chat_name, paint_name: the models' names.
        language: `"zh"` or `"en"`, until the browser says what its user prefers.
        eyes: say what a camera sees; [`start`] takes them too.

    Raises:
        ValueError: without any engine.
    """
    if chat is None and paint is None and eyes is None:
        raise ValueError("A demo needs a model to show: give an engine for chat, for paint, or eyes.")
    labels = Labels(language)
    with gr.Blocks(title="VisCPM", analytics_enabled=False, delete_cache=DELETE_CACHE) as demo:
        with gr.Row(elem_id="top"):
            gr.Markdown("# VisCPM")
            switch = labels.make(
                gr.Radio,
                {"label": "language"},
                choices=[(name, key) for key, name in LANGUAGES.items()],
                value=language,
                container=False,
                elem_id="language",
            )
        is_tiny = EMBEDDED_NAME in (chat and chat_name, paint and paint_name)
        labels.make(gr.Markdown, {"value": "tiny" if is_tiny else "intro"}, elem_classes="small")
        pages = {
            "chat": chat and (lambda: ChatPage(chat, chat_name).build(labels)),
            "live": eyes and live_page,
            "paint": paint and (lambda: PaintPage(paint, paint_name).build(labels, switch)),
        }
        shown = {key: build for key, build in pages.items() if build}
        with gr.Tabs() if len(shown) > 1 else nullcontext():
            for key, build in shown.items():
                with labels.make(gr.Tab, {"label": key}, id=key) if len(shown) > 1 else nullcontext():
                    build()
        switch.change(
            labels.updates,
            switch,
            labels.components,
            show_progress="hidden",
            queue=False,
            js="(language) => speak(language)",
        )
        demo.load(browser_language, None, switch, show_progress="hidden", queue=False)
    return demo


def browser_language(request: gr.Request) -> str:
    return preferred_language(request.headers.get("accept-language", ""))


def start(
    demo: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, share: bool = False, eyes: Eyes | None = None
) -> str:
    """Serves the app in a thread of its own until `demo.close()`.

    Args:
        demo: of [`create_demo`].
        host, port: where; port 0 takes one that is free, from 7860 on.
        share: also at a public address for 72 hours, by gradio's service. This is the one thing that needs a network.
        eyes: those of [`create_demo`].

    Returns:
        The address, with `share` the public one.

    Raises:
        OSError: if the port is taken.
    """
    try:
        app, local, shared = demo.launch(
            server_name=host,
            server_port=port or None,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            max_file_size=MAX_FILE_SIZE,
            footer_links=[],
            theme=theme(),
            css=STYLE,
            head="".join(f"<script>{script}</script>" for script in SCRIPTS),
        )
    except OSError as error:
        raise OSError(f"The page can't be served at port {port} of {host}: choose another port.") from error
    if eyes is not None:
        add_live_route(app, eyes)
    return shared or local


def theme() -> gr.themes.Base:
    """Fonts that are there already, and buttons whose words can be read (4.5 : 1 and more)."""
    plain = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    colours = {
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_cancel_background_fill": "#b91c1c",
        "button_cancel_background_fill_hover": "#991b1b",
    }
    colours |= {f"{name}_dark": colour for name, colour in colours.items()} | {"link_text_color_dark": "#93c5fd"}
    return gr.themes.Default(font=plain, font_mono=["ui-monospace", "Consolas", "monospace"]).set(**colours)
