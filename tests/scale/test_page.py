"""The server's page in a real browser: it draws, shows how far it is, keeps the last pictures, and tells of errors."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import socket
import threading
import time

import pytest

pytest.importorskip("ray.serve", reason="needs Ray")
selenium = pytest.importorskip("selenium", reason="needs selenium, of the extra `test`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium and chromedriver here (Debian: chromium chromium-driver)", allow_module_level=True)

import uvicorn  # noqa: E402
from PIL import Image  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from fastdiff.scale.app import make_app  # noqa: E402
from fastdiff.scale.artist import Artist, ModelChoice  # noqa: E402
from fastdiff.scale.gate import key_digest  # noqa: E402
from fastdiff.scale.painter import Painter  # noqa: E402
from fastdiff.scale.waiting import Limits  # noqa: E402
from fastdiff.shapes.captions import vocabulary_line  # noqa: E402

KEY = "correct-horse-battery"
# A folder that is named here gets a screenshot of every test.
SCREENSHOTS = os.environ.get("FASTDIFF_SCREENSHOTS")


class Hall:
    """Draws as the server's painters do, but with the doors shut tells of a second step, and waits."""

    def __init__(self, painter: Painter):
        self._painter, self.open = painter, threading.Event()
        self.open.set()

    async def draw(self, request, report):
        if not self.open.is_set():
            report(2)
        while not self.open.is_set():
            await asyncio.sleep(0.02)
        return await self._painter.draw(request, report)


@pytest.fixture(scope="module")
def hall() -> Hall:
    artist = Artist(ModelChoice(model=None, preset="exact", dtype=None, device="cpu", threads=1))
    return Hall(Painter(artist, 4))


def serve(hall: Hall, **options):
    """Run the application in a thread; returns the server and its address."""

    async def one() -> int:
        return 1

    async def text() -> bytes:
        return b""

    app = make_app(
        hall.draw, one, text, Limits(steps=40, pixels=128 * 128), hint=vocabulary_line(), **options
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    return server, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def url(hall):
    server, address = serve(hall)
    yield address
    server.should_exit = True


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    downloads = tmp_path_factory.mktemp("downloads")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,1300"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


@pytest.fixture
def page(chrome, url, request):
    chrome.get(url)
    yield chrome
    if SCREENSHOTS:
        chrome.save_screenshot(os.path.join(SCREENSHOTS, f"{request.node.name}.png"))


def fill(page, **fields) -> None:
    for name, value in fields.items():
        element = page.find_element(By.ID, name)
        element.clear()
        element.send_keys(value)


def draw(page, until: str = "drawn in", **fields) -> None:
    fill(page, **fields)
    page.find_element(By.ID, "draw").click()
    says(page, until)


def says(page, text: str) -> None:
    WebDriverWait(page, 60, 0.02).until(lambda page: text in page.find_element(By.ID, "says").text)


def test_it_draws_and_says_how(page):
    draw(page, prompt="a red circle on a white background", steps="4", seed="7")
    size = "const i = document.getElementById('picture'); return [i.naturalWidth, i.naturalHeight]"
    assert page.execute_script(size) == [128, 128]
    about = page.find_element(By.ID, "about").text
    assert "a red circle on a white background" in about and "128x128" in about and "seed 7" in about
    # Nothing was refused by the page's own policy, and no script failed.
    log = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in log if "favicon" not in message]


def test_the_running_picture_shows_its_steps(page, hall):
    hall.open.clear()
    try:
        draw(page, "step 2 of 5", steps="5")
        bar = page.find_element(By.ID, "progress")
        assert bar.is_displayed() and bar.get_attribute("value") == "2" and bar.get_attribute("max") == "5"
        assert not page.find_element(By.ID, "draw").is_enabled()
        if SCREENSHOTS:
            page.save_screenshot(os.path.join(SCREENSHOTS, "running.png"))
    finally:
        hall.open.set()
    says(page, "drawn in")
    assert page.find_element(By.ID, "draw").is_enabled()
    assert not page.find_element(By.ID, "progress").is_displayed()


def test_the_last_pictures_stay_with_their_seeds(page):
    for number in range(14):
        draw(page, steps="1", size="64x64", seed=str(number))
        page.execute_script("document.getElementById('says').textContent = ''")
    captions = [each.text.split("\n")[0] for each in page.find_elements(By.CSS_SELECTOR, "#past figcaption")]
    assert [caption.removesuffix("save").strip() for caption in captions] == [f"seed {n}" for n in range(13, 1, -1)]
    page.find_elements(By.CSS_SELECTOR, "#past img")[3].click()
    assert "seed 10" in page.find_element(By.ID, "about").text


def test_a_picture_can_be_downloaded(page):
    draw(page, steps="2", seed="31")
    page.find_element(By.ID, "download").click()
    file = page.downloads / "fastdiff-31.png"
    WebDriverWait(page, 30).until(lambda _: file.exists() and file.stat().st_size > 0)
    assert Image.open(io.BytesIO(file.read_bytes())).size == (128, 128)


def test_the_negative_prompt_is_sent(page):
    sources = []
    for negative in ("", "red"):
        draw(page, negative=negative, steps="4", seed="1")
        sources.append(page.execute_script(
            "const i = document.getElementById('picture'), c = document.createElement('canvas');"
            "c.width = i.naturalWidth; c.height = i.naturalHeight; c.getContext('2d').drawImage(i, 0, 0);"
            "return c.toDataURL()"
        ))
        page.execute_script("document.getElementById('says').textContent = ''")
    assert sources[0] != sources[1]


def test_it_tells_the_limits_and_what_the_model_draws(page):
    text = page.find_element(By.CSS_SELECTOR, "form .note").text
    assert "Up to 40 steps and 16384 pixels" in text and "embedded model only draws" in text
    assert page.find_element(By.ID, "steps").get_attribute("max") == "40"


def test_an_error_is_shown_in_words(page):
    draw(page, "width times height must be 16384 or less", size="1024x1024", steps="2")
    assert "wrong" in page.find_element(By.ID, "says").get_attribute("class")
    assert page.find_element(By.ID, "draw").is_enabled()


def test_it_asks_for_the_key(chrome, hall):
    server, address = serve(hall, digest=key_digest(KEY))
    try:
        chrome.get(address)
        assert not chrome.find_element(By.ID, "locked").is_displayed()
        draw(chrome, "send the API key", steps="2")
        assert chrome.find_element(By.ID, "locked").is_displayed()
        draw(chrome, "drawn in", key=KEY)
    finally:
        server.should_exit = True
