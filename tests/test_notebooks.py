"""The form of the notebooks, and the tools that keep it: notebooks/build.py and the tolerance in notebooks/conftest.py.

What the cells compute is compared with the stored outputs by nbval, not here.
"""

import ast
import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def load(name):
    """Import a file of the notebooks' folder by its path: that folder is no package, and conftest is not a name."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", NOTEBOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build")
conftest = load("conftest")


def ids(path):
    return path.relative_to(NOTEBOOKS).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# The notebooks of the series
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", build.series(), ids=ids)
def test_form(path):
    assert build.problems(build.read(path), ids(path)) == []


def test_nothing_has_drifted():
    repo = build.repository(ask_git=False)
    assert build.drift(build.series(), NOTEBOOKS, repo) == []


def test_numbers_are_consecutive():
    numbers = [int(path.name[:2]) for path in build.series() if path.parent == NOTEBOOKS]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", build.series(), ids=ids)
def test_links_point_to_files(path):
    """Of the navigation and of the whole text: every relative link."""
    for cell in build.read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
                if not re.match(r"\w+:", target):
                    assert (path.parent / target).exists(), target


def used(node, context) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, context)}


def given_names(cell: ast.Module) -> set[str]:
    """The global names that a cell assigns or defines."""
    defined = (ast.FunctionDef, ast.ClassDef)
    return set().union(*({s.name} if isinstance(s, defined) else used(s, ast.Store) for s in cell.body))


def is_slider(node) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "slider"


@pytest.mark.parametrize("path", build.series(), ids=ids)
def test_sliders_work_when_all_cells_have_run(path):
    """A slider's function runs again whenever the reader moves it: no later cell may give its names another meaning."""
    cells = [ast.parse(cell.source) for cell in build.read(path).cells if cell.cell_type == "code"]
    functions = {s.name: s for cell in cells for s in cell.body if isinstance(s, ast.FunctionDef)}
    for number, cell in enumerate(cells):
        for slider in filter(is_slider, ast.walk(cell)):
            read, todo = set(), {slider.args[0].id}
            while todo:
                function = functions[todo.pop()]
                own = used(function, ast.Store) | {argument.arg for argument in function.args.args}
                new = used(function, ast.Load) - own - read
                read, todo = read | new, todo | (new & functions.keys())
            assert read & set().union(*map(given_names, cells[number + 1 :])) == set()


def test_sliders_are_found():
    """If `ql.slider` had another name, the test above would pass without looking at anything."""
    trees = [
        ast.parse(cell.source) for path in build.series() for cell in build.read(path).cells if cell.cell_type == "code"
    ]
    assert sum(is_slider(node) for tree in trees for node in ast.walk(tree)) >= 3


def test_kernels_of_build_and_of_nbval_see_the_same():
    assert (build.ENVIRONMENT, build.REMOVED) == (conftest.ENVIRONMENT, conftest.REMOVED)


# ---------------------------------------------------------------------------------------------------------------------
# Stamps, on a series of three
# ---------------------------------------------------------------------------------------------------------------------

QUANTLIB = "def setup(model):\n    return model\n"  # stands in for the real one, which takes seconds to import


def draft(title, *code):
    """A notebook as an author writes it: no badge, no links, a setup cell of imports only."""
    cells = [
        new_markdown_cell(f"# {title}", id="title"),
        new_code_cell("import quantlib as ql", id="setup", metadata={"tags": ["setup"], "collapsed": True}),
        *(new_code_cell(source, id=f"code-{i}") for i, source in enumerate(code)),
        new_markdown_cell("## Summary\n\nIt works.", id="summary"),
        new_markdown_cell("## Where to read more\n\nHere.", id="more"),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "mine", "display_name": "Mine"}})


