"""Clients of other services, as their users have them, against the real server."""

from __future__ import annotations

import pytest
from serving import PRESET, Numbers, Serving
from tiny_models import make_processor

from vretrver_hf import Reranker
from vretrver_hf.encoding import Encoder


TEXTS = ["3", "7", "5"]


@pytest.fixture
def server():
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    with Serving(Reranker(Numbers(encoder), PRESET), api_key="k") as running:
        yield running


@pytest.mark.parametrize("provider", ["cohere", "jina"])
def test_rerankers(server, provider):
    import rerankers

    url = server.url + "/v1/rerank"
    ranker = rerankers.Reranker(
        "default", model_type="APIRanker", api_provider=provider, api_key="k", url=url, verbose=0
    )
    ranked = ranker.rank("largest", TEXTS, doc_ids=["a", "b", "c"])
    assert [(result.doc_id, result.rank) for result in ranked.results] == [("b", 1), ("c", 2), ("a", 3)]
    assert ranked.top_k(1)[0].text == "7" and ranked.get_score_by_docid("a") == pytest.approx(1 / 3)


class TestHaystack:
    @pytest.fixture
    def make_ranker(self, server, monkeypatch):
        monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        from haystack.utils import Secret
        from haystack_integrations.components.rankers.jina import JinaRanker

        def make(key="k", **settings):
            url = server.url + "/v1/rerank"
            return JinaRanker("default", Secret.from_token(key), base_url=url, **settings)

        return make

    def test_in_a_pipeline(self, make_ranker):
        from haystack import Document, Pipeline

        pipeline = Pipeline()
        pipeline.add_component("ranker", make_ranker(top_k=2))
        documents = [Document(content=text, meta={"place": place}) for place, text in enumerate(TEXTS)]
        found = pipeline.run({"ranker": {"query": "largest", "documents": documents}})["ranker"]
        assert [document.meta["place"] for document in found["documents"]] == [1, 2]
        assert [document.score for document in found["documents"]] == [1.0, pytest.approx(2 / 3)]
        assert found["meta"]["usage"]["total_tokens"] > 0

    def test_a_refusal_says_why(self, make_ranker):
        from haystack import Document

        with pytest.raises(RuntimeError, match="API key is missing or wrong"):
            make_ranker("wrong").run("largest", [Document(content="1")])
