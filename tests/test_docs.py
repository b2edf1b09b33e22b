"""The documents keep their promises: their Python runs, and links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OUR_IMPORT = "from fastrnn import LSTM"
TORCH_IMPORT = "from torch.nn import LSTM"


def snippets(document: str) -> list[str]:
    """The blocks of a document that are marked as Python."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(snippet: str) -> dict[str, object]:
    """The names that a snippet leaves behind."""
    names: dict[str, object] = {}
    exec(compile(snippet, "snippet", "exec"), names)
    return names


SNIPPETS = [
    pytest.param(snippet, id=f"{path.name}-{index}")
    for path in DOCUMENTS
    for index, snippet in enumerate(snippets(str(path.relative_to(ROOT))))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, backend, capsys):
    """And says what its comments promise: ``print(...)  # prints: what``."""
    run(snippet)
    promised = re.findall(r"# prints: (.*)$", snippet, re.MULTILINE)
    assert not promised or capsys.readouterr().out.splitlines() == promised


def test_quickstart_differs_from_torch_in_the_import_only():
    quickstart = snippets("README.md")[0]
    assert quickstart.count("fastrnn") == 1
    assert quickstart.count(OUR_IMPORT) == 1
    assert len(quickstart.splitlines()) <= 10
    ours, theirs = run(quickstart), run(quickstart.replace(OUR_IMPORT, TORCH_IMPORT))
    assert type(ours["lstm"]) is not type(theirs["lstm"])
    for name in ("output", "h_n", "c_n", "loss"):
        torch.testing.assert_close(ours[name], theirs[name])
    gradients = dict(theirs["lstm"].named_parameters())
    for name, parameter in ours["lstm"].named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\[[^\]]*\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing
