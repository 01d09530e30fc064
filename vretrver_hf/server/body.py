"""Bodies of requests: read within bounds, and made into values only once it is known that there are few."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request

from .limits import Refused


# A string, whole, or the begin of another value. The closing quote is optional, so that a string without one is passed
# over at once and not tried again from each of its quotes.
_PART = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """
    The bytes of a JSON request.

    Args:
        request (`Request`):
            The request.
        max_bytes (`int`):
            Most bytes, whatever the request's headers say.

    Raises:
        `Refused`: if it is no JSON, larger, or its sender goes away.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # a page in a browser can send other types to any server, unasked
        raise Refused(415, "send JSON, with the header Content-Type: application/json")
    too_large = Refused(413, f"the request is larger than {max_bytes:,} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise Refused(499, "the client has gone") from None
    return bytes(body)


def parse_json(body: bytes, max_parts: int) -> Any:
    """
    The values of a JSON text.

    Args:
        body (`bytes`):
            The text.
        max_parts (`int`):
            Most strings, lists, objects and commas. They are counted before any value is made: small ones take many
            times the memory of their text.

    Raises:
        `Refused`: if there are more, or it is no JSON.
    """
    if not json.detect_encoding(body).startswith("utf-8"):  # in another encoding the count would be wrong
        raise Refused(422, "the request is not in UTF-8")
    if _has_more_parts(body, max_parts):
        raise Refused(400, f"the request has more than {max_parts:,} values; send fewer documents")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(422, f"the request is no JSON: {error}") from None


def _has_more_parts(body: bytes, limit: int) -> bool:
    # Of what is mostly pictures, the marks alone are few enough, and counting those takes a quarter of the time.
    if sum(map(body.count, (b'"', b",", b"[", b"{"))) <= limit:
        return False
    return next(itertools.islice(_PART.finditer(body), limit, None), None) is not None
