"""The baseline of the service benchmark: a bare FastAPI route that forwards the conversation to the model."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI, Request, Response


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one session to the model server for the lifetime of the process."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    """Report that the process is running."""
    return {"status": "ok"}


@app.post("/classify")
async def classify(request: Request) -> Response:
    """Send the conversation to the model unchanged and return its answer unparsed."""
    session: aiohttp.ClientSession = request.app.state.session
    messages: Any = orjson.loads(await request.body())["messages"]
    prompt = "\n".join(f"{message['sender']}: {message['text']}" for message in messages)
    body = orjson.dumps({"model": "llama3.2", "messages": [{"role": "user", "content": prompt}], "stream": False})
    async with session.post(f"{os.environ['OLLAMA_ENDPOINT']}/api/chat", data=body) as response:
        return Response(await response.read(), media_type="application/json")
