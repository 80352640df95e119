"""Index a database from Python and search it.

Requires DATABASE_URL, and EMBEDDING_PROVIDER with its settings. It can be stopped and restarted; nothing is paid twice.
"""

from config.index_settings import load_index_settings
from database_docs.introspection import read_database
from embedding_index import BatchIndexingManager, DocumentationStore, SQLIndexerAgent, SQLVectorStore


def main() -> None:
    """Read, estimate, index, search."""
    settings = load_index_settings()
    if settings.database_url is None:
        raise SystemExit("Set DATABASE_URL to the database to document.")
    facts = read_database(settings.database_url)
    with SQLVectorStore(settings) as vector_store, DocumentationStore() as doc_store:
        doc_store.sync_database(facts.tables, facts.relationships)
        manager = BatchIndexingManager(SQLIndexerAgent(vector_store))
        manager.batch_size = 50

        stats = manager.get_processing_stats(doc_store)
        print(f"{stats['total_pending']} pending, {stats['total_estimated_cost']} US dollars")
        tables = manager.batch_process_pending_tables(doc_store)
        relationships = manager.batch_process_pending_relationships(doc_store)
        print(f"{sum(tables.values())} tables and {sum(relationships.values())} relationships indexed")

        for hit in vector_store.search("where are refunds stored", limit=3):
            print(f"{hit.similarity:.2f} {hit.kind} {hit.name}")


if __name__ == "__main__":
    main()
