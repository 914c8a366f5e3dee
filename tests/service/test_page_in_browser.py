"""The page in Chromium: from a posted picture to a changed threshold, by mouse and keyboard."""

from __future__ import annotations

import re
import shutil

import pytest
from helpers_images import encoded
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra efficientad[serve]")
pytest.importorskip("playwright", reason="playwright is not installed")

import playwright.sync_api as playwright
from helpers_service import StubPredictor, part, service

from efficientad.model.trust import Calibration

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
KEY = "a key of the tests, long enough"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium"),
]
expect = playwright.expect
expect.set_options(timeout=20_000)


def picture(defect: float) -> bytes:
    return encoded(Image.fromarray(part(defect)))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a service's page; afterwards nothing was asked of another host, and nothing failed."""
    asked, failed, contexts = [], [], []

    def start(running, width: int = 1280, height: int = 800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        address = f"http://{running.host}:{running.port}"
        page.on("request", lambda request: asked.append((address, request.url)))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda said: failed.append(said.text) if said.type == "error" else 0)
        page.goto(address)
        return page

    start.failed = failed
    yield start
    for context in contexts:
        context.close()
    assert [url for address, url in asked if not url.startswith((address, "data:"))] == []
    # The service ends before the page does, which then asks for it in vain.
    assert [text for text in failed if "ERR_CONNECTION_REFUSED" not in text] == []


def test_from_a_posted_picture_to_a_changed_threshold(tmp_path, opened):
    with service(tmp_path) as running:
        page = opened(running)
        expect(page.get_by_text("No picture yet")).to_be_visible()
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        for defect in (0.2, 0.8, 0.7):
            running.call("POST", f"/predict?name=part%20{defect}", picture(defect))
        verdict = page.locator(".verdict.anomalous")
        expect(verdict).to_contain_text("Anomalous")
        expect(verdict).to_contain_text("0.698")
        expect(page.locator(".strip rect")).to_have_count(3)
        expect(page.locator(".film a")).to_have_count(2)
        page.wait_for_function("document.querySelector('.panel .stage img').naturalWidth == 96")
        expect(page.locator("#open")).to_have_text("2")

        page.get_by_role("link", name="Review").click()
        expect(page.get_by_text("2 to review")).to_be_visible()
        expect(page.get_by_text("part 0.7")).to_be_visible()
        page.keyboard.press("g")  # a false reject
        expect(page.get_by_text("part 0.8")).to_be_visible()
        page.keyboard.press("b")
        expect(page.get_by_text("Every reject is reviewed")).to_be_visible()
        expect(page.locator("#open")).to_be_hidden()
        with running.inspection.store.reading() as db:
            rows = db.execute("SELECT review FROM verdicts ORDER BY id").fetchall()
        assert [row["review"] for row in rows] == [None, "bad", "good"]

        page.locator("nav").get_by_text("Threshold").click()
        says = page.locator(".says")
        expect(says).to_have_text("2 of 3 parts would be rejected, 1 of them confirmed bad.")
        slider = page.get_by_label("Threshold of stub")
        slider.evaluate("s => { s.value = 0.75; s.dispatchEvent(new Event('input')); }")
        expect(says).to_have_text("1 of 3 parts would be rejected, 1 confirmed bad.")
        page.get_by_role("button", name="Use this threshold").click()
        expect(page.locator(".decide .head")).to_contain_text("the detector's own is 0.500")
        assert running.inspection.models["stub"].predictor.threshold == pytest.approx(
            0.75, abs=1e-3
        )

        page.get_by_role("link", name="Live").click()
        running.call("POST", "/predict", picture(0.7))
        expect(page.locator(".verdict.normal")).to_contain_text("Normal")

        page.locator("nav").get_by_text("Threshold").click()
        page.get_by_role("button", name="Back to the detector's own").click()
        expect(page.get_by_role("button", name="Back to the detector's own")).to_be_disabled()
        assert running.inspection.models["stub"].predictor.threshold == 0.5


def test_recalibration_proposes_and_the_engineer_decides(tmp_path, opened):
    with service(tmp_path) as running:
        for _ in range(25):
            running.call("POST", "/predict", picture(0.3))
        page = opened(running)
        page.locator("nav").get_by_text("Threshold").click()
        page.get_by_role("button", name="Recalibrate with the reviewed parts").click()
        because = page.locator(".because")
        expect(because).to_contain_text("0 of 25 good parts lie above it")
        expect(because).to_contain_text("With 95 % confidence at most 11.29 %")
        assert running.inspection.models["stub"].predictor.threshold == 0.5  # only proposed
        page.get_by_role("button", name="Use this threshold").click()
        expect(page.locator(".decide .head")).to_contain_text("threshold 0.298")


