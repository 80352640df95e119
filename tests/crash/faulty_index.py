"""``cli.py`` that is killed (SIGKILL) at a named point: ``PACKAGE.`` and a point of ``faulty_job``.

``python tests/crash/faulty_index.py '{"point": POINT, "nth": 1, "write_at": 1000, "file_bytes": N}' index --batch ...``.
With *file_bytes* it finds no room for any file beyond that size instead (EFBIG is reported like ENOSPC).
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from embedding_index import vector_store
    from tests.crash.faulty_job import arm

    _plan = json.loads(sys.argv[1])
    # Small lots, so that a small job has several.
    vector_store.WRITE_AT = _plan.get("write_at", vector_store.WRITE_AT)
    if _plan.get("point"):
        _package, _, _point = _plan["point"].partition(".")
        arm(_point, _plan["nth"], _package)
    if "file_bytes" in _plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_plan["file_bytes"], resource.RLIM_INFINITY))
    sys.argv[:] = [str(ROOT / "cli.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
