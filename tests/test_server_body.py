from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf.server.body import parse_json
from vretrver_hf.server.limits import Refused


VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab,[{"\\\n é')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def count(value) -> int:
    """Strings, lists, objects and commas of a JSON text, from its value."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(count, value))
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + len(value) + sum(map(count, value.values()))
    return 0


@given(VALUES, st.booleans())
def test_as_many_parts_as_allowed_and_no_more(value, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_json(body, count(value)) == value
    if count(value):
        with pytest.raises(Refused, match="send fewer documents"):
            parse_json(body, count(value) - 1)


@pytest.mark.parametrize("small", [b"{},", b"[],", b'"",', b"1,", b'{"a":[{"b":""}]},'])
def test_many_small_values_take_no_memory(small):
    body = b'{"documents": [' + small * 300_000 + b"0]}"
    tracemalloc.start()
    with pytest.raises(Refused, match="more than 21,000 values"):
        parse_json(body, 21_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000


@pytest.mark.parametrize(
    "text",
    [
        b'"' + b'\\"' * 2_000_000,  # a string that never ends, and might be tried again from each of its quotes
        b'"' + b"\\\\" * 2_000_000 + b"\\",
        b'"' * 2_000_001,
        b"[" * 20_000,
        b"[" * 20_000 + b"]" * 20_000,  # deeper than the parser goes
        b"9" * 5_000,  # a number that Python does not read
        b"\xff",
        b"",
    ],
)
def test_hostile_texts_are_refused_soon(text):
    started = time.perf_counter()
    with pytest.raises(Refused):
        parse_json(text, 10**9)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_encodings_in_which_the_count_would_be_wrong(encoding):
    with pytest.raises(Refused, match="not in UTF-8"):
        parse_json('["Ģ", [], []]'.encode(encoding), 100)
