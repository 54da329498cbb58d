"""The book in a real browser, opened as files, with no server: pages, search, light and dark, a phone."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from test_jupyterlab import INSTALL, chromium, wait_for

from lib.notebook import book

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:.*MystReferenceResolver.app"),
]


@pytest.fixture
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    installed = subprocess.run([INSTALL], stderr=subprocess.PIPE, text=True)
    if installed.returncode:
        pytest.skip(installed.stderr.strip().splitlines()[-1])
    short = tmp_path_factory.mktemp("chromium")  # Chromium puts a socket there, whose path may have at most 107 letters
    driver = chromium({**os.environ, "TMPDIR": str(short)})
    yield driver
    driver.quit()


def test_the_book_is_read_searched_and_darkened_on_a_phone(browser, tmp_path):
    folder: Path = book.build(tmp_path / "book").parent
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    for page in sorted(folder.rglob("*.html")):
        browser.get(page.as_uri())
        assert browser.find_elements(By.TAG_NAME, "h1") or page.stem == "search"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, f"{page.stem} is too wide"
        broken = "return [...document.images].filter(image => image.complete && !image.naturalWidth).length"
        assert browser.execute_script(broken) == 0, page

    browser.get((folder / "search.html").as_uri() + "?q=hellaswag")
    found = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#search-results li a"), 10)
    assert any("06_2" in link.get_attribute("href") for link in found)

    def brightness() -> int:
        color = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return sum(map(int, color[color.index("(") + 1 : -1].split(",")[:3]))

    seen = {brightness()}
    for _ in range(2):  # automatic, light and dark come in turns
        browser.find_element(
            By.CSS_SELECTOR, ".theme-toggle-header .theme-toggle, .mobile-header .theme-toggle"
        ).click()
        seen.add(brightness())
    assert min(seen) < 150 < 600 < max(seen)
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
