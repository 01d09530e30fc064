"""The coarse stage on random vectors, on a small sentence-transformers model, and on a random LamRA checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from tiny_models import make_model, make_processor

from vretrver_hf import Item
from vretrver_hf.journal import JournalError, Shard
from vretrver_hf.lamra import LamRAEmbedder
from vretrver_hf.retrieval import (
    Index,
    SentenceTransformerEmbedder,
    Vectors,
    embed,
    load_embedder,
    load_vectors,
    normalised,
)


def unit(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return normalised(np.random.default_rng(seed).normal(size=(count, width)))


class Numbers:
    """Embeds a text that is a number as a point on the circle, and counts what it is asked."""

    name = "numbers"

    def __init__(self):
        self.asked: list[str] = []

    def encode(self, items, side):
        self.asked += [item.text for item in items]
        angles = np.array([float(item.text) / 50 for item in items])
        return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def numbers(start: int, stop: int) -> list[Item]:
    return [Item(text=str(number)) for number in range(start, stop)]


class TestEmbed:
    def test_in_chunks(self, tmp_path):
        vectors = embed(tmp_path, Numbers(), numbers, 10, "candidate", chunk=4)
        assert len(vectors) == 10 and sorted(p.name for p in tmp_path.glob("*.npy"))[-1] == "0000000008.npy"
        assert np.allclose(vectors[0:10], Numbers().encode(numbers(0, 10), "candidate"))
        assert np.allclose(load_vectors(tmp_path)[3:9], vectors[3:9]) and np.allclose(vectors[7], vectors[7:8][0])

    def test_goes_on_where_it_stopped(self, tmp_path):
        class Dies(Numbers):
            def encode(self, items, side):
                if items[0].text == "4":
                    raise KeyboardInterrupt
                return super().encode(items, side)

        with pytest.raises(KeyboardInterrupt):
            embed(tmp_path, Dies(), numbers, 10, "candidate", chunk=4)
        (tmp_path / "0000000008.part").write_bytes(b"half a chunk")
        embedder, done = Numbers(), []
        vectors = embed(tmp_path, embedder, numbers, 10, "candidate", chunk=4, on_chunk=done.append)
        assert embedder.asked == [str(n) for n in range(4, 10)] and done == [4, 2] and len(vectors) == 10
        assert embed(tmp_path, embedder, numbers, 10, "candidate", chunk=4) is not None and len(embedder.asked) == 6

    def test_several_processes(self, tmp_path):
        assert embed(tmp_path, Numbers(), numbers, 10, "query", Shard(0, 2), chunk=3) is None
        vectors = embed(tmp_path, Numbers(), numbers, 10, "query", Shard(1, 2), chunk=3)
        assert np.allclose(vectors[:], Numbers().encode(numbers(0, 10), "query"))

    def test_another_embedder_is_refused(self, tmp_path):
        embed(tmp_path, Numbers(), numbers, 3, "query")
        other = Numbers()
        other.name = "other"
        with pytest.raises(JournalError, match='embedder was "numbers" and is now "other"'):
            embed(tmp_path, other, numbers, 3, "query")
        with pytest.raises(JournalError, match="count was 3 and is now 4"):
            embed(tmp_path, Numbers(), numbers, 4, "query")

    def test_other_settings_are_refused(self, tmp_path):
        embed(tmp_path, Numbers(), numbers, 3, "query", settings={"task": "a", "digests": {"pool": "1"}})
        again = embed(tmp_path, Numbers(), numbers, 3, "query", settings={"digests": {"pool": "1"}, "task": "a"})
        assert len(again) == 3
        with pytest.raises(JournalError, match='digests.pool was "1" and is now "2"; task was "a" and is now "b"'):
            embed(tmp_path, Numbers(), numbers, 3, "query", settings={"task": "b", "digests": {"pool": "2"}})

    def test_nothing(self, tmp_path):
        assert len(embed(tmp_path, Numbers(), numbers, 0, "query")) == 0


class TestVectors:
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(-2, 12), st.integers(-2, 12))
    def test_slices_like_an_array(self, tmp_path_factory, sizes, start, stop):
        folder, whole = tmp_path_factory.mktemp("parts"), unit(sum(sizes), 3)
        paths, at = [], 0
        for number, size in enumerate(sizes):
            paths.append(folder / f"{number}.npy")
            np.save(paths[-1], whole[at : at + size])
            at += size
        part = Vectors(paths)[start:stop]
        assert part.dtype == np.float32 and np.array_equal(part.reshape(-1, 3), whole[start:stop])

    def test_files_that_do_not_fit(self, tmp_path):
        np.save(tmp_path / "0.npy", unit(2, 3))
        np.save(tmp_path / "1.npy", unit(2, 4))
        with pytest.raises(ValueError, match=r"1.npy has the shape \(2, 4\)"):
            load_vectors(tmp_path)
        np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
        with pytest.raises(ValueError, match="Python objects"):
            load_vectors(tmp_path / "objects.npy")
        with pytest.raises(ValueError, match="holds no vectors"):
            load_vectors(tmp_path / "absent")


class TestIndex:
    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 70), st.integers(0, 99))
    def test_agrees_with_numpy(self, count, queries, k, seed):
        pool, asked = unit(count, seed=seed), unit(queries, seed=seed + 1)
        found = list(Index([f"c{n}" for n in range(count)], pool).search(asked, k))
        scores = asked @ pool.T
        assert len(found) == queries
        for row, hits in zip(scores, found, strict=True):
            assert len(hits) == min(k, count) and len({hit.id for hit in hits}) == len(hits)
            assert [hit.score for hit in hits] == pytest.approx(sorted(row, reverse=True)[:k], abs=1e-5)
            assert [row[int(hit.id[1:])] for hit in hits] == pytest.approx([hit.score for hit in hits], abs=1e-5)

    def test_from_the_disk(self, tmp_path):
        vectors = embed(tmp_path, Numbers(), numbers, 30, "candidate", chunk=7)
        (hits,) = Index([str(n) for n in range(30)], vectors).search(vectors[12:13], k=3)
        assert hits[0].id == "12" and {hit.id for hit in hits} == {"11", "12", "13"}

    def test_an_index_that_looks_at_a_part(self):
        pool = unit(400, 4)
        (hits,) = Index([str(n) for n in range(400)], pool, factory="IVF16,Flat").search(pool[5:6], k=100)
        assert hits[0].id == "5" and 0 < len(hits) <= 100

    def test_an_empty_pool(self):
        assert list(Index([], np.zeros((0, 4), np.float32)).search(unit(2, 4))) == [[], []]

    def test_mistakes(self):
        with pytest.raises(ValueError, match="2 ids for 3 vectors"):
            Index(["a", "b"], unit(3))
        with pytest.raises(ValueError, match="k must be at least 1"):
            next(Index(["a"], unit(1)).search(unit(1), 0))


class Lengths(InputModule):
    """Embeds a text by its length and a picture by its width; together where `joint`."""

    def __init__(self, joint: bool):
        super().__init__()
        self.joint, self.batches = joint, []

    @property
    def modalities(self):
        return ["text", "image", *([("image", "text")] if self.joint else [])]

    def preprocess(self, inputs, prompt=None, **kwargs):
        def row(entry):
            entry = entry if isinstance(entry, dict) else {"text" if isinstance(entry, str) else "image": entry}
            width = entry["image"].width if "image" in entry else 0
            return [len(entry.get("text", "")), width, 1.0 if len(entry) == 2 else 0.0]

        self.batches.append(len(inputs))
        return {"rows": torch.tensor([row(entry) for entry in inputs], dtype=torch.float32)}

    def forward(self, features, **kwargs):
        return features | {"sentence_embedding": features["rows"]}

    def get_embedding_dimension(self):
        return 3

    def save(self, *args, **kwargs):
        raise NotImplementedError


class TestSentenceTransformers:
    def items(self, picture):
        image = picture(40, 30)
        return [Item(text="abc"), Item(image=image), Item(text="abc", image=image), Item(text="abcd")]

    @pytest.mark.parametrize(("joint", "both"), [(True, [3, 40, 1]), (False, [1, 1, 0])])
    def test_text_image_and_both(self, picture, joint, both):
        embedder = SentenceTransformerEmbedder(SentenceTransformer(modules=[Lengths(joint)], device="cpu"))
        for side in ("query", "candidate"):
            vectors = embedder.encode(self.items(picture), side)
            assert np.allclose(vectors, normalised(np.array([[1, 0, 0], [0, 1, 0], both, [1, 0, 0]])))

    def test_batches(self, picture):
        module = Lengths(True)
        SentenceTransformerEmbedder(SentenceTransformer(modules=[module], device="cpu"), batch_size=2).encode(
            [Item(text="a")] * 5, "query"
        )
        assert [size for size in module.batches if size] == [2, 2, 1]


CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2-VL's own template makes of messages with pictures, which LamRA was trained on."""


