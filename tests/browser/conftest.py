"""The Space in a real browser: Chromium as the system has it, driven by Playwright. `make test-browser` runs this."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from servers import free_port, serve


ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "outputs" / "browser"


@pytest.fixture(scope="session")
def browser():
    """Missing parts fail here: a test that is skipped in silence would hold nothing."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "there is no Chromium: apt-get install chromium, or set CHROMIUM to one"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page of its own; each test leaves a screenshot behind."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


@pytest.fixture
def shoot(page, request):
    ARTEFACTS.mkdir(parents=True, exist_ok=True)

    def save(name: str = "", of=None, **options) -> Path:
        stem = request.node.name.removeprefix("test_") + (f"-{name}" if name else "")
        path = ARTEFACTS / f"{stem}.png"
        (of or page).screenshot(path=path, **({"full_page": True} if of is None else {}), **options)
        return path

    return save


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """The address of the Space with the bundled model, as `python spaces/rerank/app.py` serves it."""
    folder = tmp_path_factory.mktemp("space")
    port = free_port()
    command = [sys.executable, str(ROOT / "spaces" / "rerank" / "app.py")]
    process, seconds = serve(command, port, folder, OMP_NUM_THREADS="1", VRETRVER_MAX_CANDIDATES="8")
    print(f"the Space was up after {seconds:.1f} s")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def slow_space(tmp_path_factory):
    """The Space with a model that does not stop writing, and a deadline of 12 seconds."""
    import torch
    from tiny_models import make_model, make_processor

    from vretrver_hf import Reranker
    from vretrver_hf.chat_templates import apply_to
    from vretrver_hf.engines import Sampling
    from vretrver_hf.engines.transformers import TransformersEngine
    from vretrver_hf.protocol import get_preset

    folder = tmp_path_factory.mktemp("slow")
    processor = make_processor("qwen2_5_vl")
    apply_to(processor, "qwen2_5_vl")
    model = make_model("qwen2_5_vl", processor)
    engine = TransformersEngine(model, processor)
    with torch.no_grad():  # tied weights: a logit of 0 is never the highest, so a turn ends at its limit alone
        model.get_input_embeddings().weight[engine.encoder.stop_ids] = 0
    preset = get_preset("foveated", overview_pixels=56 * 56, inspect_pixels=84 * 84)
    reranker = Reranker(engine, preset, sampling=Sampling(max_turn_tokens=14000))
    reranker.save_pretrained(folder / "model")
    port = free_port()
    command = [sys.executable, str(ROOT / "spaces" / "rerank" / "app.py")]
    settings = {"VRETRVER_MODELS": str(folder / "model"), "VRETRVER_DEADLINE": "12", "OMP_NUM_THREADS": "1"}
    process, _ = serve(command, port, folder, **settings)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=30)
