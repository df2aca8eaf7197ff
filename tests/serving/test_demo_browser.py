"""The demo page of `viscpm-tiny` as its visitors see it: a real process, a real browser.

Screenshots are kept in `test-artifacts/`, to be looked at.
"""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import axe_core_python
import PIL.Image
import pytest
from browser_support import needs_browser
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from viscpm_hf import VisCPMChat
from viscpm_hf.serving.demo_texts import say
from viscpm_hf.shapes import COLOURS, draw, make_scene


pytestmark = needs_browser

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
PATIENCE = 60

MODEL = "viscpm-tiny"
ARGUMENTS = ()  # the embedded model is what `viscpm-hf demo` shows if nothing else is asked for
MAX_TOKENS = 256
COLOUR_QUESTIONS = {"en": "What color is it?", "zh": "它是什么颜色的？"}
DESCRIBE = {"en": "Describe the picture in one sentence.", "zh": "请用一句话描述这张图片。"}
CONTROLS = {"button", "textbox", "slider", "spinbutton", "radio", "checkbox", "tab", "link", "combobox"}

# Remembers every state of the last answer.
WATCH_ANSWER = """
window.seen = [];
new MutationObserver(() => {
    const answers = document.querySelectorAll('#conversation [data-testid=bot]');
    const text = answers.length ? answers[answers.length - 1].innerText.trim() : '';
    if (text && window.seen.at(-1) !== text) window.seen.push(text);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""

AXE = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")

# Every text and every name of a control that has a word of Latin letters.
ENGLISH_TEXTS = """
const found = new Set(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const {data, parentElement: parent} = texts.currentNode;
    if (parent.closest('script, style, svg, [hidden], .said:lang(en)') === null) found.add(data.trim());
}
for (const name of ['aria-label', 'title', 'placeholder'])
    for (const element of document.querySelectorAll(`[${name}]`)) found.add(element.getAttribute(name).trim());
