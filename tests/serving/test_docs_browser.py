"""The page `/docs` in a real browser: the packaged scripts have to be able to read what the server writes."""

import pytest
from browser_support import needs_browser
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from serving_support import Server


pytestmark = needs_browser
PATIENCE = 60


@pytest.fixture(scope="module")
def address():
    server = Server("viscpm-tiny", "--device", "cpu")
    yield server.url
    assert server.stop() == 0


def test_the_documentation_renders(browser, address):
    browser.get(address)  # leads to /docs

    def shown():
        return browser.find_element(By.TAG_NAME, "body").text

    WebDriverWait(browser, PATIENCE).until(lambda _: "/v1/chat/completions" in shown(), "no route is shown")
    assert browser.current_url == f"{address}/docs"
    assert "Unable to render" not in shown() and "error" not in shown().lower().split()
    browser.find_element(By.CSS_SELECTOR, "#operations-chat-chat_completions_v1_chat_completions_post button").click()
    WebDriverWait(browser, PATIENCE).until(lambda _: "repetition_penalty" in shown(), "the body's schema is not shown")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