def store(nb, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    build.write(nb, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """01 and 03 run; 02 stands between them; one solution."""
    folder = tmp_path / "notebooks"
    store(draft("1. One", "print(1)"), folder / "01_one.ipynb")
    store(draft("2. Two"), folder / "02_two.ipynb")
    store(draft("3. Three", "2 + 2"), folder / "03_three.ipynb")
    store(draft("Solutions 2"), folder / "solutions" / "02_two.ipynb")
    (tmp_path / "quantlib.py").write_text(QUANTLIB)
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
    assert two.cells[-1].source == links
    assert two.cells[-1].metadata == {"tags": ["nav"], "slideshow": {"slide_type": "skip"}}
    assert one.cells[-1].source == "[contents](../README.md) | [2. Two →](02_two.ipynb)"
    assert three.cells[-1].source == "[← 2. Two](02_two.ipynb) | [contents](../README.md)"
    assert solution.cells[-1].source == "[contents](../../README.md)"
    assert "/notebooks/solutions/02_two.ipynb)" in solution.cells[0].source
    head, own, tail = two.cells[1].source.partition("\nimport quantlib as ql\n\n")
    assert head == build.HEAD.replace("github.com/OWNER/NAME", "github.com/ada/quant") and own and tail == build.TAIL
    assert two.cells[1].metadata == {"tags": ["setup", "nbval-ignore-output"], "slideshow": {"slide_type": "skip"}}
    assert two.metadata == build.METADATA


def test_stamping_twice_changes_nothing(folder):
    stamp_all(folder)
    before = contents(folder), [path.stat().st_mtime_ns for path in build.series(folder)]
    stamp_all(folder)
    assert (contents(folder), [path.stat().st_mtime_ns for path in build.series(folder)]) == before


def test_stamping_leaves_the_authors_cells_alone(folder):
    path = folder / "01_one.ipynb"
    before = build.read(path)
    after = stamp_all(folder)[0]
    assert [cell.id for cell in after.cells[:-1]] == [cell.id for cell in before.cells]
    for new, old in zip(after.cells[2:-1], before.cells[2:], strict=True):
        assert (new.source, new.get("outputs"), build.tags(new)) == (old.source, old.get("outputs"), build.tags(old))


def test_deck_of_slides():
    """A heading opens a slide with its first result; further results go below; readings come up after their result."""
    cells = [
        new_markdown_cell("# 1. One"), new_markdown_cell("> The question."), new_markdown_cell("## Setup\n\nRun it."),
        new_code_cell("import x", metadata={"tags": ["setup"]}), new_markdown_cell("## A bell"), new_code_cell("1"),
        new_markdown_cell("One."), new_code_cell("2"), new_markdown_cell("Two."), new_markdown_cell("## Summary"),
        new_markdown_cell("links", metadata={"tags": ["nav"]}),
    ]  # fmt: skip
    expected = "slide - skip skip slide - fragment subslide fragment slide skip"
    assert build.slide_types(cells) == expected.split()


def test_stamping_follows_a_changed_title_and_another_repository(folder):
    stamp_all(folder, "--repo", "ada/quant")
    path = folder / "01_one.ipynb"
    nb = build.read(path)
    nb.cells[0].source = nb.cells[0].source.replace("# 1. One", "# 1. Uno")
    store(nb, path)
    _, two, _, _ = stamp_all(folder)
    assert "[← 1. Uno]" in two.cells[0].source and "[← 1. Uno]" in two.cells[-1].source
    assert "github/ada/quant/blob" in two.cells[0].source  # without --repo and remote it stays what it was
    _, two, _, _ = stamp_all(folder, "--repo", "grace/quant.two")
    assert "github/grace/quant.two/blob" in two.cells[0].source and '.com/grace/quant.two")' in two.cells[1].source
    assert "ada" not in two.cells[0].source + two.cells[1].source


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("import torch\n\nimport quantlib as ql", "import torch\n\nimport quantlib as ql"),
        (build.HEAD + "import torch", "import torch"),
        (build.HEAD.replace("pocket-gpt2", "gpt2") + "\n\nimport torch\n\nMODEL = ql.setup()\n", "import torch"),
        (f"import torch\n{build.TAIL}", "import torch"),
        (build.HEAD + build.TAIL, ""),
    ],
)
def test_setup_keeps_the_own_lines(own, expected):
    stamped = build.setup_source(own, "OWNER/NAME")
    assert stamped == f"{build.HEAD}\n{expected}\n\n{build.TAIL}"
    assert build.setup_source(stamped, "OWNER/NAME") == stamped


@pytest.mark.parametrize("own", ['MODEL = "gpt2"\nimport torch', f"{build.HEAD}\n{build.TAIL}\nprint(MODEL)"])
def test_setup_not_recognised(own):
    with pytest.raises(build.BuildError, match="Expected: the head, which ends in"):
        build.setup_source(own, "OWNER/NAME")


