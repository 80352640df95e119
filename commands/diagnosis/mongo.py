"""Is MongoDB ready for a run? Findings for ``check_mongo_connection.py`` and ``cli.py doctor``. Changes nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from commands.diagnosis.findings import Finding
from config import Settings
from config.masked_settings import hosts_of
from domain.text import one_line
from error_handler import StoreError, StoreForbiddenError
from mongo_client import RESULT_INDEXES, SOURCE_INDEXES, DocumentStore, selection_filter
from storage.extended_json import id_text
from storage.mongo_errors import translated

KNOWN_STATUSES = frozenset({"pending", "processing", "processed", "failed", "skipped"})
LOOPBACK = ("127.", "localhost", "[::1]")
UNIQUE_FIELD = "source_conversation_id"
MAX_CLOCK_DIFFERENCE_S = 5.0

_IS_PROCESSED = {"$eq": ["$processed", True]}
_HAS_REASON = {"$gt": ["$status_reason", None]}

# Documents by shape and state; single queries have no status, their state is told by other fields.
COUNTS = [
    {
        "$group": {
            "_id": {
                "shape": {
                    "$switch": {
                        "branches": [
                            {"case": {"$isArray": ["$tweets"]}, "then": "tweets"},
                            {"case": {"$isArray": ["$messages"]}, "then": "messages"},
                            {"case": {"$eq": [{"$type": "$text"}, "string"]}, "then": "query"},
                        ],
                        "default": "unknown",
                    }
                },
                "state": {
                    "$switch": {
                        "branches": [
                            {"case": {"$gt": ["$status", None]}, "then": "$status"},
                            {"case": {"$and": [_IS_PROCESSED, _HAS_REASON]}, "then": "skipped"},
                            {"case": _IS_PROCESSED, "then": "processed"},
                            {"case": _HAS_REASON, "then": "failed"},
                        ],
                        "default": "pending",
                    }
                },
            },
            "count": {"$sum": 1},
        }
    }
]


Check = Callable[[DocumentStore, Settings], Awaitable[list[Finding]]]


async def diagnose(settings: Settings, *further: Check) -> AsyncGenerator[Finding]:
    """Yield what there is to say, the connection first; nothing follows a connection that fails.

    *further* checks come after the usual ones.

    Raises:
        ConfigurationError: MONGODB_URI is not a usable address.
    """
    checks: list[Check] = [_topology, _rights, _documents, _oldest_pending, _results, _indexes, *further]
    store = DocumentStore(settings)
    try:
        try:
            await store.check()
        except StoreError as exc:
            yield Finding("error", f"MongoDB at {_hosts(settings)}: {exc}", _connection_remedy(exc, settings))
            return
        for check in checks:
            try:
                findings = await check(store, settings)
            except StoreForbiddenError as exc:
                findings = [
                    Finding("error", str(exc), "db.grantRolesToUser(USER, ['readWrite']) gives what is needed.")
                ]
            except StoreError as exc:
                seconds = settings.mongodb_timeout_ms / 1000
                findings = [Finding("warning", str(exc), f"It had {seconds:g} s; MONGODB_TIMEOUT_MS allows more.")]
            for finding in findings:
                yield finding
    finally:
        await store.close()


def _connection_remedy(exc: StoreError, settings: Settings) -> str:
    if isinstance(exc, StoreForbiddenError):
        return "Often the user belongs to another database: add ?authSource=admin to MONGODB_URI."
    if _hosts(settings).startswith(LOOPBACK):
        return "Start it (systemctl start mongod, or docker start ...); python cli.py --embedded needs none."
    return "Look whether host and port are right, and whether a firewall or an IP allow list is between."


async def _topology(store: DocumentStore, settings: Settings) -> list[Finding]:
    with translated("ask for the server's state"):
        hello = await store.database.command("hello")
        build = await store.database.command("buildInfo")
    version = {"version": build["version"], "replica_set_members": len(hello.get("hosts", ()))}
    findings = [Finding("ok", f"MongoDB {build['version']} answers at {_hosts(settings)}.", numbers=version)]
    if hello.get("msg") == "isdbgrid":
        return [*findings, Finding("ok", "It is a sharded cluster: writes survive the loss of a server.")]
    if "setName" not in hello:
        meaning = "what is written survives a crash of it, and a run waits while it is away; there is no failover"
        return [*findings, Finding("ok", f"It is a standalone server: {meaning}.")]
    members = len(hello.get("hosts", ()))
    if not hello.get("isWritablePrimary"):
        remedy = "Name all members and ?replicaSet= in MONGODB_URI, without directConnection."
        return [
            *findings,
            Finding("error", f"This member of the replica set {hello['setName']} takes no writes.", remedy),
        ]
    meaning = (
        "writes are repeated by themselves, but with one member there is no failover"
        if members == 1
        else "writes go to the majority, and a run goes on when the primary changes"
    )
    return [*findings, Finding("ok", f"It is a replica set ({hello['setName']}, {members} members): {meaning}.")]


async def _rights(store: DocumentStore, settings: Settings) -> list[Finding]:
    """Compare what the user may do with what a run needs; nothing is written for it."""
    with translated("ask for the user's rights"):
        status = await store.database.command({"connectionStatus": 1, "showPrivileges": True})
    auth = status["authInfo"]
    with translated("read the source"):
        await store.database[settings.source_collection].find_one({}, {"_id": 1})
    if not auth["authenticatedUsers"]:
        if _hosts(settings).startswith(LOOPBACK):
            return [Finding("ok", "No access control: every program on this machine may read and change the data.")]
        remedy = "Start mongod with --auth and create a user."
        return [Finding("warning", "No access control: whoever reaches the port may read and change the data.", remedy)]
    needed = {
        settings.source_collection: {"find", "update", "createIndex"},
        settings.results_collection: {"find", "insert", "update", "createIndex"},
        f"{settings.source_collection}_leases": {"find", "insert", "update", "remove", "createIndex"},
    }
    findings = []
    for collection, actions in needed.items():
        missing = actions - allowed_actions(auth["authenticatedUserPrivileges"], settings.db_name, collection)
        if missing:
            sentence = f"The user lacks {', '.join(sorted(missing))} on {settings.db_name}.{collection}."
            remedy = f"db.grantRolesToUser(USER, [{{role: 'readWrite', db: '{settings.db_name}'}}]) gives all of them."
            findings.append(Finding("error", sentence, remedy))
    return findings or [Finding("ok", "The user may read the source and write results, statuses, leases and indexes.")]


def allowed_actions(privileges: Sequence[Mapping[str, Any]], db_name: str, collection: str) -> set[str]:
    """Return the actions that *privileges*, as connectionStatus reports them, allow on one collection."""
    actions: set[str] = set()
    for privilege in privileges:
        resource = privilege["resource"]
        covers = resource.get("db") in ("", db_name) and resource.get("collection") in ("", collection)
        if covers or resource.get("anyResource"):
            actions.update(privilege["actions"])
    return actions


async def _documents(store: DocumentStore, settings: Settings) -> list[Finding]:
    place = f"{settings.db_name}.{settings.source_collection}"
    with translated("count the documents"):
        cursor = await _aggregate(store.database[settings.source_collection], COUNTS)
    by_shape: dict[str, dict[str, int]] = {}
    for group in cursor:
        shape, state = group["_id"]["shape"], group["_id"]["state"]
        by_shape.setdefault(shape, {})[one_line(str(state), 40)] = group["count"]
    if not by_shape:
        remedy = "python utils/mongodb_import.py fills it with samples or from a file; or check --db-name and the name."
        return [Finding("warning", f"{place} is empty.", remedy)]
    findings = []
    for shape, states in sorted(by_shape.items()):
        counts = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
        if shape == "unknown":
            remedy = "A run skips them; data/README.md shows the shapes."
            findings.append(Finding("warning", f"{place}, of no accepted shape: {counts}.", remedy, states))
        else:
            findings.append(Finding("ok", f"{place}, shape {shape}: {counts}.", numbers=states))
    findings += _unusual_states({state for states in by_shape.values() for state in states})
    return findings


def _unusual_states(states: set[str]) -> Iterator[Finding]:
    foreign = sorted(states - KNOWN_STATUSES)
    if foreign:
        remedy = "They are never selected; set status to pending where they shall be."
        yield Finding(
            "warning", f"Some documents have another status than this product's: {', '.join(foreign)}.", remedy
        )
    if "processing" in states:
        yield Finding(
            "ok",
            "Documents that say processing are in work now, or were left by a worker that died: the next run takes them.",
        )


async def _oldest_pending(store: DocumentStore, settings: Settings) -> list[Finding]:
    """Report the age of the oldest pending document whose id tells a time: only ObjectIds do."""
    source = store.database[settings.source_collection]
    pending = selection_filter("pending")
    with translated("look for the oldest pending document"):
        dated = await source.find_one({**pending, "_id": {"$type": "objectId"}}, {"_id": 1}, sort=[("_id", 1)])
        found = dated or await source.find_one(pending, {"_id": 1}, sort=[("_id", 1)])
    if not found:
        return [Finding("ok", "Nothing is pending.")]
    if not dated:
        return [Finding("ok", f"The first pending document is {id_text(found['_id'])}; its id tells no age.")]
    created_at = dated["_id"].generation_time
    days = (datetime.now(UTC) - created_at).days
    return [
        Finding(
            "ok",
            f"The oldest pending document is {dated['_id']}, made {created_at:%Y-%m-%d %H:%M} UTC, {days} days ago.",
            numbers={"days": days},
        )
    ]


async def _results(store: DocumentStore, settings: Settings) -> list[Finding]:
    with translated("count the results"):
        count = await store.database[settings.results_collection].estimated_document_count()
    return [
        Finding(
            "ok",
            f"{settings.db_name}.{settings.results_collection} holds {count:,} results.",
            numbers={"results": count},
        )
    ]


def clock_check(now: Callable[[], datetime]) -> Check:
    """Return the check that compares *now*, an aware clock, with that of MongoDB: the leases of a run are kept by it."""

    async def check(store: DocumentStore, _settings: Settings) -> list[Finding]:
        before = now()
        with translated("ask for the server's clock"):
            hello = await store.database.command("hello")
        between = before + (now() - before) / 2
        ahead_s = (between - hello["localTime"].replace(tzinfo=UTC)).total_seconds()
        numbers = {"ahead_s": round(ahead_s, 3)}
        if abs(ahead_s) <= MAX_CLOCK_DIFFERENCE_S:
            return [Finding("ok", f"The clocks here and of MongoDB differ by {abs(ahead_s):.1f} s.", numbers=numbers)]
        where = "ahead of" if ahead_s > 0 else "behind"
        sentence = (
            f"The clock here is {abs(ahead_s):,.0f} s {where} that of MongoDB: times in results and logs disagree."
        )
        return [Finding("warning", sentence, "Let both machines keep time (timedatectl set-ntp true).", numbers)]

    return check


async def _indexes(store: DocumentStore, settings: Settings) -> list[Finding]:
    results = store.database[settings.results_collection]
    try:
        with translated("read the indexes"):
            on_source = _by_field(await store.database[settings.source_collection].index_information())
            on_results = _by_field(await results.index_information())
    except StoreForbiddenError:  # a run does not need that right: it only makes indexes
        return [Finding("warning", "The user may not list indexes, so they were not looked at.", "Grant listIndexes.")]
    missing = [f"{settings.source_collection}.{field}" for field in SOURCE_INDEXES if field not in on_source]
    missing += [f"{settings.results_collection}.{field}" for field in RESULT_INDEXES if field not in on_results]
    unique = on_results.get(UNIQUE_FIELD)
    if unique is None:
        missing.append(f"{settings.results_collection}.{UNIQUE_FIELD} (unique)")
        with translated("look for several results of one document"):
            duplicates = await _aggregate(
                results,
                [
                    {"$group": {"_id": f"${UNIQUE_FIELD}", "count": {"$sum": 1}}},
                    {"$match": {"count": {"$gt": 1}}},
                    {"$limit": 1},
                ],
            )
        if duplicates:
            remedy = (
                f"Find them with db.{results.name}.aggregate([{{$group: {{_id: '${UNIQUE_FIELD}', n: {{$sum: 1}}}}}}, "
                "{$match: {n: {$gt: 1}}}]) and remove the surplus."
            )
            return [
                Finding("error", "Some documents have several results, so the unique index cannot be made.", remedy)
            ]
    elif not unique.get("unique"):
        remedy = f"db.{results.name}.dropIndex({{{UNIQUE_FIELD}: 1}}); the next run makes the right one."
        return [Finding("error", f"The index on {results.name}.{UNIQUE_FIELD} is not unique.", remedy)]
    if missing:
        remedy = "The next run makes them; on millions of documents that takes a while."
        return [Finding("warning", f"Indexes are missing: {', '.join(missing)}.", remedy)]
    return [Finding("ok", "All indexes are there.")]


def _by_field(indexes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {index["key"][0][0]: index for index in indexes.values() if len(index["key"]) == 1}


async def _aggregate(collection: Any, pipeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cursor = await collection.aggregate(pipeline, allowDiskUse=True)
    return [document async for document in cursor]


def _hosts(settings: Settings) -> str:
    return hosts_of(settings.mongodb_uri.get_secret_value())
