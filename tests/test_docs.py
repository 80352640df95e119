"""The documentation and the code agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli import COMMANDS, load_command
from commands.flags import MONITORING, PRESETS, create_command_parser, create_parser
from config.loading import variables_of
from config.settings import known_environment_names, settings_classes
from error_handler import ExitCode, Reason, TriadError
from utils.batch_file_manager import FOLDERS

ROOT = Path(__file__).parent.parent
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
ENV_EXAMPLE = (ROOT / "config/.env.example").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAFEGUARDS = (ROOT / "docs/safeguards.md").read_text(encoding="utf-8")


def flags() -> list[str]:
    """Every flag of the run and of the commands."""
    parsers = [create_parser(), *(create_command_parser(load_command(name)) for name in COMMANDS)]
    found = (option for parser in parsers for action in parser._actions for option in action.option_strings)
    return sorted({option for option in found if option.startswith("--")})


@pytest.mark.parametrize("flag", flags())
def test_every_flag_is_documented(flag: str) -> None:
    """docs/operations.md has each flag, its other spellings included."""
    assert f"`{flag}" in OPERATIONS


def test_no_flag_is_documented_that_does_not_exist() -> None:
    """The table of flags lists no flag that does not exist."""
    section = OPERATIONS.split("## Flags")[1].split("## Environment")[0]
    documented = set(re.findall(r"`(--[a-z-]+)", section))
    assert documented == set(flags())


def test_every_command_is_documented() -> None:
    """docs/operations.md shows each command, and the help of the run names it."""
    commands = [load_command(name) for name in COMMANDS]
    assert [command.name for command in commands] == list(COMMANDS)
    for command in commands:
        assert f"cli.py {command.name}" in OPERATIONS
        assert f"cli.py {command.name}" in create_parser(commands).format_help()


@pytest.mark.parametrize("name", sorted(known_environment_names()))
def test_every_variable_is_documented(name: str) -> None:
    """docs/operations.md and config/.env.example have each variable."""
    assert f"`{name}`" in OPERATIONS
    assert re.search(rf"^(# other name: )?{name}(=|$)", ENV_EXAMPLE, re.MULTILINE)


def test_the_example_holds_the_defaults() -> None:
    """Copying .env.example unchanged changes nothing."""
    for line in ENV_EXAMPLE.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition("=")
        fields = {
            n: f for one in settings_classes() for key, f in one.model_fields.items() for n in variables_of(one, key)
        }
        default = None if fields[name].default_factory else fields[name].default
        default = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        if value == "":
            assert default is None, name
        elif isinstance(default, tuple):
            assert value == ",".join(default), name
        elif isinstance(default, bool):
            assert value == str(default).lower(), name
        elif isinstance(default, int | float):
            assert float(value) == default, name
        else:
            assert value == str(default), name


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_exit_code_is_documented(code: ExitCode) -> None:
    """The table of exit codes has each one."""
    section = OPERATIONS.split("## Exit codes")[1].split("\n## ")[0]
    assert re.search(rf"^\| {code.value} \|", section, re.MULTILINE)


def test_every_error_has_a_documented_exit_code() -> None:
    """No error class has an undocumented exit code; the tree in docs/architecture.md names the right one."""

    def classes(base: type[TriadError]) -> list[type[TriadError]]:
        return [base, *(c for child in base.__subclasses__() for c in classes(child))]

    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Errors")[1]
    for error in classes(TriadError):
        assert isinstance(error.exit_code, ExitCode)
        if error.__module__ == "error_handler":
            drawn = re.search(rf"─ {error.__name__} .*|^{error.__name__} .*", tree, re.MULTILINE)
            assert drawn, f"{error.__name__} is missing in the drawing of the tree"
            assert set(re.findall(r"exit (\d+)$", drawn[0])) <= {str(error.exit_code.value)}, drawn[0]


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_every_reason_is_documented(reason: Reason) -> None:
    """The table of failed documents has each reason."""
    assert f"`{reason}`" in OPERATIONS


def test_presets_monitoring_modes_and_folders_are_documented() -> None:
    """Choices of flags and the local folders."""
    for name in (*PRESETS, *MONITORING):
        assert f"`{name}`" in OPERATIONS
    for folder in FOLDERS:
        assert f"`{folder}/" in OPERATIONS


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_and_files_named_in_the_documentation_exist(page: Path) -> None:
    """A page names no module, test or page that does not exist."""
    text = page.read_text(encoding="utf-8")
    folders = "|".join(path.parent.name for path in ROOT.glob("*/__init__.py"))
    names = re.findall(rf"`((?:docs|data|{folders})/[a-z\d_./-]+\.(?:py|md|yaml|jsonl|example))`", text)
    modules = re.findall(rf"`((?:{folders})/[a-z_]+)`", text)
    for name in [*names, *modules]:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{page.name} names {name}"


PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


def prose(page: Path) -> str:
    """The text of *page* without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of *page*, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def tables(page: Path) -> list[list[str]]:
    """The tables of *page*: runs of lines that begin with a bar, outside of blocks of code."""
    return [found.splitlines() for found in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_render(page: Path) -> None:
    """One head per table, then as many cells in each row: what follows without a blank line is part of the table."""
    assert not re.findall(r"^\|.*\n(?!\|)(.+)", prose(page), re.MULTILINE)
    for head, line, *rows in tables(page):
        cells = len(re.findall(r"(?<!\\)\|", head))
        assert re.fullmatch(r"(\|:?-+:?)+\|", line.replace(" ", "")), head
        for row in rows:
            assert not re.fullmatch(r"[-:| ]+", row), f"a second table begins before {row}"
            assert len(re.findall(r"(?<!\\)\|", row)) == cells, row


def test_safeguards_name_existing_modules_and_tests() -> None:
    """Each row of docs/safeguards.md, so that a renamed test is renamed there as well."""
    rows = re.findall(r"^\| (.+) \| `(.+?)` \| (`.+::\w+`.*) \|$", SAFEGUARDS, re.MULTILINE)
    assert len(rows) == len({what for what, *_ in rows}) == SAFEGUARDS.count("\n| **") > 200
    for _, module, tests in rows:
        assert (ROOT / module).is_file(), module
        code = ""
        for path, test in re.findall(r"`([\w/.]*?)(?:::)?(\w+)`", tests):
            code = (ROOT / path).read_text(encoding="utf-8") if path else code  # a further test of the same file
            assert re.search(rf"^\s*(async )?def {test}\(", code, re.MULTILINE), test


def test_readme_names_run_and_test_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert "git clone" in first_screen
    assert "make run" in first_screen
    assert "make test" in first_screen
