"""The page at / in a real browser: what its user does, what it asks for, and that it can be read and reached."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Driver, chromium, drop_file, prefer, requests_of, resize, until
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from served import Served, served

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.routes.page import PAGE
from ov_kvcrush.server.settings import ServerSettings

KEY = "a-key-of-the-page"
MARKUP = "<img src=x onerror=alert(1)><b>bold</b>"
DOCUMENT = " ".join(
    f"The pump in hall {hall} was made in {1900 + 7 * hall} and its filter is changed every {3 * hall} days."
    for hall in range(2, 12)
)


@pytest.fixture(scope="module")
def server(pipeline: ContinuousBatchingPipeline) -> Iterator[Served]:
    with served(ServerSettings(port=0), pipeline) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Driver]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Driver, server: Served) -> Iterator[Driver]:
    """The page as it is opened; whatever was asked for meanwhile was this server's, and no script failed."""
    resize(browser, 1280, 800, mobile=False)
    prefer(browser, "light")
    open_page(browser, server)
    until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#model option"))
    yield browser
    urls = [request["url"] for request in requests_of(browser)]
    assert urls
    assert all(url.startswith((f"{server.url}/", "data:", "blob:")) for url in urls), urls
    failed = [entry for entry in browser.get_log("browser") if entry["source"] in ("javascript", "security")]
    assert not failed


def open_page(browser: Driver, server: Served) -> None:
    requests_of(browser)
    browser.get("about:blank")
    requests_of(browser)
    browser.get(f"{server.url}/")


def at(browser: Driver, name: str) -> Any:
    return browser.find_element(By.ID, name)


def ask(browser: Driver, text: str, max_tokens: int = 24) -> None:
    browser.execute_script("document.getElementById('max-tokens').value = arguments[0]", max_tokens)
    at(browser, "question").send_keys(text)
    at(browser, "send").click()


def answer(browser: Driver) -> Any:
    """The last answer, when it is complete."""
    return until(
        browser, lambda b: (found := b.find_elements(By.CSS_SELECTOR, ".assistant[aria-busy=false]")) and found[-1]
    )


def costs(element: Any) -> dict[str, str]:
    rows = element.find_elements(By.CSS_SELECTOR, ".cost div")
    return {row.find_element(By.TAG_NAME, "dt").text: row.find_element(By.TAG_NAME, "dd").text for row in rows}


def number(figure: str) -> int:
    return int(figure.replace(",", ""))


