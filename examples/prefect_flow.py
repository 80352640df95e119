"""A Prefect flow: label new conversations, then check the labels, then write a report and a table.

It only calls ``cli.py``, so the exit codes and the JSON of ``--output`` are the whole interface (docs/scheduling.md). Prefect
has packages of other versions than this project; install it into an environment of its own:

    python -m venv .venv-prefect
    .venv-prefect/bin/pip install -r examples/requirements-prefect.txt
    .venv-prefect/bin/python examples/prefect_flow.py --python .venv/bin/python --folder reports
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

CLI = Path(__file__).resolve().parent.parent / "cli.py"
DONE, INCOMPLETE, UNREACHABLE = 0, 1, 3  # exit codes


class CommandFailedError(Exception):
    """A command ended with an exit code that the flow does not accept."""

    def __init__(self, code: int, command: str, message: str) -> None:
        super().__init__(f"{command} ended with exit code {code}: {message}")
        self.code = code


def is_unreachable(_task: Task, _run: TaskRun, state: State) -> bool:
    """Return whether another try can help: MongoDB or the model server did not answer."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, CommandFailedError) and error.code == UNREACHABLE


@task(retries=3, retry_delay_seconds=60, retry_condition_fn=is_unreachable)
def run_cli(python: Path, *arguments: str, accepted: tuple[int, ...] = (DONE,)) -> int:
    """Run ``cli.py`` with *arguments* and return its exit code, which is one of *accepted*.

    Its settings come from the environment of the flow and the ``.env`` file of the working directory. The log gets the
    last line of stderr only; the rest would repeat the log of the command.
    """
    ended = subprocess.run([python, CLI, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if ended.returncode not in accepted:
        message = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandFailedError(ended.returncode, arguments[0], message)
    return ended.returncode


@flow(log_prints=False)
def label_and_report(python: Path, folder: Path, gold: Path | None = None) -> dict[str, int]:
    """Label, evaluate if there is a *gold* file, and write ``report.html`` and ``labels.csv`` into *folder*.

    Returns the counts of the run. A run of which some documents failed goes on to the report, because the next run
    retries them; too many failures (exit code 4) end the flow.
    """
    log = get_run_logger()
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.json"
    code = run_cli(python, "--output", str(run_file), accepted=(DONE, INCOMPLETE))
    run = json.loads(run_file.read_text(encoding="utf-8"))
    counts = {name: run[name] for name in ("successful", "failed", "skipped")}
    log.info("labelled: %s", counts)
    if code == INCOMPLETE:
        log.warning("%d documents failed; the next run retries them", counts["failed"])
    if gold:
        run_cli(python, "evaluate", "--gold", str(gold), "--fail-under", "intent=0.6")
    report = run_cli.submit(python, "report", "--output", str(folder / "report.html"))
    table = run_cli.submit(python, "export", "--output", str(folder / "labels.csv"))
    report.result()
    table.result()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python of this project")
    parser.add_argument("--folder", type=Path, default=Path("reports"), help="where the files go")
    parser.add_argument("--gold", type=Path, help="gold labels for `cli.py evaluate`")
    given = parser.parse_args()
    print(json.dumps(label_and_report(given.python, given.folder, given.gold)))
