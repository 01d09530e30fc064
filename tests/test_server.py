from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import cohere
import httpx
import pytest
import torch
from serving import PRESET, Numbers, Serving
from tiny_models import make_processor

from vretrver_hf import Reranker
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines import EngineError
from vretrver_hf.protocol import get_preset
from vretrver_hf.server import Limits, app, connections, create_app


DOCUMENTS = ["3", "7", "5"]
ORDER = [1, 2, 0]
JSON = {"Content-Type": "application/json"}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 20_000_000
"""Bytes of an answer that no system's buffers hold."""


@pytest.fixture(scope="module")
def encoder():
    return Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")


@pytest.fixture
def engine(encoder):
    return Numbers(encoder)


@pytest.fixture
def serve(engine):
    running = []

    def start(**settings):
        running.append(Serving(Reranker(engine, PRESET), **settings).__enter__())
        return running[-1]

    yield start
    engine.go.set()
    for server in running:
        server.__exit__()


def post(server, path="/v1/rerank", headers=None, **body):
    body = {"query": "largest", "documents": DOCUMENTS, **body}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=30)


def order(response) -> list[int]:
    assert response.status_code == 200, response.text
    return [result["index"] for result in response.json()["results"]]


def data_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class TestClients:
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_cohere(self, serve, version):
        server = serve(api_key="k")
        client = {"v1": cohere.Client, "v2": cohere.ClientV2}[version](api_key="k", base_url=server.url)
        reply = client.rerank(model="default", query="largest", documents=DOCUMENTS, top_n=2)
        assert [result.index for result in reply.results] == ORDER[:2]
        assert [result.relevance_score for result in reply.results] == [1.0, pytest.approx(2 / 3)]
        wrong = {"v1": cohere.Client, "v2": cohere.ClientV2}[version](api_key="x", base_url=server.url)
        with pytest.raises(cohere.UnauthorizedError):
            wrong.rerank(model="default", query="largest", documents=DOCUMENTS)

    @pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
    def test_every_path_clients_look_at(self, serve, path):
        assert order(post(serve(), path)) == ORDER

    def test_fields_of_other_services_are_ignored(self, serve):
        server = serve()
        assert order(post(server, max_tokens_per_doc=512, truncate_prompt_tokens=1, rank_fields=["text"])) == ORDER

    def test_documents_come_back_where_asked(self, serve):
        results = post(serve(), return_documents=True, documents=["3", {"text": "7"}]).json()["results"]
        assert [result["document"]["text"] for result in results] == ["7", "3"]
        assert "document" not in post(serve()).json()["results"][0]

    def test_documents_come_back_whatever_was_in_them(self, serve):
        """Half a surrogate pair, and beside what is known a number that JSON cannot hold."""
        blocks = '{"content": [{"type": "text", "text": "7", "x": 1e999}]}'
        body = f'{{"query": "q", "documents": ["\\ud800 3", {blocks}], "return_documents": true}}'
        response = httpx.post(serve().url + "/v1/rerank", content=body, headers=JSON)
        assert order(response) == [1, 0]
        first, second = (result["document"] for result in response.json()["results"])
        assert first["content"] == [{"type": "text", "text": "7", "image_url": None}] and second["text"] == "\ud800 3"

    def test_the_names_of_the_model(self, serve):
        server = serve(names=["mine"])
        assert order(post(server, model="mine")) == ORDER
        assert [m["id"] for m in httpx.get(server.url + "/v1/models").json()["data"]] == ["default", "mine"]
        refused = post(server, model="gpt")
        assert refused.status_code == 404 and "there is default, mine" in refused.json()["message"]


