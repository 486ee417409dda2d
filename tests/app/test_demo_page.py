"""The page of `fomaml demo` in a real browser: drawn on, adapted, asked, and told nonsense."""

import re
import shutil

import numpy as np
import pytest

import fomaml
from fomaml.app.demo import Demo

pytest.importorskip("starlette", reason="the page is served by starlette, of the extra demo")
pytest.importorskip("uvicorn", reason="the page is served by uvicorn, of the extra demo")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
from demos import RUNS, SYMBOLS, moved, png, serving  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine, and none is downloaded")
FIVE = RUNS / "omniglot_fomaml_5w1s_short"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    kept = tmp_path_factory.mktemp("kept") / "models"
    with serving(Demo(fomaml.load_run(FIVE), save=kept)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser, address):
    """The page, which asks nobody but its server, and whose script has no errors."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    opened = context.new_page()
    requests, errors = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(address)
    yield opened
    context.close()
    assert errors == []
    assert address in requests
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def draw(page, canvas, strokes):
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=3)
        page.mouse.up()


def taught(page, number=2):
    """Three symbols drawn so many times each, and Adapt pressed."""
    random = np.random.default_rng(0)
    page.get_by_role("button", name="Add a class").click()
    for card, name in zip(page.locator("#classes .card").all(), ("ring", "cross", "hook"), strict=True):
        card.get_by_label("name of the class").fill(name)
        for n in range(number):
            draw(page, card.locator("canvas"), moved(SYMBOLS[name], random))
            if n < number - 1:
                card.get_by_role("button", name="Keep, draw another").click()
    page.get_by_role("button", name="Adapt", exact=True).click()
    page.locator("#try").wait_for()


def test_what_is_drawn_is_learned_and_known_again(page):
    taught(page)
    status = page.locator("#status")
    playwright.expect(status).to_contain_text("Adapted to 6 examples of 3 classes in 10 steps")
    random = np.random.default_rng(1)
    for name in ("hook", "ring", "cross"):
        page.locator("#query").get_by_role("button", name="Clear").click()
        draw(page, page.locator("#query canvas"), moved(SYMBOLS[name], random))
        playwright.expect(page.locator("#said")).to_contain_text(f"{name}, ")
        page.locator("#truth").get_by_role("button", name=name).click()
    playwright.expect(page.locator("#tally")).to_contain_text("Right: 3 of 3 after adaptation, ")
    playwright.expect(page.locator("#learning svg[role=img]")).to_have_attribute(
        "aria-label", re.compile(r"accuracy on 3 tries: .* 100\.0 % after 10")
    )
    page.get_by_role("button", name="Keep this model").click()
    playwright.expect(status).to_contain_text("fomaml predict")
    saved = status.inner_text().split("Saved in ")[1].split(". In the shell")[0]
    assert fomaml.load_adapted(saved).classes == ["cross", "hook", "ring"]


def test_pictures_are_added_and_asked_about(page):
    random = np.random.default_rng(2)
    for card, name in zip(page.locator("#classes .card").all(), ("tent", "ring"), strict=True):
        card.get_by_label("name of the class").fill(name)
        files = [
            {"name": f"{n}.png", "mimeType": "image/png", "buffer": png(moved(SYMBOLS[name], random))}
            for n in range(2)
        ]
        card.locator("input[type=file]").set_input_files(files)
        playwright.expect(card.locator(".kept img")).to_have_count(2)
    page.get_by_role("button", name="Adapt", exact=True).click()
    page.locator("#try").wait_for()
    query = {"name": "q.png", "mimeType": "image/png", "buffer": png(moved(SYMBOLS["tent"], random))}
    page.locator("#query input[type=file]").set_input_files(query)
    playwright.expect(page.locator("#said")).to_contain_text("tent, ")


def test_it_can_be_drawn_on_by_keys(page):
    pads = page.locator("#classes canvas")
    for pad, way in zip(pads.all(), ("ArrowRight", "ArrowDown"), strict=True):
        pad.focus()
        for key in (" ", *[way] * 9, " "):
            page.keyboard.press(key)
        playwright.expect(pad).to_have_attribute("aria-label", re.compile("1 stroke$"))
    page.get_by_role("button", name="Adapt", exact=True).press("Enter")
    playwright.expect(page.locator("#status")).to_contain_text("Adapted to 2 examples of 2 classes")


def test_what_does_not_go_is_a_line_in_the_page(page):
    error = page.locator("#error")
    adapt = page.get_by_role("button", name="Adapt", exact=True)
    adapt.click()
    playwright.expect(error).to_have_text("'A' has no examples yet: draw or add one, or remove it")
    draw(page, page.locator("#classes canvas").first, SYMBOLS["ring"])
    page.locator("#classes .card").nth(1).get_by_role("button", name="Remove").click()
    adapt.click()
    playwright.expect(error).to_contain_text("two classes or more are needed, got one, 'A'")
    page.get_by_role("button", name="Add a class").click()
    text = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.locator("#classes input[type=file]").nth(1).set_input_files(text)
    adapt.click()
    playwright.expect(error).to_contain_text("picture 1 of 'B' is no picture that can be read")
    page.get_by_role("button", name="remove this a.txt of B").click()
    draw(page, page.locator("#classes canvas").nth(1), SYMBOLS["hook"])
    adapt.click()
    playwright.expect(page.locator("#status")).to_contain_text("Adapted to 2 examples")
    playwright.expect(error).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_narrow_and_wide(browser, address, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    opened = context.new_page()
    opened.goto(address)
    taught(opened, 1)
    draw(opened, opened.locator("#query canvas"), SYMBOLS["ring"])
    playwright.expect(opened.locator("#said")).to_contain_text("ring, ")
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
    context.close()
