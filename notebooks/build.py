"""Run the notebooks and stamp what they have in common; or check that nothing has drifted.

    python notebooks/build.py [NAME ...] [--repo OWNER/NAME] [--stamp-only] [--check]

NAME is a number ("03") or how a file name begins; by default all notebooks are taken, the solutions too. Five things
are stamped, everything else is the author's:

- Cell 0: below the authored title, its first line, the Colab badge and the links to the neighbours.
- The last cell, tagged `nav`: the same links; it is appended where it is missing.
- The setup cell, tagged `setup`: a fixed head, the notebook's own lines (its imports), a fixed tail.
- The picture of the README, `overview.png`, is the output of the cell tagged `readme-figure`.
- Metadata: of the notebook exactly `METADATA`; of a cell its tags, and its place in the deck that
  `jupyter nbconvert --to slides` makes; a cell keeps its id.

Then the notebook is run, always without GPU and network and with the bundled model, so that the stored outputs are the
same wherever it is built; a cell that fails or writes to stderr leaves the file as it was, problems of form are listed.
`--stamp-only` does not run. `--check` changes nothing, runs nothing, and lists every drift and every problem of form.
The exit status is 1 where something is listed.
"""

import argparse
import base64
import copy
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
PLACEHOLDER = "OWNER/NAME"
COLAB = "https://colab.research.google.com"
TIMEOUT = 600  # seconds for a cell, the same as in pyproject.toml

# What the kernels find in their environment: no progress bars, no network, no GPU, and no choice of another model.
ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
REMOVED = ("QUANTLIB_MODEL", "QUANTLIB_SOURCE")

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
}

# Only the address is stamped, not the name in the assert, which goes on looking for the placeholder.
HEAD = """\
MODEL = "pocket-gpt2"  # @param ["pocket-gpt2", "gpt2", "gpt2-medium", "distilgpt2"] {allow-input: true}

import os
import subprocess
import sys
from pathlib import Path

SOURCE = os.environ.get("QUANTLIB_SOURCE", "https://github.com/OWNER/NAME")
folders = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "quantization"]
if not any((folder / "quantlib.py").exists() for folder in folders):  # only this notebook was opened, as on Colab
    assert "OWNER/NAME" not in SOURCE, "Get the whole series: this copy does not say where its repository is."
    subprocess.run(["git", "clone", "--depth", "1", SOURCE, "quantization"], check=True)
sys.path.insert(0, str(next(folder for folder in folders if (folder / "quantlib.py").exists())))
"""
TAIL = "MODEL = ql.setup(MODEL)"
SETUP = re.compile(
    r"(?:.*?^sys\.path\.insert\([^\n]*(?:\n|\Z))?(?P<own>.*?)(?:^MODEL = ql\.setup\([^\n]*\n*)?", re.M | re.S
)
NOT_OWN = re.compile(r"^(?:(?:MODEL|SOURCE|folders) =|sys\.path\.insert\()", re.M)
# A line of cell 0 that is neither empty nor the badge nor the links.
NOT_STAMPED = re.compile(r"^(?!\[!\[Open In Colab\]|.*\[contents\]\().*\S", re.M)

# Looked for in the form of a notebook. Decimals in prose do not count in code, math, link targets and arXiv numbers.
MACHINE_PATH = re.compile(r"/(?:root|home|work|tmp|Users|content)/|C:\\")
PROGRESS_BAR = re.compile(r"\r|it/s\]|s/it\]|\[\d\d:\d\d<")
DECIMAL = re.compile(r"\b\d+\.\d{2,}\b")
IMAGE_WITHOUT_ALT = re.compile(r"!\[\s*\]|<img(?![^>]*\balt=[\"'][^\"'])[^>]*>")
WIDGET = "application/vnd.jupyter.widget-view+json"
URL = re.compile(r"https?://[^\s)>\"'`]+")
NOT_PROSE = re.compile(
    rf"(`+).+?\1|\$\$.+?\$\$|\$[^$\n]+\$|\]\([^)]*\)|arXiv[: ]\d{{4}}\.\d{{4,5}}|{URL.pattern}", re.S
)


