from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from vretrver_hf.samples import load_samples


expect.set_options(timeout=60_000)
SAMPLES = load_samples()
DONE = re.compile("Done: candidate")


def label(page, text: str):
    return page.get_by_label(text, exact=True)


def open_page(page, address: str, query: str = ""):
    page.goto(f"{address}/{query}")
    expect(page.locator("#run")).to_be_enabled()


def open_own(page, address: str):
    open_page(page, address)
    page.get_by_label("My own").check()
    expect(page.locator("#texts textarea")).to_be_visible()


def upload(page, paths) -> None:
    page.locator("#pictures input[type=file]").set_input_files([str(path) for path in paths])
    expect(page.locator("#pictures img").first).to_be_attached()


@pytest.fixture
def files(tmp_path):
    colors = ["red", "green", "blue", "gold", "purple", "teal", "navy", "pink", "gray"]
    for number, color in enumerate(colors):
        Image.new("RGB", (60, 40), color).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    return tmp_path


def choose(page, dropdown, text: str) -> None:
    """Picks an option as a visitor would: opens the list, and clicks."""
    dropdown.click()
    page.get_by_role("option", name=text).first.click()


def watch_steps(page) -> None:
    """Notes every state of the trace in the page, so that none is missed however quick the model is."""
    page.evaluate(
        """() => {
        window.begun = performance.now();
        window.states = [];
        new MutationObserver(() => {
            const steps = document.querySelectorAll('#trace .steps > li').length;
            const done = document.querySelectorAll('#trace [id$=order]').length;
            window.states.push([performance.now(), steps, done]);
        }).observe(document.querySelector('#trace'), {childList: true, subtree: true});
        }"""
    )


def noted_steps(page) -> list[tuple[float, int, int]]:
    """Seconds since the watch began, steps, and whether the order was there."""
    return page.evaluate("window.states.map(([at, steps, done]) => [(at - window.begun) / 1000, steps, done])")


def test_a_sample_arrives_step_by_step(page, served, shoot, note_times):
    address, served_after = served
    began = time.monotonic()
    open_page(page, address, f"?sample={SAMPLES[0].id}")
    ready = time.monotonic() - began
    expect(page.locator("#preview li.card")).to_have_count(len(SAMPLES[0].candidates))
    shoot("loaded")
    watch_steps(page)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    states = noted_steps(page)
    first = next(at for at, steps, _ in states if steps)
    last = next(at for at, _, done in states if done)
    note_times(served=served_after, page_ready=ready, first_thought=first, end=last)
    growing = [steps for _, steps, done in states if not done]
    assert growing == sorted(growing) and any(steps for steps in growing)
    expect(page.locator("#trace [aria-labelledby$=order] li.card")).to_have_count(len(SAMPLES[0].candidates))
    expect(page.locator("#trace .summary")).to_contain_text("tool calls")
    expect(page.locator("#as-page")).to_be_visible()
    assert all(alt.strip() for alt in page.locator("#trace img").evaluate_all("all => all.map(img => img.alt)"))
    shoot("done")


def test_a_detail_is_looked_at_closer(page, space, shoot, note_times):
    """A sample of which the overview shows too little, picked from the list."""
    detail = next(sample for sample in SAMPLES if sample.task == "text-to-detail")
    began = time.monotonic()
    open_page(page, space)
    ready = time.monotonic() - began
    choose(page, page.locator("#sample input"), detail.query.text)
    expect(page.locator("#preview")).to_contain_text(detail.query.text)
    watch_steps(page)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    states = noted_steps(page)
    grown = {}
    for at, steps, done in states:
        if steps and not done:
            grown.setdefault(steps, at)
    assert len(grown) > 2 and list(grown) == sorted(grown), "steps came one by one, before the order"
    assert len(set(grown.values())) == len(grown)
    note_times(page_ready=ready, first_thought=min(grown.values()), end=next(at for at, _, done in states if done))
    box, picture = page.locator("#trace rect.asked").first, page.locator("#trace .marked img").first
    inner, outer = box.bounding_box(), picture.bounding_box()
    assert 0 < inner["width"] < outer["width"] + 1 and 0 < inner["height"] < outer["height"] + 1
    assert outer["x"] - 1 <= inner["x"] and inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 1
    assert outer["y"] - 1 <= inner["y"] and inner["y"] + inner["height"] <= outer["y"] + outer["height"] + 1
    expect(page.locator("#trace figcaption").filter(has_text="asked for").first).to_contain_text("Candidate")
    shoot()


