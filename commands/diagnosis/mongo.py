"""Checks of MongoDB for ``check_mongo_connection.py`` and ``cli.py doctor``. They change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from commands.diagnosis.findings import Finding, error, ok, warning
from config import Settings, load_taxonomy
from domain.text import counted
from error_handler import (
    ConfigurationError,
    StoreError,
    StoreForbiddenError,
    StoreUnavailableError,
    StoreUnreadableError,
)
from mongo_client import DocumentStore
from storage import extended_json
from storage.extended_json import id_text
from storage.mongo_connection import hosts_of
from storage.mongo_errors import connection_problem, has_no_server, translated
from storage.mongo_indexes import RESULT_INDEXES, UNIQUE_FIELD, label_indexes, serves_as_unique
from storage.selection import StateFields, switch
from storage.subset import Subset
from utils.process import tell_line
from worker.left_out import count_in_time, count_left_out, status_name
from worker.subset import require_query

LOOPBACK = ("127.", "localhost", "[::1]")
MAX_CLOCK_DIFFERENCE_S = 5.0
OBJECT_IDS_SINCE = datetime(2009, 1, 1, tzinfo=UTC)  # the first release of MongoDB; earlier times are numbers


_SHAPE = switch(
    "unknown",
    ({"$isArray": ["$tweets"]}, "tweets"),
    ({"$isArray": ["$messages"]}, "messages"),
    ({"$eq": [{"$type": "$text"}, "string"]}, "query"),
)
DUPLICATES: list[dict[str, Any]] = [
    {"$group": {"_id": f"${UNIQUE_FIELD}", "count": {"$sum": 1}}},
    {"$match": {"count": {"$gt": 1}}},
    {"$limit": 1},
]

Check = Callable[[DocumentStore, Settings], AsyncGenerator[Finding]]
Clock = Callable[[], datetime]
Tell = Callable[[str], None]


async def diagnose(
    settings: Settings, now: Clock = lambda: datetime.now(UTC), tell: Tell = tell_line, subset: Subset | None = None
) -> AsyncGenerator[Finding]:
    """Yield the findings about MongoDB, the connection first; a failed connection ends the diagnosis.

    *now* is this machine's clock; *tell* gets the progress of counts that take long. With a *subset*, what a run of it does not
    select is counted.

    Raises:
        ConfigurationError: MONGODB_URI is not a usable address.
    """
    documents = partial(_documents, tell)
    checks: list[Check] = [
        _topology,
        _rights,
        _subset,
        documents,
        _oldest_pending,
        _results,
        _indexes,
        partial(_clock, now),
    ]
    store = DocumentStore(settings, subset=subset)
    try:
        try:
            await store.check()
        except StoreError as exc:
            yield error(str(exc), _connection_remedy(exc, settings))
            return
        for check in checks:
            try:
                async for finding in check(store, settings):
                    yield finding
            except StoreForbiddenError as exc:
                yield error(str(exc), "Grant the rights with db.grantRolesToUser(USER, ['readWrite']).")
            except ConfigurationError as exc:
                yield error(str(exc), "A run stops for the same reason.")
            except StoreUnreadableError as exc:
                yield warning(str(exc), "A run names each such document and processes the others.")
            except StoreError as exc:
                seconds = settings.mongodb_timeout_ms / 1000
                yield warning(str(exc), f"The time limit is {seconds:g} s; raise MONGODB_TIMEOUT_MS.")
    finally:
        await store.close()


def _connection_remedy(exc: StoreError, settings: Settings) -> str:
    if isinstance(exc, StoreForbiddenError):
        return "If the user belongs to another database, add ?authSource=admin to MONGODB_URI."
    is_away = has_no_server(exc.__cause__)
    if connection_problem(exc.__cause__) and not is_away:
        return "The server's own log has more; docs/robustness.md explains each message."
    if is_away and _hosts(settings).startswith(LOOPBACK):
        return "Start it (systemctl start mongod, or docker start ...), or run python cli.py --embedded."
    return "Check the host and port, and any firewall or IP allow list in between."


async def _topology(store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    with translated("read the server's state"):
        hello = await store.database.command("hello")
        build = await store.database.command("buildInfo")
    name, members = hello.get("setName"), len(hello.get("hosts", ()))
    sentence = f"MongoDB {build['version']} answers at {_hosts(settings)}."
    yield ok(sentence, version=build["version"], replica_set_members=members)
    if hello.get("msg") == "isdbgrid":
        yield ok("It is a sharded cluster: writes survive the loss of a server.")
    elif name is None:
        yield ok("It is a standalone server: writes survive its crash; there is no failover, so a run waits for it.")
    elif not hello.get("isWritablePrimary"):
        remedy = "List all members and add ?replicaSet= to MONGODB_URI, without directConnection."
        yield error(f"This member of the replica set {name} takes no writes.", remedy)
    else:
        meaning = (
            "writes are retried, but a single member has no failover"
            if members == 1
            else "writes go to the majority, and a run continues when the primary changes"
        )
        yield ok(f"It is a replica set ({name}, {counted(members, 'member')}): {meaning}.")


async def _rights(store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    """Compare the user's privileges with those that a run needs, and send the commands of a run; change nothing."""
    await store.identity()
    with translated("read the user's rights"):
        status = await store.database.command({"connectionStatus": 1, "showPrivileges": True})
    auth = status["authInfo"]
    with translated("read the source"):
        await store.database[settings.source_collection].find_one({}, {"_id": 1})
    if not auth["authenticatedUsers"]:
        if _hosts(settings).startswith(LOOPBACK):
            yield ok("No access control: every program on this machine can read and change the data.")
        else:
            sentence = "No access control: anyone who reaches the port can read and change the data."
            yield warning(sentence, "Start mongod with --auth and create a user.")
        await store.try_writes()
        return
    needed = {
        settings.source_collection: {"find", "update", "createIndex"},
        settings.results_collection: {"find", "insert", "update", "createIndex"},
        f"{settings.source_collection}_leases": {"find", "insert", "update", "remove", "createIndex"},
    }
    privileges, has_all = auth["authenticatedUserPrivileges"], True
    for collection, actions in needed.items():
        if missing := actions - allowed_actions(privileges, settings.db_name, collection):
            is_needed = missing != {"createIndex"} or collection == settings.results_collection
            has_all &= not is_needed
            sentence = f"The user lacks {', '.join(sorted(missing))} on {settings.db_name}.{collection}."
            remedy = f"Grant them with db.grantRolesToUser(USER, [{{role: 'readWrite', db: '{settings.db_name}'}}])."
            yield error(sentence, remedy) if is_needed else warning(sentence, remedy)
    if has_all:
        await store.try_writes()
        yield ok("The user may read the source, and write statuses, leases and results.")


