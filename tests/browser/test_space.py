from __future__ import annotations

import re
import time

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


def test_a_sample_arrives_step_by_step(page, space, shoot):
    open_page(page, space, f"?sample={SAMPLES[0].id}")
    expect(page.locator("#preview li.card")).to_have_count(len(SAMPLES[0].candidates))
    shoot("loaded")
    # Every state of the trace is noted in the page, so that none is missed however quick the model is.
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
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    states = page.evaluate("window.states.map(([at, steps, done]) => [(at - window.begun) / 1000, steps, done])")
    first = next(at for at, steps, _ in states if steps)
    last = next(at for at, _, done in states if done)
    print(f"first thought after {first:.2f} s, order after {last:.2f} s")
    growing = [steps for _, steps, done in states if not done]
    assert growing == sorted(growing) and any(steps for steps in growing)
    expect(page.locator("#trace [aria-labelledby$=order] li.card")).to_have_count(len(SAMPLES[0].candidates))
    expect(page.locator("#trace .summary")).to_contain_text("tool calls")
    expect(page.locator("#as-page")).to_be_visible()
    assert all(alt.strip() for alt in page.locator("#trace img").evaluate_all("all => all.map(img => img.alt)"))
    shoot("done")


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


def test_two_at_once(browser, space):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page, sample in zip(pages, SAMPLES[:2], strict=True):
        open_page(page, space, f"?sample={sample.id}")
        expect(page.locator("#preview")).to_contain_text(sample.query.text or "Query", timeout=60_000)
    for page in pages:
        page.locator("#run").click()
    for page, sample in zip(pages, SAMPLES[:2], strict=True):
        expect(page.locator("#message")).to_contain_text(DONE, timeout=120_000)
        expect(page.locator("#trace")).to_contain_text(sample.query.text or "Query")
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, space, shoot, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    open_page(page, space)
    page.locator("#run").click()
    expect(page.locator("#message")).to_contain_text(DONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ground = page.locator("#trace .panel").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    shoot(of=page, full_page=True)
    context.close()


def test_by_keyboard(page, space):
    open_page(page, space)
    page.locator("#run").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_contain_text(DONE)
