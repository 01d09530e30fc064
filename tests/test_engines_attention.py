from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.backends import cuda

from vretrver_hf.engines._attention import without_cudnn_attention


def fake_model(device: str = "cuda", implementation: str = "sdpa"):
    """What the switch looks at; it can be turned without a GPU."""
    text_config = SimpleNamespace(_attn_implementation=implementation)
    return SimpleNamespace(device=torch.device(device), config=SimpleNamespace(get_text_config=lambda: text_config))


@pytest.fixture(autouse=True, params=[True, False])
def before(request):
    """Whether cuDNN was on; somebody may have turned it off for good."""
    was_on = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(request.param)
    yield request.param
    cuda.enable_cudnn_sdp(was_on)


def test_is_off_inside_and_as_before_outside(before):
    with pytest.raises(ZeroDivisionError), without_cudnn_attention(fake_model()):
        assert not cuda.cudnn_sdp_enabled()
        with without_cudnn_attention(fake_model()):
            assert not cuda.cudnn_sdp_enabled()
        assert not cuda.cudnn_sdp_enabled()
        raise ZeroDivisionError
    assert cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("arguments", [("cpu", "sdpa"), ("cuda", "eager"), ("cuda", "flash_attention_2")])
def test_is_left_alone_where_it_does_not_matter(before, arguments):
    with without_cudnn_attention(fake_model(*arguments)):
        assert cuda.cudnn_sdp_enabled() == before


def test_contexts_of_two_threads_overlap(before):
    """The first one in is the first one out: the switch stays off until the other one ends too."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with without_cudnn_attention(fake_model()):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with without_cudnn_attention(fake_model()):
        thread.start()
        assert entered.wait(10)
    assert not cuda.cudnn_sdp_enabled()
    leave.set()
    thread.join()
    assert cuda.cudnn_sdp_enabled() == before
