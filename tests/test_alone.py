"""Each notebook works where only the notebook was opened, as on Colab: in an empty folder, it clones the series.

The clone comes from a local git repository with the files of this checkout. By default the setup cell of every notebook
and the exercises' import run, and notebook 1 from top to bottom; with QUANTLIB_SLOW=1 all notebooks do.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
WHOLE = NOTEBOOKS if os.environ.get("QUANTLIB_SLOW") else NOTEBOOKS[:1]
NOT_PART_OF_THE_SERIES = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".ipynb_checkpoints", ".*_cache")


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The address of a git repository with the files of this checkout."""
    folder = tmp_path_factory.mktemp("series") / "source"
    shutil.copytree(ROOT, folder, ignore=NOT_PART_OF_THE_SERIES)
    git = ["git", "-C", folder, "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *command], check=True)
    return folder.as_uri()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_alone_in_a_folder(path, source, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLIB_SOURCE", source)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    shutil.copy(path, tmp_path)
    nb = nbformat.read(tmp_path / path.name, as_version=4)
    if path not in WHOLE:
        code = [cell for cell in nb.cells if cell.cell_type == "code"]
        imports = [cell for cell in code if "import checks" in cell.source]
        nb.cells = [code[0], *imports[:1]]
    NotebookClient(nb, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, "quantization"])
