"""Print the status counts of a job and its most frequent errors; reads only MongoDB.

python examples/read_results.py mongodb://localhost:27017 clinic events
"""

import sys
from collections import Counter
from typing import Any

from pymongo import MongoClient


def main(uri: str, database: str, collection: str) -> None:
    """Print the statuses, then the errors by frequency."""
    with MongoClient[dict[str, Any]](uri) as client:
        documents = client[database][collection]
        for status, count in sorted(
            Counter(d.get("ai_status") for d in documents.find({}, {"ai_status": 1})).items(), key=str
        ):
            print(f"{count:8} {status}")
        failed = documents.find({"ai_status": "failed"}, {"processing_info.error": 1})
        for error, count in Counter(d["processing_info"]["error"] for d in failed).most_common(10):
            print(f"{count:8} failed: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
