"""The page at / of the endpoint, in a real browser: it streams, counts, stops, says what went wrong, and asks nobody but its server."""

import shutil
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest
from project import copy_of_project
from server import Served, serve

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)",
)
SECONDS = 60


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tree = copy_of_project(tmp_path_factory.mktemp("page") / "tree")
    (tree / "keys").write_text("sk-page\n")
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=models/llama-2.jinja", "API_KEY_FILE=keys")
    yield running
    assert running.end() == 0


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # root in a container has no sandbox of chromium's, and little /dev/shm; nothing but loopback is asked
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", "--window-size=1000,760",
                 "--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    complaints = [
        entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE" and entry["source"] != "network"
    ]
    driver.quit()
    assert complaints == []


def wait(browser: Any, script: str) -> Any:
    """What a script says, once it says anything."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS, 0.05).until(lambda driver: driver.execute_script(f"return {script}"))


def fill(browser: Any, name: str, value: str) -> None:
    element = browser.find_element("id", name)
    element.clear()
    element.send_keys(value)


def opened(browser: Any, server: Served, key: str = "") -> None:
    """The page, once it knows the model."""
    browser.get(server.openai)
    if key:
        wait(browser, "document.getElementById('about').textContent.includes('Incorrect API key')")
        fill(browser, "key", f"{key}\t")
    wait(browser, "document.getElementById('model').textContent === 'stories'")


IDLE = "!document.getElementById('send').disabled && document.getElementById('stats').textContent"
LAST = "[...document.querySelectorAll('.turn span')].at(-1).textContent"


def test_a_text_is_continued_and_streamed(served: Served, browser: Any) -> None:
    opened(browser, served)
    assert not browser.find_element("id", "way").is_enabled(), "a base model has no chat"
    fill(browser, "temperature", "0")
    fill(browser, "max_tokens", "200")
    # every state of the answer that the page shows, as it comes
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => window.seen.push(document.querySelectorAll('.turn span')[1]?.textContent))"
        ".observe(document.getElementById('talk'), {childList: true, subtree: true, characterData: true})"
    )
    browser.find_element("id", "send").click()
    stats = wait(browser, IDLE)
    shown = browser.execute_script(f"return {LAST}")
    assert shown == served.post("ensemble", text_input="Once upon a time", max_tokens=200)["text_output"]
    seen = [text for text in browser.execute_script("return window.seen") if text]
    assert len(set(seen)) > 5 and all(later.startswith(text) for text, later in zip(seen, seen[1:]))
    assert "tokens, first after" in stats and "tokens/s" in stats


def test_a_conversation_and_the_key(chatting: Served, browser: Any) -> None:
    opened(browser, chatting, "sk-page")
    for name, value in (
        ("temperature", "0"),
        ("max_tokens", "12"),
        ("system", "Be <b>kind</b>"),
        ("prompt", "안녕 <img src=x>"),
    ):
        fill(browser, name, value)
    browser.find_element("id", "send").click()
    wait(browser, IDLE)
    fill(browser, "prompt", "And then?")
    browser.find_element("id", "send").click()
    wait(browser, f"document.querySelectorAll('.turn').length === 4 && {IDLE}")
    turns = [turn.text.split("\n")[0] for turn in browser.find_elements("css selector", ".turn")]
    assert turns == ["user", "assistant", "user", "assistant"]
    assert "안녕 <img src=x>" in browser.find_element("css selector", ".turn.user").text, "what is typed is text"
    assert browser.execute_script("return document.querySelectorAll('#talk img, #talk b b').length") == 0


def test_clearing_while_an_answer_comes_begins_anew(chatting: Served, browser: Any) -> None:
    opened(browser, chatting, "sk-page")
    fill(browser, "max_tokens", "400")
    fill(browser, "prompt", "First")
    browser.find_element("id", "send").click()
    wait(browser, LAST)
    browser.find_element("id", "clear").click()
    wait(browser, "!document.getElementById('send').disabled")
    fill(browser, "max_tokens", "5")
    for count in (2, 4):
        fill(browser, "prompt", "Again")
        browser.find_element("id", "send").click()
        wait(browser, f"document.querySelectorAll('.turn').length === {count} && {IDLE}")
    assert browser.execute_script("return document.querySelectorAll('.turn.error').length") == 0


def test_stopping_frees_the_slot_and_errors_are_shown(served: Served, browser: Any) -> None:
    opened(browser, served)
    fill(browser, "max_tokens", "100000")
    browser.find_element("id", "send").click()
    wait(browser, "document.querySelector('.turn.error')?.textContent.includes('maximum context length is 512')")
    fill(browser, "max_tokens", "500")
    fill(browser, "prompt", "One day")
    browser.find_element("id", "send").click()
    wait(browser, LAST)
    browser.find_element("id", "halt").click()
    wait(browser, "!document.getElementById('send').disabled")
    while served.active:
        pass


def test_the_page_may_ask_its_own_server_only(served: Served) -> None:
    with urllib.request.urlopen(served.openai, timeout=30) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "http://" not in page and "https://" not in page
