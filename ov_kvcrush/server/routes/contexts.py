"""/v1/contexts: texts that are read and compressed once, and asked by many requests of the key that made them."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile

from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.outputs import KeptTokens
from ov_kvcrush.server.answers import salt_of
from ov_kvcrush.server.contexts.held import HeldContext
from ov_kvcrush.server.edge import UPLOAD
from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.requests import read_json, unless_gone
from ov_kvcrush.server.schemas.contexts import ContextRequest, ExtendRequest, ForkRequest, fields_of
from ov_kvcrush.server.state import ServerState, owner_of, state_of
from ov_kvcrush.server.tools.prompt import history_of

router = APIRouter(prefix="/v1/contexts")
Report = Callable[[int, int], None]


@router.post("")
async def make(request: Request) -> JSONResponse:
    """Read and compress what the body says; or take up a .kvc file."""
    state, owner = state_of(request), owner_of(request)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == UPLOAD:
        return await _uploaded(request, state, owner)
    body = await (_form(request) if media == "multipart/form-data" else read_json(request, ContextRequest))
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "one of text, messages and file must be given, got none or several", "text")
    if body.tools and body.messages is None:
        raise ApiError(400, "tools must be left out without messages", "tools")
    text: Any = body.text
    if body.messages is not None:
        text = history_of(body.messages, body.tools, state.tools)

    def compress(report: Report) -> Context:
        return state.pipeline.compress(
            text,
            policy=body.policy,
            kept=body.kept,
            protect=body.protect or (),
            progress=report,
            budget=body.budget,
            cache_salt=salt_of(state, owner),
        )

    made = await unless_gone(request, state.contexts.make(owner, compress, body.name))
    return JSONResponse(_object(state, made), 201)


async def _form(request: Request) -> ContextRequest:
    """A form with a file of text and the other fields."""
    async with request.form(max_files=1, max_fields=300, max_part_size=1 << 20) as form:
        values: dict[str, Any] = {}
        for name in form:
            found = form.getlist(name)
            values[name] = found[0] if len(found) == 1 and name != "protect" else found
        file = values.pop("file", None)
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file must be a file of text, got none", "file")
        try:
            values["text"] = (await file.read()).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ApiError(400, "file must be text in UTF-8, got other bytes", "file") from None
        values.setdefault("name", file.filename)
    return fields_of(values)


async def _uploaded(request: Request, state: ServerState, owner: str) -> JSONResponse:
    """A .kvc file as the body; it is checked before it is believed."""
    with tempfile.TemporaryDirectory(prefix="ov_kvcrush-") as folder:
        path = Path(folder) / "upload.kvc"
        try:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    await state.contexts.call(file.write, chunk)
        except OSError as error:
            raise ApiError(507, f"the file cannot be stored: {error.strerror or type(error).__name__}") from None
        name = request.query_params.get("name")
        made = await unless_gone(
            request, state.contexts.make(owner, lambda report: Context.load(path, state.pipeline), name)
        )
    return JSONResponse(_object(state, made), 201)


@router.get("")
async def every(request: Request) -> dict[str, Any]:
    """Those of the key that asks, the newest first."""
    state = state_of(request)
    return {"object": "list", "data": [_object(state, x) for x in state.contexts.of(owner_of(request))]}


@router.get("/{name}")
async def one(request: Request, name: str) -> dict[str, Any]:
    """What one is. kept_map=true: how much of each token is kept, and the text of each."""
    state, owner = state_of(request), owner_of(request)
    found = _object(state, state.contexts.get(owner, name))
    wanted = request.query_params.get("kept_map", "false")
    if wanted not in ("true", "false"):
        raise ApiError(400, f"kept_map must be true or false, got {wanted!r}", "kept_map")
    if wanted == "true":
        context = await state.contexts.lease(owner, name)
        try:
            kept = await state.contexts.call(context.kept_map)
        finally:
            context.close()
        found["kept_map"] = await state.contexts.call(_map, state, kept)
    return found


@router.delete("/{name}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Forget one; requests that go on from it end as they would."""
    await state_of(request).contexts.delete(owner_of(request), name)
    return {"id": name, "object": "context.deleted", "deleted": True}


@router.get("/{name}/file")
async def file(request: Request, name: str) -> Response:
    """Its .kvc file."""
    folder = tempfile.TemporaryDirectory(prefix="ov_kvcrush-")
    try:
        path = await state_of(request).contexts.file(owner_of(request), name, Path(folder.name) / "context.kvc")
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(path, media_type=UPLOAD, filename=f"{name}.kvc", background=BackgroundTask(folder.cleanup))


@router.post("/{name}/extend")
async def extend(request: Request, name: str) -> JSONResponse:
    """A new context: this one and more text behind it."""
    body, state, owner = await read_json(request, ExtendRequest), state_of(request), owner_of(request)
    context = await state.contexts.lease(owner, name)

    def extended(report: Report) -> Context:
        return context.extend(body.text, policy=body.policy, progress=report)

    try:
        made = await unless_gone(request, state.contexts.make(owner, extended, body.name))
    finally:
        context.close()
    return JSONResponse(_object(state, made), 201)


@router.post("/{name}/fork")
async def fork(request: Request, name: str) -> JSONResponse:
    """A new context of the same bytes."""
    body = await read_json(request, ForkRequest) if await request.body() else ForkRequest()
    state, owner = state_of(request), owner_of(request)
    context = await state.contexts.lease(owner, name)
    try:
        made = await state.contexts.make(owner, lambda report: context.fork(), body.name)
    finally:
        context.close()
    return JSONResponse(_object(state, made), 201)


def _object(state: ServerState, held: HeldContext) -> dict[str, Any]:
    return {
        "id": held.id,
        "object": "context",
        "created": int(held.created),
        "name": held.name,
        "kind": held.kind,
        "num_tokens": held.num_tokens,
        "kept_tokens": held.kept_tokens,
        "kv_bytes": held.nbytes,
        "bf16_bytes": state.pipeline.bf16_kv_bytes(held.num_tokens),
        "policy": held.policy,
        "seconds": round(held.seconds, 3),
        "resident": held.context is not None,
        "on_disk": held.path is not None,
    }


def _map(state: ServerState, kept: KeptTokens) -> dict[str, Any]:
    """texts: of each token; a character of several tokens is with its last. kept: the share of all layers and KV heads
    that hold it, in [0, 1].
    """
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    length, heads = len(kept.ids), [places for layer in kept.positions for places in layer]
    counts = np.zeros(length, np.int64)
    for places in heads:
        counts += np.bincount(places[places < length], minlength=length)
    shares = counts / max(len(heads), 1)
    return {
        "texts": [characters.decode(state.texts.raw(token)) for token in kept.ids.tolist()],
        "kept": [round(float(share), 3) for share in shares],
    }
