"""Debian's Chromium without a window, and what tests do with a page in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers, where it cannot work
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
WAIT_S = 60  # no test asserts a time: this only ends one that hangs

Driver = webdriver.Chrome


@contextmanager
def chromium() -> Iterator[Driver]:
    """A browser that logs its requests. Fails the test where Chromium is not installed."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail("chromium and chromedriver must be installed: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for switch in _SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def until(browser: Driver, condition: Callable[[Driver], Any]) -> Any:
    """What a condition gives when it gives something."""
    return WebDriverWait(browser, WAIT_S, poll_frequency=0.05).until(condition)


def requests_of(browser: Driver) -> list[dict[str, Any]]:
    """The requests since the last call, as the DevTools protocol has them."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]


def resize(browser: Driver, width: int, height: int, *, mobile: bool) -> None:
    """Make the window as large as a screen."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(browser: Driver, scheme: str) -> None:
    """light or dark."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def drop_file(browser: Driver, selector: str, name: str, text: str) -> None:
    """Drop a text file on an element, with the events that a mouse makes."""
    browser.execute_script(
        """
        const [selector, name, text] = arguments;
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([text], name, { type: "text/plain" }));
        const target = document.querySelector(selector);
        for (const type of ["dragenter", "dragover", "drop"])
          target.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
        """,
        selector,
        name,
        text,
    )
