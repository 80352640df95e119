"""The walk of one document through the code, from ``read_page`` to the release of its lease.

A real run: an embedded MongoDB, the fake Ollama, one document, one worker. What a process does once (open the
connection, look up the loaded model) comes before, in a first run over another document; the second run is recorded.

What counts. The walk begins when ``DocumentStore.read_page`` is called and ends when ``DocumentStore.release`` returns.
A profiler sees each call of a function of the product meanwhile, in every task and thread that handles the document.
Left out are the background tasks that no document waits for (leases, stop, indexes, look for urgent ones, lease of the service,
progress report, heartbeat, window), and code that ``dataclasses`` generates.

- modules: the modules that the walk enters.
- arrows: the pairs (caller's module, called module) that differ. Each pair counts once, as in a drawing; coming back by
  ``return`` is not an arrow.
- folder arrows: the arrows between modules of different folders; the top level counts as one folder.
- raw changes: how often the next call is in another module than the call before, repetitions included. It is shown for
  comparison with older measurements and has no target.
"""

from __future__ import annotations

import asyncio
import dis
import itertools
import sys
import tempfile
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from pymongo import MongoClient

from batch_processor import BatchProcessor
from benchmarks.documents import conversations
from benchmarks.table import Row
from embedded.mongod import EmbeddedMongod
from mongo_client import DocumentStore
from tests.fakes.fake_ollama import FakeOllama

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULES, MAX_FOLDER_ARROWS = 20, 25
BACKGROUND = {"leases", "stop", "indexes", "urgent", "service", "window", "heartbeat"}  # tasks
REPORTS = {"_report", "note_answer"}  # functions
NOT_PRODUCT = ("tests", "benchmarks", ".venv")
DATABASE, SOURCE = "walk", "conversation_set"


@dataclass
class Walk:
    """The calls of one document: (task, caller's module, called module, function)."""

    calls: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """The modules in the order in which the walk enters them."""
        return list(dict.fromkeys(module for _, _, module, _ in self.calls))

    @property
    def arrows(self) -> list[tuple[str, str]]:
        """The distinct (caller, called) pairs of modules, in the order of their first call."""
        return list(dict.fromkeys((caller, module) for _, caller, module, _ in self.calls if caller != module))

    @property
    def folder_arrows(self) -> list[tuple[str, str]]:
        """The arrows between folders."""
        return [(one, other) for one, other in self.arrows if _folder(one) != _folder(other)]

    @property
    def raw_changes(self) -> tuple[int, int]:
        """The number of changes to another module, and to another folder."""
        entered = [module for _, _, module, _ in self.calls]
        pairs = list(itertools.pairwise(entered))
        return sum(a != b for a, b in pairs), sum(_folder(a) != _folder(b) for a, b in pairs)


class Recorder:
    """A profile function that records calls between ``read_page`` and the end of ``release``."""

    def __init__(self) -> None:
        self.walk = Walk()
        self._is_armed = self._is_on = self._has_ended = False
        self._modules: dict[CodeType, str] = {}
        self._frames: dict[int, FrameType] = {}  # entered frames: a resumed coroutine is not a new call

    def arm(self) -> None:
        """Record the next walk."""
        self._is_armed = True

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Handle one event of ``sys.setprofile``."""
        if self._has_ended or event not in ("call", "return"):
            return
        code = frame.f_code
        if event == "return":
            self._has_ended = self._is_on and code is _RELEASE and _is_finished(frame)
            return
        if code is asyncio.to_thread.__code__:
            _HANDED_OVER_BY.set(self._caller(frame))  # the thread inherits it
        module = self._module(code)
        if not module or id(frame) in self._frames:
            return
        self._frames[id(frame)] = frame
        self._is_on |= self._is_armed and code is _READ_PAGE
        task = _task_name()
        if not self._is_on or task in BACKGROUND or self._is_report(frame):
            return
        self.walk.calls.append((task, self._caller(frame), module, code.co_qualname))

    def _caller(self, frame: FrameType) -> str:
        """Return the module of the nearest caller in the product; in a thread, the one that called ``to_thread``."""
        above = frame.f_back
        while above is not None:
            if module := self._module(above.f_code):
                return module
            above = above.f_back
        return _HANDED_OVER_BY.get() or self._module(frame.f_code)

    def _is_report(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name in REPORTS:
                return True
            frame = frame.f_back
        return False

    def _module(self, code: CodeType) -> str:
        """Return the product's module of *code*; empty for libraries, tests and generated code."""
        if code not in self._modules:
            path = Path(code.co_filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in NOT_PRODUCT
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts) if inside else ""
            self._modules[code] = name
        return self._modules[code]


