"""Run the same notebook several times at once, in the same folder, and compare what the runs print.

    python tests/at_once.py                # notebooks 02, 07 and 08, four times each
    python tests/at_once.py 04 --times 8

The runs share the folder, the processors and the memory, as a class on one server does. Compared are all outputs of all
cells but those tagged `nbval-ignore-output`, which measure times or draw: texts character for character, pictures byte
for byte. The exit status is 1 if they are not the same, or if a run fails.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(nb, timeout=1800, kernel_name="python3").execute(cwd=sys.argv[3])
nbformat.write(nb, sys.argv[2])
"""


def outputs(path: Path) -> list[tuple[int, str, str]]:
    """`(cell, kind, content)` of every output that must not change; streams that came in pieces joined."""
    found = []
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code" or "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        streams = {}
        for output in cell.outputs:
            if output.output_type == "stream":
                streams[output.name] = streams.get(output.name, "") + output.text
            else:
                data = {kind: content for kind, content in output.get("data", {}).items() if "widget" not in kind}
                found += [(i, kind, str(content)) for kind, content in data.items()]  # a widget has a random name
        found += [(i, name, text) for name, text in streams.items()]
    return found


def run_at_once(path: Path, times: int, folder: Path) -> dict:
    results = [folder / f"{path.stem} {i}.ipynb" for i in range(times)]
    command = [sys.executable, "-c", RUN, path]
    begin = time.perf_counter()
    runs = [subprocess.Popen([*command, result, path.parent], stderr=subprocess.PIPE, text=True) for result in results]
    errors = [run.communicate()[1] for run in runs]
    seconds = time.perf_counter() - begin
    failed = [error for run, error in zip(runs, errors, strict=True) if run.returncode]
    for error in failed:
        print(error[-2000:], file=sys.stderr)
    found = [outputs(result) for result in results if result.exists()]
    differing = {a[:2] for other in found[1:] for a, b in zip(found[0], other, strict=False) if a != b}
    same = not failed and not differing and len({len(one) for one in found}) == 1
    for cell, kind in sorted(differing):
        print(f"{path.name}: cell {cell} differs in {kind}", file=sys.stderr)
    return {
        "notebook": path.stem, "runs": times, "failed": len(failed), "outputs": len(found[0]) if found else 0,
        "characters": sum(len(content) for *_, content in found[0]) if found else 0,
        "the same": "yes" if same else "NO", "seconds": round(seconds),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", default=["02", "07", "08"])
    parser.add_argument("--times", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in arguments.numbers:
            (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
            rows.append(run_at_once(notebook, arguments.times, Path(temporary)))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    sys.exit(int((table["the same"] != "yes").any()))