def test_the_trace_can_be_kept(page, space, tmp_path):
    open_page(page, space)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    for button, beginning in (("#as-page", "<!DOCTYPE html>"), ("#as-json", '{"query_id"')):
        with page.expect_download() as download:
            page.locator(button).click()
        assert download.value.path().read_text(encoding="utf-8").startswith(beginning)


def test_with_and_without_tools(page, space, shoot):
    open_page(page, space)
    label(page, "Compare: with and without tools, side by side").check()
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    expect(page.locator("#trace h2")).to_have_text("With tools")
    expect(page.locator("#other-trace h2")).to_have_text("Without tools")
    expect(page.locator("#other-trace .summary")).to_contain_text(re.compile(r"tool calls\s*0|0\s*tool calls"))
    shoot()


def test_own_pictures_and_texts(page, space, shoot, files):
    open_own(page, space)
    page.locator("#query textarea").fill("a red square")
    page.locator("#texts textarea").fill("red square\ngreen <b>square</b>")
    upload(page, [files / "0.png", files / "1.png"])
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    expect(page.locator("#trace [aria-labelledby$=order] li.card")).to_have_count(4)
    expect(page.locator("#trace")).to_contain_text("green <b>square</b>")  # text stays text
    shoot()


def test_a_broken_picture(page, space, shoot, files):
    open_own(page, space)
    page.locator("#query textarea").fill("a red square")
    upload(page, [files / "0.png", files / "broken.png"])
    page.locator("#run").click()
    alert = page.locator("#message [role=alert]")
    expect(alert).to_contain_text("candidate 2")
    assert "/" not in alert.inner_text()  # where the server keeps files is nobody's business
    expect(page.locator("#run")).to_be_enabled()
    shoot()


def test_too_many_files(page, space, shoot, files):
    open_own(page, space)
    page.locator("#query textarea").fill("a red square")
    upload(page, [files / f"{number}.png" for number in range(9)])
    expect(page.locator("#pictures .thumbnail-item")).to_have_count(9)
    page.locator("#run").click()
    expect(page.locator("#message [role=alert]")).to_have_text("there are 9 candidates, and 8 are allowed here")
    shoot()


def test_nothing_to_look_for(page, space):
    open_own(page, space)
    page.locator("#texts textarea").fill("a\nb")
    page.locator("#run").click()
    expect(page.locator("#message [role=alert]")).to_contain_text("query: there is none")


def test_cancel(page, slow_space, shoot):
    """The model of this server writes hundreds of tokens a turn; after Cancel it stops at the next."""
    open_page(page, slow_space)
    page.locator("#run").click()
    expect(page.locator("#cancel")).to_be_enabled()
    expect(page.locator("#trace")).to_contain_text("The model is at work")
    time.sleep(1)
    started = time.monotonic()
    page.locator("#cancel").click()
    expect(page.locator("#message [role=alert]")).to_have_text("Cancelled. The model has stopped.")
    print(f"stopped after {time.monotonic() - started:.2f} s")
    expect(page.locator("#run")).to_be_enabled()
    shoot()


def test_a_job_that_takes_too_long(page, slow_space, shoot):
    open_page(page, slow_space)
    page.locator("#run").click()
    expect(page.locator("#message [role=alert]")).to_contain_text("it took longer than 12 seconds")
    shoot()


def test_two_at_once(browser, space, shoot):
    with visitors(browser, 2) as pages:
        for page, sample in zip(pages, SAMPLES[:2], strict=True):
            open_page(page, space, f"?sample={sample.id}")
            expect(page.locator("#preview")).to_contain_text(sample.query.text)
        for page in pages:
            page.locator("#run").click()
        for number, (page, sample) in enumerate(zip(pages, SAMPLES[:2], strict=True), start=1):
            expect(page.locator("#message")).to_contain_text(DONE, timeout=120_000)
            expect(page.locator("#trace .query")).to_contain_text(sample.query.text)
            shoot(str(number), of=page, full_page=True)


