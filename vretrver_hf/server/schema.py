"""Requests and responses of `/v1/rerank`."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..images import ItemError, is_data_url, is_url
from ..items import Item
from ..ranking import Ranking
from .body import parse_json
from .limits import Limits, Refused


class ImageUrl(BaseModel):
    """Where a picture is: a data URL."""

    url: str


class Block(BaseModel):
    """A piece of a document's content."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class Document(BaseModel):
    """
    A query or a document: `text`, `image` (a data URL), or both; or `content`, as vLLM's clients send it, a list of
    `{"type": "text", "text": …}` and one `{"type": "image_url", "image_url": {"url": …}}`.
    """

    model_config = ConfigDict(extra="ignore")

    text: str | None = None
    image: str | None = None
    content: list[Block] | None = None


class RerankRequest(BaseModel):
    """
    What clients send. Fields that other services know and this one does not are ignored.

    `evidence` asks for what the model thought, called and saw.
    """

    model_config = ConfigDict(extra="ignore")

    model: str = "default"
    query: str | Document
    documents: list[str | Document]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    evidence: bool = False


def request_of(body: bytes, limits: Limits) -> RerankRequest:
    """
    What a body asks for.

    Raises:
        `Refused`: saying which field is wrong and why, without repeating what was sent: that may be a whole picture.
    """
    values = parse_json(body, limits.max_parts)
    documents = values.get("documents") if isinstance(values, dict) else None
    if isinstance(documents, list) and len(documents) > limits.max_documents:
        raise Refused(400, f"{len(documents)} documents are more than the {limits.max_documents} allowed")
    try:
        return RerankRequest.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)[:5]
        told = [f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}" for problem in problems]
        raise Refused(422, "; ".join(told)) from None


def items_of(request: RerankRequest, limits: Limits) -> list[Item]:
    """
    The query and its documents, each picture read once, so that a bad one is known before the model runs.

    Raises:
        `ItemError`: naming the document and what is wrong with it.
    """
    names = ["query", *(f"document {index}" for index in range(len(request.documents)))]
    values = [request.query, *request.documents]
    items = [_item(value, name, limits) for name, value in zip(names, values, strict=True)]
    pixels = 0
    for name, item in zip(names, items, strict=True):
        if item.image is not None:
            pixels += _pixels(item, name, limits)
        if pixels > limits.max_total_pixels:
            raise ItemError(
                f"{name}: with its picture there are {pixels:,} pixels, more than the {limits.max_total_pixels:,} "
                "that all pictures may have together; make them smaller"
            )
    return items


def response_of(request: RerankRequest, ranking: Ranking, request_id: str) -> dict[str, Any]:
    """
    The ranking, best first. `relevance_score` is 1 − place/n: a listwise ranking has an order and no other score.
    """
    count = len(ranking.order)
    results = []
    for place, index in enumerate(ranking.order[: request.top_n]):
        result: dict[str, Any] = {"index": index, "relevance_score": 1 - place / count}
        if request.return_documents:
            document = request.documents[index]
            result["document"] = {"text": document} if isinstance(document, str) else document.model_dump()
        results.append(result)
    response = {
        "id": request_id,
        "model": request.model,
        "results": results,
        "status": ranking.status,
        "usage": {"total_tokens": ranking.num_tokens},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
    if request.evidence:
        response["evidence"] = evidence_of(ranking)
    return response


def evidence_of(ranking: Ranking) -> list[dict[str, Any]]:
    """
    What happened in each window: which documents it showed, and every thought, call and observation. The pictures that
    the model saw are given as references: image number in the window (0 is the query's), region, and size.
    """
    windows = []
    for trajectory in ranking.trajectories:
        turns = [
            {
                "role": turn.role,
                "text": turn.text,
                "thought": turn.thought,
                "call": turn.call,
                "valid": turn.valid,
                "problem": turn.problem,
                "images": [ref.to_dict() for ref in turn.images],
            }
            for turn in trajectory.turns[1:]
        ]
        windows.append(
            {
                "documents": trajectory.candidate_indices,
                "order": [trajectory.candidate_indices[place] for place in trajectory.order],
                "status": trajectory.status,
                "problems": trajectory.problems,
                "turns": turns,
            }
        )
    return windows


def _item(value: str | Document, name: str, limits: Limits) -> Item:
    """The item that a query or document stands for. A string is text, unless it is a data URL of a picture."""
    if isinstance(value, str):
        value = Document(image=value) if is_data_url(value) else Document(text=value)
    try:
        text, image = _parts(value)
        if text is not None and len(text) > limits.max_characters:
            raise ItemError(f"its text has {len(text):,} characters, more than the {limits.max_characters:,} allowed")
        if image is not None and not is_data_url(image):
            image = _file(image, limits)
        return Item(text=text, image=image)
    except ItemError as error:
        raise ItemError(f"{name}: {error}") from None


def _pixels(item: Item, name: str, limits: Limits) -> int:
    """Reads a picture. Returns how many pixels it has."""
    try:
        image = item.load_image(limits.images, name=name)
    except ItemError as error:
        # Where the operator's files lie is none of a client's business.
        root = "" if limits.image_root is None else repr(os.path.join(limits.image_root.resolve(), ""))[1:-1]
        raise ItemError(str(error).replace(root, "") if root else str(error)) from None
    return image.width * image.height


def _parts(document: Document) -> tuple[str | None, str | None]:
    texts = [] if document.text is None else [document.text]
    images = [document.image] if document.image else []
    for block in document.content or []:
        if block.type == "text" and block.text is not None:
            texts.append(block.text)
        elif block.type == "image_url" and block.image_url is not None:
            images.append(block.image_url.url)
        else:
            raise ItemError("its content must hold blocks of type text or image_url")
    if len(images) > 1:
        raise ItemError(f"it has {len(images)} images, and an item has at most one")
    return "\n".join(texts) or None, images[0] if images else None


def _file(name: str, limits: Limits) -> Any:
    """A picture file that the operator allowed."""
    if limits.image_root is None or is_url(name):
        raise ItemError("its image must be a data: URL; this server fetches no URLs and reads no files of that name")
    root = limits.image_root.resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError):
        path = root.parent
    if root not in path.parents:
        raise ItemError("its image must lie in the folder that this server reads pictures from")
    return path
