from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from PIL import Image
from tiny_models import FAMILIES, make_model, make_processor

from vretrver_hf.encoding import Encoder


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def processor(family):
    return make_processor(family)


@pytest.fixture(scope="session")
def model(family, processor):
    return make_model(family, processor)


@pytest.fixture(scope="session")
def encoder(family, processor) -> Encoder:
    return Encoder(processor, family)


@pytest.fixture
def picture():
    """Makes pictures of noise: any two of them differ in every region."""
    source = np.random.default_rng(0)

    def make(width: int = 96, height: int = 64) -> Image.Image:
        return Image.fromarray(source.integers(0, 255, (height, width, 3), dtype=np.uint8))

    return make
