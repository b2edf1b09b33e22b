"""Lists the programs: ``python -m examples``."""

from __future__ import annotations

import ast
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent


def programs() -> dict[str, str]:
    """The name of each program with the first line of its docstring; nothing is imported for it."""
    found = {}
    for path in sorted(HERE.glob("[!_]*.py")):
        found[path.stem] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return found


def main() -> None:
    table = Table("program", "what it shows", box=None)
    for name, line in programs().items():
        table.add_row(f"python -m examples.{name}", line)
    console = Console()
    console.print(table)
    console.print("Each takes --quick, a run of seconds, and --help. The pictures are in docs/examples/README.md.")


if __name__ == "__main__":
    main()