class TestPictures:
    def test_all_ways_to_send_one(self, serve, picture, engine):
        url = data_url(picture())
        blocks = [{"type": "text", "text": "7"}, {"type": "image_url", "image_url": {"url": url}}]
        documents = [{"text": "3", "image": url}, {"content": blocks}, {"text": "5", "image": ""}]
        assert order(post(serve(), documents=documents, query={"text": "largest", "image": url})) == ORDER
        assert engine.prompts["0"].count("<|image_pad|>") == 3

    def test_a_string_is_text_unless_it_is_a_data_url(self, serve, engine, picture):
        post(serve(), documents=["cat9.png", "https://example.com/1", data_url(picture())])
        assert "cat9.png" in engine.prompts["0"] and engine.prompts["0"].count("<|image_pad|>") == 1

    @pytest.mark.parametrize(
        ("document", "reason"),
        [
            ({"image": "https://example.com/a.png"}, "fetches no URLs"),
            ({"image": "file:///etc/passwd"}, "fetches no URLs"),
            ({"image": "/etc/passwd"}, "reads no files"),
            ({"image": "a.png"}, "reads no files"),
            ({"content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}, "fetches no URLs"),
            ({"content": [{"type": "video_url"}]}, "blocks of type text or image_url"),
            ({"image": "data:image/png;base64,AAAA"}, "no readable image"),
            ({"image": "data:image/png;base64,*"}, "base64 is invalid"),
            ({"image": "data:text/html;base64,AAAA"}, "fetches no URLs"),
            ({}, "needs text, an image, or both"),
            ({"text": "  "}, "needs text, an image, or both"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, serve, engine, document, reason):
        response = post(serve(), documents=["1", document])
        assert response.status_code == 400 and response.json()["message"].startswith("document 1")
        assert reason in response.json()["message"] and not engine.turns

    def test_a_picture_beyond_the_limit(self, serve, picture):
        response = post(serve(limits=Limits(max_pixels=5000)), documents=["1", {"image": data_url(picture(100, 80))}])
        assert response.status_code == 400 and "limit of 5,000" in response.json()["message"]

    def test_pictures_that_are_together_beyond_the_limit(self, serve, picture, engine):
        server = serve(limits=Limits(max_total_pixels=20_000))
        shown = {"image": data_url(picture(100, 80))}
        assert len(order(post(server, documents=["1", shown, shown]))) == 3
        played = len(engine.turns)
        response = post(server, query={"text": "q", **shown}, documents=["1", shown, shown])
        assert response.status_code == 400 and len(engine.turns) == played
        assert response.json()["message"].startswith("document 2: with its picture there are 24,000 pixels")

    def test_files_below_the_folder_that_is_allowed_and_no_others(self, serve, picture, tmp_path, engine):
        folder = tmp_path / "allowed"
        folder.mkdir()
        picture().save(folder / "a.png")
        picture().save(tmp_path / "secret.png")
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        server = serve(limits=Limits(image_root=folder))
        assert len(order(post(server, documents=["1", {"image": "a.png", "text": "2"}]))) == 2
        for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "a\0.png", "http://x/a.png"):
            refused = post(server, documents=["1", {"image": name}])
            assert refused.status_code == 400, name
        response = post(server, documents=["1", {"image": "missing.png"}])
        assert response.status_code == 400
        assert response.json()["message"] == "document 1 ('missing.png') does not exist; check the path"
        for name in (".", "x/..", str(folder)):
            response = post(server, documents=["1", {"image": name}])
            assert response.status_code == 400 and str(tmp_path) not in response.text, name

    def test_what_the_model_could_not_be_shown_is_refused_before(self, serve, tmp_path):
        """Whatever a request may weigh, a picture has the package's own limits."""
        with (tmp_path / "large.png").open("wb") as file:
            file.truncate(51 * 2**20)
        response = post(serve(limits=Limits(image_root=tmp_path)), documents=["1", {"image": "large.png"}])
        assert response.status_code == 400 and "limit of 52,428,800 bytes" in response.json()["message"]
        with pytest.raises(ValueError, match="max_pixels must be at most 64,000,000, got 64,000,001"):
            Limits(max_pixels=64_000_001)


class TestLimits:
    def test_documents(self, serve):
        response = post(serve(limits=Limits(max_documents=2)))
        assert response.status_code == 400 and "3 documents are more than the 2 allowed" in response.json()["message"]

    def test_far_too_many_documents_are_refused_before_they_are_values(self, serve, monkeypatch):
        monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("they were parsed"))
        body = b'{"query": "q", "documents": [' + b'"", ' * 30_000 + b'""]}'
        response = httpx.post(serve().url + "/v1/rerank", content=body, headers=JSON)
        assert response.status_code == 400 and b"send fewer documents" in response.content

    def test_characters(self, serve, engine):
        server = serve(limits=Limits(max_characters=10))
        blocks = {"content": [{"type": "text", "text": "x" * 5}, {"type": "text", "text": "y" * 5}]}
        assert order(post(server, query="x" * 10, documents=["1" * 10, "2"])) == [0, 1]
        played = len(engine.turns)
        for field, body in [
            ("query", {"query": "x" * 11}),
            ("document 0", {"documents": ["x" * 11]}),
            ("document 1", {"documents": ["1", {"text": "x" * 11}]}),
            ("document 0", {"documents": [blocks]}),
        ]:
            response = post(server, **body)
            told = f"{field}: its text has 11 characters, more than the 10 allowed"
            assert response.status_code == 400 and response.json()["message"] == told
        assert len(engine.turns) == played

    def test_bytes_declared_and_sent_in_pieces(self, serve):
        server = serve(limits=Limits(max_bytes=1000))
        assert post(server, query="x" * 2000).status_code == 413

        def pieces():
            for _ in range(20):
                yield b"x" * 100

        response = httpx.post(server.url + "/v1/rerank", content=pieces(), headers=JSON)
        assert "content-length" not in response.request.headers
        assert response.status_code == 413 and "1,000 bytes" in response.json()["message"]

    def test_without_the_key_nothing_is_read(self, serve):
        server = serve(api_key="k", limits=Limits(max_bytes=10))
        assert post(server).status_code == 401
        assert post(server, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert post(server, headers={"Authorization": "Bearer k"}).status_code == 413
        assert httpx.get(server.url + "/health").status_code == 200

    def test_a_full_house_is_told_to_come_again(self, serve, engine):
        server = serve(limits=Limits(max_requests=2))
        engine.go.clear()
        with ThreadPoolExecutor(2) as pool:
            taken = [pool.submit(post, server) for _ in range(2)]
            wait_for(lambda: metric(server, "vretrver_requests_here") == 2)
            refused = post(server)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            engine.go.set()
            assert [order(future.result()) for future in taken] == [ORDER] * 2
        assert order(post(server)) == ORDER

    def test_a_ranking_that_takes_too_long_is_stopped(self, serve, engine):
        server = serve(limits=Limits(seconds=0.3))
        engine.go.clear()
        response = post(server)
        assert response.status_code == 504 and "within 0.3 s" in response.json()["message"]
        engine.go.set()
        wait_for(lambda: metric(server, "vretrver_requests_here") == 0)
        assert not engine._open and order(post(server)) == ORDER

    def test_a_client_that_goes_takes_its_ranking_along(self, serve, engine):
        server = serve()
        engine.go.clear()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/rerank", json={"query": "q", "documents": DOCUMENTS}, timeout=0.3)
        time.sleep(1)  # longer than the server looks away
        engine.go.set()
        wait_for(lambda: metric(server, "vretrver_requests_here") == 0)
        assert not engine._open and metric(server, 'vretrver_requests_total{status="499"}') == 1

    @pytest.mark.parametrize(
        "name",
        [
            "max_documents",
            "max_bytes",
            "max_characters",
            "max_pixels",
            "max_total_pixels",
            "max_requests",
            "max_connections",
            "seconds",
        ],
    )
    def test_no_limit_may_be_nothing(self, name):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            Limits(**{name: 0})


class TestAdmission:
    def test_who_is_still_sending_has_a_place(self, serve):
        server = serve(limits=Limits(max_requests=2))
        senders = [begin(server) for _ in range(2)]
        wait_for(lambda: metric(server, "vretrver_requests_here") == 2)
        assert post(server).status_code == 429
        for sender in senders:
            sender.close()
        wait_for(lambda: metric(server, "vretrver_requests_here") == 0)
        assert order(post(server)) == ORDER and metric(server, 'vretrver_requests_total{status="499"}') == 2

    def test_no_more_are_decoded_than_are_taken(self, serve, monkeypatch):
        """Of many that come at once, those that find no place cost nothing."""
        here, decoded = threading.Event(), []

        def items_of(*args):
            decoded.append(args)
            here.wait(20)
            return original(*args)

        original = app.items_of
        monkeypatch.setattr(app, "items_of", items_of)
        server = serve(limits=Limits(max_requests=2))
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(post, server) for _ in range(6)]
            wait_for(lambda: sum(future.done() for future in futures) == 4)
            here.set()
            assert sorted(future.result().status_code for future in futures) == [200] * 2 + [429] * 4
        assert len(decoded) == 2

    def test_a_ranking_that_was_given_up_has_its_place_until_the_engine_lets_go(self, serve, engine):
        server = serve(limits=Limits(max_requests=1, seconds=0.3))
        engine.go.clear()
        assert [post(server).status_code for _ in range(3)] == [504, 429, 429]
        engine.go.set()
        wait_for(lambda: metric(server, "vretrver_requests_here") == 0)
        assert order(post(server)) == ORDER


class TestDeadline:
    def test_a_body_that_drips_in(self, serve):
        server = serve(limits=Limits(seconds=0.5))
        sender = begin(server)
        assert drip(sender, b" ").startswith(b"HTTP/1.1 408 ")
        wait_for(lambda: metric(server, "vretrver_requests_here") == 0)

    def test_the_time_it_took_to_arrive_counts(self, serve, engine):
        server = serve(limits=Limits(seconds=3))
        engine.go.clear()
        started = time.monotonic()
        sender = begin(server, length=len(BODY))
        time.sleep(2)
        sender.sendall(BODY)
        assert sender.recv(1000).startswith(b"HTTP/1.1 504 ")
        assert time.monotonic() - started < 4.5
        sender.close()


class TestConnections:
    def test_one_too_many_is_closed_and_idle_ones_make_room(self, serve, monkeypatch):
        monkeypatch.setattr(connections, "PATIENCE", 1.0)
        server = serve(limits=Limits(max_requests=1, max_connections=3))
        idle = [connect(server) for _ in range(3)]
        assert is_closed(connect(server)) and not is_closed(idle[0], seconds=0.1)
        wait_for(lambda: all(is_closed(connection) for connection in idle))
        assert order(post(server)) == ORDER

    @pytest.mark.parametrize("before", [b"", HEALTH])
    def test_who_never_ends_the_head_of_a_request(self, serve, monkeypatch, before):
        """The first one, or the one after another."""
        monkeypatch.setattr(connections, "PATIENCE", 0.5)
        connection = connect(serve())
        if before:
            connection.sendall(before)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert drip(connection, b"x") == b""

    def test_who_waits_for_an_answer_may_wait(self, serve, engine, monkeypatch):
        monkeypatch.setattr(connections, "PATIENCE", 0.2)
        server = serve()
        engine.go.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server)
            time.sleep(1)
            engine.go.set()
            assert order(answer.result()) == ORDER

    @pytest.mark.parametrize("behind", [b"", HEALTH])
    def test_who_never_takes_the_answer(self, serve, monkeypatch, behind):
        """To one request, or to another one that waits behind it."""
        monkeypatch.setattr(connections, "PATIENCE", 0.5)
        server = serve(limits=Limits(max_characters=LARGE))
        connection = ask_for_much(server, behind)
        wait_for(lambda: metric(server, 'vretrver_requests_total{status="200"}') == 1)
        wait_for(lambda: server.num_connections == 0)
        connection.close()

    def test_who_takes_the_answer_slowly_gets_all_of_it(self, serve, monkeypatch):
        monkeypatch.setattr(connections, "PATIENCE", 0.3)
        connection = ask_for_much(serve(limits=Limits(max_characters=LARGE)))
        taken = 0
        while taken < LARGE:
            time.sleep(0.1)
            piece = connection.recv(1_000_000, socket.MSG_WAITALL)
            assert piece, f"closed after {taken} bytes"
            taken += len(piece)
        connection.close()

    def test_who_sends_on_while_a_request_is_answered(self, serve, engine):
        server = serve()
        engine.go.clear()
        connection = begin(server, length=len(BODY))
        connection.sendall(BODY)
        wait_for(lambda: metric(server, "vretrver_requests_here") == 1)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x" * 100_000)
        connection.close()

    def test_there_are_more_than_requests(self):
        with pytest.raises(ValueError, match="more than max_requests"):
            Limits(max_requests=8, max_connections=8)


class TestFailures:
    """What fails here is told to the operator; clients get an id to ask with."""

    def test_an_engine(self, serve, caplog):
        response = post(serve(), query="crash")
        self.check(response, 502, caplog, "out of memory")

    def test_anything_else(self, serve, caplog, monkeypatch):
        monkeypatch.setattr(app, "items_of", lambda *args: open("/no/such/secret"))
        server = serve()
        self.check(post(server), 500, caplog, "/no/such/secret")
        assert metric(server, "vretrver_requests_here") == 0

    def check(self, response, status, caplog, reason):
        assert response.status_code == status and reason not in response.text
        request_id = response.json()["message"].rpartition(" ")[2]
        assert request_id.startswith("rerank-")
        (record,) = [record for record in caplog.records if request_id in record.message]
        assert reason in record.message and record.levelno == logging.ERROR


class TestRequests:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ({"documents": DOCUMENTS}, "query"),
            ({"query": "q"}, "documents"),
            ({"query": "q", "documents": "one"}, "documents"),
            ({"query": "q", "documents": [1]}, "documents.0"),
            ({"query": "q", "documents": [], "top_n": 0}, "top_n"),
        ],
    )
    def test_a_malformed_request_names_the_field_and_repeats_nothing(self, serve, body, reason):
        response = httpx.post(serve().url + "/v1/rerank", json={**body, "note": "SECRET"})
        assert response.status_code == 422 and reason in response.json()["message"]
        assert "SECRET" not in response.text

    def test_no_json(self, serve):
        response = httpx.post(serve().url + "/v1/rerank", content=b"{", headers=JSON)
        assert response.status_code == 422 and "message" in response.json()

    @pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
    def test_what_a_page_in_a_browser_could_send_unasked(self, serve, content_type):
        headers = {"Content-Type": content_type} if content_type else {}
        response = httpx.post(serve().url + "/v1/rerank", content=BODY, headers=headers)
        assert response.status_code == 415 and "Content-Type: application/json" in response.json()["message"]

    def test_its_fields_are_documented(self, serve):
        schema = httpx.get(serve().url + "/openapi.json").json()
        request = schema["paths"]["/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"query", "documents", "top_n", "evidence"} <= set(request["properties"])
        found = schema
        for part in request["properties"]["query"]["anyOf"][1]["$ref"].removeprefix("#/").split("/"):
            found = found[part.replace("~1", "/")]
        assert "image" in found["properties"]

    @pytest.mark.parametrize("query", ["", " ", {}])
    def test_no_query(self, serve, query):
        response = post(serve(), query=query)
        assert response.status_code == 400 and response.json()["message"].startswith("query: ")

    @pytest.mark.parametrize("documents", [[], ["1"]])
    def test_nothing_to_compare_costs_no_model_call(self, serve, engine, documents):
        assert order(post(serve(), documents=documents)) == list(range(len(documents))) and not engine.turns

    def test_scores_are_ordinal(self, serve):
        scores = [result["relevance_score"] for result in post(serve(), documents=list("1234")).json()["results"]]
        assert scores == [1.0, 0.75, 0.5, 0.25]

    def test_evidence_on_request(self, serve, picture):
        documents = [{"text": "3", "image": data_url(picture())}, {"text": "7"}]
        server = serve()
        (window,) = post(server, query="look", documents=documents, evidence=True).json()["evidence"]
        assert window["documents"] == [0, 1] and window["order"] == [1, 0] and window["status"] == "ok"
        call, seen, answer = window["turns"]
        assert call["thought"] == "closer" and call["call"]["name"] == "select_images" and call["valid"]
        assert seen["role"] == "observation" and seen["images"][0]["index"] == 1
        assert answer["thought"] == "by size"
        assert "evidence" not in post(server, documents=documents).json()

    def test_many_windows(self, serve):
        documents = [str((i * 37) % 50) for i in range(50)]
        ranked = order(post(serve(), documents=documents))
        assert sorted(ranked) == list(range(50)) and [int(documents[i]) for i in ranked[:3]] == [49, 48, 47]


class TestConcurrency:
    def test_requests_share_the_batch_and_get_their_own_answers(self, serve, engine):
        server = serve()
        engine.go.clear()
        bodies = [[str((i * 7 + j * 3) % 11 + 11 * j) for j in range(3 + i % 4)] for i in range(12)]
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(post, server, documents=documents) for documents in bodies]
            wait_for(lambda: metric(server, "vretrver_requests_here") == 12)
            engine.go.set()
            for documents, future in zip(bodies, futures, strict=True):
                assert order(future.result()) == sorted(range(len(documents)), key=lambda i: -int(documents[i]))
        assert engine.most_open == 4

    def test_an_engine_that_fails_costs_what_was_under_way_and_nothing_else(self, serve, engine):
        server = serve()
        response = post(server, query="crash")
        assert response.status_code == 502 and "out of memory" not in response.text
        assert not engine._open and order(post(server)) == ORDER

    def test_an_engine_that_cannot_even_stop_costs_everything_at_once(self, serve, engine, monkeypatch):
        def close(session):
            raise RuntimeError("it is dead")

        server = serve()
        engine.go.clear()
        monkeypatch.setattr(engine, "close", close)
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(post, server, query="crash") for _ in range(6)]  # more than are played at a time
            wait_for(lambda: metric(server, "vretrver_requests_here") == 6)
            engine.go.set()
            assert [future.result().status_code for future in futures] == [502] * 6
        assert health(server) == (503, "the engine has failed for good (RuntimeError); " + AGAIN)
        assert post(server).status_code == 503

    def test_a_device_that_has_failed_is_told_to_who_looks_after_the_server(self, serve, engine, caplog):
        server = serve()
        engine.go.clear()
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(post, server, query="device") for _ in range(6)]
            wait_for(lambda: metric(server, "vretrver_requests_here") == 6)
            engine.go.set()
            assert [future.result().status_code for future in futures] == [502] * 6
        reason = "the engine has failed for good (AcceleratorError); " + AGAIN
        assert health(server) == (503, reason) and "illegal memory access" in caplog.text
        refused = post(server)
        assert refused.status_code == 503 and refused.json()["message"] == reason

    @pytest.mark.parametrize(
        ("status", "body"),
        [(502, {"query": "crash"}), (400, {"documents": ["1", {"image": "data:image/png;base64,AAAA"}]})],
    )
    def test_a_failure_of_one_request_is_not_the_servers(self, serve, status, body):
        server = serve()
        assert post(server, **body).status_code == status and health(server) == (200, "")

    def test_shutting_down_finishes_what_was_taken(self, serve, engine):
        server = serve()
        engine.go.clear()
        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(post, server) for _ in range(6)]
            wait_for(lambda: metric(server, "vretrver_requests_here") == 6)
            server.stop()
            wait_for(lambda: refuses(server))
            engine.go.set()
            assert [order(future.result()) for future in futures] == [ORDER] * 6


