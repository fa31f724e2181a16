"""The page at / of the endpoint, in a real browser: what people do with it, at two sizes, light and dark,
in English and Korean.

Most tests talk to the real server. If a model cannot be made to say something, or to wait,
tests/support/play_answers.py answers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from play_answers import Play
from project import ROOT, copy_of_project
from server import Served, serve

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver on PATH (Debian: apt-get install chromium chromium-driver)",
)
SECONDS = 60
PHONE, DESK = (390, 844), (1280, 800)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tree = copy_of_project(tmp_path_factory.mktemp("page") / "tree")
    (tree / "keys").write_text("sk-page\n")
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=models/llama-2.jinja", "API_KEY_FILE=keys")
    yield running
    assert running.end() == 0


@pytest.fixture
def play(served: Served) -> Iterator[Play]:
    """A chat model that says what the test says."""
    server = Play(served.openai)
    yield server
    server.close()


@pytest.fixture
def base(served: Served) -> Iterator[Play]:
    """A base model that says what the test says."""
    server = Play(served.openai, chat=False)
    yield server
    server.close()


class Browser:
    """Chromium, and what the tests do in it. All conditions are JavaScript expressions."""

    def __init__(self, folder: Path, language: str = "en-US") -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        # root in a container has no sandbox of chromium's, and little /dev/shm; nothing but loopback is asked
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", f"--lang={language}",
                     "--disable-background-networking", "--no-first-run", f"--accept-lang={language}",
                     f"--user-data-dir={folder}"):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.size(*DESK)

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        measures = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", measures)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def say(self, script: str, *given: Any) -> Any:
        """The value of an expression."""
        return self.driver.execute_script(f"return {script}", *given)

    def wait(self, script: str) -> Any:
        """The value of an expression, once it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, SECONDS, 0.05).until(lambda driver: driver.execute_script(f"return {script}"))

    def open(self, address: str, model: str) -> None:
        """The page, once it knows the model."""
        self.driver.get(address)
        self.wait(f"document.getElementById('model').textContent === '{model}'")

    def fill(self, name: str, value: str) -> None:
        """Type into a field in place of what it has."""
        element = self.driver.find_element("id", name)
        element.clear()
        element.send_keys(value)

    def set(self, **values: str) -> None:
        """Type settings and close them again."""
        self.driver.find_element("id", "open_settings").click()
        for name, value in values.items():
            self.fill(name, value)
        self.driver.find_element("css selector", "#values .primary").click()
        self.wait("!document.getElementById('settings').open")

    def ask(self, prompt: str) -> None:
        """Type a message and send it by the button."""
        self.fill("prompt", prompt)
        self.click("#send")

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def texts(self, selector: str) -> list[str]:
        return [
            str(text)
            for text in self.say(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")
        ]

    def complaints(self) -> list[str]:
        """What the console has against the page; a status of 400 or above is the server's business."""
        entries = self.driver.get_log("browser")
        return [one["message"] for one in entries if one["level"] == "SEVERE" and one["source"] != "network"]

    def addresses(self) -> list[str]:
        """Every address that was asked for since the last call."""
        events = [json.loads(one["message"])["message"] for one in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Browser]]:
    """One browser for each language, started when it is first wanted: a start takes longer than most tests."""
    started: dict[str, Browser] = {}

    def one(language: str) -> Browser:
        if language not in started:
            started[language] = Browser(tmp_path_factory.mktemp("profile"), language)
        return started[language]

    yield one
    for it in started.values():
        it.driver.quit()


