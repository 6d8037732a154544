"""The page in a real browser: a picture is uploaded, enlarged, compared and looked at closely; a pixel is clicked."""

from __future__ import annotations

import re
import shutil
import time
from urllib.parse import urlparse

import numpy as np
import pytest
from demo_host import photo
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield program
        program.close()


@pytest.fixture
def opened(browser):
    """Opens a page and checks at the end that nothing went wrong in it."""
    pages, complaints, hosts = [], [], set()

    def open_page(demo, size="desktop", theme="light"):
        context = browser.new_context(viewport=SIZES[size], color_scheme=theme, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(f"{demo.url}/?__theme={theme}")
        page.wait_for_selector("#go")
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()
    assert not complaints
    assert hosts <= {"127.0.0.1", "", None}, hosts  # nothing from elsewhere


def give(page, path, box="#picture"):
    page.set_input_files(f"{box} input[type=file]", str(path))
    page.wait_for_selector(f"{box} img")


def upscale(page):
    page.click("#go")
    page.wait_for_selector("#report strong", timeout=120_000)
    page.wait_for_selector("#pair img")


def tab(page, name):
    button = page.get_by_role("tab", name=name, exact=True).first
    if not button.is_visible():  # what does not fit is behind the three dots
        page.locator(".overflow-menu > button").first.click()
        button = page.locator(".overflow-dropdown button", has_text=name).first
    button.click()


@pytest.mark.parametrize("size, theme", [("desktop", "light"), ("phone", "dark")])
def test_a_picture_is_uploaded_enlarged_and_compared(demo, opened, picture, size, theme):
    page = opened(demo, size, theme)
    give(page, picture)
    upscale(page)
    report = page.inner_text("#report")
    assert "44 × 36 \u2192 88 × 72" in report and "uplift-mini" in report
    before, after = (image.get_attribute("src") for image in page.locator("#pair img").all()[:2])
    assert before != after
    handle = page.locator("#pair .inner, #pair .outer").first
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 80, y, steps=8)
    page.mouse.up()
    moved = handle.bounding_box()
    assert moved["x"] < box["x"] - 40
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]  # nothing sticks out
    with page.expect_download() as download:
        page.click("#download")
    found = download.value
    assert found.suggested_filename == "picture_2x.png" and Image.open(found.path()).size == (88, 72)


def test_zoom_shows_what_was_clicked(demo, opened, tmp_path):
    image = np.zeros((60, 80, 3), np.uint8)
    image[40:50, 60:70] = (255, 0, 0)  # the only red there is
    Image.fromarray(image).save(tmp_path / "mark.png")
    page = opened(demo)
    give(page, tmp_path / "mark.png")
    upscale(page)
    first = page.locator("#pair img").first.get_attribute("src")
    box = page.locator("#picture img").bounding_box()
    factor = min(box["width"] / 80, box["height"] / 60, 1)  # pictures are not shown larger than they are
    x = box["x"] + (box["width"] - 80 * factor) / 2 + 65 * factor
    y = box["y"] + (box["height"] - 60 * factor) / 2 + 45 * factor
    page.mouse.click(x, y)
    page.wait_for_function("first => document.querySelector('#pair img').src != first", arg=first)
    assert page.locator("#zoom input:checked").get_attribute("value") == "4"
    source = page.locator("#pair img").last.get_attribute("src")
    shown = page.request.get(source).body()
    (tmp_path / "shown.png").write_bytes(shown)
    pixels = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB")).astype(int)
    assert pixels.shape[:2] == (30, 40)
    middle = pixels[10:20, 15:25].mean((0, 1))
    assert middle[0] > 150 and middle[1] < 80, middle


