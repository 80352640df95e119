"""A run loads no library that only another command needs, starts without the garbage collector, and leaves no garbage."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import certifi
import pytest

from tests.worker.site import ROOT, Ended, Site, WorkerProcess, conversation

# Each is loaded where it is used: by --embedded, by a command of its own, by the service, by the drawing of a bar.
OF_OTHERS = {
    *(
        "chromadb",
        "croniter",
        "dns",
        "fastapi",
        "genai_prices",
        "httpx2",
        "jinja2",
        "mongomock_motor",
        "motor",
        "openai",
    ),
    *("phonenumbers", "requests", "sqlalchemy", "starlette", "statistics", "stdnum", "urllib3"),
    *("http.cookiejar", "embedded.baseline"),
    *("uvicorn", "vaderSentiment", "api", "main", "llm_wrapper", "openai_batch", "rich.progress"),
    *(
        "config.openai_settings",
        "config.service_settings",
        "help_desks.reader",
    ),
    *("embedded.mongod", "worker.timing", "worker.server_pool", "ray", "cluster"),
}
LOADED = re.compile(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cli.py", pytest.param("run_batch_processor.py", marks=pytest.mark.thorough)])
def test_a_plain_run_loads_no_library_of_others(site: Site, script: str) -> None:
    """From its first line to its summary, as the interpreter itself tells it."""
    site.source.insert_many([conversation(number) for number in range(3)])
    command = [sys.executable, "-X", "importtime", str(ROOT / script)]
    with WorkerProcess(command, site.environment(), site.folder) as worker:
        ended = worker.ended()
    loaded = set(LOADED.findall(ended.err))
    assert (ended.code, site.results.count_documents({})) == (0, 3)
    assert {"aiohttp", "pymongo", "rich.console", "worker.run"} <= loaded  # they are listed at all
    assert not loaded & OF_OTHERS


@pytest.mark.thorough
def test_certificates_of_the_system_are_not_read_for_a_run() -> None:
    """aiohttp loads them twice for contexts that no request uses; requests to https have those of their route."""
    told = (
        "import os, async_llm_wrapper\n"
        "from aiohttp import connector\n"
        "contexts = connector._SSL_CONTEXT_VERIFIED, connector._SSL_CONTEXT_UNVERIFIED\n"
        "print([context.cert_store_stats()['x509'] for context in contexts])\n"
        "print(os.environ.get('SSL_CERT_FILE'), os.environ.get('SSL_CERT_DIR'))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SSL_CERT_FILE": certifi.where()}
    run = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[0, 0]", f"{certifi.where()} None"]


def run_watched(site: Site, told: str, *arguments: str) -> Ended:
    """Run cli.py to its end with *told* in place of ``uvloop.run``; it calls ``run(main)`` and returns what that does."""
    watch = (
        f"import gc, runpy, sys, uvloop\nrun = uvloop.run\n{told}\nuvloop.run = told\n"
        f"sys.argv = [{str(ROOT / 'cli.py')!r}, *{arguments!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    with WorkerProcess([sys.executable, "-c", watch], site.environment(PYTHONPATH=str(ROOT)), site.folder) as worker:
        return worker.ended()


@pytest.mark.thorough
def test_a_document_leaves_no_garbage(site: Site) -> None:
    """A reference cycle keeps its prompt or document until the garbage collector runs, which is rarely."""
    count = 1000
    site.source.insert_many([conversation(number) for number in range(count)])
    told = (
        "def told(main):\n"
        "    gc.disable()\n"
        "    code = run(main)\n"
        "    print('in circles:', gc.collect())\n"
        "    return code"
    )
    ended = run_watched(site, told, "--batch-size", "100")
    assert (ended.code, site.results.count_documents({})) == (0, count), ended.err
    assert int(re.findall(r"in circles: (\d+)", ended.out)[0]) < count  # of the run's own parts there are a few hundred


@pytest.mark.thorough
def test_garbage_is_looked_for_again_once_a_run_is_under_way(site: Site) -> None:
    """A process that never looks grows with each cycle; only the imports are free of it."""
    site.source.insert_many([conversation(number) for number in range(3)])
    told = "def told(main):\n    print('in the run:', gc.isenabled(), gc.get_threshold())\n    return run(main)"
    ended = run_watched(site, told)
    assert ended.code == 0, ended.err
    assert "in the run: True (10000, 5, 2)" in ended.out
