"""The setup cell, wherever a notebook is started; and a notebook of which nothing else is there, as on Colab.

What is fetched comes from a local git repository: git is told to look there instead of at GitHub. One notebook is run
from top to bottom; that all begin alike is checked in test_notebooks.py.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from test_notebooks import NOTEBOOKS, build

COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
NO_ADDRESS = "import os\nimport sys\nfrom importlib.util import find_spec\n\n" + build.SETUP
CLONE = NO_ADDRESS.replace("# Tell", build.FETCH.replace("OWNER/NAME", "ada/quant") + "# Tell")
QUANTLIB = (
    "def setup(model):\n    print('found', __file__)\n"  # stands in for the real one, which takes seconds to import
)


def publish(folder, monkeypatch):
    """Make of a folder what is cloned as https://github.com/ada/quant."""
    git = ["git", "-C", folder, "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{folder.as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/ada/quant")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs cells in a folder of `tmp_path` and returns what they print; one holds the series."""
    (tmp_path / "series" / "notebooks" / "solutions").mkdir(parents=True)
    (tmp_path / "series" / "quantlib.py").write_text(QUANTLIB)
    publish(tmp_path / "series", monkeypatch)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(where, *cells):
        (tmp_path / where).mkdir(exist_ok=True)
        code = "MODEL = 'pocket-gpt2'\n" + "".join(f"get_ipython().run_cell({cell!r})\n" for cell in cells)
        command = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=tmp_path / where, **pipes).stdout

    return run


@pytest.mark.parametrize("where", ["series", "series/notebooks", "series/notebooks/solutions"])
def test_setup_finds_quantlib(run, tmp_path, where):
    """And makes importable nothing else that lies near: a folder there may be named like a package, as was triton's."""
    (tmp_path / "neighbour").mkdir()
    printed = run(where, CLONE, "import neighbour")
    assert Path(re.search("found (.*)", printed)[1]).resolve() == tmp_path / "series" / "quantlib.py"
    assert "No module named 'neighbour'" in printed


def test_setup_on_colab_fetches_the_series_once(run, tmp_path):
    """When the network is there; it was not at the first try."""
    offline = "import os\nos.environ |= {'GIT_CONFIG_COUNT': '0', 'https_proxy': 'http://localhost:9'}\n"
    online = "os.environ['GIT_CONFIG_COUNT'] = '1'"
    printed = run("content", COLAB + offline, CLONE, online, CLONE, CLONE)
    assert printed.count("AssertionError: The series could not be fetched: fatal: unable to access 'https") == 1
    found = re.findall("found (.*)", printed)
    assert [Path(path).resolve() for path in found] == 2 * [tmp_path / "content" / "quantization" / "quantlib.py"]


def test_setup_says_why_git_did_not_fetch(run, tmp_path):
    """A folder is left of a clone that did not end; there is no git."""
    (tmp_path / "content" / "quantization").mkdir(parents=True)
    (tmp_path / "content" / "quantization" / "README.md").touch()
    said = "AssertionError: The series could not be fetched: "
    assert said + "fatal: destination path 'quantization' already exists" in run("content", COLAB, CLONE)
    without = f"import os\nos.environ['PATH'] = {str(tmp_path)!r}"
    assert re.search(said + ".*git.*not found", run("elsewhere", COLAB, without, CLONE))


@pytest.mark.parametrize("first", ["", COLAB])
def test_setup_says_where_it_looked(run, tmp_path, first):
    """On Colab too while the address is not known."""
    said = f"AssertionError: quantlib.py is not in {tmp_path}/content, .., ../.. or quantization: put the series there."
    assert said in run("content", first, NO_ADDRESS)


def test_notebook_alone_in_a_folder(tmp_path, monkeypatch):
    source, alone = tmp_path / "source", tmp_path / "alone"
    shutil.copytree(NOTEBOOKS, source / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(NOTEBOOKS.parent / "quantlib.py", source)
    publish(source, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone.mkdir()
    path = build.series()[0]
    nb = build.stamp(build.read(path), path, NOTEBOOKS, "ada/quant")
    nb.cells.insert(0, new_code_cell(COLAB))
    NotebookClient(nb, timeout=600, kernel_name="python3").execute(cwd=str(alone))
    assert [entry.name for entry in alone.iterdir()] == ["quantization"]
