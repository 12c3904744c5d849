"""The whole test suite in this interpreter's environment, and its column of docs/versions.md.

    python tests/suite.py oldest | locked | newest

`make oldest`, `make versions` and `make newest` prepare the environments and call it. The versions that a column names
are those that were installed while the tests ran. Exits with 1 if a test failed.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "versions.md"
COLUMNS = ("oldest", "locked", "newest")
START, END = "<!-- suite -->", "<!-- /suite -->"
Column = dict[str, str]


def run() -> tuple[Column, list[str]]:
    """The column of this environment, and the tests that failed."""
    column = {"Python": platform.python_version()}
    for requirement in requires("tempme_vl") or ():
        name, rest = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        if "extra ==" not in rest:
            column[name] = version(name).split("+")[0]
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        code = subprocess.run([sys.executable, "-m", "pytest", "-m", "", f"--junitxml={xml}"], cwd=ROOT).returncode
        if code not in (0, 1):
            sys.exit(f"pytest ended with {code}: nothing is written to {PAGE.relative_to(ROOT)}")
        cases = list(ElementTree.parse(xml).iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = sum(any(element.tag == "skipped" for element in case) for case in cases)
    column["tests passed"] = str(len(cases) - len(failed) - skipped)
    column["failed"], column["skipped"] = str(len(failed)), str(skipped)
    return column, failed


def read(text: str) -> dict[str, Column]:
    """The columns of a table that `table` wrote."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    if not rows:
        return {}
    head, _, *rows = ([cell.strip() for cell in row] for row in rows)
    return {name: {row[0]: row[i] for row in rows} for i, name in enumerate(head) if i}


def table(columns: dict[str, Column]) -> str:
    """Markdown: a row a package, a column an environment; "-" where one has no such row."""
    names = [name for name in COLUMNS if name in columns]
    keys = list(dict.fromkeys(key for name in names for key in columns[name]))
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[key, *(columns[name].get(key, "-") for name in names)] for key in keys]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(name: str, column: Column) -> None:
    """Replaces one column of the page."""
    before, rest = PAGE.read_text().split(START)
    old, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{table({**read(old), name: column})}\n{END}{after}")


def main() -> None:
    if sys.argv[1:2] == [] or sys.argv[1] not in COLUMNS:
        sys.exit(f"expected one of {', '.join(COLUMNS)}; got {' '.join(sys.argv[1:]) or 'nothing'}")
    column, failed = run()
    write(sys.argv[1], column)
    print(table({sys.argv[1]: column}))
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
