"""The notebook runs from its first cell to its last, on pictures that it writes itself."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "own_images.ipynb"
#: One epoch on few pictures: how good it becomes is not looked at.
CHANGES = {"EPOCHS = 8": "EPOCHS = 1", "enumerate(digits.target)": "enumerate(digits.target[:200])"}
WITH_KERNEL = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))


def _changed() -> dict[str, object]:
    text = NOTEBOOK.read_text()
    for old, new in CHANGES.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return json.loads(text)  # type: ignore[no-any-return]


def test_it_is_ten_cells_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) == 10
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )


def _page(output: str) -> str:
    place = re.search(r"^(/\S+/report\.html)$", output, re.M)
    assert place, output
    return Path(place[1]).read_text()


@pytest.mark.slow
def test_its_cells_run_in_order_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel, so that the test runs everywhere; the last cell shows the page, which needs IPython."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cells = ["".join(cell["source"]) for cell in _changed()["cells"] if cell["cell_type"] == "code"]  # type: ignore[attr-defined]
    assert "IFrame" in cells[-1]
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(cells[:-1])], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"^says: \[\d.*\]\nis:   \[\d.*\]$", process.stdout, re.M)
    page = _page(process.stdout)
    assert '<th scope="col">accuracy</th>' in page
    assert page.count("<svg ") == 2


@pytest.mark.slow
@pytest.mark.skipif(not WITH_KERNEL, reason="no kernel to run notebooks with (pip install nbclient ipykernel)")
def test_a_kernel_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.reads(json.dumps(_changed()), as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    _page("".join(texts))
    assert "IFrame" in str(notebook.cells[-1].outputs)
