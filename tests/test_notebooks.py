"""The form of the notebooks, and the tools that keep it: notebooks/build.py and the tolerance in notebooks/conftest.py.

What the cells compute is compared with the stored outputs by nbval, not here.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import from_dict
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def load(name):
    """Import a file of the notebooks' folder by its path: that folder is no package, and conftest is not a name."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", NOTEBOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, conftest = load("build"), load("conftest")

# The notebooks of the series -----------------------------------------------------------------------------------------

SERIES = build.series()
CHAPTERS = [path for path in SERIES if path.parent == NOTEBOOKS]
all_notebooks = pytest.mark.parametrize("path", SERIES, ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())


@all_notebooks
def test_form(path):
    assert build.check(path, NOTEBOOKS, build.repository()) == []


def test_each_number_once_and_a_solution_for_each():
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert numbers == sorted({*numbers}) and numbers[0] == 1
    assert [path.name for path in SERIES[len(CHAPTERS) :]] == [path.name for path in CHAPTERS]


def prose(path) -> str:
    return "\n".join(cell.source for cell in build.read(path).cells if cell.cell_type == "markdown")


@all_notebooks
def test_links_point_to_files_and_headings(path):
    for target, heading in re.findall(r"\]\(([^)#\s]+)#?([^)\s]*)", prose(path)):
        assert re.match(r"\w+:", target) or (path.parent / target).exists(), target
        if heading and target.endswith(".ipynb"):  # Jupyter makes of a heading its text with hyphens for spaces
            headings = re.findall(r"^#+ (.+)$", prose(path.parent / target), flags=re.M)
            assert heading in [text.replace(" ", "-") for text in headings], f"{target}#{heading}"


def trees(path):
    """The syntax trees of the code cells, but for the setup, which may hold a command for the shell."""
    cells = [cell for cell in build.read(path).cells if cell.cell_type == "code" and "setup" not in build.tags(cell)]
    return [ast.parse(cell.source) for cell in cells]


def used(node, context) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, context)}


def given(cell: ast.Module) -> set[str]:
    """The global names that a cell assigns or defines."""
    return set().union(*({s.name} if hasattr(s, "name") else used(s, ast.Store) for s in cell.body))


def test_sliders_work_when_all_cells_have_run():
    """A slider's function runs again whenever the reader moves it: no later cell may give its names another meaning."""
    sliders = 0
    for path in CHAPTERS:
        cells = trees(path)
        functions = {s.name: s for cell in cells for s in cell.body if isinstance(s, ast.FunctionDef)}
        for number, cell in enumerate(cells):
            for call in [n for n in ast.walk(cell) if isinstance(n, ast.Call) and ast.unparse(n.func) == "ql.slider"]:
                read, todo, sliders = set(), {call.args[0].id}, sliders + 1
                while todo:
                    function = functions[todo.pop()]
                    own = used(function, ast.Store) | {argument.arg for argument in function.args.args}
                    new = used(function, ast.Load) - own - read
                    read, todo = read | new, todo | (new & functions.keys())
                assert read & set().union(*map(given, cells[number + 1 :])) == set(), path.name
    assert sliders >= 3


@all_notebooks
def test_nothing_is_left_behind(path):
    """A temporary folder ends with its block, or is cleaned up."""
    source = "\n".join(map(ast.unparse, trees(path)))
    folders = re.findall(r"(with )?tempfile\.(\w+)\(", source)
    assert {kind for _, kind in folders} <= {"TemporaryDirectory"}
    assert source.count(".cleanup()") == sum(not block for block, _ in folders)


IN_FEWER_THAN_TWO = {  # what quantlib has although fewer than two notebooks name it -> why
    "setup": "every notebook calls it, in the cell that is stamped",
    "bits_per_weight": "notebook 21 counts with it; of interest to whoever stores a model",
    "matmul": "what a stored layer computes; notebook 9 looks into it",
    "time_interleaved": "what benchmark_decode times with; notebook 9 teaches it",
    "sliding_windows": "what perplexity slides over; notebook 7 draws it",
    "PerplexityResult": "what perplexity returns",
    "Comparison": "what compare returns",
    "QuantizedWeight": "a part of what quantize_model returns",
    "QuantizedLinear": "a part of what quantize_model returns",
    "QuantizedEmbedding": "a part of what quantize_model returns",
}