@pytest.mark.parametrize(
    ("source", "message"), [("No title", "begin with the title"), ("# T\n\nProse", "move it into the next cell")]
)
def test_cell_0_is_title_and_stamps_only(folder, capsys, source, message):
    nb = build.read(folder / "03_three.ipynb")
    nb.cells[0].source = source
    store(nb, folder / "03_three.ipynb")
    before = (folder / "03_three.ipynb").read_bytes()
    assert build.main(["3", "--stamp-only"], folder) == 1
    assert message in capsys.readouterr().err and (folder / "03_three.ipynb").read_bytes() == before


def test_missing_and_duplicate_ids_are_replaced(folder):
    nb = draft("1. One", "print(1)", "print(2)")
    nb.nbformat_minor = 4
    nb.cells[1].id, nb.cells[3].id = "cell-03", nb.cells[2].id
    del nb.cells[4]["id"]
    stamped = build.stamp(nb, folder / "01_one.ipynb", folder, "OWNER/NAME")
    assert [cell.id for cell in stamped.cells[1:5]] == ["cell-03", "code-0", "cell-04", "cell-05"]
    assert stamped.nbformat_minor == 5


def test_code_loses_trailing_whitespace(folder):
    store(draft("1. One", "if True:  \n    print(1)\n\n"), folder / "01_one.ipynb")
    assert stamp_all(folder)[0].cells[2].source == "if True:\n    print(1)"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/ada/quant", "ada/quant"),
        ("https://token@github.com/ada/quant.git", "ada/quant"),
        ("git@github.com:ada/quant.py.git", "ada/quant.py"),
        ("ssh://git@github.com/ada/quant", "ada/quant"),
        ("https://gitlab.com/ada/quant", None),
        ("https://github.com.evil.org/ada/quant", None),
        ("../quant", None),
        ("", None),
    ],
)
def test_github_name(url, name):
    assert build.github_name(url) == name


def test_repository_is_the_git_remote_but_not_for_check(folder, capsys):
    git = ["git", "-C", folder.parent]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "git@github.com:ada/quant.git"], check=True)
    assert build.repository(folder) == "ada/quant"
    assert build.repository(folder, ask_git=False) == "OWNER/NAME"
    stamp_all(folder, "--repo", "grace/quant")
    build.main(["--check"], folder)
    assert "not as stamped" not in capsys.readouterr().err


