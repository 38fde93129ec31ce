"""Run the series in environments of other versions, and print a table.

    python tests/versions.py                  # all environments: builds each, which downloads some gigabytes
    python tests/versions.py colab oldest     # some of them
    python tests/versions.py --keep FOLDER    # keep the environments there, and use them again

Each environment is a fresh virtual one. It runs `tests/`, and all notebooks and solutions without comparing what they
print, because other versions round differently. An environment wants a version of Python; it is looked for as
`pythonX.Y`, and where there is none the running one is taken, which the table shows.

- pinned: requirements.txt, the versions of the stored outputs.
- oldest: the oldest that the notebooks accept.
- colab: what Colab has in late 2026, as near as PyPI has it; pytest and nbval are added.
- newest: the newest of everything in requirements.txt.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
PINNED = [line for line in PINNED if line]
NAMES = [re.split("[=<>]", line)[0] for line in PINNED]


def others(*chosen: str) -> list[str]:
    """The chosen requirements first, then the other packages of the series in whatever version fits them."""
    names = {re.split("[=<>]", requirement)[0] for requirement in chosen}
    return [*chosen, *(name for name in NAMES if name not in names)]


ENVIRONMENTS = {  # name -> version of Python, requirements
    "pinned": ("3.11", PINNED),
    "oldest": ("3.11", others("torch==2.6.*", "transformers==4.57.*", "numpy<2.3")),
    "colab": ("3.13", others("torch==2.11.*", "transformers==5.15.*", "numpy==2.1.*", "ipywidgets==7.7.*")),
    "newest": ("3.13", NAMES),
}


def interpreter(version: str) -> str:
    """`pythonX.Y`, if it is there and starts (pyenv leaves names behind that do not); else the running Python."""
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "--version"], capture_output=True).returncode == 0
    return found if works else sys.executable


def build(name: str, folder: Path) -> Path:
    """Make the environment, unless it is there; returns its Python."""
    version, requirements = ENVIRONMENTS[name]
    python = folder / name / "bin" / "python"
    if not python.exists():
        base = interpreter(version)
        subprocess.run([base, "-m", "venv", folder / name], check=True)
        torch = [requirement for requirement in requirements if requirement.startswith("torch")]
        for part in (torch, requirements):  # torch first, so that nothing else chooses another version
            subprocess.run([python, "-m", "pip", "install", "--quiet", *part], check=True)
    return python


def measure(python: Path, selection: list[str]) -> dict:
    """Run the tests in the environment; what pytest counted, and the versions."""
    about = "import platform, torch, transformers, numpy; print(platform.python_version(), torch.__version__.split('+')[0], transformers.__version__, numpy.__version__)"  # noqa: E501
    versions = subprocess.run([python, "-c", about], capture_output=True, text=True, check=True).stdout.split()
    row = dict(zip(["python", "torch", "transformers", "numpy"], versions, strict=True))
    begin = time.perf_counter()
    options = ["-o", "addopts=", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900", "-q"]
    run = subprocess.run([python, "-m", "pytest", *options, *selection], cwd=ROOT, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    print(*[line for line in lines if line.startswith(("FAILED", "ERROR"))], sep="\n", flush=True)
    counted = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return row | counted | {"minutes": round((time.perf_counter() - begin) / 60, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--keep", type=Path, help="a folder for the environments; default: a temporary one")
    parser.add_argument("--only", nargs="+", default=["tests", "notebooks"], help="what pytest is given")
    arguments = parser.parse_args()
    import pandas as pd

    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.names or ENVIRONMENTS:
            rows[name] = measure(build(name, (arguments.keep or Path(temporary)).resolve()), arguments.only)
    table = pd.DataFrame(rows).T
    print(table.to_string())
    sys.exit(int(any(table.get(kind, 0).fillna(0).any() for kind in ("failed", "error") if kind in table)))
