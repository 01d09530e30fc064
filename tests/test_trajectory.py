from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf.images import ImageRef
from vretrver_hf.trajectory import Trajectory, Turn, from_dataset, read_jsonl, to_dataset, write_jsonl


def example(**changes) -> Trajectory:
    call = {"name": "crop_image", "arguments": {"bbox_2d": [0.1, 0, 0.5, 1], "target_image": 2}}
    turns = [
        Turn("prompt", [1, 2, 3], "<prompt>", images=[ImageRef(1, 56, 84), ImageRef(2, 84, 84)], seconds=0.25),
        Turn(
            "assistant", [4, 5, 9], "call", num_sampled=2, logprobs=[-0.5, -1.25], seconds=1.5, kind="call",
            thought="hm", call=call, valid=True,
        ),
        Turn("observation", [6, 6], "Image 2:", images=[ImageRef(2, 56, 56, (0, 10, 20, 30))], valid=True),
        Turn("assistant", [7, 9], "answer", num_sampled=2, kind="answer", problem="no <think>"),
    ]  # fmt: skip
    values = {"query_id": "q", "num_candidates": 2, "candidate_indices": [4, 1], "preset": {"name": "release"}}
    values |= {"turns": turns, "finish": "answer", "order": [1, 0], "status": "repaired", "problems": ["prose"]}
    return Trajectory(**{**values, "seed": 3, "sample": 1, **changes})


def test_tokens_masks_and_logprobs_line_up():
    trajectory = example()
    assert trajectory.token_ids == [1, 2, 3, 4, 5, 9, 6, 6, 7, 9]
    # The 9 of the first model turn was appended by the loop; the 9 of the last was sampled, its probability unknown.
    assert trajectory.mask == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    assert trajectory.logprobs == [None, None, None, -0.5, -1.25, None, None, None, None, None]
    assert [ref.index for ref in trajectory.images] == [1, 2, 2]


def test_counts():
    trajectory = example()
    assert (trajectory.num_calls, trajectory.num_valid_calls) == (1, 1)
    assert (trajectory.num_tokens, trajectory.num_sampled_tokens, trajectory.seconds) == (10, 4, 1.75)
    assert trajectory.completion == "call\nanswer"
    trajectory.turns[1].valid = False
    assert (trajectory.num_calls, trajectory.num_valid_calls) == (1, 0)


def test_jsonl_gives_equal_records_back(tmp_path):
    trajectories = [example(), example(query_id="é\n<|im_end|>", turns=[], error="broken")]
    write_jsonl(tmp_path / "t.jsonl", trajectories)
    assert list(read_jsonl(tmp_path / "t.jsonl")) == trajectories


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [example()])
    path.write_text(path.read_text() + '{"query_id": "x"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2"):
        list(read_jsonl(path))


def test_datasets_give_equal_records_back(tmp_path):
    import datasets

    counted = example(exact_tokens=False, usage={"tokens": 20, "sampled": 5})
    trajectories = [example(), example(turns=[], order=[], error="broken"), counted]
    to_dataset(trajectories).to_parquet(tmp_path / "t.parquet")
    again = datasets.Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path))
    assert list(from_dataset(again)) == trajectories


numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=5,
)


@given(st.lists(numbers, max_size=5), st.text(), st.dictionaries(st.text(), values, max_size=3))
def test_any_content_survives_json(logprobs, text, arguments):
    call = {"name": text, "arguments": arguments}
    turn = Turn("assistant", [0] * len(logprobs), text, num_sampled=len(logprobs), logprobs=logprobs, call=call)
    trajectory = example(turns=[turn])
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_sampled": 3}, "num_sampled is 3 but the turn has 2"),
        ({"num_sampled": 2, "logprobs": [-1.0]}, "1 log-probabilities for 2"),
    ],
)
def test_records_that_do_not_add_up_are_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        Turn("assistant", [1, 2], "x", **values)
