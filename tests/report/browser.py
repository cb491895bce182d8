"""A real Chromium without a window, and what a reader does in the viewer."""

import shutil
import time
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--lang=en",
)


def find(*names):
    """Return the path of the first of these programs that is installed; skip the test if none is."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed (make setup-browser)")
    return found


@contextmanager
def chromium(profile):
    """A browser with a new profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(find("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Reader:
    """Somebody who reads a report."""

    def __init__(self, driver, path):
        self.driver, self.path = driver, path

    def open(self, path=None, *, width=1400, height=900, dark=False, row=None):
        """Open the page anew, in a window of this size."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get("about:blank")
        self.driver.get((path or self.path).as_uri() + ("" if row is None else f"#row={row}"))
        self.wait(lambda: self.js("return document.documentElement.dataset.ready") == "yes")
        return self

    def cdp(self, command, **given):
        self.driver.execute_cdp_cmd(command, given)

    def js(self, script, *given):
        return self.driver.execute_script(script, *given)

    def wait(self, is_so, seconds=30):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, f"The page shows: {self.found()!r}"
            time.sleep(0.02)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        """The texts of elements, as they are and not as they are rendered."""
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element):
        ActionChains(self.driver).move_to_element(element).perform()

    # --- the viewer

    def found(self):
        return self.js("return document.getElementById('found').textContent")

    def count(self):
        """How many rows the list says it has."""
        return int(self.found().split()[0].replace(",", ""))

    def settle(self):
        """Wait until a search is over and its row is on the page."""
        self.wait(lambda: self.one("#list").get_attribute("aria-busy") == "false")

    def search(self, text):
        self.js(
            "document.getElementById('search').value = arguments[0];"
            "document.getElementById('filters').dispatchEvent(new Event('input'))",
            text,  # the driver cannot type every character
        )
        self.settle()

    def fill(self, name, value):
        self.one(f"#{name}").clear()
        self.one(f"#{name}").send_keys(str(value))
        self.settle()

    def reason(self, word):
        (chip,) = [chip for chip in self.all("#reasons .chip") if chip.text.startswith(word)]
        chip.click()
        self.settle()

    def title(self):
        return self.texts("#row h2")[0]

    def selected(self):
        return self.texts('.item[aria-selected="true"] .number')