class TestMetrics:
    def test_what_happened_is_counted(self, serve, picture):
        server = serve()
        post(server)
        post(server, query="look", documents=[{"text": "3", "image": data_url(picture())}, {"text": "7"}])
        post(server, model="none")
        assert metric(server, 'vretrver_requests_total{status="200"}') == 2
        assert metric(server, 'vretrver_requests_total{status="404"}') == 1
        assert metric(server, 'vretrver_rankings_total{status="ok"}') == 2
        assert metric(server, "vretrver_documents_total") == 5 and metric(server, "vretrver_tool_calls_total") == 1
        assert metric(server, "vretrver_request_seconds_count") == 3 and metric(server, "vretrver_tokens_total") > 0


BODY = json.dumps({"query": "largest", "documents": DOCUMENTS}).encode()


def connect(server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def ask_for_much(server, behind: bytes = b"") -> socket.socket:
    """A request whose answer is `LARGE`: a document that comes back."""
    body = json.dumps({"query": "q", "documents": ["1" * LARGE], "return_documents": True}).encode()
    connection = begin(server, len(body))
    connection.sendall(body + behind)
    return connection


def begin(server, length: int = 1000) -> socket.socket:
    """A request without its body."""
    connection = connect(server)
    head = f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


def drip(connection: socket.socket, piece: bytes) -> bytes:
    """Sends a little now and then. Returns what comes back, nothing where the connection is closed."""
    connection.settimeout(0.1)
    for _ in range(200):
        try:
            connection.sendall(piece)
            return connection.recv(1000)
        except TimeoutError:
            continue
        except OSError:
            return b""
    raise AssertionError("it was never ended")


def is_closed(connection: socket.socket, seconds: float = 2) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def metric(server, name: str) -> float:
    text = httpx.get(server.url + "/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")] or [f"{name} 0"]
    return float(line.rpartition(" ")[2])


AGAIN = "start the server again, whose log says why"


def health(server) -> tuple[int, str]:
    response = httpx.get(server.url + "/health")
    return response.status_code, response.json()["message"] if response.content else ""


def wait_for(condition, seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.02)


def refuses(server) -> bool:
    """Whether new connections find nobody."""
    parts = urlsplit(server.url)
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=1) as connection:
            connection.sendall(HEALTH)
            return connection.recv(1) == b""
    except OSError:
        return True


def test_a_preset_that_replays_the_prompts_of_a_data_set(engine):
    preset = get_preset(PRESET, prompt_source="dataset")
    with pytest.raises(ValueError, match="replays the prompts of a data set"):
        create_app(Reranker(engine, preset))


def test_evidence_is_json(serve):
    assert json.dumps(post(serve(), evidence=True).json())


def test_an_engine_that_wraps_the_error_of_its_device(engine):
    device, other = EngineError("failed"), EngineError("failed")
    device.__cause__, other.__cause__ = torch.AcceleratorError("CUDA error"), torch.OutOfMemoryError("CUDA error")
    assert engine.is_lost(device) and not engine.is_lost(other)
