"""Run the notebooks and stamp what they have in common; or check that nothing has drifted.

    python notebooks/build.py [NAME ...] [--repo OWNER/NAME] [--stamp-only] [--check]

NAME is a number ("03") or how a file name begins; by default all notebooks are taken, the solutions too. Stamped are:

- cell 0: below the authored title the Colab badge and the links to the neighbours; the last cell: the links, and
  one to the glossary;
- the cell that chooses the model, tagged `parameters`; of the cell tagged `setup`, what comes after its imports;
- metadata: of the notebook `METADATA`; of a cell its tags, and its place in the deck of `nbconvert --to slides`.

All else is the author's. Then the notebook is run, without GPU and network and with the bundled model, so that its
outputs are the same wherever it is built; a cell that fails leaves the file as it was. `--check` changes and runs
nothing, and fails on drift and on problems of form; in a GitHub workflow also where the notebooks are stamped for
another repository.
"""

import argparse
import base64
import copy
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell

FOLDER = Path(__file__).resolve().parent
COLAB = "https://colab.research.google.com"
# What kernels find in their environment: no progress bars, no network, no GPU. QUANTLIB_MODEL they do not find.
ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
}
MODEL = 'MODEL = "pocket-gpt2"  # @param ["pocket-gpt2", "gpt2", "gpt2-medium", "distilgpt2"] {allow-input: true}'
OTHERS = MODEL.replace('"gpt2", "gpt2-medium", "distilgpt2"', '"HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B", "gpt2"')
PLACEHOLDER = "OWNER/NAME"
FETCH = """\
# On Colab this notebook comes alone: fetch the rest of the series.
if "google.colab" in sys.modules and not os.path.exists("quantization/quantlib.py"):
    git = !git clone --depth 1 https://github.com/OWNER/NAME quantization
    assert os.path.exists("quantization/quantlib.py"), f"The series could not be fetched: {git[-1]}"

"""
SETUP = """\
# Tell Python where quantlib.py is: one folder up, two folders up, or in what was fetched.
for folder in ["..", "../..", "quantization"]:
    if os.path.exists(f"{folder}/quantlib.py"):
        sys.path.append(folder)
assert find_spec("quantlib"), f"quantlib.py is not in {os.getcwd()}, .., ../.. or quantization: put the series there."
import quantlib as ql

MODEL = ql.setup(MODEL)"""

# What the form of a notebook is searched for. Code, math, link targets and numbers of arXiv are no prose.
BOX = ["Question.", "You will be able to", "You need", "Time"]
HEADINGS = ["## Summary", "## Exercises", "## Where to read more"]
URL = r"https?://[^\s)>\"'`]+"
NOT_PROSE = re.compile(rf"(`+).+?\1|\$\$.+?\$\$|\$[^$\n]+\$|\]\([^)]*\)|arXiv[: ]\d{{4}}\.\d{{4,5}}|{URL}", re.S)
DECIMAL = re.compile(r"\b\d+\.\d{2,}\b")
MACHINE_PATH = re.compile(r"/(?:root|home|work|tmp|Users|content)/|C:\\")
PROGRESS_BAR = re.compile(r"\r|it/s\]|s/it\]|\[\d\d:\d\d<")
NO_ALT_TEXT = re.compile(r"!\[\s*\]|<img(?![^>]*\balt=[\"'][^\"'])[^>]*>")
WIDGET = "application/vnd.jupyter.widget-view+json"


def series(folder: Path = FOLDER) -> list[Path]:
    """All notebooks in reading order: the numbered ones, then the solutions."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb")) + sorted((folder / "solutions").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook as it is stored; unlike `nbformat.read` this does not add what is missing."""
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def repository(folder: Path = FOLDER) -> str:
    """OWNER/NAME as the first stamped notebook has it, else the placeholder."""
    for path in series(folder):
        if match := re.search(re.escape(COLAB) + r"/github/([\w.-]+/[\w.-]+)/blob/", path.read_text(encoding="utf-8")):
            return match[1]
    return PLACEHOLDER


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def tagged(nb, tag: str):
    """The first cell with this tag, or None."""
    return next((cell for cell in nb.cells if tag in tags(cell)), None)


def navigation(path: Path, folder: Path) -> str:
    """The line of links: previous | contents | next. Neighbours are the notebooks in the same folder."""
    neighbours = [other for other in series(folder) if other.parent == path.parent]
    titles = [read(other).cells[0].source.split("\n")[0].removeprefix("# ") for other in neighbours]
    here = neighbours.index(path)
    links = [f"[contents]({'../' * len(path.relative_to(folder).parts)}README.md)"]
    if here > 0:
        links.insert(0, f"[← {titles[here - 1]}]({neighbours[here - 1].name})")
    if here < len(neighbours) - 1:
        links.append(f"[{titles[here + 1]} →]({neighbours[here + 1].name})")
    return " | ".join(links)


