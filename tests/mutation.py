"""Change quantlib.py in thousands of small ways, one at a time, and count how many of them the tests notice.

    python3 -m venv mutation && . mutation/bin/activate
    pip install -r requirements.txt cosmic-ray
    python tests/mutation.py                         # a sample of 1,000 mutants, in two processes
    python tests/mutation.py --count 0               # all of them: some hours
    python tests/mutation.py --results FILE          # keep what is known in FILE, and go on from it when run again

The mutants are those of cosmic-ray: other operators, comparisons, numbers, signs and booleans, loops that do not run,
decorators that are removed, conditions that are negated, exceptions that are not caught. Left out are annotations, and
what runs on a GPU only: the Triton kernels, `_cuda_matmul`, `Decoder._capture` and lines that name CUDA.

A first run of the tests notes which lines each of them executes. A mutant meets the tests that execute its line, the
quickest first, until one fails; one that survives meets all the tests. A mutant that does not end is stopped, and is
counted as noticed. The tests are those of `TESTS`, a part of the default ones: no notebooks, and not the slowest.
"""

import argparse
import ast
import difflib
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/test_{name}.py"
    for name in ("quantlib", "calibration", "storage_speed", "files", "properties", "statistics")
]
# They take long, and start interpreters or compilers of their own.
SLOW = "not compiled_model and not peak_memory and not other_cpus and not stored_bytes"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-k", SLOW]
NOT_ON_A_CPU = ("_limbs_kernel", "_dot", "_signed", "_product_kernel", "_cuda_matmul", "_capture")


# --- mutants ---


def excluded(source: str) -> tuple[set[int], list[tuple]]:
    """Lines that are left out, and the positions `((line, column), (line, column))` of annotations."""
    lines, annotations = set(), []
    for i, line in enumerate(source.splitlines(), 1):
        if re.search(r"cuda|triton|\bis_compiling\b", line, re.I):
            lines.add(i)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in NOT_ON_A_CPU:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines.update(range(first, node.end_lineno + 1))
        for found in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(found, ast.AST):
                annotations.append(((found.lineno, found.col_offset), (found.end_lineno, found.end_col_offset)))
    return lines, annotations


def mutants(source: str) -> list[tuple]:
    """`(operator, occurrence, line)` of all that are not left out."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    lines, annotations = excluded(source)
    nodes, found = list(ast_nodes(get_ast(source))), []
    for name in sorted(plugins.operator_names()):
        operator = plugins.get_operator(name)
        if operator.arguments():
            continue
        positions = (position for node in nodes for position in operator().mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            within = any(low <= start and end <= high for low, high in annotations)
            if start[0] not in lines and not within:
                found.append((name, occurrence, start[0]))
    return found


def mutated(source: str, operator: str, occurrence: int) -> str:
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return mutate_code(source, plugins.get_operator(operator)(), occurrence)


def difference(source: str, operator: str, occurrence: int) -> str:
    """The lines before and after."""
    pair = [text.splitlines() for text in (source, mutated(source, operator, occurrence))]
    lines = [line for line in difflib.unified_diff(*pair, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    return "\n".join(line for line in lines if line[0] in "+-")


# --- tests ---


class Watch:
    """A plugin of pytest that notes for each test how long it took and which lines of quantlib it executed."""

    def __init__(self, coverage):
        self.coverage, self.seconds = coverage, Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_runtest_logstart(self, nodeid, location):
        self.coverage.switch_context(nodeid)


class Limits:
    """A plugin of pytest that ends the process in a test that takes much longer than it did without mutation.

    It writes the name of a test that fails into a file.
    """

    def __init__(self, seconds, failed: Path):
        self.seconds, self.failed = seconds, failed

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.write_text(report.nodeid)

    def pytest_runtest_logstart(self, nodeid, location):
        signal.setitimer(signal.ITIMER_REAL, 20 + 10 * self.seconds.get(nodeid, 0))  # nobody handles the signal


def forked(function, seconds: float, output: Path) -> int:
    """Run it in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(output, "w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))  # some mutants ask for all memory there is
        status = 99
        try:
            status = int(function())
        finally:
            os._exit(status)
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)  # negative: the signal that ended it
        if time.monotonic() - begin > seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM
        time.sleep(0.02)


def pytest_in(folder: Path, *arguments: str, plugins=()) -> int:
    import pytest

    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    return pytest.main([*OPTIONS, *arguments], plugins=list(plugins))


