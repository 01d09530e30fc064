"""The Space in a real browser: Chromium as the system has it, driven by Playwright. `make test-browser` runs this."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import free_port, serve


ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "outputs" / "browser"
TIMES = ARTEFACTS / "times.json"


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


@pytest.fixture
def note_times(request):
    """Keeps a test's seconds beside the screenshots, where those of the tests that were run before stay."""

    def note(**seconds: float) -> None:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        times = json.loads(TIMES.read_text()) if TIMES.is_file() else {}
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        times[request.node.name.removeprefix("test_")] = rounded
        TIMES.write_text(json.dumps(times, indent=2) + "\n")

    return note


@contextmanager
def serve_space(folder: Path, **settings: str):
    """The address of a Space that `python spaces/rerank/app.py` serves, and the seconds until it was there."""
    port = free_port()
    command = [sys.executable, str(ROOT / "spaces" / "rerank" / "app.py")]
    process, seconds = serve(command, port, folder, OMP_NUM_THREADS="1", **settings)
    try:
        yield f"http://127.0.0.1:{port}", seconds
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The Space with the bundled model: its address, and the seconds until it was there."""
    with serve_space(tmp_path_factory.mktemp("space"), VRETRVER_MAX_CANDIDATES="8") as served:
        yield served


@pytest.fixture(scope="session")
def space(served):
    return served[0]


@pytest.fixture(scope="session")
def models_space(tmp_path_factory):
    """The address of a Space with three models: the bundled one, the same with other settings, and an absent one."""
    from vretrver_hf.engines import Sampling
    from vretrver_hf.protocol import get_preset
    from vretrver_hf.reranker import bundled_model, save_config

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(bundled_model(), folder / "second")
    preset = get_preset("foveated", max_calls=2, overview_pixels=64 * 64, inspect_pixels=100 * 100)
    save_config(folder / "second", preset, 6, 3, Sampling(temperature=0.5, max_turn_tokens=128))
    with serve_space(folder, VRETRVER_MODELS="bundled,second,someone/absent", HF_HUB_OFFLINE="1") as (address, _):
        yield address


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory) -> str:
    """The folder of a model that does not stop writing."""
    import torch
    from tiny_models import make_model, make_processor

    from vretrver_hf import Reranker
    from vretrver_hf.chat_templates import apply_to
    from vretrver_hf.engines import Sampling
    from vretrver_hf.engines.transformers import TransformersEngine
    from vretrver_hf.protocol import get_preset

    folder = tmp_path_factory.mktemp("slow-model")
    processor = make_processor("qwen2_5_vl")
    apply_to(processor, "qwen2_5_vl")
    model = make_model("qwen2_5_vl", processor)
    engine = TransformersEngine(model, processor)
    with torch.no_grad():  # tied weights: a logit of 0 is never the highest, so a turn ends at its limit alone
        model.get_input_embeddings().weight[engine.encoder.stop_ids] = 0
    preset = get_preset("foveated", overview_pixels=56 * 56, inspect_pixels=84 * 84)
    reranker = Reranker(engine, preset, sampling=Sampling(max_turn_tokens=14000))
    reranker.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def slow_space(tmp_path_factory, slow_model):
    """The address of a Space with the slow model and a deadline of 12 seconds."""
    settings = {"VRETRVER_MODELS": slow_model, "VRETRVER_DEADLINE": "12"}
    with serve_space(tmp_path_factory.mktemp("slow"), **settings) as (address, _):
        yield address


@pytest.fixture(scope="session")
def narrow_space(tmp_path_factory, slow_model):
    """The address of a Space with the slow model that plays one run, lets one wait, and keeps uploads 2 seconds."""
    settings = {"CONCURRENCY": "1", "MAX_QUEUE": "1", "KEEP_FILES": "2", "DEADLINE": "120", "MODELS": slow_model}
    settings = {f"VRETRVER_{name}": value for name, value in settings.items()}
    with serve_space(tmp_path_factory.mktemp("narrow"), **settings) as (address, _):
        yield address