def run_head(where, repo, source=None):
    """Run the head of the setup cell in a folder that has no quantlib.py."""
    where.mkdir()
    code = build.setup_source("import quantlib as ql", repo) + "\nprint(ql.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "QUANTLIB_SOURCE"}
    environment |= {"QUANTLIB_SOURCE": str(source)} if source else {}
    return subprocess.run([sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True)


def test_head_clones_the_series_where_only_the_notebook_is(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "quantlib.py").write_text(QUANTLIB)
    git = ["git", "-C", source, "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *command], check=True)
    result = run_head(tmp_path / "alone", "ada/quant", source=source.as_uri())
    assert result.stdout.strip() == str(tmp_path / "alone" / "quantization" / "quantlib.py"), result.stderr


def test_head_says_so_where_the_repository_is_not_known(tmp_path):
    result = run_head(tmp_path / "alone", "OWNER/NAME")
    assert result.returncode == 1 and "this copy does not say where its repository is" in result.stderr
    assert 'assert "OWNER/NAME" not in SOURCE' in build.setup_source("", "ada/quant")


# ---------------------------------------------------------------------------------------------------------------------
# Running and checking
# ---------------------------------------------------------------------------------------------------------------------


def test_build_then_check(folder, capsys, monkeypatch):
    """01 runs, 02 raises, 03 writes to stderr: only 01 is written. Mended and built, --check finds nothing."""
    monkeypatch.setenv("QUANTLIB_MODEL", "gpt2")
    shutil.rmtree(folder / "solutions")
    code = (
        'import os\nprint("a", flush=True)\nprint(MODEL)',
        'os.environ["TQDM_DISABLE"], os.environ.get("QUANTLIB_MODEL")',
        f'from IPython.display import display\ndisplay({{"{build.WIDGET}": {{}}}}, raw=True)',  # is not stored
    )
    store(draft("1. One", *code), folder / "01_one.ipynb")
    store(draft("2. Two", "1 / 0"), folder / "02_two.ipynb")
    store(draft("3. Three", "import sys", "print('Oh', file=sys.stderr)"), folder / "03_three.ipynb")
    before = contents(folder)
    assert build.main([], folder) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"01_one.ipynb: \d+\.\d s, written\n", out)
    assert "02_two.ipynb: cell 2 raised ZeroDivisionError: division by zero" in err
    assert "03_three.ipynb: cell 3 wrote to stderr: Oh" in err
    assert contents(folder)[1:] == before[1:]
    one = build.read(folder / "01_one.ipynb")
    assert one.cells[2].outputs == [new_output("stream", name="stdout", text="a\npocket-gpt2\n")]
    assert one.cells[3].outputs[0].data == {"text/plain": "('1', None)"} and one.cells[4].outputs == []
    assert [cell.execution_count for cell in one.cells[1:5]] == [1, 2, 3, 4]
    assert build.problems(one, "01_one.ipynb") == []

    (folder / "02_two.ipynb").unlink()
    (folder / "03_three.ipynb").unlink()
    assert build.main(["--stamp-only"], folder) == 0
    assert build.main(["--check"], folder) == 0
    one = build.read(folder / "01_one.ipynb")
    one.cells[-1].source += " "
    store(one, folder / "01_one.ipynb")
    stale = contents(folder)
    capsys.readouterr()
    assert build.main(["--check"], folder) == 1
    assert capsys.readouterr().err.startswith("01_one.ipynb: cell 7 is not as stamped") and contents(folder) == stale


def test_build_does_not_overwrite_what_changed_meanwhile(folder, capsys, monkeypatch):
    monkeypatch.setattr(build, "run", lambda nb, path: path.write_text("edited"))
    assert build.main(["2"], folder) == 1
    assert "was changed while it ran" in capsys.readouterr().err
    assert (folder / "02_two.ipynb").read_text() == "edited"


def test_build_lists_problems_of_form(folder, capsys, monkeypatch):
    monkeypatch.setattr(build, "run", lambda nb, path: None)
    assert build.main(["1"], folder) == 1
    assert "01_one.ipynb: execution counts do not run" in capsys.readouterr().err


def test_check_requires_one_repository(folder, capsys):
    stamp_all(folder, "--repo", "ada/quant")
    assert build.main(["2", "--stamp-only", "--repo", "grace/quant"], folder) == 0
    assert build.main(["--check"], folder) == 1
    err = capsys.readouterr().err
    assert "02_two.ipynb: cell 0 is not as stamped for ada/quant" in err and "01_one.ipynb: cell 0" not in err
    assert "02_two.ipynb: execution counts do not run 1…1" in err


def test_names_select(folder):
    nbs = stamp_all(folder, "03_thr", "1")
    assert [nb.cells[-1].metadata.get("tags") == ["nav"] for nb in nbs] == [True, False, True, False]
    for wrong in (["9"], ["--repo", "quant"]):
        with pytest.raises(SystemExit):
            build.main([*wrong, "--stamp-only"], folder)


# ---------------------------------------------------------------------------------------------------------------------
# Problems of form: a good notebook, broken in one way
# ---------------------------------------------------------------------------------------------------------------------


PICTURE = {"image/png": "AAAA/tmp/", "text/plain": "<Figure>"}


@pytest.fixture
def good(folder):
    nb = draft("1. One", "print(1)\n1.5")
    nb.cells[1].execution_count, nb.cells[2].execution_count = 1, 2
    nb.cells[2].outputs = [
        new_output("stream", name="stdout", text="1\n"),
        new_output("display_data", data=PICTURE, metadata={"image/png": {"alt": "A bell."}}),
        new_output("execute_result", data={"text/plain": "1.5"}, execution_count=2),
    ]
    nb.cells[3].source += (
        "\n\nA half, 0.5, the code `0.25`, $x = 0.125$, $$y = 0.0625$$, [a paper](https://arxiv.org/abs/2208.07339), "
        "arXiv:2208.07339 and https://example.org/home/v1.25 are no measured numbers; ``a `0.75` b`` neither.\n\n"
        "```\nmean 0.375\n```\n\n![a picture](../README.md)"
    )
    return build.stamp(nb, folder / "01_one.ipynb", folder, "OWNER/NAME")


def output(kind, **content):
    return lambda nb: nb.cells[2].outputs.append(new_output(kind, **content))


def source(cell, text):
    return lambda nb: nb.cells[cell].update(source=text)


def prose(text):
    return lambda nb: nb.cells[3].update(source=nb.cells[3].source + "\n\n" + text)


WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}