def test_history_one_part_and_its_map(tmp_path, opened):
    with service(tmp_path, {"left": StubPredictor(), "right": StubPredictor()}) as running:
        for i in range(70):
            model = ("left", "right")[i % 2]
            running.call(
                "POST", f"/predict/{model}?name=p{i}", picture(0.8 if i % 10 == 0 else 0.1)
            )
        page = opened(running)
        expect(page.locator(".panel")).to_have_count(2)
        page.get_by_role("link", name="History").click()
        expect(page.locator(".part")).to_have_count(60)
        page.get_by_role("button", name="Older parts").click()
        expect(page.locator(".part")).to_have_count(70)
        page.get_by_label("Verdict").select_option("anomalous")
        expect(page.locator(".part")).to_have_count(7)
        page.locator("#model").select_option("right")
        expect(page.get_by_text("No part fits")).to_be_visible()
        page.locator("#model").select_option("left")
        expect(page.locator(".part")).to_have_count(7)
        page.locator(".part").first.click()
        expect(page.locator(".side .score")).to_have_text("0.800")
        expect(page.locator(".side dl")).to_contain_text("p60")
        heat = page.locator(".one-part .heat")
        page.get_by_label("Opacity of the map").fill("0.25")
        assert heat.evaluate("map => getComputedStyle(map).opacity") == "0.25"
        assert page.locator(".one-part .boxes rect").count() == 2  # a line on a darker one
        page.get_by_label("Boxes").uncheck()
        expect(page.locator(".one-part .boxes")).to_be_hidden()
        # The map lies on the picture itself, not on the bars beside it.
        shape = heat.evaluate("map => [map.clientWidth, map.clientHeight]")
        assert shape[0] / shape[1] == pytest.approx(96 / 64, rel=0.01)
        page.keyboard.press("ArrowRight")
        expect(page.locator(".side dl")).to_contain_text("p50")
        page.keyboard.press("u")
        expect(page.locator(".answers .unsure")).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("u")
        expect(page.locator(".answers .unsure")).to_have_attribute("aria-pressed", "false")


def test_the_course_of_the_scores_shows_since_when_they_drift(tmp_path, opened):
    known = [0.2 + i / 1000 for i in range(100)]
    calibration = Calibration(known, [score / 16 for score in known])  # a patch of 1 in 16 cells
    with service(tmp_path, calibration=calibration) as running:
        for i in range(60):
            running.call("POST", "/predict", picture((0.2, 0.3)[i >= 30] + i % 10 / 100))
        page = opened(running)
        page.locator("nav").get_by_text("Drift").click()
        expect(page.locator(".says")).to_contain_text(
            re.compile(r"Drift of the score and map's mean since part (3\d|2\d),")
        )
        # In both charts, of the scores and of the maps' means: the line and its words.
        expect(page.locator(".course .since")).to_have_count(4)
        expect(page.locator(".stretch")).to_have_count(12)
        expect(page.locator(".course .legend")).to_contain_text("threshold 0.500")
        marks = page.evaluate(
            "[...document.querySelectorAll('.course polyline')].map(p => p.points.numberOfItems)"
        )
        assert marks == [6, 6, 6]
        running.call("POST", "/predict", picture(0.2))
        page.get_by_role("button", name="New parts").click()
        expect(page.locator(".course .head")).to_contain_text("the last 61 parts")
        page.get_by_label("Newest parts, at most").select_option("1,000")
        expect(page.locator(".says")).to_contain_text("Drift of the score and map's mean since")
        page.locator(".stretch").last.click()
        expect(page.locator(".side dl")).to_contain_text("61")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_a_panel_of_1024_pixels(tmp_path, opened, scheme):
    with service(tmp_path, {"left": StubPredictor(), "right": StubPredictor()}) as running:
        for model in ("left", "right"):
            for _ in range(3):
                running.call("POST", f"/predict/{model}?name={'long-name-' * 20}", picture(0.8))
        page = opened(running, 1024, 768, color_scheme=scheme)
        for name in ("live", "review", "history", "threshold", "drift", "part/1"):
            page.goto(f"http://{running.host}:{running.port}/#{name}")
            expect(page.locator("#view > *").first).to_be_visible()
            expect(page.locator("nav a[aria-current]")).to_have_count(1)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 1024, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(241, 243, 246)", "dark": "rgb(15, 19, 25)"}[scheme]
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


def test_a_locked_service_asks_for_its_key_once(tmp_path, opened):
    with service(tmp_path, key=KEY) as running:
        page = opened(running)
        page.get_by_label("This service is locked.").fill("not the key at all")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_have_text("the API key is wrong")
        page.get_by_label("This service is locked.").fill(KEY)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_text("No picture yet")).to_be_visible()
        running.call("POST", "/predict", picture(0.8), {"X-API-Key": KEY})
        expect(page.locator(".verdict.anomalous")).to_be_visible()
        page.wait_for_function("document.querySelector('.panel .stage img').naturalWidth == 96")
        opened.failed[:] = [text for text in opened.failed if "401" not in text]  # as meant


def test_what_senders_call_their_pictures_is_text_and_nothing_else(tmp_path, opened):
    evil = "%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'hacked'%22%3E"
    with service(tmp_path) as running:
        running.call("POST", f"/predict?name={evil}", picture(0.8))
        page = opened(running)
        for name in ("review", "history", "part/1"):
            page.goto(f"http://{running.host}:{running.port}/#{name}")
            expect(page.get_by_text("onerror").first).to_be_visible()
        assert page.title() == "Inspection"
        assert page.locator("img[src='x']").count() == 0