def stamp(nb, path: Path, folder: Path, repo: str) -> nbformat.NotebookNode:
    """A copy of the notebook with all stamps; stamping a stamped notebook changes nothing."""
    nb, links = copy.deepcopy(nb), navigation(path, folder)
    title, *rest = nb.cells[0].source.split("\n")
    own = [line for line in rest if line and not line.startswith("[![Open In Colab]") and "[contents](" not in line]
    if own or not title.startswith("# "):
        raise ValueError("cell 0 should be the title alone, # …: the stamp would erase the rest")
    address = f"{COLAB}/github/{repo}/blob/main/notebooks/{path.relative_to(folder).as_posix()}"
    nb.cells[0].source = f"{title}\n\n[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({address})\n\n{links}"

    setup = tagged(nb, "setup")
    source = setup.source if setup else "missing"
    imports, rest = re.fullmatch(r"((?:import .+\n|from .+\n|\n)*)([\s\S]*)", source + "\n").groups()
    if rest and not rest.startswith(("# On Colab", "# Tell Python")):
        raise ValueError("a cell tagged `setup` should hold the imports and nothing else of its own")
    fetch = "" if repo == PLACEHOLDER else FETCH.replace(PLACEHOLDER, repo)  # there is no address to fetch from yet
    setup.source = f"{imports.strip()}\n\n{fetch}{SETUP}"
    model = tagged(nb, "parameters") or new_code_cell(id="model")
    nav = tagged(nb, "nav") or new_markdown_cell(id="nav")
    model.source = OTHERS if path.name.startswith("21_") else MODEL  # it is for all families
    nav.source = f"{links} | [glossary]({'../' * (len(path.relative_to(folder).parts) - 1)}glossary.md)"
    cells = [cell for cell in nb.cells if cell is not model and cell is not nav]
    cells.insert(cells.index(setup), model)
    nb.cells = [*cells, nav]

    for cell, names in ((model, ["parameters"]), (setup, ["setup", "nbval-ignore-output"]), (nav, ["nav"])):
        cell.metadata["tags"] = names
    for cell, kind in zip(nb.cells, slide_types(nb.cells), strict=True):
        kept = {"tags": tags(cell)} if tags(cell) else {}
        cell.metadata = nbformat.from_dict(kept | {"slideshow": {"slide_type": kind}})
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def slide_types(cells: list) -> list[str]:
    """Where each cell stands in a deck of slides; setup and links are left out.

    A heading begins a slide, and the first cell of code with its result stands on it; each later one goes on a slide
    below. What reads a result comes up after it, so that the class can predict first.
    """
    kinds, code_before = [], False
    for i, cell in enumerate(cells):
        if {"parameters", "setup", "nav"} & {*tags(cell)} or re.match(r"## Setup\b", cell.source):
            kinds.append("skip")
        elif cell.cell_type == "code":
            kinds.append("subslide" if code_before else "-")
            code_before = True
        elif i == 0 or cell.source.startswith("## "):
            kinds.append("slide")
            code_before = False
        else:
            kinds.append("fragment" if code_before else "-")
    return kinds


def run(nb, path: Path) -> None:
    """Run all cells of the notebook, in its folder, and store their outputs in `nb`."""
    environment = os.environ | ENVIRONMENT
    environment.pop("QUANTLIB_MODEL", None)
    quiet = ["--log-level=ERROR"]  # no advice on encryption
    client = NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, extra_arguments=quiet)
    client.execute(cwd=str(path.parent), env=environment)
    for cell in nb.cells:
        merged = []
        for output in cell.get("outputs", []):
            # How the kernel cuts a stream into pieces is an accident of timing. A widget shows only where it runs; what
            # a reader sees without it is the static picture below it.
            if merged and output.get("name", "none") == merged[-1].get("name"):
                merged[-1].text += output.text
            elif WIDGET not in output.get("data", {}):
                merged.append(output)
        if cell.cell_type == "code":
            cell.outputs = merged