BREAKS = {
    "count missing": (lambda nb: nb.cells[2].update(execution_count=None), "execution counts do not run 1…2"),
    "count skipped": (lambda nb: nb.cells[2].update(execution_count=3), "execution counts do not run 1…2"),
    "error": (output("error", ename="E", evalue="", traceback=[]), "cell 2: it stores an error: E"),
    "stderr": (output("stream", name="stderr", text="Oh"), "cell 2: it stores what went to stderr"),
    "widget": (output("display_data", data=WIDGET), "cell 2: it stores a widget"),
    "widget state": (lambda nb: nb.metadata.update(widgets={}), "the notebook's metadata is not as stamped"),
    "old format": (lambda nb: nb.update(nbformat_minor=4), "the notebook's metadata is not as stamped"),
    "metadata": (lambda nb: nb.metadata.pop("colab"), "the notebook's metadata is not as stamped"),
    "bar": (output("stream", name="stdout", text="50%|##  | 1/2 [00:01<00:01, 1.0it/s]"), "cell 2: it stores a prog"),
    "bar, slow": (output("display_data", data={"text/plain": "1/2 [00:01<00:01, 2s/it]"}), "cell 2: it stores a prog"),
    "carriage return": (output("stream", name="stdout", text="1\r2"), "cell 2: it stores a progress bar"),
    "path in output": (output("stream", name="stdout", text="/home/ada/x"), "cell 2: its output shows a path of a mac"),
    "path in code": (source(2, 'open("C:\\\\x")'), "cell 2: a path of a machine"),
    "path in prose": (prose("Look into `/content/x`."), "cell 3: a path of a machine: /content/"),
    "long cell": (source(2, "\n".join(["x = 1"] * 31)), "cell 2: it has 31 lines, more than 30"),
    "large file": (output("stream", name="stdout", text="x" * 1_500_000), "the file takes 1.5 MB"),
    "no setup": (lambda nb: nb.cells[1].metadata.tags.remove("setup"), "the first code cell is not tagged setup"),
    "setup late": (lambda nb: nb.cells.insert(3, nb.cells.pop(1)), "the first code cell is not tagged setup"),
    "no summary": (source(3, "Summary"), "there is no heading ## Summary"),
    "no reading": (source(4, "### Where to read more"), "there is no heading ## Where to read more"),
    "silent picture": (output("display_data", data=PICTURE), "cell 2: a picture has no alt text"),
    "bare picture": (output("display_data", data={"image/png": "AAAA"}), "cell 2: a picture has no text/plain"),
    "decimal": (prose("It costs 0.37 nats."), "cell 3: a measured number stands in the prose: 0.37"),
    "decimal after code": (prose("`a` costs 0.37, `b` more."), "cell 3: a measured number stands in the prose: 0.37"),
    "decimal after URL": (prose("`https://example.org` says 0.37 `b`."), "cell 3: a measured number stands in the"),
    "empty cell": (source(4, " \n"), "cell 4: it is empty"),
    "no alt text": (prose("![](a.png)"), "cell 3: an image has no alt text"),
    "no alt text, html": (prose('<img src="a.png">'), "cell 3: an image has no alt text"),
    "attachment": (lambda nb: nb.cells[3].update(attachments={"a.png": {}}), "cell 3: it has attachments"),
}  # fmt: skip


def test_good_notebook_has_no_problems(good):
    assert build.problems(good, "01_one.ipynb") == []


@pytest.mark.parametrize("name", BREAKS)
def test_problem_is_reported(good, name):
    damage, expected = BREAKS[name]
    damage(good)
    found = build.problems(good, "01_one.ipynb")
    assert any(problem.startswith(f"01_one.ipynb: {expected}") for problem in found), found


def test_what_a_notebook_may(good):
    """An error that its tag announces; a solution without the sections of a chapter."""
    expected = copy.deepcopy(good)
    expected.cells[2].metadata.tags = ["raises-exception"]
    output("error", ename="E", evalue="", traceback=[])(expected)
    assert build.problems(expected, "01_one.ipynb") == []
    del good.cells[3:5]
    assert build.problems(good, "solutions/01_one.ipynb") == []


