"""``python -m bench.readme``: the README's part on what was measured, from the committed results.

After ``make bench``: copy bench/out/results.json and results.md to bench/results/cpu-xeon-2-cores.* (or a name of the
machine's), ratios.png to docs/bench.png, and run this.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.cases import CELLS, MODES
from bench.timing import MIN_ROUNDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu-xeon-2-cores.json"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->"


def section(document: dict[str, Any], path: str) -> str:
    """Markdown of one run: a ratio a case, cell and mode, and what is to be known of them."""
    machine, rows = document["machine"], document["rows"]
    ratios = {(row["case"], row["cell"], row["mode"]): row for row in rows}
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    heads = [f"{cell.upper()} {mode}" if mode == MODES[0] else mode for cell, mode in columns]
    lines = [
        f"Time of torch.nn over time of fastrnn, {rows[0]['dtype']}, {rows[0]['threads']} threads, {machine['cpu']}, "
        f"{machine['cpu_capability']}, torch {machine['torch']}, commit {machine['commit']} (`make bench`; above 1, "
        f"fastrnn is faster; every row with its times and shapes in [bench/results]({path})):",
        "",
        f"| case | {' | '.join(heads)} |",
        "|---" + "|--:" * len(heads) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [ratios.get((case, *column)) for column in columns]
        entries = [format(row["ratio"], ".2f" if row["ratio"] < 10 else ".1f") if row else "" for row in found]
        lines.append(f"| {case} | {' | '.join(entries)} |")
    means = (document["summary"][cell][mode] for cell, mode in columns)
    lines += [f"| **geomean** | {' | '.join(f'**{mean:.2f}**' for mean in means)} |", ""]
    slower = ["{} {} at `{}`".format(row["cell"].upper(), row["mode"], row["case"]) for row in rows if row["ratio"] < 1]
    few = sum(row["rounds"] < MIN_ROUNDS for row in rows)
    lines.append(f"Below 1 in this run: {', '.join(slower)}." if slower else "No row is below 1 in this run.")
    if few:
        lines.append(f"{few} rows had time for fewer than {MIN_ROUNDS} rounds.")
    lines.append("[docs/performance.md](docs/performance.md) says what is next.")
    if model := document["charlm"]:
        lines.append(
            "A character-level language model (two LSTM layers, embedding and head included) trains "
            f"{model['ratio']:.2f} times as fast, with the same loss curve."
        )
    return "\n".join([*lines, "", "![ratio per case](docs/bench.png)", ""])


def rewrite(readme: str, text: str) -> str:
    """The README with ``text`` between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README lacks {BEGIN.strip()} or {END}")
    return before + BEGIN + text + END + after


def main() -> None:
    """Rewrite README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="JSON of a run of `make bench`")
    results = parser.parse_args().results.resolve()
    path = results.with_suffix(".md").relative_to(ROOT)
    readme = ROOT / "README.md"
    text = section(json.loads(results.read_text(encoding="utf-8")), path.as_posix())
    readme.write_text(rewrite(readme.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