def test_what_quantlib_has_is_used():
    """A function or a class stands in quantlib because two notebooks need it; what only one needs stands there."""
    module = ast.parse((NOTEBOOKS.parent / "quantlib.py").read_text(encoding="utf-8"))
    public = {s.name for s in module.body if isinstance(s, (ast.FunctionDef, ast.ClassDef)) and s.name[0] != "_"}
    named = [set(re.findall(r"\bql\.(\w+)", "\n".join(map(ast.unparse, trees(path))))) for path in CHAPTERS]
    assert {name for name in public if sum(name in names for names in named) < 2} == set(IN_FEWER_THAN_TWO)


# Stamps, on a series of three ----------------------------------------------------------------------------------------

IMPORTS = "import os\nimport sys\nfrom importlib.util import find_spec"
BOX = "> " + "\n>\n> ".join(f"**{word}** one." for word in build.BOX)


def draft(title, *code):
    """A notebook as an author writes it: no badge, no links, a setup cell of imports only."""
    cells = [
        new_markdown_cell(f"# {title}", id="title"),
        new_markdown_cell(BOX, id="box"),
        new_code_cell(IMPORTS, id="setup", metadata={"tags": ["setup"], "collapsed": True}),
        *(new_code_cell(source, id=f"code-{i}") for i, source in enumerate(code)),
        new_markdown_cell("## Exercises\n\nNone.\n\n## Summary\n\nIt works.", id="summary"),
        new_markdown_cell("## Where to read more\n\nHere.", id="more"),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "mine", "display_name": "Mine"}})