return [...found].filter(text => /[a-z]{3}/i.test(text.replaceAll(/viscpm-\\w+|\\.png|token|PNG/g, '')));
"""
NAMES = {"VisCPM", "English", "语言 / Language", "top-p"}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, served as users start it."""
    log = tmp_path_factory.mktemp("demo") / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "viscpm_hf.cli", "demo", "both", *ARGUMENTS, "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        line = process.stdout.readline()
        assert line.startswith("http"), log.read_text()
        yield line.split()[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chat():
    return VisCPMChat(MODEL, device="cpu")


@pytest.fixture
def page(browser, address):
    page = Page(browser, address)
    page.open()
    return page


@pytest.fixture(scope="module")
def scenes():
    """Pictures of a single shape that training has not seen."""
    return [make_scene("test", index, num_shapes=1) for index in (2, 5)]


@pytest.fixture(scope="module")
def pictures(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"picture-{index}.png" for index in range(len(scenes))]
    for scene, file in zip(scenes, files, strict=True):
        draw(scene, 224).save(file)
    return files


class Page:
    """What a visitor does and sees."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, language="en", is_phone=False):
        self.browser.execute_cdp_cmd("Network.enable", {})
        self.browser.execute_cdp_cmd(
            "Network.setUserAgentOverride", {"userAgent": "Tests of viscpm-hf", "acceptLanguage": language}
        )
        if is_phone:
            self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        else:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.browser.get(self.address)
        self.wait(lambda: say(language, "question") in self.text("#question"))

    def find(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return " ".join(
            self.browser.execute_script(
                "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector
            )
        )

    def wait(self, condition, message=""):
        waiting = WebDriverWait(self.browser, PATIENCE, poll_frequency=0.1)
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException as error:
            raise AssertionError(f"{message} After {PATIENCE} s the page says: {self.text('body')}") from error

    def is_shown(self, selector):
        """Whether there is such a picture and it has been loaded."""
        return self.browser.execute_script(
            "const image = document.querySelector(arguments[0]); return !!image && image.naturalWidth > 0", selector
        )

    def screenshot(self, name):
        ARTIFACTS.mkdir(exist_ok=True)
        self.browser.save_screenshot(str(ARTIFACTS / f"demo-{name}.png"))

    def upload(self, file):
        self.wait(lambda: self.find("#picture input[type=file]"))[0].send_keys(str(file))
        self.wait(lambda: self.is_shown("#picture img"))

    def type(self, text):
        """Into what has the focus."""
        self.browser.switch_to.active_element.send_keys(text)

    def tab_to(self, selector, keys=Keys.TAB):
        """Goes on with the keyboard until something in there has the focus."""
        for _ in range(80):
            self.type(keys)
            if self.browser.execute_script("return !!document.activeElement.closest(arguments[0])", selector):
                return
        raise AssertionError(f"the tab key does not lead to {selector}")

    def answers(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#conversation [data-testid=bot]')].map(e => e.innerText.trim())"
        )

    def ask(self, question, expected, language="en"):
        """Sends a question by Enter and waits for the whole answer, which is the expected one."""
        self.find("#question textarea")[0].send_keys(question, Keys.ENTER)
        self.wait_for_answer(expected, language)

    def wait_for_answer(self, expected, language="en"):
        speed = say(language, "answered").rpartition("}")[2]
        self.wait(lambda: speed in self.text("#chat-status"), f"no answer to {expected!r}")
        self.wait(lambda: self.answers()[-1:] == [expected], f"another answer than {expected!r}")

    def switch_language(self, language):
        self.find(f"#language input[value={language}]")[0].click()
        self.wait(lambda: say(language, "question") in self.text("#question"))

    def open_tab(self, key, language="en"):
        name = say(language, key)
        next(tab for tab in self.find("button[role=tab]") if tab.text == name).click()

    def set_paint(self, key, value):
        """Opens the settings of Paint, types a number and closes them."""
        header = self.find("#paint-settings button")[0]
        header.click()
        field = f"#paint-settings input[type=number][aria-label$='{say('en', key)}']"
        self.wait(lambda: self.find(field) and self.find(field)[0].is_displayed())
        (number,) = self.find(field)
        number.clear()
        number.send_keys(value, Keys.TAB)
        self.wait(lambda: number.get_attribute("value") == value)
        header.click()

    def overflow(self):
        """Pixels that the page is wider than its window."""
        return self.browser.execute_script("return document.documentElement.scrollWidth - screen.width")

    def violations(self):
        """What axe-core finds of serious weight."""
        self.browser.execute_script(AXE)
        found = self.browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        assert len(found["passes"]) > 20
        return [
            (fault["id"], [node["target"] for node in fault["nodes"]])
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
        ]

    def left_in_english(self):
        """What is read or read out in English of a page in Chinese, but for names."""
        return [text for text in self.browser.execute_script(ENGLISH_TEXTS) if text not in NAMES]


def answer_of(chat, picture, question):
    return chat.ask(picture, question, mode="generate", max_new_tokens=MAX_TOKENS).answer


def test_a_conversation_in_both_languages(page, chat, scenes, pictures):
    page.upload(pictures[0])
    for language in ("en", "zh"):
        page.switch_language(language)
        context, encoded = "", None
        for question in (COLOUR_QUESTIONS[language], DESCRIBE[language]):
            turn = chat.ask(pictures[0], question, context, encoded, mode="generate", max_new_tokens=MAX_TOKENS)
            context, encoded = turn.context, turn.vision_hidden_states
            page.ask(question, turn.answer, language)
            if question == COLOUR_QUESTIONS[language]:
                words = COLOURS[scenes[0].shapes[0].colour].words(language)
                assert any(word in turn.answer.lower() for word in words), f"{turn.answer!r} names none of {words}"
        page.screenshot(f"chat-{language}")
        page.find("#clear")[0].click()
        page.wait(lambda: not page.answers())


def test_the_answer_is_shown_as_it_is_written(page, chat):
    page.find("#samples button")[2].click()  # three shapes: a long sentence
    page.wait(lambda: page.is_shown("#picture img"))
    page.browser.execute_script(WATCH_ANSWER)
    expected = answer_of(chat, draw(make_scene("test", 2), 224), DESCRIBE["en"])
    page.ask(DESCRIBE["en"], expected)
    seen = page.browser.execute_script("return window.seen")
    assert len(seen) > 1 and seen[-1] == expected
    assert all(expected.startswith(text) for text in seen)


def test_another_picture_begins_another_conversation(page, chat, pictures):
    page.upload(pictures[0])
    page.ask(COLOUR_QUESTIONS["en"], answer_of(chat, pictures[0], COLOUR_QUESTIONS["en"]))
    page.find("#samples button")[1].click()
    page.wait(lambda: not page.answers() and say("en", "new_conversation") in page.text("#chat-status"))
    page.wait(lambda: page.is_shown("#picture img"))
    page.screenshot("new-conversation")
    page.ask(DESCRIBE["en"], answer_of(chat, draw(make_scene("test", 1), 224), DESCRIBE["en"]))


def test_without_a_picture_and_with_a_broken_one(page, chat, tmp_path):
    page.ask("What is there?", answer_of(chat, None, "What is there?"))
    assert say("en", "no_picture") in page.text("#chat-status")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page.find("#picture input[type=file]")[0].send_keys(str(tmp_path / "broken.png"))
    page.wait(lambda: "can't be read as JPEG" in page.text("#chat-status"))  # before anything is asked
    page.find("#question textarea")[0].send_keys("And now?", Keys.ENTER)
    page.wait(lambda: page.find("#question textarea")[0].get_attribute("value") == "And now?")
    page.wait(lambda: "can't be read as JPEG" in page.text("[data-testid=toast-body]"))
    page.screenshot("error")


def test_painting(page):
    page.open_tab("paint")
    assert not page.find("#halt")[0].is_enabled()
    page.find("#prompt textarea")[0].send_keys("a red circle", Keys.ENTER)
    page.wait(lambda: page.find("#halt")[0].is_enabled() or page.is_shown("#gallery img"))
    page.screenshot("painting")
    page.wait(lambda: page.is_shown("#gallery img"))
    page.wait(lambda: say("en", "painted").partition(":")[0] in page.text("#paint-status"))
    page.screenshot("paint")
    link = page.find("#downloads a")[0].get_attribute("href")
    with urlopen(link) as answer:
        picture = PIL.Image.open(io.BytesIO(answer.read()))
    assert picture.text["prompt"] == "a red circle" and picture.text["seed"] in page.text("#gallery")
    assert picture.width == page.browser.execute_script("return document.querySelector('#gallery img').naturalWidth")


def test_painting_can_be_stopped(page):
    page.open_tab("paint")
    page.set_paint("steps", "200")
    page.set_paint("candidates", "8")  # a machine that is never so slow draws no picture before the click
    page.find("#prompt textarea")[0].send_keys("a blue star", Keys.ENTER)
    page.wait(lambda: page.find("#paint-status progress"))
    page.find("#halt")[0].click()
    page.wait(lambda: page.text("#paint-status") == say("en", "stopped"))
    assert not page.find("#gallery img") and not page.find("#halt")[0].is_enabled()


def test_four_candidates_are_seen_whole(page):
    page.open_tab("paint")
    page.set_paint("candidates", "4")
    page.find("#ideas button")[0].click()
    page.wait(lambda: len(page.find("#gallery .thumbnail-item")) == 4)
    boxes = [picture.rect for picture in page.find("#gallery .thumbnail-item")]
    assert len({(box["x"], box["y"]) for box in boxes}) == 4 and len({box["x"] for box in boxes}) == 2
    bottom = max(box["y"] + box["height"] for box in boxes)
    assert bottom - min(box["y"] for box in boxes) < page.browser.execute_script("return innerHeight")
    for scrolled in page.find("#gallery, #gallery .grid-wrap"):
        assert (
            page.browser.execute_script("const e = arguments[0]; return e.scrollHeight - e.clientHeight", scrolled)
            <= 1
        )
    page.screenshot("paint-four")


def test_on_a_phone(page, chat, pictures):
    page.open("zh", is_phone=True)  # the browser's language, without a click
    for control in page.find("#language label, #question textarea, #send, #retry"):  # all within the first screen
        box = control.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        assert box["y"] + box["height"] <= PHONE["height"]
    page.screenshot("phone")
    page.upload(pictures[1])
    expected = answer_of(chat, pictures[1], DESCRIBE["zh"])
    next(button for button in page.find("#conversation .example") if button.text == DESCRIBE["zh"]).click()
    page.wait_for_answer(expected, "zh")
    assert page.overflow() <= 0
    page.screenshot("phone-chat")
    page.browser.execute_script("window.scrollTo(0, 0)")
    page.open_tab("paint", "zh")
    page.find("#prompt textarea")[0].send_keys("一个红色的圆形", Keys.ENTER)
    page.wait(lambda: page.is_shown("#gallery img"))
    assert page.overflow() <= 0
    page.screenshot("phone-paint")


def test_nothing_stays_english_after_switching(page, chat, pictures):
    page.upload(pictures[0])
    page.ask(DESCRIBE["zh"], answer_of(chat, pictures[0], DESCRIBE["zh"]))
    page.open_tab("paint")
    page.find("#ideas button")[0].click()
    page.wait(lambda: page.is_shown("#gallery img"))
    page.find("#prompt textarea")[0].clear()
    assert len(page.left_in_english()) > 30
    page.switch_language("zh")
    page.wait(lambda: not page.left_in_english(), "left in English")
    page.switch_language("en")
    page.wait(lambda: say("en", "candidate_seed", seed="") in page.text("#gallery"))
    assert page.find("#picture button[title='Remove Image']")


def test_with_the_keyboard_alone(page, chat):
    expected = answer_of(chat, draw(make_scene("test", 0), 224), "What is this?")
    page.tab_to("#language")
    page.tab_to("[role=tab]")
    page.tab_to("#picture")
    page.tab_to("#samples")
    page.type(Keys.ENTER)
    page.wait(lambda: page.is_shown("#picture img"))
    page.tab_to("#question")
    page.type("What is this?")
    page.type(Keys.ENTER)
    page.wait_for_answer(expected)
    page.tab_to("#send")
    page.tab_to("#retry")
    first = page.text("#chat-status")
    page.type(Keys.ENTER)
    page.wait(lambda: page.text("#chat-status") != first)
    page.wait_for_answer(expected)
    page.screenshot("keyboard")
    page.tab_to("#clear")
    page.type(Keys.ENTER)
    page.wait(lambda: not page.answers())
    page.tab_to("[role=tab]", Keys.SHIFT + Keys.TAB)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(page, pictures, scheme):
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    page.open()
    assert page.violations() == []
    page.find("#samples button")[0].click()
    page.wait(lambda: page.is_shown("#picture img"))
    for tab in ("chat", "paint"):
        page.open_tab(tab)
        for button in page.find("button.label-wrap"):
            if button.is_displayed():
                button.click()
        assert page.violations() == []
        nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
        assert len(controls) > 8
        nameless = [node for node in controls if not node.get("name", {}).get("value", "").strip()]
        assert not nameless, [(node["role"]["value"], node.get("properties")) for node in nameless]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# What the browser is asked to say, which nobody hears here.
LISTEN = "window.spoken = []; speechSynthesis.speak = (words) => spoken.push([words.lang, words.text]);"


@pytest.fixture
def film(camera, scenes):
    """Shows a scene: 4:2:0 in full colour, every pixel of a 224 x 224 picture doubled."""

    def show(scene):
        picture = draw(scene, 224).resize((448, 448), PIL.Image.Resampling.NEAREST).convert("YCbCr")
        luma, *chroma = picture.split()
        planes = [luma.tobytes(), *(plane.resize((224, 224)).tobytes() for plane in chroma)]
        camera.write_bytes(b"YUV4MPEG2 W448 H448 F25:1 Ip C420jpeg\n" + 50 * (b"FRAME\n" + b"".join(planes)))

    return show


def test_live(page, chat, scenes, film):
    """A standing question, then what is seen; the answers are spoken, in their own language."""
    film(scenes[0])
    page.browser.execute_script(LISTEN)
    page.open_tab("live")
    assert page.find("#live-listen")[0].is_displayed()  # Chromium can hear
    page.find("#live-question")[0].send_keys(COLOUR_QUESTIONS["en"])
    page.find("#live-speak")[0].click()
    page.find("#live-camera")[0].click()
    expected = answer_of(chat, draw(scenes[0], 224), COLOUR_QUESTIONS["en"])
    page.wait(lambda: page.text("#live-answer") == expected, f"no answer {expected!r}")
    page.wait(lambda: float(page.find("#live-rate")[0].get_attribute("data-rate") or 0) > 0)
    assert page.violations() == []
    page.screenshot("live")
    page.switch_language("zh")
    page.find("#live-question")[0].clear()
    expected_zh = answer_of(chat, draw(scenes[0], 224), DESCRIBE["zh"])
    page.wait(lambda: page.text("#live-answer") == expected_zh, f"no answer {expected_zh!r}")
    assert page.left_in_english() == []
    page.screenshot("live-zh")
    page.find("#live-stop")[0].click()
    assert not page.find("#live-stop")[0].is_enabled()
    assert page.browser.execute_script("return document.getElementById('live-video').srcObject") is None
    assert page.browser.execute_script("return spoken") == [["en-US", expected], ["zh-CN", expected_zh]]


def test_live_with_a_file_and_without_a_server(page, tmp_path):
    page.open_tab("live")
    (tmp_path / "no.mp4").write_bytes(b"no video")
    page.find("#live-input")[0].send_keys(str(tmp_path / "no.mp4"))
    page.wait(lambda: say("en", "live_no_video") in page.text("#live-answer"))
    for headers, status in (({"content-type": "text/plain"}, 415), ({"content-type": "image/jpeg"}, 422)):
        request = Request(f"{page.address.rstrip('/')}/viscpm-hf/live?language=zh", b"no picture", headers)
        with pytest.raises(HTTPError) as refusal:
            urlopen(request)
        assert refusal.value.code == status and set(json.load(refusal.value)["error"]) == {"zh", "en"}


def test_nobody_else_is_asked(page, chat, pictures):
    page.browser.get_log("performance")
    page.open()
    page.upload(pictures[0])
    page.ask(COLOUR_QUESTIONS["en"], answer_of(chat, pictures[0], COLOUR_QUESTIONS["en"]))
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = {urlsplit(parameters["request"]["url"]) for parameters in sent}
    remote = [address for address in addresses if address.scheme not in ("data", "blob")]
    assert len(remote) > 10
    assert {address.hostname for address in remote} == {"127.0.0.1"}
