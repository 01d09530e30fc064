from __future__ import annotations

import subprocess
import sys

import pytest

import vretrver_hf


@pytest.mark.parametrize("name", vretrver_hf.__all__)
def test_public_names_are_there(name):
    assert getattr(vretrver_hf, name).__name__ == name
    assert name in dir(vretrver_hf)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'Rerankers'"):
        vretrver_hf.Rerankers  # noqa: B018


def test_scoring_costs_no_torch_import():
    code = "import sys, vretrver_hf; vretrver_hf.EvidenceReward(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