_HANDED_OVER_BY: ContextVar[str] = ContextVar("handed_over_by", default="")
_RETURNS = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in dis.opmap}
_READ_PAGE, _RELEASE = DocumentStore.read_page.__code__, DocumentStore.release.__code__


def record(uri: str) -> Walk:
    """Run one document in a database of the MongoDB at *uri*, which is dropped before and after; return its walk."""
    with (
        tempfile.TemporaryDirectory(prefix="walk-") as folder,
        FakeOllama() as fake,
        MongoClient[dict[str, Any]](uri) as client,
    ):
        client.drop_database(DATABASE)
        try:
            return asyncio.run(_record(client, uri, fake.url, Path(folder) / "batch_files"))
        finally:
            client.drop_database(DATABASE)


async def _record(client: MongoClient[dict[str, Any]], uri: str, url: str, directory: Path) -> Walk:
    first, second = conversations(2)
    source, recorder = client[DATABASE][SOURCE], Recorder()
    processor = BatchProcessor(
        mongodb_uri=uri,
        db_name=DATABASE,
        source_collection=SOURCE,
        ollama_endpoint=url,
        ollama_model="llama3.2:latest",
        batch_files_dir=directory,
        max_concurrent=1,
    )
    threading.setprofile(recorder)  # for the threads that the runs start
    sys.setprofile(recorder)
    try:
        async with processor:
            source.insert_one(first)
            await processor.run()
            source.insert_one(second)
            recorder.arm()
            stats = await processor.run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if stats["successful"] != 1:
        raise RuntimeError(f"the document of the walk was not classified: {stats}")
    return recorder.walk


def measure(*, quick: bool) -> list[Row]:  # noqa: ARG001 - one document is quick
    """Print the walk; return its figures."""
    with tempfile.TemporaryDirectory(prefix="walk-") as folder, EmbeddedMongod(Path(folder)) as mongod:
        walk = record(mongod.uri)
    for number, (caller, module) in enumerate(walk.arrows, 1):
        functions = dict.fromkeys(call[3].split(".<locals>")[0] for call in walk.calls if call[1:3] == (caller, module))
        is_crossing = "*" if _folder(caller) != _folder(module) else " "
        print(f"{number:3} {is_crossing} {caller:24} -> {module:26} {', '.join(functions)}")
    print(f"\nmodules: {', '.join(walk.modules)}\n")
    changes, folder_changes = walk.raw_changes
    modules, folder_arrows = len(walk.modules), len(walk.folder_arrows)
    return [
        _row("walk of one document: modules", modules, MAX_MODULES),
        _row("  arrows between folders (* above)", folder_arrows, MAX_FOLDER_ARROWS),
        Row("  arrows between modules", str(len(walk.arrows))),
        Row("  raw module changes / folder changes", f"{changes} / {folder_changes}"),
    ]


def _row(measure: str, figure: int, most: int) -> Row:
    return Row(measure, str(figure), target=f"<= {most}", met=figure <= most)


def _folder(module: str) -> str:
    return module.rpartition(".")[0]


def _task_name() -> str:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return "thread"
    return task.get_name() if task else ""


def _is_finished(frame: FrameType) -> bool:
    """Return whether a coroutine's "return" event is its end, not an ``await`` that suspends it."""
    return frame.f_code.co_code[frame.f_lasti] in _RETURNS