def map_lines(folder: Path) -> tuple[dict, dict]:
    """Line -> tests that execute it, quickest first; test -> seconds."""

    def watched():
        import coverage

        watcher = coverage.Coverage(data_file=str(folder / "coverage"), include=[str(folder / "quantlib.py")])
        watch = Watch(watcher)
        watcher.start()
        status = pytest_in(folder, *TESTS, plugins=[watch])
        watcher.stop()
        watcher.save()
        (folder / "seconds").write_text(json.dumps(watch.seconds))
        return status

    status = forked(watched, 3600, folder / "output")
    if status:
        sys.exit(f"the tests fail without any mutation:\n{(folder / 'output').read_text()[-3000:]}")
    import coverage

    data = coverage.CoverageData(str(folder / "coverage"))
    data.read()
    seconds = json.loads((folder / "seconds").read_text())
    lines = data.contexts_by_lineno(str(folder / "quantlib.py"))
    tests = {line: sorted((t for t in found if t in seconds), key=seconds.get) for line, found in lines.items()}
    return tests, seconds


def meet(folder: Path, source: str, mutant: tuple, tests: dict, seconds: dict, alone: dict) -> str:
    """ "survived", or how it was noticed. alone: test -> whether it passes by itself, without mutation, if known."""
    operator, occurrence, line = mutant
    file, failed = folder / "quantlib.py", folder / "failed"

    def run(code: str, chosen) -> int:
        file.write_text(code)
        failed.write_text("")
        work = partial(pytest_in, folder, *chosen, plugins=[Limits(seconds, failed)])
        return forked(work, 60 + 10 * sum(seconds.values()), folder / "output")

    code, near = mutated(source, operator, occurrence), tests.get(line, [])
    while near := [test for test in near if alone.get(test, True)]:
        status, test = run(code, near), failed.read_text()
        if status == 1 and test and test not in alone:
            alone[test] = run(source, [test]) == 0
        if status == 0:
            break
        if status != 1 or alone.get(test, True):
            return how(status)
    return how(run(code, TESTS))


def how(status: int) -> str:
    return {0: "survived", 1: "failed", -signal.SIGALRM: "stopped"}.get(status, f"broken {status}")


# --- all of it ---


def copy_of_checkout(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv", "*.ipynb", "__pycache__", ".*_cache", ".hypothesis")
    return shutil.copytree(ROOT, folder, ignore=ignored)


def interval(noticed: int, count: int) -> tuple[float, float]:
    """Wilson's, of 95 %."""
    z, share = 1.96, noticed / count
    centre, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (centre - width) / (1 + z**2 / count), (centre + width) / (1 + z**2 / count)


def work(folder: Path, source: str, chosen: list, tests: dict, seconds: dict, results: Path) -> None:
    alone = {}
    for mutant in chosen:
        begin = time.monotonic()
        what = meet(folder, source, mutant, tests, seconds, alone)
        row = {"mutant": mutant[:2], "line": mutant[2], "result": what, "seconds": round(time.monotonic() - begin, 1)}
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="mutants in the sample; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a file to keep the results in")
    arguments = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS="1", MPLBACKEND="Agg", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1"
    )
    sys.dont_write_bytecode = True
    for name in (
        "torch",
        "transformers",
        "hypothesis",
        "pandas",
        "seaborn",
        "nbformat",
        "safetensors.torch",
        "coverage",
    ):
        importlib.import_module(name)  # before forking, so that no mutant waits for them
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    source = (ROOT / "quantlib.py").read_text()
    everything = mutants(source)
    chosen = list(everything)
    random.Random(arguments.seed).shuffle(chosen)
    chosen = chosen[: arguments.count or None]
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        results = (arguments.results or temporary / "results").resolve()
        known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        known = {tuple(row["mutant"]) for row in known}
        left = [mutant for mutant in chosen if mutant[:2] not in known]
        folders = [copy_of_checkout(temporary / str(i)) for i in range(arguments.processes)]
        print(f"{len(everything)} mutants, {len(chosen)} in the sample, {len(left)} to do", flush=True)
        if left:
            tests, seconds = map_lines(folders[0])
            print(f"{len(seconds)} tests take {sum(seconds.values()):.0f} s without mutation", flush=True)
        children = []
        for i, folder in enumerate(folders if left else []):
            child = os.fork()
            if child == 0:
                work(folder, source, left[i :: len(folders)], tests, seconds, results)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        rows = {tuple(row["mutant"]): row for row in map(json.loads, results.read_text().splitlines())}
    rows = [rows[mutant[:2]] for mutant in chosen if mutant[:2] in rows]
    survivors = [row for row in rows if row["result"] == "survived"]
    for row in sorted(survivors, key=lambda row: row["line"]):
        print(f"\nline {row['line']}, {row['mutant'][0]} {row['mutant'][1]}\n{difference(source, *row['mutant'])}")
    noticed = len(rows) - len(survivors)
    low, high = interval(noticed, len(rows))
    print(f"\n{dict(Counter(row['result'].split()[0] for row in rows))}")
    print(f"noticed: {noticed} of {len(rows)}, {noticed / len(rows):.1%} ({low:.1%} to {high:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