def allowed_actions(privileges: Sequence[Mapping[str, Any]], db_name: str, collection: str) -> set[str]:
    """Return the actions that *privileges* (of connectionStatus) allow on one collection."""
    actions: set[str] = set()
    for privilege in privileges:
        resource = privilege["resource"]
        covers = resource.get("db") in ("", db_name) and resource.get("collection") in ("", collection)
        if covers or resource.get("anyResource"):
            actions.update(privilege["actions"])
    return actions


async def _subset(store: DocumentStore, _settings: Settings) -> AsyncGenerator[Finding]:
    """Report how many documents a run takes of the subset, and how many wait outside of it."""
    if store.states.subset:
        await require_query(store, store.states.subset, "--filter")
        inside, pending = await store.count("sweep"), await store.count("sweep", whole=True)
        yield ok(
            f"Of {counted(pending, 'pending document')}, {inside:,} are in the subset.", pending=pending, inside=inside
        )


def count_stages(states: StateFields) -> list[dict[str, Any]]:
    """Return the stages that count the documents by shape and state."""
    return [{"$group": {"_id": {"shape": _SHAPE, "state": states.state_expression}, "count": {"$sum": 1}}}]


async def _documents(tell: Tell, store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    place = f"{settings.db_name}.{settings.source_collection}"
    with translated("count the documents"):
        groups = await _aggregate(store.database[settings.source_collection], count_stages(store.states))
    by_shape: dict[str, dict[str, int]] = {}
    for group in groups:
        state = status_name(group["_id"]["state"])
        by_shape.setdefault(group["_id"]["shape"], {})[state] = group["count"]
    if not by_shape:
        remedy = "Import documents with python -m utils.mongodb_import, or correct --db-name and --source-collection."
        yield warning(f"{place} is empty.", remedy)
    for shape, states in sorted(by_shape.items()):
        counts = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
        if shape == "unknown":
            remedy = "A run skips them; data/README.md lists the accepted shapes."
            yield Finding("warning", f"{place}, of no accepted shape: {counts}.", remedy, dict(states))
        else:
            yield Finding("ok", f"{place}, shape {shape}: {counts}.", numbers=dict(states))
    found = {state for states in by_shape.values() for state in states}
    try:
        left_out = await count_in_time(count_left_out(store, queued=0), tell)
    except StoreUnavailableError as exc:
        yield warning("The documents that a run does not select were not counted.", f"{exc}.")
    else:
        for sentence, remedy in replace(left_out, failed=0, skipped=0, filtered=0).problems(
            settings.results_collection
        ):
            yield warning(sentence, remedy)  # the other three are counted above
    if "processing" in found:
        yield ok(
            "Documents in processing belong to a running worker or to one that died; the next run takes the latter."
        )


def _object_id(moment: datetime) -> Any:
    """Return the least ObjectId of *moment*."""
    return extended_json.loads(b'{"$oid": "%08x0000000000000000"}' % int(moment.timestamp()))


def _is_numbered(object_id: str) -> bool:
    """Return whether a script counted *object_id* up: a driver draws the five bytes that are zero then."""
    return object_id[8:18] == "0" * 10 and object_id[18:] != "0" * 6


async def _oldest_pending(store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    """Report the age of the oldest pending document; only an ObjectId that a driver made holds a time."""
    source = store.database[settings.source_collection]
    pending = store.states.queries["pending"]
    first, last = (_object_id(moment) for moment in (OBJECT_IDS_SINCE, datetime.now(UTC) + timedelta(days=1)))
    with translated("find the oldest pending document"):
        dated = await source.find_one({**pending, "_id": {"$gte": first, "$lt": last}}, {"_id": 1}, sort=[("_id", 1)])
        found = dated or await source.find_one(pending, {"_id": 1}, sort=[("_id", 1)])
    if not found:
        yield ok("Nothing is pending.")
    elif not dated or _is_numbered(str(dated["_id"])):
        yield ok(f"The first pending document is {id_text(found['_id'])}; its id contains no time.")
    else:
        created_at = dated["_id"].generation_time
        days = (datetime.now(UTC) - created_at).days
        age = f"created {created_at:%Y-%m-%d %H:%M} UTC, {counted(days, 'day')} ago"
        yield ok(f"The oldest pending document is {dated['_id']}, {age}.", days=days)


async def _results(store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    with translated("count the results"):
        count = await store.database[settings.results_collection].estimated_document_count()
    yield ok(f"{settings.db_name}.{settings.results_collection} holds {counted(count, 'result')}.", results=count)


async def _indexes(store: DocumentStore, settings: Settings) -> AsyncGenerator[Finding]:
    results = store.database[settings.results_collection]
    try:
        with translated("read the indexes"):
            on_source = _first_fields(await store.database[settings.source_collection].index_information())
            indexes = await results.index_information()
    except StoreForbiddenError:  # a run creates indexes and never lists them
        yield warning("The indexes were not checked: the user may not list them.", "Grant listIndexes.")
        return
    on_results, is_unique = _first_fields(indexes), serves_as_unique(indexes)
    missing = [f"{settings.source_collection}.{field}" for field in store.states.indexed if field not in on_source]
    wanted = (*RESULT_INDEXES, *label_indexes(_field_names(settings)))
    missing += [f"{settings.results_collection}.{field}" for field in wanted if field not in on_results]
    with translated("find several results of one document"):
        repeated = [] if is_unique else await _aggregate(results, DUPLICATES)
    if repeated:
        remedy = (
            f"Find them with db.{results.name}.aggregate([{{$group: {{_id: '${UNIQUE_FIELD}', n: {{$sum: 1}}}}}}, "
            "{$match: {n: {$gt: 1}}}]) and delete the surplus."
        )
        yield error("Some documents have several results, so the unique index cannot be created.", remedy)
        return
    if not is_unique and UNIQUE_FIELD in on_results:
        remedy = (
            f"MongoDB before 5.0 needs db.{results.name}.dropIndex({{{UNIQUE_FIELD}: 1}}) first; later ones do not."
        )
        yield warning(
            f"The index on {results.name}.{UNIQUE_FIELD} is not unique; the next run adds one that is.", remedy
        )
    elif not is_unique:
        missing.append(f"{settings.results_collection}.{UNIQUE_FIELD} (unique)")
    if missing:
        remedy = "The next run creates them; this takes a while on millions of documents."
        yield warning(f"Indexes are missing: {', '.join(missing)}.", remedy)
    elif is_unique:
        yield ok("All indexes exist.")


async def _clock(now: Clock, store: DocumentStore, _settings: Settings) -> AsyncGenerator[Finding]:
    """Compare *now* with MongoDB's clock, which decides when leases expire."""
    before = now()
    with translated("read the server's clock"):
        hello = await store.database.command("hello")
    between = before + (now() - before) / 2
    ahead_s = (between - hello["localTime"].replace(tzinfo=UTC)).total_seconds()
    numbers = {"ahead_s": round(ahead_s, 3)}
    if abs(ahead_s) <= MAX_CLOCK_DIFFERENCE_S:
        yield ok(f"The local clock and MongoDB's clock differ by {abs(ahead_s):.1f} s.", **numbers)
    else:
        side = "ahead of" if ahead_s > 0 else "behind"
        sentence = f"The local clock is {abs(ahead_s):,.0f} s {side} MongoDB's; times in results and logs disagree."
        yield warning(sentence, "Synchronise both clocks (timedatectl set-ntp true).", **numbers)


def _field_names(settings: Settings) -> tuple[str, ...]:
    """Return the fields of the taxonomy; none if it does not load, which ``diagnose_labels`` reports."""
    with contextlib.suppress(ConfigurationError):
        return load_taxonomy(settings.taxonomy_file).field_names
    return ()


def _first_fields(indexes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the fields by which *indexes* find documents: an index of several fields serves the first."""
    return {index["key"][0][0] for index in indexes.values()}


async def _aggregate(collection: Any, pipeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cursor = await collection.aggregate(pipeline, allowDiskUse=True)
    return [document async for document in cursor]


def _hosts(settings: Settings) -> str:
    return hosts_of(settings.mongodb_uri.get_secret_value())