@pytest.fixture(scope="module")
def embedder() -> LamRAEmbedder:
    processor = make_processor("qwen2_5_vl")
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    return LamRAEmbedder(make_model("qwen2_5_vl", processor), processor, batch_size=3)


class TestLamRA:
    def items(self, picture):
        return [
            Item(text="Find me a cat. black"),
            Item(image=picture(56, 84)),
            Item(text="the same in red", image=picture(112, 56)),
            Item(text="x"),
        ]

    def test_prompts(self, embedder, picture):
        texts = [
            embedder.processor.apply_chat_template(embedder.prompt(item), tokenize=False, add_generation_prompt=True)
            for item in self.items(picture)[:3]
        ]
        head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        image, end = "<|vision_start|><|image_pad|><|vision_end|>", " in one word: <|im_end|>\n<|im_start|>assistant\n"
        assert texts == [
            f"{head}Find me a cat. black\nSummarize above sentence{end}",
            f"{head}{image}\nSummarize above image{end}",
            f"{head}{image}the same in red\nSummarize above image and sentence{end}",
        ]

    def test_is_the_state_before_emb(self, embedder, picture):
        """The reference writes `<emb>.` as the answer, finds it, and takes the state of the token before it."""
        items = self.items(picture)
        vectors = embedder.encode(items, "candidate")
        processor, model = make_processor("qwen2_5_vl"), embedder.model
        processor.chat_template = processor.tokenizer.chat_template = CHAT
        emb = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")  # any token will do
        for item, vector in zip(items, vectors, strict=True):
            messages = [*embedder.prompt(item), {"role": "assistant", "content": "@@."}]
            text = processor.apply_chat_template(messages, tokenize=False)
            images = None if item.image is None else [item.load_image()]
            inputs = processor(text=[text], images=images, return_tensors="pt")
            at = processor.tokenizer.encode("@", add_special_tokens=False)[0]
            place = inputs["input_ids"][0].tolist().index(at)
            inputs["input_ids"][0, place] = emb
            with torch.inference_mode():
                states = model.model(**inputs).last_hidden_state[0]
            assert np.allclose(vector, normalised(states[place - 1].numpy()), atol=2e-5)

    def test_batches_do_not_matter(self, embedder, picture):
        items = self.items(picture)
        together = embedder.encode(items, "query")
        alone = np.concatenate([embedder.encode([item], "query") for item in items])
        assert together.shape == (4, 64) and np.allclose(together, alone, atol=2e-5)
        assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert embedder.encode([], "query").shape == (0, 0)

    def test_a_folder_without_modules_is_taken_for_lamra(self, embedder, picture, tmp_path):
        embedder.model.save_pretrained(tmp_path)
        embedder.processor.save_pretrained(tmp_path)
        loaded = load_embedder(tmp_path, device="cpu", dtype="float32")
        assert isinstance(loaded, LamRAEmbedder) and loaded.name == str(tmp_path)
        items = self.items(picture)
        assert np.allclose(loaded.encode(items, "query"), embedder.encode(items, "query"), atol=2e-5)