def test_a_pixel_of_the_features_is_clicked(opened, dense_demo, tmp_path):
    photo(70, 56).save(tmp_path / "photo.png")
    page = opened(dense_demo)
    tab(page, "Dense features")
    give(page, tmp_path / "photo.png", "#f-picture")
    page.click("#backbone input")
    page.get_by_role("option", name="DINOv2 small, patch 14").click()
    page.click("#f-go")
    page.wait_for_selector("#f-report strong", timeout=120_000)
    last = page.locator("#steps img").get_attribute("src")
    page.locator("#step input[type=number]").fill("0")
    page.locator("#step input[type=number]").press("Enter")
    page.wait_for_function("last => document.querySelector('#steps img').src != last", arg=last)
    shown = page.locator("#f-click img")
    shown.scroll_into_view_if_needed()
    box = shown.bounding_box()
    shown.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    page.wait_for_selector("#by-tokens img")
    path = page.locator("#by-pixels img").get_attribute("src")
    x, y = (int(n) for n in re.search(r"similar_pixels_(\d+)_(\d+)", path).groups())
    assert abs(x - 112) <= 2 and abs(y - 90) <= 2  # the middle of 224 x 179
    tab(page, "Segments")
    page.click("#segment")
    page.wait_for_selector("#segments img")
    tab(page, "Correspondence")
    give(page, tmp_path / "photo.png", "#f-other")
    page.click("#match")
    page.wait_for_selector("#matches img")
    page.wait_for_selector("#match-rows >> text=yes", state="attached")


def test_comparisons_change_what_is_before(demo, opened, picture):
    page = opened(demo)
    give(page, picture)
    upscale(page)
    seen = [page.locator("#pair img").first.get_attribute("src")]
    for number in (1, 2):
        page.locator("#compare label").nth(number).click()
        page.wait_for_function("old => document.querySelector('#pair img').src != old", arg=seen[-1])
        seen.append(page.locator("#pair img").first.get_attribute("src"))
    assert len(set(seen)) == 3


def test_a_bad_picture_is_refused_in_words_on_the_page(demo, opened, picture, tmp_path):
    (tmp_path / "text.png").write_text("only words")
    page = opened(demo)
    page.set_input_files("#picture input[type=file]", str(tmp_path / "text.png"))
    page.wait_for_timeout(1000)
    page.click("#go")
    page.wait_for_selector("text=not a picture")
    page.reload()
    page.wait_for_selector("#go")
    give(page, picture)
    upscale(page)


def test_stop_stops_and_the_next_one_runs(demo, opened, tmp_path, picture):
    photo(900, 700).save(tmp_path / "long.png")
    page = opened(demo)
    give(page, tmp_path / "long.png")
    page.click("#go")
    page.wait_for_selector("#pair >> text=/Enlarging/")
    page.wait_for_timeout(1500)
    begun = time.monotonic()
    page.click("#stop")
    other = opened(demo)
    give(other, picture)
    upscale(other)
    assert time.monotonic() - begun < 30
    assert not re.search(r"900 × 700", page.inner_text("#report"))


def test_a_closed_tab_frees_the_worker(demo, opened, tmp_path, picture):
    photo(900, 700).save(tmp_path / "long.png")
    page = opened(demo)
    give(page, tmp_path / "long.png")
    page.click("#go")
    page.wait_for_selector("#pair >> text=/Enlarging/")
    page.close()
    begun = time.monotonic()
    other = opened(demo)
    give(other, picture)
    upscale(other)
    assert time.monotonic() - begun < 45  # the browser's heartbeat is looked for every 15 seconds


@pytest.mark.parametrize("size, theme", [("desktop", "dark"), ("phone", "light")])
def test_without_weights_the_tabs_say_what_to_do(demo, opened, size, theme):
    page = opened(demo, size, theme)
    said = {"Generate": "#generate-said >> text=--checkpoint", "Dense features": "#features-said >> text=Models tab",
            "Models": "#models >> text=uplift-mini"}
    for name, words in said.items():
        tab(page, name)
        page.wait_for_selector(words, state="attached")
        page.wait_for_timeout(500)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size]["width"], f"{name} sticks out: {width}"