@contextmanager
def visitors(browser, count: int):
    """Pages of as many visitors, of whom none shares anything with another."""
    contexts = [browser.new_context(viewport={"width": 1200, "height": 900}) for _ in range(count)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.set_default_timeout(60_000)
    try:
        yield pages
    finally:
        for page in pages:
            page.close()  # which stops its run
        for context in contexts:
            context.close()


def begin_and_wait(pages, address) -> None:
    """The first visitor's run begins, the second's waits for it."""
    for page in pages:
        open_page(page, address)
    for page, told in zip(pages, ("The model is at work", "Waiting for a turn"), strict=False):
        page.locator("#run").click()
        expect(page.locator("#trace")).to_contain_text(told)


def test_who_leaves_makes_room(browser, narrow_space, shoot, note_times):
    with visitors(browser, 2) as (first, second):
        begin_and_wait((first, second), narrow_space)
        time.sleep(1)
        expect(second.locator("#trace .busy")).to_have_text("Waiting for a turn …")  # not only until the queue has it
        shoot("waiting", of=second, full_page=True)
        left = time.monotonic()
        first.close()
        expect(second.locator("#trace")).to_contain_text("The model is at work", timeout=30_000)
        seconds = time.monotonic() - left
        note_times(next_begins=seconds)
        assert seconds < 30  # and the deadline is 120


def test_a_full_queue_refuses_in_words(browser, narrow_space, shoot):
    with visitors(browser, 3) as pages:
        begin_and_wait(pages, narrow_space)
        third = pages[2]
        third.locator("#run").click()
        expect(third.locator("#message [role=alert]")).to_contain_text("too many are waiting for a turn")
        expect(third.locator("#trace")).to_be_empty()
        expect(third.locator("#run")).to_be_enabled()
        shoot(of=third, full_page=True)
        choose(third, third.locator("#sample input"), SAMPLES[1].query.text)  # all else goes on
        expect(third.locator("#preview")).to_contain_text(SAMPLES[1].query.text)
        expect(pages[1].locator("#trace .busy")).to_have_text("Waiting for a turn …")


def test_uploads_are_removed(page, narrow_space, files, shoot):
    open_own(page, narrow_space)
    page.locator("#query textarea").fill("a red square")
    page.locator("#texts textarea").fill("a blue square")
    with page.expect_response(lambda response: response.request.method == "POST") as uploaded:
        upload(page, [files / "0.png"])
    (path,) = uploaded.value.json()
    ends = time.monotonic() + 20
    while Path(path).exists():
        assert time.monotonic() < ends, "it stayed"
        time.sleep(0.1)
    page.locator("#run").click()
    alert = page.locator("#message [role=alert]")
    expect(alert).to_contain_text("candidate 1")
    expect(alert).to_contain_text("upload it again")
    expect(page.locator("#run")).to_be_enabled()
    shoot()


def number_of(page, text: str):
    """The number beside a slider."""
    return page.get_by_role("spinbutton", name=re.compile(re.escape(text)))


def test_a_model_brings_its_settings(page, models_space, shoot):
    open_page(page, models_space)
    page.get_by_role("button", name="Settings").click()
    model = page.get_by_label("Model", exact=True)
    names = ("Candidates at a time", "Calls of tools", "Pictures at first", "Pictures looked at again", "Temperature")
    for chosen, values in (("second", "6 2 64 100 0.5"), ("bundled", "8 4 85 125 0"), ("second", "6 2 64 100 0.5")):
        choose(page, model, chosen)
        for name, value in zip(names, values.split(), strict=True):
            expect(number_of(page, name)).to_have_value(value)
    shoot()
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)


def test_a_model_that_is_not_there(page, models_space, shoot):
    open_page(page, models_space)
    page.get_by_role("button", name="Settings").click()
    model, alert = page.get_by_label("Model", exact=True), page.locator("#message [role=alert]")
    choose(page, model, "someone/absent")
    expect(alert).to_contain_text("model someone/absent: no such folder")
    expect(number_of(page, "Calls of tools")).to_have_value("4")
    page.locator("#run").click()
    expect(page.locator("#trace")).to_be_empty()
    expect(alert).to_contain_text("model someone/absent: no such folder")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#cancel")).to_be_disabled()
    shoot()
    choose(page, model, "bundled")
    expect(alert).to_have_count(0)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("screen", "width"), [("phone", 390), ("desktop", 1200)])
def test_a_screen(browser, space, shoot, scheme, screen, width):
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=screen == "phone"
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    open_page(page, space)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in (page.locator("#trace .panel").first, page.locator("#preview .card").first, page.locator("body")):
        ground = part.evaluate("e => getComputedStyle(e).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    shoot(of=page, full_page=True)
    context.close()


def test_by_keyboard(page, space):
    """From the top, by Tab alone, in the order in which the controls stand on the page."""
    open_page(page, space)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => {
                const e = document.activeElement, part = e.closest('#sample, #compare, #run');
                return part ? part.id : e.type === 'radio' ? 'source'
                    : e.innerText?.startsWith('Settings') ? 'settings' : e.tagName;
                }"""
            )
        )
        if reached[-1] == "run":
            break
    wanted = ["source", "sample", "compare", "settings", "run"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted, reached
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text(DONE)
