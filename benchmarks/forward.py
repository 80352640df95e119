"""The yardstick of the service: a bare FastAPI route that only forwards the conversation to the model."""

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
    """Keep one session to the model server for the whole life of the process."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    """Tell that the process runs."""
    return {"status": "ok"}


@app.post("/classify")
async def classify(request: Request) -> Response:
    """Ask the model with the conversation as it is, and hand its answer on unread."""
    session: aiohttp.ClientSession = request.app.state.session
    messages: Any = orjson.loads(await request.body())["messages"]
    prompt = "\n".join(f"{message['sender']}: {message['text']}" for message in messages)
    body = orjson.dumps({"model": "llama3.2", "messages": [{"role": "user", "content": prompt}], "stream": False})
    async with session.post(f"{os.environ['OLLAMA_ENDPOINT']}/api/chat", data=body) as response:
        return Response(await response.read(), media_type="application/json")
