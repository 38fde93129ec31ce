"""Pictures and their alt texts, whatever backend and format of figures a front end has set."""

import base64
import os
import re

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from test_notebooks import NOTEBOOKS

FRONT_ENDS = {  # what runs before the picture is drawn; the kernel starts with MPLBACKEND=Agg, as many servers set it
    "Agg": "",
    "svg": "plt.switch_backend('svg')",
    "inline, svg": "%matplotlib inline\n%config InlineBackend.figure_format = 'svg'",
    "inline, two formats": "%config InlineBackend.figure_formats = ['svg', 'jpeg']",
    "inline, figures kept": "%config InlineBackend.close_figures = False",
}
SETUP = """import matplotlib.pyplot as plt
import quantlib as ql

def draw(power=2):
    plt.plot([x**power for x in range(5)])
    ql.show("A curve.")
"""


@pytest.fixture(scope="module")
def run():
    """The notebook, run: for each front end two cells that draw, a picture and a slider."""
    sources = [SETUP]
    for before in FRONT_ENDS.values():
        sources += [f"{before}\ndraw()", "ql.slider(draw, power=(1, 3))"]
    nb = new_notebook(cells=[new_code_cell(source) for source in sources])
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(NOTEBOOKS.parent)}
    quiet = ["--log-level=ERROR"]
    return NotebookClient(nb, timeout=120, kernel_name="python3", extra_arguments=quiet).execute(env=environment)


@pytest.mark.parametrize("number", range(len(FRONT_ENDS)), ids=list(FRONT_ENDS))
def test_one_picture_with_its_alt_text(run, number):
    (output,) = run.cells[1 + 2 * number].outputs
    assert {kind for kind in output.data if kind.startswith("image")} == {"image/png"}
    assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG") and len(output.data["image/png"]) > 5000
    assert output.metadata["image/png"]["alt"] == "A curve."
    assert [list(output.data)[0] for output in run.cells[2 + 2 * number].outputs] == ["text/plain"]


def test_sliders_hold_such_pictures(run):
    widgets = run.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    pictures = [widget.state.value for widget in widgets if widget.model_name == "HTMLModel"]
    assert len(pictures) == len(FRONT_ENDS)
    for picture in pictures:
        assert re.fullmatch(r'<img src="data:image/png;base64,iVBOR[\w+/=\n]{5000,}" alt="A curve.">', picture)