# ---------------------------------------------------------------------------------------------------------------------
# Tolerance of numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("mean 0.1234 dB", "mean 0.1234 dB"),
        ("0.13", "0.12"),  # the last digit, which binary floats would miss
        ("0.1", "0.0999"),
        ("1234.56", "1234.99"),  # within a thousandth
        ("1,234.5", "1,235.1"),
        ("12.5%", "12.6%"),
        ("1.27x, 3.1MB", "1.28x, 3.0MB"),
        ("[0.25,-0.5]", "[0.26,-0.6]"),
        ("1.500e-07", "1.501e-07"),
        ("1e-05", "9.9999e-06"),
        ("0.0019±0.0006", "0.0020±0.0005"),
        ("−0.50", "-0.51"),
        ("0.00", "-0.01"),
        ("tensor([ 0.0001, -0.2000])", "tensor([-0.0000, -0.2000])"),
        ("mean\n    a\nx  9.9996\n", "mean\n     a\nx  10.0001\n"),  # a wider number moves the rest of its column
        ("<td>0.50</td>", "<td>0.51</td>"),
        ("nan inf -inf 1.50", "nan inf -inf 1.51"),
    ],
)
def test_numbers_that_agree(stored, fresh):
    assert conftest.agree(stored, fresh)


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("0.1234", "0.1236"),
        ("1234.5", "1236.5"),
        ("2.00e-07", "2.02e-07"),
        ("12.5%", "12.7%"),
        ("1,234.5", "1,237.5"),
        ("127", "126"),
        ("127", "100"),
        ("1,234", "1,235"),
        ("25%", "26%"),
        ("127.", "126."),  # how torch prints a whole number
        ("1", "1.0"),
        ("0.5", "-0.5"),
        ("0.01", "-0.01"),
        ("mean 0.5", "mode 0.5"),
        ("0.5 dB", "0.5"),
        ("a  0.50", "a 0.51"),  # spaces, although no number got wider
        ("0.5\n0.5", "0.5 0.5"),
        ("[0.5]", "[0.5, 0.5]"),
        ("0.5", "nan"),
        ("inf", "-inf"),
        ("torch 2.13.0", "torch 2.14.0"),
        ("h.0.mlp", "h.1.mlp"),
        ("int8.5", "int8.6"),
        ("3e99999a", "4e99999a"),  # hexadecimal
    ],
)
def test_numbers_that_do_not_agree(stored, fresh):
    assert not conftest.agree(stored, fresh)


def test_texts_are_paired_as_nbval_pairs_them():
    """The second picture's text is compared with the second, whatever was printed between them."""

    def outputs(printed, *shown):
        texts = [new_output("display_data", data={"text/plain": text}) for text in shown]
        return [*texts[:1], new_output("stream", name="stdout", text=printed), *texts[1:]]

    def compared(self, test, ref, skip_compare=None):
        return test

    fresh = outputs("0.51", "0.11", "0.33", "0.77")
    stored = outputs("0.50", "0.12", "0.44")
    assert conftest.tolerant(compared)(None, fresh, stored) == outputs("0.50", "0.12", "0.33", "0.77")


def test_stale_outputs_fail_and_last_digits_pass(tmp_path):
    """End to end: pytest runs two notebooks beside a copy of conftest.py, in a process of its own."""
    cells = {
        "import os\nos.environ['HF_HUB_OFFLINE'], os.environ.get('QUANTLIB_MODEL')": "('1', None)",
        "print('mean', 0.12345)": "mean 0.12346\n",
        "2.5 * 2": "5.0",
        "print('largest code', 127)": "largest code 127\n",
    }
    for name, wrong in {"right": {}, "stale": {"largest code 127\n": "largest code 100\n"}}.items():
        nb = new_notebook()
        for i, (code, text) in enumerate(cells.items(), start=1):
            text = wrong.get(text, text)
            if text.endswith("\n"):
                outputs = [new_output("stream", name="stdout", text=text)]
            else:
                outputs = [new_output("execute_result", data={"text/plain": text}, execution_count=i)]
            nb.cells.append(new_code_cell(code, execution_count=i, outputs=outputs))
        store(nb, tmp_path / f"{name}.ipynb")
    shutil.copy(NOTEBOOKS / "conftest.py", tmp_path)
    result = subprocess.run(
        [sys.executable, *"-m pytest --nbval --nbval-current-env -v --color=no -p no:cacheprovider".split()],
        cwd=tmp_path, env=os.environ | {"QUANTLIB_MODEL": "gpt2"}, capture_output=True, text=True,
    )  # fmt: skip
    verdicts = re.findall(r"^(\w+)\W+ipynb::Cell (\d) (\w+)", result.stdout, re.M)
    assert verdicts == [
        *[("right", str(i), "PASSED") for i in range(4)],
        *[("stale", str(i), "PASSED") for i in range(3)],
        ("stale", "3", "FAILED"),
    ], result.stdout
    assert result.returncode == 1