@pytest.fixture
def browser(browsers: Callable[[str], Browser], request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A browser that keeps nothing of the test before; the console must have nothing against the page."""
    it = browsers(getattr(request, "param", "en-US"))
    it.size(*DESK)
    yield it
    complaints = it.complaints()
    it.addresses()
    it.say("localStorage.clear(), sessionStorage.clear()")
    it.driver.get("about:blank")
    assert complaints == []


korean = pytest.mark.parametrize("browser", ["ko-KR"], indirect=True)
BUTTON = "document.getElementById('send').dataset.does"
IDLE = f"{BUTTON} !== 'stop'"
DONE = f"{IDLE} && document.querySelector('#talk .turn:last-child .meta')"
ANSWER = "[...document.querySelectorAll('.answer')].at(-1)"
STATE = "document.getElementById('state').textContent"


# --- a base model -----------------------------------------------------------------------------------------------------


@in_a_browser
def test_a_base_model_continues_its_text_in_one_box(served: Served, browser: Browser) -> None:
    browser.open(served.openai, "stories")
    assert browser.say("document.getElementById('prompt').hidden && document.getElementById('way_row').hidden")
    browser.set(temperature="0", max_tokens="200")
    assert len(browser.texts("#examples button")) == 3
    browser.click("#examples button")
    assert browser.say("document.activeElement.id + document.activeElement.value") == "textOnce upon a time"
    # every state of the continuation that the page shows, as it comes
    browser.driver.execute_script(
        "window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector('#mirror "
        "mark').textContent))"
        ".observe(document.getElementById('mirror'), {childList: true})"
    )
    browser.click("#send")
    browser.wait(f"{IDLE} && document.querySelector('#mirror mark').textContent")
    whole = served.post("ensemble", text_input="Once upon a time", max_tokens=200)["text_output"]
    assert browser.say("document.getElementById('text').value") == "Once upon a time" + whole
    assert browser.texts("#mirror mark") == [whole]
    seen = [text for text in browser.say("window.seen") if text]
    assert len(set(seen)) > 1 and all(later.startswith(text) for text, later in zip(seen, seen[1:]))
    [stats] = browser.texts("#tools .stats")
    assert "200 tokens" in stats and "tokens/s" in stats and "first after" in stats
    assert "Ready" in browser.say(STATE) and "tokens/s" in browser.say(STATE)

    browser.click("#tools [data-does=undo]")
    assert browser.say("document.getElementById('text').value") == "Once upon a time"
    assert browser.texts("#mirror mark") == [""]
    browser.driver.find_element("id", "text").send_keys(" there", "\ue009", "\ue007", "\ue000")  # Control+Enter
    browser.wait(f"{IDLE} && document.querySelector('#mirror mark').textContent")
    again = served.post("ensemble", text_input="Once upon a time there", max_tokens=200)["text_output"]
    browser.click("#tools [data-does=again]")
    browser.wait(f"{IDLE} && document.querySelector('#tools .stats').textContent")
    assert browser.say("document.getElementById('text').value") == "Once upon a time there" + again


@in_a_browser
def test_a_text_waits_with_a_caret_and_keeps_what_came_before_the_stop(base: Play, browser: Browser) -> None:
    browser.open(base.address, "played")
    browser.fill("text", "One")
    browser.click("#send")
    asked = base.next()
    assert asked.said == "One" and asked.body["max_tokens"] == 200
    assert browser.say("document.querySelectorAll('#mirror .caret').length") == 1
    assert browser.say("document.getElementById('text').readOnly") and browser.say(BUTTON) == "stop"
    asked.send(" two")
    browser.wait("document.getElementById('text').value === 'One two'")
    browser.driver.find_element("id", "text").send_keys("\ue00c")  # Escape
    browser.wait(IDLE)
    assert browser.texts("#note .notice > span") == ["Stopped."]
    assert not browser.say("document.getElementById('text').readOnly")
    browser.click("#note [data-does=retry]")
    assert base.next().said == "One"


# --- a conversation ---------------------------------------------------------------------------------------------------


@in_a_browser
def test_a_conversation_and_the_key(chatting: Served, browser: Browser) -> None:
    browser.driver.get(chatting.openai)
    # without a key: the settings open, and the field is marked
    browser.wait("document.getElementById('settings').open && document.activeElement.id === 'key'")
    assert browser.say("document.getElementById('key').getAttribute('aria-invalid')") == "true"
    assert browser.texts("#key_hint") == ["This server needs an API key."]
    for key, hint in (("sk-wrong", "The server does not know this key."), ("sk-page", "Kept in this tab only.")):
        browser.fill("key", key + "\ue007")  # Enter
        browser.wait(f"document.getElementById('key_hint').textContent === '{hint}'")
    browser.wait("document.getElementById('model').textContent === 'stories'")
    assert browser.say("document.getElementById('key').getAttribute('aria-invalid')") == "false"
    browser.wait("!document.getElementById('settings').open")
    browser.set(temperature="0", max_tokens="12", system="Be <b>kind</b>")
    browser.ask("안녕 <img src=x>")
    browser.wait(DONE)
    browser.ask("And then?")
    browser.wait(f"document.querySelectorAll('.turn').length === 4 && {DONE}")
    assert browser.texts(".turn h2") == ["You", "Model"] * 2
    assert browser.texts(".user > div") == ["안녕 <img src=x>", "And then?"], "what is typed is text"
    assert browser.say("document.querySelectorAll('#talk img, #talk b').length") == 0
    said = [{"role": "system", "content": "Be <b>kind</b>"}, {"role": "user", "content": "안녕 <img src=x>"}]
    body = json.dumps(
        {"model": "stories", "messages": said, "temperature": 0, "top_p": 0.95, "max_tokens": 12}
    ).encode()
    head = {"Content-Type": "application/json", "Authorization": "Bearer sk-page"}
    with urllib.request.urlopen(urllib.request.Request(f"{chatting.openai}/v1/chat/completions", body, head)) as answer:
        whole = json.load(answer)["choices"][0]["message"]["content"]
    shown = browser.say("document.querySelector('.answer').textContent")
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", whole)
    # a reload keeps settings and key, and nothing else
    browser.open(chatting.openai, "stories")
    assert browser.say("document.getElementById('system').value") == "Be <b>kind</b>"
    assert "sk-page" not in browser.say("JSON.stringify(localStorage)")


@in_a_browser
def test_one_button_sends_and_stops_and_a_caret_waits(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    assert browser.say("document.querySelectorAll('form#form button[type=submit], form#form .primary').length") == 1
    assert browser.texts("#send span") == ["Send"]
    browser.fill("prompt", "first\ue007")  # Enter
    asked = play.next()
    assert browser.say(f"{ANSWER}.querySelectorAll('.caret').length") == 1
    assert browser.texts("#send span") == ["Stop"] and browser.say("document.getElementById('prompt').value") == ""
    asked.send("So")
    browser.wait(f"{ANSWER}.textContent === 'So'")
    assert browser.say("document.querySelectorAll('#talk .caret').length") == 0
    browser.click("#send")
    browser.wait(DONE)
    assert browser.texts("#send span") == ["Send"]
    assert browser.texts(".notice > span") == ["Stopped."] and browser.say(f"{ANSWER}.textContent") == "So"
    while not asked.left.wait(0.05):
        asked.send("more")
    # what was said before the stop stays in the conversation; Regenerate asks the same again
    browser.ask("second")
    asked = play.next()
    assert asked.said == [("user", "first"), ("assistant", "So"), ("user", "second")]
    asked.end("This")
    browser.wait(DONE)
    assert len(browser.texts("#talk [data-does=again]")) == 1, "the last answer alone"
    browser.click("#talk [data-does=again]")
    again = play.next()
    assert again.said == asked.said and browser.say(f"{ANSWER}.textContent") == ""
    assert browser.say("document.activeElement.id") == "send", "the keyboard is not left at a button that is gone"
    again.end("That", "length")
    browser.wait(DONE)
    assert browser.say(f"{ANSWER}.textContent") == "That" and len(browser.texts(".turn")) == 4
    assert browser.texts(".turn:last-child .notice > span") == ["The answer ended at its limit of tokens."]


@in_a_browser
def test_clearing_while_an_answer_comes_begins_a_new_conversation(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    browser.ask("first")
    old = play.next()
    old.send("old")
    browser.wait(f"{ANSWER}.textContent === 'old'")
    browser.click("#clear")
    assert browser.texts(".turn") == [] and browser.say("!document.getElementById('empty').hidden")
    browser.ask("first again")
    play.next().send("old")
    browser.wait(f"{ANSWER}.textContent === 'old'")
    # at once, before the answer that was stopped knows it
    browser.fill("prompt", "second")
    browser.driver.execute_script("for (const id of ['clear', 'send']) document.getElementById(id).click()")
    new = play.next()
    assert new.said == [("user", "second")]
    while not old.left.wait(0.05):
        old.send("old")
    assert browser.say(BUTTON) == "stop", "the end of the old answer is not the end of the new one"
    new.end("new")
    browser.wait(DONE)
    assert browser.say("document.getElementById('talk').textContent").count("old") == 0


@in_a_browser
def test_the_page_follows_the_answer_unless_the_reader_scrolled_up(play: Play, browser: Browser) -> None:
    browser.size(*PHONE)
    browser.open(play.address, "played")
    browser.ask("tell")
    asked = play.next()
    at_end = "main.scrollHeight - main.scrollTop - main.clientHeight < 2"
    for number in range(40):
        asked.send(f"line {number}\n\n")
    browser.wait(f"{ANSWER}.textContent.includes('line 39')")
    assert browser.say("main.scrollHeight > 2 * main.clientHeight")
    browser.wait(at_end)
    below = browser.say("document.getElementById('prompt').getBoundingClientRect().bottom <= innerHeight")
    assert below, "the prompt is always there"
    assert browser.say("document.documentElement.scrollWidth") == PHONE[0]
    browser.driver.execute_script("main.scrollTop -= 400")
    browser.wait("!document.getElementById('latest').hidden")
    where = browser.say("main.scrollTop")
    for number in range(40, 60):
        asked.send(f"line {number}\n\n")
    browser.wait(f"{ANSWER}.textContent.includes('line 59')")
    assert browser.say("main.scrollTop") == where
    browser.click("#latest")
    browser.wait(f"{at_end} && document.getElementById('latest').hidden")
    asked.send("line 60\n\n" * 20)
    asked.end("the end")
    browser.wait(DONE)
    browser.wait(at_end)


@in_a_browser
def test_what_goes_wrong_has_a_line_of_its_own_and_retry(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    words = {
        400: "the prompt is <b>long</b>",
        429: "The server is busy. Try again in a moment.",
        503: "The server is not ready. Try again in a moment.",
    }
    browser.ask("first")
    for status, text in words.items():
        play.next().refuse(status, "the prompt is <b>long</b>")
        browser.wait(f"{DONE} && document.querySelector('.notice.error')")
        assert browser.texts(".notice.error > span") == [text]
        browser.click(".notice [data-does=retry]")
    asked = play.next()
    asked.send("half")
    asked.fail("the engine ended")
    browser.wait(f"{DONE} && document.querySelector('.notice.error')")
    assert browser.texts(".notice.error > span") == ["the engine ended"] and browser.texts(".answer") == ["half"]
    browser.click(".notice [data-does=retry]")
    asked = play.next()
    assert asked.said == [("user", "first")], "half an answer is not part of its own question"
    asked.send("part")
    asked.break_off()
    browser.wait(f"{DONE} && document.querySelector('.notice.error')")
    assert browser.texts(".notice.error > span") == ["The answer broke off."]
    browser.ask("second")
    play.next().refuse(400, "no")
    browser.wait(f"document.querySelectorAll('.turn').length === 4 && {DONE}")
    browser.ask("third")
    asked = play.next()
    said = [("user", "first"), ("assistant", "part"), ("user", "third")]
    assert asked.said == said, "a question without an answer would give two turns of one side"
    asked.end("")
    browser.wait(f"document.querySelectorAll('.turn').length === 6 && {DONE}")
    assert browser.texts(".turn:last-child .notice > span") == ["The model said nothing."]
    # a key that the server no longer takes
    browser.ask("fourth")
    play.next().refuse(401)
    browser.wait("document.getElementById('settings').open && document.activeElement.id === 'key'")
    browser.fill("key", "sk-new\ue007")
    browser.wait("!document.getElementById('settings').open")
    browser.click(".turn:last-child [data-does=retry]")
    asked = play.next()
    assert asked.key == "Bearer sk-new"
    asked.end("done")
    browser.wait(DONE)


@in_a_browser
def test_a_server_that_is_gone_is_said_and_found_again(served: Served, browser: Browser) -> None:
    first = Play(served.openai)
    port = first.server.server_port
    browser.open(first.address, "played")
    browser.wait(f"{STATE} === 'Ready'")
    first.close()
    browser.ask("there?")
    browser.wait(f"{DONE} && {STATE} === 'The server does not answer'")
    assert browser.texts(".notice.error > span") == ["The server cannot be reached."]
    second = Play(served.openai, port=port)
    second.health, second.health_status = {}, 503
    browser.wait(f"{STATE} === 'The server is not ready yet'")
    second.health, second.health_status = {"status": "ok", "requests": 7, "slots": 4}, 200
    browser.wait(f"{STATE} === 'Ready · 4/4 slots busy · 3 waiting'")
    browser.click(".notice [data-does=retry]")
    second.next().end("yes")
    browser.wait(f"{DONE} && !document.querySelector('.notice')")
    second.close()


@in_a_browser
def test_stopping_frees_the_slot_and_errors_are_shown(served: Served, browser: Browser) -> None:
    browser.open(served.openai, "stories")
    browser.set(max_tokens="100000")
    browser.fill("text", "One day")
    browser.click("#send")
    browser.wait("document.querySelector('#note .error')?.textContent.includes('maximum context length is 512')")
    browser.set(max_tokens="500")
    browser.click("#note [data-does=retry]")
    browser.wait("document.querySelector('#mirror mark').textContent")
    browser.click("#send")
    browser.wait(IDLE)
    while served.active:
        pass


@in_a_browser
def test_a_korean_syllable_is_finished_before_enter_sends(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    browser.fill("prompt", "안녕")
    press = "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', cancelable: true, %s}))"
    assert browser.say(press % "isComposing: true"), "left to the input method"
    assert browser.say(press % "shiftKey: true"), "a new line"
    assert play.asked.empty() and browser.say("document.getElementById('prompt').value") == "안녕"
    assert not browser.say(press % "shiftKey: false")
    asked = play.next()
    assert asked.said == [("user", "안녕")]
    asked.end("예")
    browser.wait(DONE)


# --- what the model says ----------------------------------------------------------------------------------------------

MARKDOWN = """### Steps

1. **bold** and *slanted* and ~~gone~~
2. `code`

```python
print("<b>")
```

| a | b |
|--:|---|
| 1 | 2 |

> quoted

[a link](https://example.org/a) https://example.org/b

##### Deep
"""


@in_a_browser
def test_markdown_is_shown_and_code_is_copied(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    browser.ask("show")
    asked = play.next()
    for piece in re.findall(r"(?s).{1,7}", MARKDOWN):
        asked.send(piece)
    asked.end()
    browser.wait(DONE)
    # h3 and h4 for ### and #####: an answer stands below the turn's h2, and no level is skipped
    wanted = {"h3": 1, "h4": 1, "ol": 1, "li": 2, "strong": 1, "em": 1, "s": 1, "code": 2, "pre": 1, "table": 1, "thead": 1, "tbody": 1,
              "tr": 2, "th": 2, "td": 2, "blockquote": 1, "a": 2}  # fmt: skip
    count = f"Object.fromEntries({json.dumps(list(wanted))}.map((one) => [one, {ANSWER}.querySelectorAll(one).length]))"
    assert browser.say(count) == wanted
    link = browser.say(f"[...{ANSWER}.querySelectorAll('a')].map((one) => [one.href, one.target, one.rel])")
    safe = ["_blank", "noopener noreferrer nofollow"]
    assert link == [["https://example.org/a", *safe], ["https://example.org/b", *safe]]
    assert browser.say(f"getComputedStyle({ANSWER}.querySelector('td')).textAlign") == "right"
    browser.click(".answer .code button")
    browser.wait("document.querySelector('.answer .code button').textContent === 'Copied'")
    copied = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    assert browser.driver.execute_async_script(copied) == 'print("<b>")'
    # without the clipboard's own API, as on a page that is not from https or localhost
    browser.driver.execute_script("navigator.clipboard.writeText = () => Promise.reject(new Error('not here'))")
    browser.click(".turn:last-child .meta [data-does=copy]")
    browser.wait("document.querySelector('.meta button').textContent === 'Copied'")
    assert browser.driver.execute_async_script(copied) == MARKDOWN


HOSTILE = [
    "<script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 1'>", "<svg onload='window.pwned = 1'></svg>",
    "<iframe src='javascript:parent.pwned = 1'></iframe>", "<style>* { display: none }</style>", "<base href='https://example.org/'>",
    "[click](javascript:window.pwned=1)", "[click](JaVaScRiPt&colon;window.pwned=1)", "[click](java\tscript:window.pwned=1)",
    "[click](data:text/html,<script>1</script>)", "[click](vbscript:x)", "[click](/v1/models)", "[click](//example.org/x)",
    "<javascript:window.pwned=1>", "![look](https://example.org/pixel.png?stolen)", "![look](javascript:window.pwned=1)",
    "[look]: javascript:window.pwned=1\n\n[look]", "![x](data:image/svg+xml,<svg onload=1>)",
    '[a](https://example.org/"onmouseover="window.pwned=1)', '[a](https://example.org "x\\" onclick=window.pwned=1")',
    "`<img src=x onerror=window.pwned=1>`",
    "```html\n<script>window.pwned = 1</script>\n```", "```\"><script>window.pwned=1</script>\nx\n```",
    "|a|\n|-|\n|<img src=x onerror=window.pwned=1>|", "# <img src=x onerror=window.pwned=1>", "&lt;img src=x onerror=window.pwned=1&gt;",
    "<form action='https://example.org'><button>Retry</button></form>", "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "</div></main></body></html><script>window.pwned=1</script>", "<!--<script>", "${window.pwned=1} {{window.pwned=1}}",
    ">" * 5000 + "deep", "* " * 3000 + "deep", "[" * 5000, "*" * 5000 + "a", "a\u0000b\u202ec\ufffe",
]  # fmt: skip


@in_a_browser
def test_nothing_that_a_model_says_runs_or_loads_anything(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    browser.addresses()
    before = browser.say("[...document.querySelectorAll('script, style')].length")
    for number, text in enumerate(HOSTILE):
        browser.ask("say it")
        asked = play.next()
        cut = len(text) // 2
        asked.send(text[:cut])
        asked.end(text[cut:])
        browser.wait(f"document.querySelectorAll('.answer').length === {number + 1} && {DONE}")
        assert browser.say(f"{ANSWER}.textContent.length") > 0, text[:60]
        browser.say(
            f"{ANSWER}.querySelectorAll('a').forEach((one) => one.dispatchEvent(new MouseEvent('mouseover', "
            f"{{bubbles: true}})))"
        )
    kinds = "script, style, img, svg, iframe, object, embed, base, meta, link, form, video, audio, input"
    found = (
        f"[...document.querySelectorAll('.answer')].flatMap((one) => [...one.querySelectorAll({json.dumps(kinds)})])"
    )
    assert browser.say(f"{found}.filter((one) => !one.closest('button')).map((one) => one.outerHTML)") == []
    attributes = browser.say(
        "[...new Set([...document.querySelectorAll('.answer :not(button, button *)')].flatMap((one) => "
        "one.getAttributeNames()))]"
    )
    assert set(attributes) <= {"class", "role", "aria-label", "tabindex", "href", "target", "rel", "style", "start"}
    links = browser.say("[...document.querySelectorAll('.answer a')].map((one) => one.href)")
    assert links and all(re.match(r"https?://example\.org[/?\"%]", link) for link in links), links
    assert browser.say("window.pwned === undefined")
    assert browser.say("[...document.querySelectorAll('script, style')].length") == before
    asked_for = [address for address in browser.addresses() if not address.startswith(play.address + "/")]
    assert asked_for == []


@in_a_browser
def test_markup_that_a_script_made_would_be_refused_too(served: Served, browser: Browser) -> None:
    """Trusted Types: were a mistake in the page to hand text to innerHTML, the browser would refuse."""
    browser.open(served.openai, "stories")
    tried = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'taken'; } catch (error) { return error.name; } })()"
    # chromedriver's own scripts are excepted from a page's policy, a script of the page is not
    browser.driver.execute_script(
        f"document.getElementById('clear').addEventListener('click', () => {{ window.tried = {tried}; }})"
    )
    browser.click("#clear")
    assert browser.say("window.tried") == "TypeError"
    browser.driver.get_log("browser")


# --- the same request elsewhere ---------------------------------------------------------------------------------------


@in_a_browser
@pytest.mark.parametrize("tongue", ["curl", "python"])
def test_curl_and_python_give_the_same_answer(chatting: Served, browser: Browser, tongue: str, tmp_path: Path) -> None:
    browser.driver.get(chatting.openai)
    browser.wait("document.activeElement.id === 'key'")
    browser.fill("key", "sk-page\ue007")
    browser.wait(
        "document.getElementById('model').textContent === 'stories' && !document.getElementById('settings').open"
    )
    browser.set(temperature="0", max_tokens="12", system='It\'s "so" $HOME `x` \\', stop="\\n'")
    browser.ask("안녕 'quoted' \\ 😀")
    browser.wait(DONE)
    browser.click("#talk [data-does=source]")
    browser.click(f"#source [value={tongue}]")
    [source] = browser.texts("#listing code")
    assert "sk-page" not in source, "a key is not shown"
    file = tmp_path / "source"
    file.write_text(source, encoding="utf-8")
    command = ["bash", str(file)] if tongue == "curl" else [sys.executable, str(file)]
    environment = {**os.environ, "API_KEY": "sk-page", "PYTHONUTF8": "1"}
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True).stdout
    if tongue == "curl":
        events = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
        out = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    shown = browser.say(f"{ANSWER}.textContent")
    assert shown and re.sub(r"\s", "", out) == re.sub(r"\s", "", shown)


# --- everybody can use it ---------------------------------------------------------------------------------------------


@in_a_browser
def test_a_screen_reader_hears_the_answer_once(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    assert browser.say("document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]').length") == 1
    browser.ask("say")
    asked = play.next()
    browser.wait("document.querySelector('[role=status]').textContent === 'The model is answering.'")
    asked.send("**One**")
    browser.wait(f"{ANSWER}.textContent === 'One'")
    assert browser.texts("[role=status]") == ["The model is answering."], "not a word at a time"
    asked.end(" two")
    browser.wait("document.querySelector('[role=status]').textContent === 'Answer: One two'")


@in_a_browser
def test_the_keyboard_reaches_everything(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    browser.ask("say")
    play.next().end("```\ncode\n```")
    browser.wait(DONE)
    seen: list[str] = []
    browser.say("document.activeElement.blur()")
    for _ in range(12):
        browser.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        name = "document.activeElement.id || document.activeElement.dataset.does || document.activeElement.tagName"
        seen.append(browser.say(name))
        assert browser.say(
            "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
            " !== 'none' || Boolean(document.activeElement.closest('#box'))"
        )
    assert {"clear", "open_settings", "copy", "PRE", "again", "source", "prompt", "send"} <= set(seen), seen
    browser.driver.find_element("id", "open_settings").send_keys("\ue007")  # Enter
    assert browser.say("document.getElementById('settings').contains(document.activeElement)")
    browser.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    browser.wait("document.activeElement.id === 'open_settings'")


@in_a_browser
@korean
def test_korean(play: Play, browser: Browser) -> None:
    browser.open(play.address, "played")
    assert browser.say("document.documentElement.lang") == "ko"
    assert browser.texts("#send span, #open_settings span, #clear span") == ["새로 시작", "설정", "보내기"]
    browser.ask("안녕")
    play.next().refuse(429)
    browser.wait(DONE)
    assert browser.texts(".notice > span, .notice button") == [
        "서버가 바쁩니다. 잠시 뒤에 다시 시도하세요.",
        "다시 시도",
    ]
    browser.click("#open_settings")
    browser.driver.find_element("id", "language").send_keys("English")
    browser.wait("document.documentElement.lang === 'en'")
    assert browser.texts(".notice > span, .notice button") == ["The server is busy. Try again in a moment.", "Retry"]
    browser.open(play.address, "played")
    assert browser.say("document.documentElement.lang") == "en", "what was chosen stays"


def test_both_languages_have_every_word() -> None:
    page = (ROOT / "scripts" / "openai" / "page.html").read_text("utf-8")
    tables = re.findall(r"(?ms)^  (en|ko): \{\n(.*?)^  \},$", page)
    names = {
        language: re.findall(r"(?:^|[,\[] ?)\s*(\w+): (?=[\"\[(]|n)", table, re.MULTILINE) for language, table in tables
    }
    assert names["en"] == names["ko"] and len(names["en"]) > 50
    used = set(re.findall(r"say\(\"(\w+)\"|data-(?:t|label|placeholder)=\"(\w+)\"|button\(\"(\w+)\"", page))
    assert {one for three in used for one in three if one and not one.endswith("_")} <= set(names["en"])


def axe() -> str:
    """axe-core's script, from the package that carries it;
    the package itself is for another driver and is not imported."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None and found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text("utf-8")


def violations(browser: Browser, rules: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What axe has against the page as it is: WCAG 2.2 A and AA, and its best practices;
    of these rules alone where some are named."""
    if not browser.say("window.axe !== undefined"):
        browser.driver.execute_script(axe())
    only = {"runOnly": list(rules)} if rules else {}
    found = browser.driver.execute_async_script(
        "const done = arguments[1]; axe.run(document, {resultTypes: ['violations'], ...arguments[0]}).then((all) => "
        "done(all.violations"
        ".map((one) => [one.id, one.help, one.nodes.map((node) => node.html.slice(0, 200) + ' ' + "
        "node.failureSummary)])))",
        only,
    )
    return list(found)


SHOWN = ["nothing yet", "an answer", "an error", "waiting", "settings", "key missing", "source", "a text"]
COLOURS = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 18)"}
# what depends on a size or a colour; every other rule asks what is on the page, and that is the same in both
SEEN = ["color-contrast", "link-in-text-block", "target-size", "scrollable-region-focusable", "meta-viewport"]


@in_a_browser
@pytest.mark.parametrize("browser", ["en-US", "ko-KR"], indirect=True)
def test_axe_finds_nothing(play: Play, base: Play, browser: Browser) -> None:
    """Every state of the page once: all rules at first, then those that can tell sizes and colours apart; English at a
    desk in light, in dark and on a phone, Korean on a phone in dark."""
    english = browser.say("navigator.language") == "en-US"
    views = [(DESK, "light"), (DESK, "dark"), (PHONE, "light")] if english else [(PHONE, "dark")]
    found: dict[str, Any] = {}

    def check(what: str) -> None:
        found[what] = []
        for size, scheme in views:
            browser.size(*size, scheme)
            assert browser.say("getComputedStyle(document.body).backgroundColor") == COLOURS[scheme]
            found[what] += violations(browser, () if (size, scheme) == views[0] else SEEN)
            width = browser.say("document.documentElement.scrollWidth")
            assert width <= size[0], f"{what}: the page is {width} pixels wide"
        browser.size(*views[0][0])

    browser.open(play.address, "played")
    check("nothing yet")
    browser.ask("show " * 40)
    play.next().end(MARKDOWN + "\n\n```\n" + "long " * 60 + "\n```\n")
    browser.wait(DONE)
    check("an answer")
    browser.ask("fail")
    play.next().refuse(400, "a message of the server")
    browser.wait(f"document.querySelectorAll('.turn').length === 4 && {DONE}")
    check("an error")
    browser.ask("wait")
    waiting = play.next()
    check("waiting")
    waiting.end("done", "length")
    browser.wait(f"document.querySelectorAll('.turn').length === 6 && {DONE}")
    browser.click("#open_settings")
    check("settings")
    browser.say("want_key()")
    check("key missing")
    browser.click("#settings [data-close]")
    browser.click("#talk [data-does=source]")
    check("source")
    browser.open(base.address, "played")
    browser.fill("text", "Once")
    browser.click("#send")
    base.next().end(" upon a time")
    browser.wait(f"{IDLE} && document.querySelector('#mirror mark').textContent")
    check("a text")
    assert found == dict.fromkeys(SHOWN, [])
    assert browser.say("document.querySelectorAll('main').length") == 1


# --- what the page is made of -----------------------------------------------------------------------------------------


def test_the_page_may_ask_its_own_server_only(served: Served) -> None:
    with urllib.request.urlopen(served.openai, timeout=30) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    own = (ROOT / "scripts" / "openai" / "page.html").read_text("utf-8")
    namespace = "http://www.w3.org/2000/svg"
    assert "http" not in own.replace(namespace, "").replace('"http:", "https:"', "").replace("https and localhost", "")
    for sink in ("innerHTML =", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert sink not in own
    library = (ROOT / "scripts" / "openai" / "vendored" / "markdown-it.umd.min.js").read_text("utf-8")
    assert library in page
    # neither would be inside a script what it is in the library: one opens another script's text, one ends it
    assert "<script" not in library and "</script" not in library and "\r" not in library


def test_what_comes_from_others_is_what_its_script_takes() -> None:
    folder = ROOT / "scripts" / "openai" / "vendored"
    script = (folder / "get.sh").read_text()
    [expected] = re.findall(r"^sha256=(\w{64})$", script, re.MULTILINE)
    assert hashlib.sha256((folder / "markdown-it.umd.min.js").read_bytes()).hexdigest() == expected
    named = re.findall(r"[\w.-]+@[\d.]+", re.search(r"(?s)main=(.*?)sha256", script)[1])  # type: ignore[index]
    licences = (folder / "LICENSES.txt").read_text("utf-8")
    assert re.findall(r"^=== (\S+)$", licences, re.MULTILINE) == named and len(named) == 6
