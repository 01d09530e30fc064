from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from vretrver_hf.chat_templates import families, load_chat_template
from vretrver_hf.protocol import format_answer, format_call, format_turn


CALL = format_turn("look closer", format_call("select_images", {"target_images": [1]}))
ANSWER = format_turn("the first fits", format_answer([0, 1]))
PICTURE = {"type": "image"}
CONVERSATION = [
    {"role": "system", "content": "Rank."},
    {"role": "user", "content": [{"type": "text", "text": "a cat"}, PICTURE]},
    {"role": "assistant", "content": CALL},
    {"role": "user", "content": [{"type": "text", "text": "Image 1:"}, PICTURE]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


def render(encoder, messages, **kwargs):
    return encoder.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def test_renders_the_conversation(encoder):
    assert render(encoder, CONVERSATION) == (
        "<|im_start|>system\nRank.<|im_end|>\n"
        "<|im_start|>user\na cat<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n<think>look closer</think>\n"
        '<tool_call>\n{"name": "select_images", "arguments": {"target_images": [1]}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nImage 1:<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n<think>the first fits</think>\n<answer>[1, 2]</answer><|im_end|>\n"
    )


def test_every_beginning_renders_as_a_prefix(encoder):
    whole = render(encoder, CONVERSATION)
    for end in range(2, len(CONVERSATION)):
        beginning = render(encoder, CONVERSATION[:end])
        assert whole.startswith(beginning)
        if CONVERSATION[end]["role"] == "assistant":
            assert whole.startswith(render(encoder, CONVERSATION[:end], add_generation_prompt=True))


def test_marks_what_the_model_writes_itself(encoder):
    encoded = encoder.tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    own = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    # The loop closes a call turn, the model closes an answer turn; the newline after either belongs to neither.
    assert encoder.tokenizer.decode(own) == CALL + ANSWER + "<|im_end|>"


def test_parsed_calls_render_as_the_model_wrote_them(encoder):
    call = {"type": "function", "function": {"name": "select_images", "arguments": {"target_images": [1]}}}
    parsed = {"role": "assistant", "content": "<think>look closer</think>", "tool_calls": [call]}
    as_tool = {**CONVERSATION[3], "role": "tool"}
    messages = [*CONVERSATION[:2], parsed, as_tool, CONVERSATION[4]]
    assert render(encoder, messages) == render(encoder, CONVERSATION)


def test_tools_are_listed_once(encoder):
    schema = {"type": "function", "function": {"name": "select_images"}}
    listed = render(encoder, CONVERSATION, tools=[schema])
    assert '<tools>\n{"type": "function", "function": {"name": "select_images"}}\n</tools>' in listed
    own = [{"role": "system", "content": "Mine: <tools></tools>"}, *CONVERSATION[1:]]
    assert render(encoder, own, tools=[schema]) == render(encoder, own)


def test_without_a_system_turn_the_family_speaks_as_its_stock_template(family, encoder):
    start = {"qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "qwen3_vl": ""}[family]
    assert render(encoder, [{"role": "user", "content": "hi"}]) == f"{start}<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "<think>look closer</think>", [{"target_images": [1]}]),
        (ANSWER + "<|im_end|>", ANSWER, []),
        # A call that is only quoted in a thought must not run.
        (f"<think>I could write {CALL[CALL.index('<tool_call>') :]}</think>\n<answer>[1]</answer>", None, []),
    ],
)
def test_response_parsing_finds_the_calls(encoder, text, content, calls):
    prefix = encoder.tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)["input_ids"]
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    message = encoder.tokenizer.parse_response(ids, prefix=prefix)
    assert message["content"] == (text if content is None else content)
    assert [call["function"]["arguments"] for call in message.get("tool_calls", [])] == calls


def test_template_and_parsing_survive_saving(encoder, tmp_path):
    encoder.processor.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.response_template == encoder.tokenizer.response_template
    assert again.apply_chat_template(CONVERSATION, tokenize=False) == render(encoder, CONVERSATION)


def test_trl_knows_how_to_train_with_it(encoder):
    """TRL refuses a template that is not prefix-preserving or has no response parsing."""
    from trl.chat_template_utils import is_chat_template_prefix_preserving

    assert is_chat_template_prefix_preserving(encoder.processor)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="llava.*qwen2_5_vl"):
        load_chat_template("llava")
    assert families() == ["qwen2_5_vl", "qwen3_vl"]
