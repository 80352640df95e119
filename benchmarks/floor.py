"""The baseline of the comparison: the smallest loop that reads, calls, parses and writes, with the product's libraries.

``python benchmarks/floor.py JOB.json``; the benchmarks write the job. One cursor, a queue, a number of
workers, nothing else: no checks, retries, timeouts, files, leases, statuses or indexes. An error of
any kind ends it. It knows one shape of document: tweets in the order of time.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from pymongo import AsyncMongoClient, WriteConcern

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


async def run(job: dict[str, Any]) -> None:
    """Classify every document of *job*.

    Keys: mongodb_uri, db_name, source_collection, results_collection, url (of the chat route),
    concurrency, loop ("uvloop" or "asyncio"), system_prompt, body (the request without its messages).
    """
    durable = WriteConcern("majority", j=True)
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(2 * job["concurrency"])
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(job["mongodb_uri"])
    database = client[job["db_name"]]
    results = database.get_collection(job["results_collection"], write_concern=durable)
    constant = {**job["body"], "format": orjson.Fragment(orjson.dumps(job["body"]["format"]))}
    system = {"role": "system", "content": job["system_prompt"]}

    async def work(session: aiohttp.ClientSession) -> None:
        while (document := await queue.get()) is not None:
            lines = [f"{'Customer' if tweet['inbound'] else 'Agent'}: {tweet['text']}" for tweet in document["tweets"]]
            content = "<conversation>\n" + "\n".join(lines) + "\n</conversation>"
            body = orjson.dumps({**constant, "messages": [system, {"role": "user", "content": content}]})
            async with session.post(job["url"], data=body, headers=HEADERS) as response:
                reply = orjson.loads(await response.read())
            await results.insert_one(
                {
                    "conversation_number": document["conversation_number"],
                    "source_conversation_id": document["_id"],
                    "classification": orjson.loads(reply["message"]["content"]),
                    "model_used": reply["model"],
                    "prompt_tokens": reply["prompt_eval_count"],
                    "reply_tokens": reply["eval_count"],
                    "created_at": datetime.now(UTC),
                }
            )

    connector = aiohttp.TCPConnector(limit=job["concurrency"])
    async with client, aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(job["concurrency"]):
            tasks.create_task(work(session))
        async for document in database[job["source_collection"]].find():
            await queue.put(document)
        for _ in range(job["concurrency"]):
            await queue.put(None)


if __name__ == "__main__":
    given = orjson.loads(Path(sys.argv[1]).read_bytes())
    (uvloop.run if given["loop"] == "uvloop" else asyncio.run)(run(given))
