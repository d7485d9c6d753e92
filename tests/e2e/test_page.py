"""The page in a real browser, without a network, on the session's server."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from pruning.models.checkpoint import verify

pytestmark = pytest.mark.engine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(live_server):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.problems, page.asked = [], set()
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.asked.add(request.url))
        page.goto(live_server.url)
        yield page
        browser.close()


def test_it_shows_what_became_of_the_sublayers(page, live_server, smollm2_checkpoint):
    limited = len(verify(smollm2_checkpoint).removed)
    expect(page.locator("#model")).to_have_text(live_server.model)
    assert page.locator(".cell").count() == 60
    assert page.locator(".cell.limited").count() == limited
    expect(page.locator("#legend")).to_contain_text(f"{60 - limited} kept")
    titles = [cell.get_attribute("title") for cell in page.locator(".cell.limited").all()]
    assert all("attention: limited" in title for title in titles)
    assert any("but for KV heads" in title for title in titles)
    expect(page.locator("#heads")).to_contain_text("of 90 KV heads keep every token")


def test_it_compares_with_the_dense_model(page):
    expect(page.locator("#cost")).to_contain_text("(dense 45.0 KiB)")
    width = page.locator("#cost b").first.evaluate("bar => bar.getBoundingClientRect().width")
    track = page.locator("#cost .track").first.evaluate("bar => bar.getBoundingClientRect().width")
    assert width / track == pytest.approx(0.3, abs=0.03)
    expect(page.locator("#quality")).to_contain_text("times the dense model's")


def test_it_streams_an_answer_and_shows_live_figures(page):
    page.locator("#send").click()
    expect(page.locator("#answer")).to_contain_text("Paris")
    expect(page.locator("#timing")).to_contain_text("tokens; first after")
    expect(page.locator("#state")).to_have_text("ready")
    tiles = page.locator("#tiles")
    expect(tiles.locator(".tile", has_text="to the first token").locator("strong")).to_contain_text("s", timeout=15_000)
    expect(tiles.locator(".tile", has_text="KV cache in use").locator("strong")).to_contain_text("%")


def test_a_running_answer_can_be_stopped(page):
    page.locator("#prompt").fill("Write a very long story about the sea.")
    page.locator("#tokens").fill("1500")
    page.locator("#send").click()
    page.locator("#stop").click()
    expect(page.locator("#timing")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_enabled()


def test_an_error_is_shown(page):
    page.locator("#tokens").fill("99999")
    page.locator("#send").click()
    expect(page.locator("#answer.bad")).to_contain_text("max_tokens")
    page.problems[:] = [p for p in page.problems if "400" not in p]  # the browser logs the refusal too


def test_it_follows_the_readers_colour_scheme(page):
    colours = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.add(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
    assert len(colours) == 2


def test_it_asked_nobody_else_and_nothing_went_wrong(page, live_server):
    assert {url for url in page.asked if not url.startswith((live_server.url, "data:"))} == set()
    assert page.problems == []
