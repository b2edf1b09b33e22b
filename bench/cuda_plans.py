"""The ladder of docs/cuda.md, predicted: what a step of a layer costs on a named GPU, by the plan's own model.

    python -m bench.cuda_plans [--device h200]

Needs the native library, and no GPU. What a plan may do otherwise has the number K of `FASTRNN_CUDA_PLAN=persistent:K`,
in the order of `fastrnn._C.cuda_plans`.
"""

import argparse
from typing import Any

from fastrnn import _C

CELLS = ("rnn_tanh", "lstm", "gru")
SIZES = (64, 128, 256, 512, 768, 1024)
BATCHES = (1, 16, 64)


def in_words(plan: dict[str, Any]) -> str:
    tier = "G" if plan["tier"] == "grid" else "C"
    where = "stepwise" if plan["tier"] == "stepwise" else f"{tier}{plan['cluster']} N{plan['rows']}"
    return f"{plan['microseconds']:.2f} ({where})"


def table(device: str) -> list[str]:
    """Rows of Markdown: a cell and a size, then forward and backward for each batch."""
    heads = [f"N = {batch} {way}" for batch in BATCHES for way in ("forward", "backward")]
    lines = [f"| cell, H | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for cell in CELLS:
        for hidden in SIZES:
            plans = [
                _C.cuda_plans(cell, 100, batch, hidden, training=True, backward=backward, device=device)[0]
                for batch in BATCHES
                for backward in (False, True)
            ]
            lines.append(f"| {cell} {hidden} | {' | '.join(map(in_words, plans))} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200", help="a100, h100, h200, b200, rtx4090 or rtx5060")
    print("\n".join(table(parser.parse_args().device)))
