"""What the vLLM engine refuses before it imports vLLM; what it does with the real one is in tests/vllm_cpu."""

from __future__ import annotations

import sys

import pytest

from vretrver_hf.cli.common import Mistake, load_reranker
from vretrver_hf.engines.vllm import VLLMEngine
from vretrver_hf.reranker import bundled_model


REASON = (
    "vLLM cannot run data_parallel_size={count} replicas in this process; start `vllm serve {name} "
    "--data-parallel-size {count}` and ask it with engine='openai' and base_url (--base-url on the command line)"
)


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    """Whoever tries to import it fails in another way than by what is tested."""
    monkeypatch.setitem(sys.modules, "vllm", None)


@pytest.mark.parametrize("settings", [{}, {"distributed_executor_backend": "mp"}])
@pytest.mark.parametrize("count", [2, "8"])
def test_several_replicas_are_refused_before_anything_is_loaded(settings, count):
    with pytest.raises(ValueError) as caught:
        VLLMEngine.from_pretrained("no/such-model", data_parallel_size=count, **settings)
    assert str(caught.value) == REASON.format(name="no/such-model", count=count)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_parallel_size": 1},
        {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
    ],
)
def test_one_replica_a_process_is_for_vllm(settings):
    with pytest.raises(ImportError):
        VLLMEngine.from_pretrained("no/such-model", **settings)


def test_the_command_line_tells_it_in_one_line():
    with pytest.raises(Mistake) as caught:
        load_reranker(str(bundled_model()), None, "auto", "vllm", data_parallel_size=2)
    reason = REASON.format(name=bundled_model(), count=2)
    assert caught.value.format_message() == f"model {bundled_model()}: {reason}" and "\n" not in reason


def test_a_subfolder_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="cannot load the subfolder 'x'"):
        VLLMEngine.from_pretrained("no/such-model", subfolder="x")
