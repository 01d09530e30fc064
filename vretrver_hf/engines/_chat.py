"""Chat endpoints: what is sent to one, what its reply says, and what is told of its failures."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any, Literal

from PIL import Image


ImageFormat = Literal["png", "jpeg"]


def make_client(base_url: str, api_key: str, timeout: float, retries: int) -> Any:
    """
    An `openai.AsyncOpenAI` that also tries again where a reply was cut off inside its JSON.

    Args:
        base_url (`str`):
            Address of the endpoint, such as `"http://localhost:8000/v1"`.
        api_key (`str`):
            Its key.
        timeout (`float`):
            Seconds that one reply may take.
        retries (`int`):
            How often a request is tried again, with growing pauses, after 408, 409, 429, 5xx, a time-out, a broken
            connection or a broken reply.
    """
    import openai

    http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [_count_broken_as_failed]})
    return openai.AsyncOpenAI(
        base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries, http_client=http_client
    )


def image_block(image: Image.Image, image_format: ImageFormat = "png") -> dict[str, Any]:
    """A picture as a block of a chat message."""
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    url = f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text_of(reply: Any) -> str:
    """
    What the model wrote, up to the end of its first call. Servers may take a reply apart into thought, text and calls:
    it is put together again.

    Raises:
        `ValueError`: if the reply is no chat completion.
    """
    try:
        message = reply.choices[0].message
    except (AttributeError, IndexError, TypeError):
        raise ValueError("the reply is no chat completion") from None
    # Half a surrogate pair is valid in JSON, but no tokenizer and no file takes it.
    text = (message.content or "").encode("utf-8", "replace").decode()
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if thought and "<think>" not in text:
        text = f"<think>{thought}</think>\n{text}"
    if message.tool_calls and "<answer>" not in text:
        text = _until(text, "</think>") + "\n" + _written_call(message.tool_calls[0])
    before, end, after = text.partition("</think>")
    return before + end + _until(after, "</tool_call>")


def turn_seed(source: random.Random) -> int:
    """The seed of a request, from a turn's own source of chance."""
    return source.getrandbits(31)


def reason_of(error: Exception, secret: str) -> str:
    """What went wrong, in a line. Servers have been seen to repeat the key in what they say about it."""
    text = f"{error} {error.__cause__ or ''}"
    if secret:
        text = text.replace(secret, "…")
    return " ".join(text.split())[:300] or type(error).__name__


async def _count_broken_as_failed(response: Any) -> None:
    """The client tries a bad gateway again, but not a reply that it cannot read."""
    if response.is_success and "json" in response.headers.get("content-type", ""):
        await response.aread()
        try:
            response.json()
        except ValueError:
            response.status_code = 502


def _written_call(call: Any) -> str:
    name, arguments = call.function.name, call.function.arguments
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def _until(text: str, mark: str) -> str:
    before, end, _ = text.partition(mark)
    return before + end