def store(nb, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(writes(nb) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three notebooks and a solution; nothing is known of a workflow."""
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    folder = tmp_path / "notebooks"
    store(draft("1. One", "print(1)"), folder / "01_one.ipynb")
    store(draft("2. Two"), folder / "02_two.ipynb")
    store(draft("3. Three", "2 + 2"), folder / "03_three.ipynb")
    store(draft("Solutions 2"), folder / "solutions" / "02_two.ipynb")
    (tmp_path / "quantlib.py").write_text("def setup(model):\n    return model\n")
    return folder


def stamp_all(folder, *arguments):
    assert build.main(["--stamp-only", *arguments], folder) == 0
    return [build.read(path) for path in build.series(folder)]


def contents(folder):
    return [path.read_bytes() for path in build.series(folder)]


def test_stamps(folder):
    one, two, three, solution = stamp_all(folder, "--repo", "ada/quant")
    colab = "https://colab.research.google.com"
    links = "[← 1. One](01_one.ipynb) | [contents](../README.md) | [3. Three →](03_three.ipynb)"
    assert two.cells[0].source == (
        f"# 2. Two\n\n[![Open In Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/ada/quant/blob/main/notebooks/02_two.ipynb)\n\n{links}"
    )
    ends = "[contents](../README.md) | [2. Two →](02_two.ipynb)", "[← 2. Two](02_two.ipynb) | [contents](../README.md)"
    feet = [f"{line} | [glossary](glossary.md)" for line in (ends[0], links, ends[1])]
    assert [nb.cells[-1].source for nb in (one, two, three)] == feet
    assert solution.cells[-1].source == "[contents](../../README.md) | [glossary](../glossary.md)"
    assert "/notebooks/solutions/02_two.ipynb)" in solution.cells[0].source
    model, setup, nav = two.cells[2], two.cells[3], two.cells[-1]
    fetch = build.FETCH.replace("OWNER/NAME", "ada/quant")
    assert (model.source, setup.source) == (build.MODEL, f"{IMPORTS}\n\n{fetch}{build.SETUP}")
    for cell, tags in ((model, ["parameters"]), (setup, ["setup", "nbval-ignore-output"]), (nav, ["nav"])):
        assert cell.metadata == {"tags": tags, "slideshow": {"slide_type": "skip"}}
    assert two.metadata == build.METADATA


def test_stamping_again(folder):
    """It changes nothing, until a title or the repository has changed; the author's cells are left alone."""
    before = build.read(folder / "01_one.ipynb").cells
    one = stamp_all(folder, "--repo", "ada/quant")[0]
    assert [cell.id for cell in one.cells] == ["title", "box", "model", "setup", "code-0", "summary", "more", "nav"]
    assert [cell.source for cell in one.cells[4:-1]] == [cell.source for cell in before[3:]]
    stamped = contents(folder)
    assert stamp_all(folder) and contents(folder) == stamped
    one.cells[0].source = one.cells[0].source.replace("# 1. One", "# 1. Uno")
    store(one, folder / "01_one.ipynb")
    two = stamp_all(folder, "--repo", "grace/quant.two")[1]
    assert "[← 1. Uno]" in two.cells[0].source and "[← 1. Uno]" in two.cells[-1].source
    assert "grace/quant.two/blob" in two.cells[0].source and "com/grace/quant.two quant" in two.cells[3].source
    assert b"ada/quant" not in b"".join(contents(folder))


@pytest.mark.parametrize(
    ("cell", "source"), [(0, "No title"), (0, "# T\n\nProse"), (2, "import os\nx = 1"), (2, build.MODEL)]
)
def test_what_stamping_would_erase(folder, capsys, cell, source):
    nb = draft("3. Three")
    nb.cells[cell].source = source
    store(nb, folder / "03_three.ipynb")
    before = contents(folder)
    assert build.main(["3", "--stamp-only"], folder) == build.main(["3", "--check"], folder) == 1
    assert "should" in capsys.readouterr().err and contents(folder) == before


def test_deck_of_slides():
    """A heading opens a slide with its first result; further results go below; readings come up after their result."""
    deck = "# 1. One/> The question./## Setup/code/## A bell/code/One./code/Two./## Summary".split("/")
    cells = [new_code_cell("1") if source == "code" else new_markdown_cell(source) for source in deck]
    cells[3].metadata.tags = ["setup"]
    assert build.slide_types(cells) == "slide - skip skip slide - fragment subslide fragment slide".split()


# Running and checking ------------------------------------------------------------------------------------------------


def test_build_then_check(folder, capsys, monkeypatch):
    """01 runs, 02 raises: only 01 is written. --check finds nothing in it, until it is changed."""
    monkeypatch.setenv("QUANTLIB_MODEL", "gpt2")
    shutil.rmtree(folder / "solutions")
    code = (
        'print("a", flush=True)\nprint(MODEL)',
        'os.environ["TQDM_DISABLE"], os.environ.get("QUANTLIB_MODEL")',
        f'from IPython.display import display\ndisplay({{"{build.WIDGET}": {{}}}}, raw=True)',  # is not stored
    )
    store(draft("1. One", *code), folder / "01_one.ipynb")
    store(draft("2. Two", "1 / 0"), folder / "02_two.ipynb")
    before = contents(folder)
    assert build.main(["1", "2"], folder) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"01_one.ipynb: \d+\.\d s\n", out)
    assert "02_two.ipynb: " in err and "division by zero" in err and "the file is left as it was" in err
    assert contents(folder)[1:] == before[1:]
    one = build.read(folder / "01_one.ipynb")
    assert one.cells[4].outputs == [new_output("stream", name="stdout", text="a\npocket-gpt2\n")]
    assert one.cells[5].outputs[0].data == {"text/plain": "('1', None)"} and one.cells[6].outputs == []

    assert build.main(["--check", "1"], folder) == 0
    one.cells[-1].source += " "
    store(one, folder / "01_one.ipynb")
    assert build.main(["--check", "1"], folder) == 1
    assert "01_one.ipynb: it is not as stamped" in capsys.readouterr().err
    assert build.read(folder / "01_one.ipynb") == one


def test_build_does_not_overwrite_what_changed_meanwhile(folder, capsys, monkeypatch):
    monkeypatch.setattr(build, "run", lambda nb, path: path.write_text("edited"))
    assert build.main(["2"], folder) == 1
    assert "was changed while it ran" in capsys.readouterr().err
    assert (folder / "02_two.ipynb").read_text() == "edited"


def test_a_workflow_of_another_repository_is_told_what_to_do(folder, capsys, monkeypatch):
    """And the command that it is told helps."""
    workflow = NOTEBOOKS.parent / ".github" / "workflows" / "test.yml"
    assert "- run: python notebooks/build.py --check" in workflow.read_text()
    stamp_all(folder)
    monkeypatch.setattr(build, "problems", lambda nb, chapter: [])
    for here, status in (("Ada/quant", 1), ("Ada/quant", 0), ("ada/Quant", 0), ("grace/quant", 1)):
        monkeypatch.setenv("GITHUB_REPOSITORY", here)
        assert build.main(["--check"], folder) == status
        for command in re.findall(r"run python notebooks/build.py (.*) and commit", capsys.readouterr().err):
            assert status and build.main(command.split(), folder) == 0


# Problems of form: a good notebook, broken in one way ----------------------------------------------------------------

PICTURE = {"image/png": "AAAA/tmp/", "text/plain": "<Figure>"}
PROSE = (
    "A half, 0.5, the code `0.25`, $x = 0.125$, $$y = 0.0625$$, [a paper](https://arxiv.org/abs/2208.07339), "
    "arXiv:2208.07339 and https://example.org/home/v1.25 are no measured numbers; ``a `0.75` b`` neither.\n\n"
    "```\nmean 0.375\n```\n\n![a picture](../README.md)"
)


@pytest.fixture
def good(folder):
    """Cells 2 to 4 are code, the last with a picture; then come two of prose."""
    nb = build.stamp(draft("1. One", "print(1)"), folder / "01_one.ipynb", folder, "OWNER/NAME")
    for count, cell in enumerate(nb.cells[2:5], start=1):
        cell.execution_count = count
    nb.cells[4].outputs = [new_output("display_data", data=PICTURE, metadata={"image/png": {"alt": "A bell."}})]
    nb.cells[5].source += "\n\n" + PROSE
    return nb


def printed(text, name="stdout"):
    return {"outputs": [new_output("stream", name=name, text=text)]}


def shown(data):
    return {"outputs": [new_output("display_data", data=data)]}


ERROR = {"outputs": [new_output("error", ename="E", evalue="", traceback=[])]}
BREAKS = [  # what is reported, the number of a cell, what is put into it
    ("execution counts do not run", 4, {"execution_count": None}),
    ("execution counts do not run", 4, {"execution_count": 4}),
    ("the file is larger than 1.5 MB", 4, printed("x" * 1_500_000)),
    ("the first code cells are not tagged", 2, {"metadata": {}}),
    ("cell 1 is not the box: Question. You", 1, {"source": BOX.replace("You need", "So far")}),
    ("cell 1 is not the box: Question. You", 1, {"source": BOX + "\n>\n> **So far** much."}),
    ("a heading is missing", 5, {"source": "## Exercises\n\nSummary"}),
    ("a heading is missing", 6, {"source": "### Where to read more"}),
    ("cell 4: it stores an error", 4, ERROR),
    ("cell 4: it stores what went to stderr", 4, printed("Oh", "stderr")),
    ("cell 4: it stores a widget", 4, shown({build.WIDGET: {"model_id": "1"}, "text/plain": "bar"})),
    ("cell 4: it stores a progress bar", 4, printed("50%|##  | 1/2 [00:01<00:01, 1.0it/s]")),
    ("cell 4: it stores a progress bar", 4, shown({"text/plain": "1/2 [00:01<00:01, 2s/it]"})),
    ("cell 4: it stores a progress bar", 4, printed("1\r2")),
    ("cell 4: a picture has no alt text", 4, shown(PICTURE)),
    ("cell 4: it shows a path of a machine: /home/", 4, printed("/home/ada/x")),
    ("cell 4: it shows a path of a machine: C:", 4, {"source": 'open("C:\\\\x")'}),
    ("cell 5: it shows a path of a machine: /content/", 5, {"source": "Look into `/content/x`."}),
    ("cell 4: it has more than 30 lines", 4, {"source": "\n".join(["x = 1"] * 31)}),
    ("cell 6: it is empty", 6, {"source": " \n"}),
    ("cell 5: an image has no alt text", 5, {"source": "![](a.png)"}),
    ("cell 5: an image has no alt text", 5, {"source": '<img src="a.png">'}),
    ("cell 5: a measured number stands in the prose: 0.37", 5, {"source": "It costs 0.37 nats."}),
    ("cell 5: a measured number stands in the prose: 0.37", 5, {"source": "`a` costs 0.37, `b` more."}),
    ("cell 5: a measured number stands in the prose: 0.37", 5, {"source": "`https://example.org` says 0.37 `b`."}),
]


@pytest.mark.parametrize(("expected", "cell", "change"), BREAKS)
def test_problem_is_reported(good, expected, cell, change):
    assert build.problems(good, chapter=True) == []
    good.cells[cell].update(from_dict(change))
    assert any(problem.startswith(expected) for problem in build.problems(good, chapter=True))


def test_what_a_notebook_may(good):
    """An error that its tag announces; a solution without the sections of a chapter."""
    good.cells[4].update(ERROR)
    good.cells[4].metadata.tags = ["raises-exception"]
    assert build.problems(good, chapter=True) == []
    del good.cells[5:7]
    assert build.problems(good, chapter=False) == []


# Tolerance of numbers ------------------------------------------------------------------------------------------------

AGREE = [
    ("mean 0.1234 dB", "mean 0.1234 dB"), ("0.1", "0.0999"), ("[0.25,-0.5]", "[0.26,-0.6]"), ("0.00", "-0.01"),
    ("0.13", "0.12"),  # the last digit, which binary floats would miss
    ("1234.56", "1234.99"), ("1,234.5", "1,235.1"), ("1e-05", "9.9999e-06"),  # within a thousandth
    ("12.5%", "12.6%"), ("0.0019±0.0006", "0.0020±0.0005"), ("−0.50", "-0.51"), ("<td>0.50</td>", "<td>0.51</td>"),
    ("tensor([ 0.0001, -0.2000])", "tensor([-0.0000, -0.2000])"), ("nan inf -inf 1.50", "nan inf -inf 1.51"),
    ("mean\n    a\nx  9.9996\n", "mean\n     a\nx  10.0001\n"),  # a wider number moves the rest of its column
]  # fmt: skip
DIFFER = [
    ("0.1234", "0.1236"), ("1234.5", "1236.5"), ("2.00e-07", "2.02e-07"), ("12.5%", "12.7%"), ("0.5", "-0.5"),
    ("127", "126"), ("1,234", "1,235"), ("25%", "26%"), ("1", "1.0"), ("127.", "126."),  # how torch prints 127
    ("mean 0.5", "mode 0.5"), ("0.5\n0.5", "0.5 0.5"), ("[0.5]", "[0.5, 0.5]"), ("0.5", "nan"), ("inf", "-inf"),
    ("a  0.50", "a 0.51"),  # spaces, although no number got wider
    ("torch 2.13.0", "torch 2.14.0"), ("h.0.mlp", "h.1.mlp"), ("int8.5", "int8.6"), ("3e99999a", "4e99999a"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "fresh", "same"), [(*p, True) for p in AGREE] + [(*p, False) for p in DIFFER])
def test_numbers_agree(stored, fresh, same):
    assert conftest.agree(stored, fresh) == same


def test_stale_outputs_fail_and_last_digits_pass(tmp_path):
    """End to end: pytest runs two notebooks beside a copy of conftest.py, in a process of its own."""
    show = "display({'text/plain': '0.11'}, raw=True); print(0.51); display({'text/plain': '0.33'}, raw=True)"
    cells = {
        "import os; print(os.environ['HF_HUB_OFFLINE'], os.environ.get('QUANTLIB_MODEL'))": "1 None",
        show: "0.50",  # what is displayed before and after it is paired with what is stored, in order
        "print('largest code', 127)": "largest code 127",
    }
    shown = [new_output("display_data", data={"text/plain": text}) for text in ("0.12", "0.34")]
    for name, code in {"right": "127", "stale": "100"}.items():
        nb = new_notebook(cells=[new_code_cell(source, execution_count=1) for source in cells])
        for cell, text in zip(nb.cells, cells.values(), strict=True):
            cell.outputs = [new_output("stream", name="stdout", text=text.replace("127", code) + "\n")]
        nb.cells[1].outputs = [shown[0], *nb.cells[1].outputs, shown[1]]
        store(nb, tmp_path / f"{name}.ipynb")
    shutil.copy(NOTEBOOKS / "conftest.py", tmp_path)
    command = [sys.executable, *"-m pytest --nbval --nbval-current-env -v --color=no -p no:cacheprovider".split()]
    environment = os.environ | {"QUANTLIB_MODEL": "gpt2"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    verdicts = re.findall(r"^(\w+)\W+ipynb::Cell \d (\w+)", result.stdout, re.M)
    assert verdicts == [*3 * [("right", "PASSED")], *2 * [("stale", "PASSED")], ("stale", "FAILED")], result.stdout


def test_kernels_of_build_and_of_nbval_see_the_same():
    assert build.ENVIRONMENT == conftest.ENVIRONMENT
