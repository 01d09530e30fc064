from __future__ import annotations

import json
import shutil

import pytest
import torch
from records import PRESET, make_example, make_records
from safetensors.torch import save_file
from tiny_models import make_processor

from vretrver_hf.cards import Figure, data_card, model_card, read_figures, trajectories_card
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines import Sampling
from vretrver_hf.evaluation.results import Results
from vretrver_hf.reranker import bundled_model, save_config


SFT = {
    "stage": "sft",
    "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "datasets": ["someone/cold-start"],
    "steps": 120,
    "epochs": 3.0,
    "processes": 8,
    "seconds": 600.0,
    "loss": 0.25,
    "settings": {"learning_rate": 1e-05},
    "versions": {"trl": "1.16.0"},
    "before": None,
}
GRPO = {**SFT, "stage": "grpo", "base_model": "/home/somebody/outputs/sft", "datasets": ["/data/rl.parquet"]}
RESULTS = [{"task": "t2i", "split": "held-out", "n": 1000, "r1": 0.856, "interval": [0.833, 0.876], "calls": 0.97}]


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    save_config(tmp_path, PRESET, 8, 4, Sampling())
    return tmp_path


class TestModelCard:
    def test_tells_what_ran(self, folder):
        (folder / "training.json").write_text(json.dumps({**GRPO, "before": SFT}))
        (folder / "evaluation.json").write_text(json.dumps(RESULTS))
        card = model_card(folder, "someone/mine", license="apache-2.0")
        text = str(card)
        assert "A Qwen2.5-VL with 17 weights (BF16, F32)" in text
        assert "| sft | Qwen/Qwen2.5-VL-7B-Instruct | someone/cold-start | 120 | 3.00 | 8 | 10.0 | 0.2500 |" in text
        assert "| grpo | sft (a local folder) | rl.parquet (a local folder) |" in text
        assert text.index("| sft |") < text.index("| grpo |")
        assert "| t2i | held-out | R@1 | 85.6 % | 83.3 – 87.6 % | 1,000 | 0.97 |" in text
        assert "| overview pixels | 4096 |" in text and '"learning_rate": 1e-05' in text
        assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.datasets == ["someone/cold-start"]
        assert card.data.license == "apache-2.0" and card.data.eval_results[0].metric_value == 0.856

    def test_how_a_computer_is_set_up_is_nobodys_business(self, folder):
        (folder / "training.json").write_text(json.dumps({**GRPO, "before": SFT}))
        text = str(model_card(folder, "someone/mine", license="mit"))
        assert "/home" not in text and "/data/" not in text.replace("someone/data/", "")

    def test_does_not_claim_what_nobody_measured(self, folder):
        text = str(model_card(folder, "someone/mine", license="mit"))
        assert "Nothing was measured" in text and "Nothing beside the weights says how they were trained" in text
        assert "What it is good at is not known" in text

    def test_needs_a_licence(self, folder):
        with pytest.raises(ValueError, match="nothing says under which licence"):
            model_card(folder, "someone/mine")

    def test_a_card_that_somebody_wrote_is_kept(self, tmp_path):
        written = (bundled_model() / "README.md").read_text(encoding="utf-8")
        assert model_card(bundled_model(), "someone/tiny").text == written.split("---\n", 2)[2]
        (tmp_path / "README.md").write_text(written)
        assert str(model_card(tmp_path, "someone/tiny", license="mit")).count("license: mit") == 1

    def test_new_figures_make_a_new_card(self, tmp_path):
        for path in bundled_model().iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path)
        figure = Figure("t2i", "mine", "R@1", 0.5, 10)
        card = model_card(tmp_path, "someone/tiny", figures=[figure])
        assert "| t2i | mine | R@1 | 50.0 % | – | 10 | – |" in str(card) and card.data.license == "apache-2.0"
        card.save(tmp_path / "README.md")
        again = model_card(tmp_path, "someone/tiny", figures=[])
        assert "Nothing was measured" in str(again)

    def test_the_card_a_trainer_leaves_is_passed_over(self, folder):
        (folder / "README.md").write_text("---\nlicense: license\ntags:\n- trl\n---\n# Model Card\n")
        assert "# mine" in str(model_card(folder, "someone/mine", license="mit"))


class TestFigures:
    def test_reads_what_was_measured(self, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps([{"task": "a", "n": 3, "metric": "mAP@5", "value": 0.1}]))
        assert read_figures(tmp_path / "rows.json") == [Figure("a", "–", "mAP@5", 0.1, 3)]

    def test_reads_what_evaluate_wrote(self, tmp_path):
        """Of each data set its own metric: that of CIRCO is MAP@5."""

        def group(n, **means):
            metrics = {name: {"mean": mean, "interval": [mean - 0.1, mean + 0.1]} for name, mean in means.items()}
            return {"n": n, "reranked": metrics, "coarse": {}, "cost": {"calls": 1.5}}

        groups = {"mine": group(8, **{"hit@1": 0.5, "map@5": 0.2}), "circo": group(4, **{"hit@1": 0.5, "map@5": 0.25})}
        Results("a", {"data": "some/where/rows.parquet"}, groups, {}, None, {}).save(tmp_path / "metrics.json")
        expected = [
            Figure("mine", "rows.parquet", "hit@1", 0.5, 8, 0.4, 0.6, 1.5),
            Figure("circo", "rows.parquet", "map@5", 0.25, 4, 0.15, 0.35, 1.5),
        ]
        assert read_figures(tmp_path) == read_figures(tmp_path / "metrics.json") == expected

    @pytest.mark.parametrize("rows", ["{}", '[{"task": "a"}]', '[{"n": 1, "r1": 0.1}]', '[{"task": "a", "n": "x"}]'])
    def test_names_a_row_that_is_none(self, tmp_path, rows):
        (tmp_path / "rows.json").write_text(rows)
        with pytest.raises(ValueError, match="rows.json"):
            read_figures(tmp_path / "rows.json")


class TestDataCards:
    def test_counts_queries_by_source_and_kind(self):
        examples = [make_example(number) for number in range(4)]
        text = str(data_card(examples, "someone/doors", license="cc-by-4.0", attribution=True))
        assert "4 queries, each with 3 candidates" in text and "license: cc-by-4.0" in text
        assert text.count("| doors |") == 2  # odd queries have a picture
        assert "ATTRIBUTION.md" in text

    def test_tells_how_trajectories_went(self):
        encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
        records = make_records(encoder, [make_example(number, pictures=False) for number in range(4)])
        text = str(trajectories_card(records, "someone/traces", license="mit", story="---\na: 1\n---\n# T\n\nHow.\n"))
        assert "| doors | text → text | 4 | 100.0 % | 1.00 | 100.0 % | 0 |" in text
        assert "How." in text and "# T\n" not in text and "| max calls | 4 |" in text