def problems(nb, chapter: bool) -> list[str]:
    """What is wrong with the form of a notebook, a chapter or a solution. Cells are counted from 0."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    first_tags = [tag for cell in code[:2] for tag in tags(cell)[:1]]
    lines = {line for cell in nb.cells if cell.cell_type == "markdown" for line in cell.source.split("\n")}
    box = re.findall(r"^> \*\*(.+?)\*\*", nb.cells[1].source, re.M)
    wrong = {
        "execution counts do not run 1, 2, 3, …": [c.execution_count for c in code] != [*range(1, len(code) + 1)],
        "the first code cells are not tagged parameters and setup": first_tags != ["parameters", "setup"],
        "the file is larger than 1.5 MB": len(nbformat.v4.writes(nb).encode()) > 1.5e6,
        f"cell 1 is not the box: {' '.join(BOX)}": chapter and box != BOX,
        f"a heading is missing, of {', '.join(HEADINGS)}": chapter and not lines.issuperset(HEADINGS),
    }
    found = [f"cell {i}: {problem}" for i, cell in enumerate(nb.cells) for problem in cell_problems(cell)]
    return [problem for problem, is_so in wrong.items() if is_so] + found


def cell_problems(cell) -> list[str]:
    code, outputs = cell.cell_type == "code", cell.get("outputs", [])
    data = [output.get("data", {}) for output in outputs]
    texts = [line for output in outputs for line in (output.get("text", ""), *output.get("traceback", []))]
    shown = "\n".join(texts + [text for each in data for kind, text in each.items() if kind.startswith("text/")])
    silent = [o for o in outputs if "image/png" in o.get("data", {}) and not o.metadata.get("image/png", {}).get("alt")]
    wrong = {
        "it is empty": not cell.source.strip(),
        "it has more than 30 lines": code and cell.source.count("\n") >= 30,
        "it shows a path of a machine": MACHINE_PATH.search(re.sub(URL, "", f"{cell.source}\n{shown}")),
        "a measured number stands in the prose": not code and DECIMAL.search(NOT_PROSE.sub("", cell.source)),
        "an image has no alt text": not code and NO_ALT_TEXT.search(cell.source),
        "a picture has no alt text: show it with ql.show(…)": silent,
        "it stores an error": any(o.output_type == "error" for o in outputs) and "raises-exception" not in tags(cell),
        "it stores what went to stderr": "stderr" in [output.get("name") for output in outputs],
        "it stores a widget, which shows only where it runs": any(WIDGET in each for each in data),
        "it stores a progress bar": PROGRESS_BAR.search(shown),
    }
    return [f"{problem}: {w[0]}" if isinstance(w, re.Match) else problem for problem, w in wrong.items() if w]


def build(path: Path, folder: Path, repo: str, stamp_only: bool) -> list[str]:
    """Stamp one notebook, run it and write it; returns what is wrong with it."""
    before, start = path.read_bytes(), time.perf_counter()
    try:
        nb = stamp(read(path), path, folder, repo)
        if not stamp_only:
            run(nb, path)
            if path.read_bytes() != before:
                raise ValueError("it was changed while it ran")
            nb = stamp(nb, path, folder, repo)  # running has added metadata
    except (ValueError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"{error}; the file is left as it was"]
    nbformat.validate(nb)
    path.write_text(nbformat.v4.writes(nb) + "\n", encoding="utf-8", newline="\n")
    print(f"{path.relative_to(folder).as_posix()}: {time.perf_counter() - start:.1f} s", flush=True)
    if (figure := tagged(nb, "readme-figure")) and not stamp_only:  # the picture of the README
        (picture,) = [output.data["image/png"] for output in figure.outputs if "image/png" in output.get("data", {})]
        (folder / "overview.png").write_bytes(base64.b64decode(picture))
    return [] if stamp_only else problems(nb, path.parent == folder)


def check(path: Path, folder: Path, repo: str) -> list[str]:
    """What is wrong with one notebook as it is stored."""
    nb = read(path)
    try:
        drifted = stamp(nb, path, folder, repo) != nb
    except ValueError as error:
        return [str(error)]
    return ["it is not as stamped: run build.py --stamp-only"] * drifted + problems(nb, path.parent == folder)


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; returns the exit status, 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="Run the notebooks and stamp what they have in common.")
    parser.add_argument("names", nargs="*", metavar="NAME", help='"03", or how a file name begins; default all')
    parser.add_argument("--repo", metavar=PLACEHOLDER, help="on GitHub; default: what is stamped")
    parser.add_argument("--stamp-only", action="store_true", help="do not run the notebooks")
    parser.add_argument("--check", action="store_true", help="change and run nothing; fail if anything has drifted")
    options = parser.parse_args(argv)
    names = tuple(name.zfill(2) if name.isdigit() else name for name in options.names) or ("",)
    paths = [path for path in series(folder) if path.name.startswith(names)]
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(names)}")

    repo, found = options.repo or repository(folder), []
    for path in paths:
        wrong = check(path, folder, repo) if options.check else build(path, folder, repo, options.stamp_only)
        found += [f"{path.relative_to(folder).as_posix()}: {problem}" for problem in wrong]
    here = os.environ.get("GITHUB_REPOSITORY", repo)
    if options.check and here.lower() != repo.lower():
        found.append(f"stamped for {repo}: run python notebooks/build.py --stamp-only --repo {here} and commit")
    print(*found, sep="\n", end="\n" * bool(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
