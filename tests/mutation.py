"""Plant small faults into quantlib.py, one at a time, and see whether the tests notice.

    python tests/mutation.py                     # 150 mutants, drawn from seed 0, two at a time
    python tests/mutation.py --seed 5 --jobs 16  # others, on a machine with more processors

A mutant changes one operator, comparison, constant, condition or call. Strings, annotations and what only words an
error are left out, since no test should hold them; so is the kernel, which needs a GPU. Each mutant gets a copy of the
tree, runs the unit tests of the helper until the first fails, and has five minutes (an endless loop is noticed too).
The survivors are printed with their lines: read each, and say why it may live, or write the test that is missing.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["quantlib", "inputs", "storage", "speed", "calibration", "statistics", "architectures", "properties"]
NAMES += ["formats"]
TESTS = [f"tests/test_{name}.py" for name in NAMES]
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {
    "amax": "amin",
    "amin": "amax",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
}


def faults(node):
    """The faults of one node, as (description, function that plants it into a copy of the node)."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for value in (node.value + 1, -node.value if node.value else -1):
            yield f"{node.value} → {value}", lambda n, v=value: setattr(n, "value", v)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield f"{node.value} → {not node.value}", lambda n: setattr(n, "value", not n.value)
    for field in ("op", "ops"):
        operator = getattr(node, field, None)
        first = operator[0] if isinstance(operator, list) else operator
        if type(first) in SWAPS:
            new = SWAPS[type(first)]()
            what = f"{type(first).__name__} → {type(new).__name__}"
            yield (
                what,
                lambda n, f=field, v=[new] if field == "ops" else new: setattr(
                    n, f, v + getattr(n, f)[1:] if f == "ops" else v
                ),
            )
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Attribute) and node.attr in CALLS:
        yield f"{node.attr} → {CALLS[node.attr]}", lambda n: setattr(n, "attr", CALLS[n.attr])


def all_mutants(tree):
    """(index of the node in the walk, number of the fault, description with its line) of all that count."""
    silent = set()
    for node in ast.walk(tree):
        arguments = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        wording = isinstance(node, (ast.Raise, ast.JoinedStr))
        for part in [node] if wording else [a for a in arguments if a is not None]:
            silent.update(id(n) for n in ast.walk(part))
        if isinstance(node, ast.If) and "triton" in ast.unparse(node.test):  # the kernel and its launch need a GPU
            silent.update(id(n) for part in node.body for n in ast.walk(part))
    return [(i, k, f"line {node.lineno}: {what}") for i, node in enumerate(ast.walk(tree)) if id(node) not in silent
            for k, (what, _) in enumerate(faults(node))]  # fmt: skip


def run(mutant, tree, folder):
    """Whether the tests notice it, or, of None, whether they fail on the file as it is."""
    tree, what = copy.deepcopy(tree), "no fault"
    if mutant:
        i, k, what = mutant
        node = list(ast.walk(tree))[i]
        list(faults(node))[k][1](node)
    place = Path(tempfile.mkdtemp(dir=folder))
    for name in ("notebooks", "tests", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place / name)
    (place / "quantlib.py").write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-m", "not slow", *TESTS]
    try:
        code = subprocess.run(
            command, cwd=place, capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    except subprocess.TimeoutExpired:
        code = 1
    shutil.rmtree(place)
    print("caught  " if code else "SURVIVED", what, flush=True)
    return code != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    tree = ast.parse((ROOT / "quantlib.py").read_text(encoding="utf-8"))
    mutants = all_mutants(tree)
    drawn = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        if run(None, tree, folder):
            sys.exit("the tests fail without any fault: what they would catch says nothing")
        caught = sum(pool.map(lambda mutant: run(mutant, tree, folder), drawn))
    print(f"{caught} of {len(drawn)} mutants caught, drawn from {len(mutants)} by seed {options.seed}")


if __name__ == "__main__":
    main()