def metric(server: Served, name: str) -> float:
    found = re.search(rf"^ov_kvcrush_{name} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_an_answer_comes_in_pieces_and_tells_its_cost(page: Driver) -> None:
    page.execute_script(
        """
        window.lengths = [];
        const note = () => window.lengths.push(document.querySelector(".assistant p")?.textContent.length ?? 0);
        new MutationObserver(note).observe(document.getElementById("log"), { childList: true, subtree: true });
        """
    )
    ask(page, "What is the capital of France? Answer in one sentence.")
    shown = answer(page)
    assert "Paris" in shown.find_element(By.TAG_NAME, "p").text
    assert len(set(page.execute_script("return window.lengths"))) > 3  # nothing, pieces, all of it
    cost = costs(shown)
    assert set(cost) == {"read", "written", "kept", "KV cache", "TTFT", "TPOT"}
    assert 0 < number(cost["written"]) <= 24
    assert number(cost["read"]) > 5
    assert re.fullmatch(r"[\d.]+ [kM]B, 1/[\d.]+ of bf16", cost["KV cache"])


def test_a_later_question_knows_the_earlier_ones(page: Driver) -> None:
    ask(page, "My name is Ada.", 4)
    first = costs(answer(page))
    requests_of(page)
    ask(page, "What is my name?", 4)
    until(page, lambda b: len(b.find_elements(By.CSS_SELECTOR, ".assistant[aria-busy=false]")) == 2)
    assert number(costs(answer(page))["read"]) > number(first["read"]) + number(first["written"])
    at(page, "new-chat").click()
    assert not page.find_elements(By.CLASS_NAME, "turn")


def test_stop_ends_the_request_on_the_server_too(page: Driver, server: Served) -> None:
    ask(page, "Tell me a very long story about the sea.", 4000)
    until(page, lambda b: b.find_element(By.CSS_SELECTOR, ".assistant p").text)
    assert not at(page, "send").is_displayed()
    at(page, "stop").click()
    shown = answer(page)
    assert shown.find_element(By.CLASS_NAME, "end").text == "Stopped."
    until(page, lambda b: metric(server, "requests_running") == 0)
    ask(page, "What is the capital of France? Answer in one sentence.")
    until(page, lambda b: len(b.find_elements(By.CSS_SELECTOR, ".assistant[aria-busy=false]")) == 2)
    assert "Paris" in answer(page).text


def test_a_dropped_document_is_asked_and_shows_what_is_kept(page: Driver, server: Served) -> None:
    drop_file(page, "#log", "pumps.txt", DOCUMENT)
    until(page, lambda b: at(b, "held").is_displayed())
    held = costs(at(page, "held"))
    assert 0 < number(held["kept"]) < number(held["tokens"])
    assert float(re.search(r"1/([\d.]+) of bf16", held["KV cache"])[1]) > 2  # type: ignore[index]
    assert DOCUMENT in at(page, "text").get_attribute("textContent")
    colours = {cell.get_attribute("class") for cell in page.find_elements(By.CSS_SELECTOR, "#strip i")}
    assert len(colours) > 1
    assert {span.get_attribute("class") for span in page.find_elements(By.CSS_SELECTOR, "#text span")} >= colours - {
        "kept-0"
    }
    assert at(page, "strip").size["height"] > 10

    requests_of(page)
    ask(page, "How often is the filter in hall 3 changed?", 8)
    cost = costs(answer(page))
    assert number(cost["read"]) > number(held["tokens"])
    chosen = at(page, "context").get_attribute("value")
    bodies = [request["postData"] for request in requests_of(page) if request["url"].endswith("/chat/completions")]
    assert len(bodies) == 1
    assert f'"context":"{chosen}"' in bodies[0]

    at(page, "forget").click()
    until(page, lambda b: not at(b, "held").is_displayed())
    assert httpx.get(f"{server.url}/v1/contexts/{chosen}").status_code == 404


def test_a_chosen_file_is_a_document_too_with_its_budget(page: Driver, tmp_path: Path) -> None:
    path = tmp_path / "pumps.txt"
    path.write_text(DOCUMENT)
    kept = []
    for budget in ("1/2", "1/8"):
        page.execute_script("document.getElementById('budget').value = arguments[0]", budget)
        before = at(page, "context").get_attribute("value")
        at(page, "file").send_keys(str(path))
        until(page, lambda b, before=before: at(b, "context").get_attribute("value") != before)  # type: ignore[misc]
        until(page, lambda b: at(b, "held").is_displayed() and costs(at(b, "held")))
        kept.append(at(page, "strip").get_attribute("aria-label"))
    assert kept[0] != kept[1]
    for _ in range(2):
        at(page, "context").send_keys(Keys.END)
        chosen = at(page, "context").get_attribute("value")
        at(page, "forget").click()
        until(page, lambda b, chosen=chosen: chosen not in at(b, "shelf").get_attribute("innerHTML"))  # type: ignore[misc]


def test_what_is_refused_is_said_and_the_question_stays(page: Driver) -> None:
    page.execute_script("document.getElementById('temperature').value = 9")
    ask(page, "Say something.")
    until(page, lambda b: at(b, "problem").is_displayed())
    assert "temperature" in at(page, "problem").text
    assert at(page, "question").get_attribute("value") == "Say something."
    assert not page.find_elements(By.CLASS_NAME, "turn")


def test_texts_are_never_markup(page: Driver) -> None:
    drop_file(page, "#document", f"{MARKUP}.txt", f"{MARKUP} {DOCUMENT}")
    until(page, lambda b: at(b, "held").is_displayed())
    ask(page, f"Repeat: {MARKUP}", 8)
    answer(page)
    assert MARKUP in page.find_element(By.CSS_SELECTOR, ".user p").text
    assert MARKUP in at(page, "text").get_attribute("textContent")
    assert not page.find_elements(By.CSS_SELECTOR, "img, b, main script")
    at(page, "forget").click()
    until(page, lambda b: not at(b, "held").is_displayed())


def test_the_keyboard_is_enough(page: Driver) -> None:
    def press(*keys: str) -> None:
        ActionChains(page).send_keys(*keys).perform()

    def focused() -> Any:
        return page.switch_to.active_element

    def go_to(name: str) -> None:
        for _ in range(40):
            if focused().get_attribute("id") == name:
                return
            press(Keys.TAB)
        raise AssertionError(f"{name} must be reached by Tab")

    def outline() -> str:
        script = (
            "const e = arguments[0].closest('label#choose') ?? arguments[0]; return getComputedStyle(e).outlineStyle"
        )
        return str(page.execute_script(script, focused()))

    assert focused().get_attribute("id") == "question"
    press("Tell me a long story")
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    press("about the sea.")
    assert focused().get_attribute("value") == "Tell me a long story\nabout the sea."
    press(Keys.ENTER)
    until(page, lambda b: b.find_element(By.CSS_SELECTOR, ".assistant p").text)
    press(Keys.ESCAPE)
    assert answer(page).find_element(By.CLASS_NAME, "end").text == "Stopped."
    for name in ("question", "send", "context", "file", "budget", "model", "new-chat"):
        if at(page, name).is_displayed():
            go_to(name)
            assert outline() != "none", name
    press(Keys.ENTER)  # New chat
    assert not page.find_elements(By.CLASS_NAME, "turn")
    assert focused().get_attribute("id") == "question"
    at(page, "new-chat").send_keys(Keys.TAB)
    press(Keys.ENTER)  # Settings
    go_to("key")
    press(Keys.ESCAPE)
    assert not at(page, "key").is_displayed()


def test_every_control_has_a_name_and_the_answer_is_announced(page: Driver) -> None:
    page.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    page.execute_script("for (const id of ['shelf', 'stop']) document.getElementById(id).hidden = false")
    controls = page.find_elements(By.CSS_SELECTOR, "button, input, select, textarea")
    assert len(controls) > 8
    assert [c.get_attribute("id") for c in controls if not c.accessible_name] == []
    assert at(page, "log").get_attribute("aria-live") == "polite"
    assert at(page, "problem").get_attribute("role") == "alert"


_CONTRAST = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" && e.parentElement ? ground(e.parentElement) : colour;
};
return arguments[0].map((e) => {
  const [low, high] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height", "mobile"), [(1280, 800, False), (360, 640, True)])
def test_light_and_dark_can_be_read_on_every_screen(
    page: Driver, scheme: str, width: int, height: int, mobile: bool
) -> None:
    resize(page, width, height, mobile=mobile)
    prefer(page, scheme)
    page.execute_script(
        """
        for (const level of [0, 1, 2, 3, 4]) {
          const span = document.createElement("span");
          span.className = `kept-${level}`;
          span.textContent = "kept ".repeat(20);
          document.getElementById("text").append(span);
        }
        for (const id of ["held", "problem", "stop"]) document.getElementById(id).hidden = false;
        document.getElementById("problem").textContent = "W".repeat(300);
        document.getElementById("panel").open = true;
        """
    )
    names = "body, #empty, #problem, #send, #stop, #new-chat, #keys, #legend, #reading, #text span, h1, h2"
    shown = page.find_elements(By.CSS_SELECTOR, names)
    assert min(page.execute_script(_CONTRAST, shown)) >= 4.5  # WCAG 2.2, AA
    is_dark = page.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 100")
    assert is_dark == (scheme == "dark")
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    box = at(page, "send").rect
    assert box["x"] + box["width"] <= width
    assert box["height"] >= 24  # WCAG 2.2, target size


def test_the_browser_keeps_the_page_from_asking_anybody_else(page: Driver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/"
        refused = page.execute_async_script(
            """
            const [url, done] = arguments;
            const image = new Promise((gone) => { const i = new Image(); i.onerror = () => gone(true); i.src = url; });
            const fetched = fetch(url, { mode: "no-cors" }).then(() => false, () => true);
            Promise.all([image, fetched]).then(done);
            """,
            url,
        )
        assert refused == [True, True]
        with pytest.raises(BlockingIOError):
            other.accept()
    requests_of(page)
    page.get_log("browser")  # they say that both were blocked
    page.refresh()


def test_files_come_with_their_policy_and_nothing_else_is_served(server: Served) -> None:
    paths = ["/", *(f"/page/{path.name}" for path in PAGE.iterdir())]
    for path in paths:
        got = httpx.get(server.url + path)
        assert got.status_code == 200
        assert "default-src 'none'" in got.headers["content-security-policy"]
        assert "unsafe" not in got.headers["content-security-policy"]
        assert got.headers["x-content-type-options"] == "nosniff"
        assert "://" not in got.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b", got.text)
    for path in ("/page/..%2froutes%2fpage.py", "/page/../routes/page.py", "/page/none.js", "/page/__init__.py"):
        assert httpx.get(server.url + path).status_code == 404


def test_the_key_stays_in_its_tab(browser: Driver, pipeline: ContinuousBatchingPipeline) -> None:
    with served(ServerSettings(port=0, api_keys=(KEY,)), pipeline) as server:
        resize(browser, 1280, 800, mobile=False)
        open_page(browser, server)
        until(browser, lambda b: at(b, "problem").is_displayed())
        until(browser, lambda b: b.switch_to.active_element.get_attribute("id") == "key")
        browser.switch_to.active_element.send_keys(KEY, Keys.ENTER)
        until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#model option"))
        assert not at(browser, "problem").is_displayed()
        browser.refresh()
        until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#model option"))
        kept = browser.execute_script("return [Object.values(sessionStorage), localStorage.length, document.cookie]")
        assert kept == [[KEY], 0, ""]
        assert all(KEY not in request["url"] for request in requests_of(browser))
        browser.execute_script("sessionStorage.clear()")
        browser.get("about:blank")