class BuildError(Exception):
    """A notebook that cannot be stamped or run; the message says where and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def series(folder: Path = FOLDER) -> list[Path]:
    """All notebooks in reading order: the numbered ones, then the solutions."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb")) + sorted((folder / "solutions").glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """The notebook as it is stored; unlike `nbformat.read` this does not add what is missing."""
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def write(nb: NotebookNode, path: Path) -> bool:
    """Store the notebook in one step; returns False, and leaves the file alone, where nothing changed."""
    nbformat.validate(nb)
    text = nbformat.v4.writes(nb) + "\n"
    if path.read_text(encoding="utf-8") == text:
        return False
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return True


def github_name(url: str) -> str | None:
    """The OWNER/NAME in the address of a git remote at github.com, https or ssh; None for any other."""
    match = re.fullmatch(r"(?:https://(?:[^@/]+@)?|(?:ssh://)?git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    return match and match[1]


def repository(folder: Path = FOLDER, ask_git: bool = True) -> str:
    """OWNER/NAME: of the git remote if asked for, else what the first stamped notebook says, else the placeholder."""
    if ask_git:
        try:
            git = subprocess.run(["git", "remote", "get-url", "origin"], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            git = None
        if git and (name := github_name(git.stdout.strip())):
            return name
    for path in series(folder):
        if match := re.search(re.escape(COLAB) + r"/github/([\w.-]+/[\w.-]+)/blob/", path.read_text(encoding="utf-8")):
            return match[1]
    return PLACEHOLDER


# ---------------------------------------------------------------------------------------------------------------------
# Stamps
# ---------------------------------------------------------------------------------------------------------------------


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def title(path: Path) -> str:
    """The authored title: what follows `# ` in the first line of cell 0."""
    first = next(iter(read(path).cells), None)
    if not first or first.cell_type != "markdown" or not first.source.startswith("# "):
        raise BuildError(f"cell 0 of {path.name} should be Markdown and begin with the title: # …")
    return first.source.split("\n")[0][2:].strip()


def navigation(path: Path, folder: Path) -> str:
    """The line of links: previous | contents | next. Neighbours are the notebooks in the same folder."""
    neighbours = [other for other in series(folder) if other.parent == path.parent]
    here = neighbours.index(path)
    up = "../" * len(path.relative_to(folder).parts)
    links = [f"[contents]({up}README.md)"]
    if here > 0:
        links.insert(0, f"[← {title(neighbours[here - 1])}]({neighbours[here - 1].name})")
    if here < len(neighbours) - 1:
        links.append(f"[{title(neighbours[here + 1])} →]({neighbours[here + 1].name})")
    return " | ".join(links)


def setup_source(source: str, repo: str) -> str:
    """The setup cell: the head, the notebook's own lines out of `source`, the tail."""
    own = SETUP.fullmatch(source)["own"].strip("\n")
    if NOT_OWN.search(own):
        raise BuildError(
            "the setup cell is not recognised. Expected: the head, which ends in the line `sys.path.insert(…)`, then "
            f"the notebook's own imports, then `{TAIL}` and nothing more; or the own imports alone"
        )
    return HEAD.replace(f"github.com/{PLACEHOLDER}", f"github.com/{repo}") + f"\n{own}\n\n{TAIL}"


def stamp(nb: NotebookNode, path: Path, folder: Path, repo: str) -> NotebookNode:
    """A copy of the notebook with all stamps; stamping a stamped notebook changes nothing."""
    nb = copy.deepcopy(nb)
    address = f"{COLAB}/github/{repo}/blob/main/notebooks/{path.relative_to(folder).as_posix()}"
    badge = f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({address})"
    heading, links = title(path), navigation(path, folder)
    if NOT_STAMPED.search(nb.cells[0].source.partition("\n")[2]):
        raise BuildError("cell 0 holds more than the title, which stamping would erase: move it into the next cell")
    nb.cells[0].source = f"# {heading}\n\n{badge}\n\n{links}"

    setup = next((cell for cell in nb.cells if cell.cell_type == "code" and "setup" in tags(cell)), None)
    if setup is None:
        raise BuildError("there is no setup cell: tag the first code cell `setup`")
    setup.source = setup_source(setup.source, repo)
    setup.metadata.tags = tags(setup) + ["nbval-ignore-output"] * ("nbval-ignore-output" not in tags(setup))

    nav = next((cell for cell in nb.cells if "nav" in tags(cell)), None)
    nav = nav or NotebookNode(cell_type="markdown", metadata=NotebookNode(tags=["nav"]))
    nav.source = links
    nb.cells = [cell for cell in nb.cells if "nav" not in tags(cell)] + [nav]

    for cell, kind in zip(nb.cells, slide_types(nb.cells), strict=True):
        cell.metadata = NotebookNode(tags=tags(cell)) if tags(cell) else NotebookNode()
        cell.metadata.slideshow = NotebookNode(slide_type=kind)

    taken = {cell.get("id") for cell in nb.cells}
    seen = set()
    for i, cell in enumerate(nb.cells):
        if not cell.get("id") or cell.id in seen:
            cell.id = next(id_ for n in itertools.count(i) if (id_ := f"cell-{n:02d}") not in taken)
            taken.add(cell.id)
        seen.add(cell.id)
        if cell.cell_type == "code":
            cell.source = "\n".join(line.rstrip() for line in cell.source.rstrip().split("\n"))
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def slide_types(cells: list[NotebookNode]) -> list[str]:
    """Where each cell stands in a deck of slides.

    A heading begins a slide, and the first cell of code with its result stands on it. Each later one goes on a slide
    below. What reads a result comes up after it, so that the class can predict first. Setup and navigation are left
    out.
    """
    kinds, code_before = [], False
    for i, cell in enumerate(cells):
        if "nav" in tags(cell) or "setup" in tags(cell) or re.fullmatch(r"## Setup\b.*", cell.source, re.S):
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


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def run(nb: NotebookNode, path: Path) -> None:
    """Run all cells of the notebook, in its folder, and store their outputs in `nb`."""
    environment = {key: value for key, value in os.environ.items() if key not in REMOVED} | ENVIRONMENT
    current = 0

    def remember(cell, cell_index):
        nonlocal current
        current = cell_index

    client = NotebookClient(
        nb,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        on_cell_start=remember,
        extra_arguments=["--log-level=ERROR"],  # no advice on encryption
    )
    try:
        client.execute(cwd=str(path.parent), env=environment)
    except CellExecutionError as error:
        raise BuildError(f"cell {current} raised {error.ename}: {error.evalue}") from None
    except CellTimeoutError:
        raise BuildError(f"cell {current} took more than {TIMEOUT} s") from None
    except DeadKernelError:
        raise BuildError(f"cell {current} killed the kernel") from None
    nb.metadata.pop("widgets", None)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            # A widget shows only where it runs; what a reader sees without it is the static picture below it.
            cell.outputs = merge_streams([o for o in cell.outputs if WIDGET not in o.get("data", {})])
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    raise BuildError(f"cell {i} wrote to stderr: {output.text.strip()}")


def merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join what consecutive prints wrote: how the kernel cuts a stream into pieces is an accident of timing."""
    merged = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def save_figure(nb: NotebookNode, path: Path) -> None:
    """Store the picture that the cell tagged `readme-figure` drew, if the notebook has one, for the README."""
    for cell in nb.cells:
        if "readme-figure" in tags(cell):
            pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
            path.write_bytes(base64.b64decode(pictures[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def drift(paths: list[Path], folder: Path, repo: str) -> list[str]:
    """Where the notebooks differ from what would be stamped; the notebook's metadata is left to `problems`."""
    found = []
    for path in paths:
        name, nb = path.relative_to(folder).as_posix(), read(path)
        try:
            stamped = stamp(nb, path, folder, repo)
        except BuildError as error:
            found.append(f"{name}: {error}")
            continue
        for i, (old, new) in enumerate(itertools.zip_longest(nb.cells, stamped.cells)):
            if old != new:
                found.append(f"{name}: cell {i} is not as stamped for {repo}: run build.py --stamp-only")
    return found


def problems(nb: NotebookNode, name: str) -> list[str]:
    """What is wrong with the form of one notebook; `name` is its path in this folder. Cells are counted from 0."""
    found = []
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    counts = [cell.get("execution_count") for cell in code if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"execution counts do not run 1…{len(counts)}")
    if nb.metadata != METADATA or (nb.nbformat, nb.nbformat_minor) != (4, 5):
        found.append("the notebook's metadata is not as stamped")
    if (size := len(nbformat.v4.writes(nb).encode())) > 1.5e6:
        found.append(f"the file takes {size / 1e6:.1f} MB, more than 1.5 MB")
    if not code or "setup" not in tags(code[0]):
        found.append("the first code cell is not tagged setup")
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    for heading in () if name.startswith("solutions/") else ("## Summary", "## Where to read more"):
        if not re.search(rf"^{heading}\s*$", text, re.M):
            found.append(f"there is no heading {heading}")
    for i, cell in enumerate(nb.cells):
        found += [f"cell {i}: {problem}" for problem in _cell_problems(cell)]
    return [f"{name}: {problem}" for problem in found]


def _cell_problems(cell: NotebookNode):
    if not cell.source.strip():
        yield "it is empty"
    if match := MACHINE_PATH.search(URL.sub("", cell.source)):
        yield f"a path of a machine: {match[0]}"
    if cell.get("attachments"):
        yield "it has attachments"
    if cell.cell_type == "markdown":
        if match := DECIMAL.search(NOT_PROSE.sub("", cell.source)):
            yield f"a measured number stands in the prose: {match[0]}"
        if IMAGE_WITHOUT_ALT.search(cell.source):
            yield "an image has no alt text"
    if cell.cell_type == "code":
        if (lines := len(cell.source.split("\n"))) > 30:
            yield f"it has {lines} lines, more than 30"
        for output in cell.outputs:
            yield from _output_problems(output, expected_error="raises-exception" in tags(cell))


def _output_problems(output: NotebookNode, expected_error: bool):
    data = output.get("data", {})
    text = [output.get("text", ""), *output.get("traceback", ())]
    text = "\n".join(text + [value for mime, value in data.items() if mime.startswith("text/")])
    if output.output_type == "error" and not expected_error:
        yield f"it stores an error: {output.ename}"
    if output.get("name") == "stderr":
        yield "it stores what went to stderr"
    if WIDGET in data:
        yield "it stores a widget, which shows only where it runs"
    if "image/png" in data and "text/plain" not in data:
        yield "a picture has no text/plain beside it"
    if "image/png" in data and not output.get("metadata", {}).get("image/png", {}).get("alt"):
        yield "a picture has no alt text: show it with ql.show(…)"
    if PROGRESS_BAR.search(text):
        yield "it stores a progress bar"
    if match := MACHINE_PATH.search(URL.sub("", text)):
        yield f"its output shows a path of a machine: {match[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def build(path: Path, folder: Path, repo: str, stamp_only: bool) -> list[str]:
    """Stamp one notebook, run it and write it; returns the problems of form that are left."""
    start = time.perf_counter()
    before = path.read_bytes()
    nb = stamp(read(path), path, folder, repo)
    if not stamp_only:
        run(nb, path)
        if path.read_bytes() != before:
            raise BuildError("it was changed while it ran")
        nb = stamp(nb, path, folder, repo)  # running has added metadata
        save_figure(nb, folder / "overview.png")
    changed = "written" if write(nb, path) else "unchanged"
    name = path.relative_to(folder).as_posix()
    print(f"{name}: {time.perf_counter() - start:.1f} s, {changed}", flush=True)
    return [] if stamp_only else problems(nb, name)


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the notebooks and stamp what they have in common.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help='a number ("03") or how a file name begins; default all'
    )
    parser.add_argument("--repo", metavar=PLACEHOLDER, help="on GitHub; default: the git remote, or what is stamped")
    parser.add_argument("--stamp-only", action="store_true", help="do not run the notebooks")
    parser.add_argument("--check", action="store_true", help="change and run nothing; exit 1 if anything has drifted")
    options = parser.parse_args(argv)
    if options.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        parser.error(f"--repo {options.repo}: give {PLACEHOLDER}")
    names = [name.zfill(2) if name.isdigit() else name for name in options.names]
    paths = [path for path in series(folder) if not names or path.name.startswith(tuple(names))]
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            parser.error(f"no notebook begins with {name}")

    repo = options.repo or repository(folder, ask_git=not options.check)
    if options.check:
        found = drift(paths, folder, repo)
        found += [problem for path in paths for problem in problems(read(path), path.relative_to(folder).as_posix())]
    else:
        found = []
        for path in paths:
            try:
                found += build(path, folder, repo, options.stamp_only)
            except BuildError as error:
                found.append(f"{path.relative_to(folder).as_posix()}: {error}; the file is left as it was")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
