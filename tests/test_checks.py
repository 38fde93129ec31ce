"""The exercises and their checkers, notebooks/checks.py: what is right passes, what is wrong is told what is wrong.

The worked solutions are run here, and what they print is compared with what is stored: nbval does not run them again.
"""

import ast
import contextlib
import io
import json
import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch

import quantlib as ql

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = sorted(path.name for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
sys.path.append(str(NOTEBOOKS))
import checks  # noqa: E402


def check(number, answer):
    """(passed, message) of a checker, which prints them in one line."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        passed = checks.EXERCISES[number](answer)
    message = checks.RESULTS[number][1]
    says = {True: "right. ", False: "not yet. ", None: ""}[passed]
    assert printed.getvalue() == f"Exercise {number}: {says}{message}\n" and checks.RESULTS[number][0] is passed
    return passed, message


# The checkers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", checks.EXERCISES)
def test_exercise(number):
    """The right answer is rewarded, each mistake is told its own message, and a stub is no mistake."""
    exercise = checks.EXERCISES[number]
    assert getattr(checks, "check_{:02d}_{}".format(*map(int, number.split(".")))) is exercise
    passed, message = check(number, exercise.right)
    assert passed and message and "{" not in message, message
    assert callable(exercise.right) or exercise.hint, "what was expected would give the answer away"
    for message, mistake in exercise.wrong.items():
        assert check(number, partial(exercise.right, **mistake) if isinstance(mistake, dict) else mistake) == (
            False,
            message,
        )
        for inputs in exercise.cases():  # an error of a mistake would be taken for one of the student
            exercise.outcome(mistake, inputs if isinstance(inputs, tuple) else (inputs,))
    stubs = [..., None] + [lambda *_: None, lambda *_: ...] * callable(exercise.right)
    assert {check(number, stub) for stub in stubs} == {(None, "not solved yet")}


@pytest.mark.parametrize("number", [n for n, e in checks.EXERCISES.items() if callable(e.right)])
def test_odd_functions(number):
    """Whatever an answer does or returns, it is told so in one line."""

    def raises(*inputs):
        raise KeyError("lost")

    assert check(number, raises) == (False, "it raised KeyError: 'lost'")
    assert check(number, 5) == (False, "give the function itself, not what it returns")
    for odd in ("text", 1e30, math.nan, torch.zeros(3), (1, 2), {"a": 1}, object()):
        passed, message = check(number, lambda *inputs, odd=odd: odd)
        assert passed is False and message and "\n" not in message, message


@pytest.mark.parametrize("number", [n for n, e in checks.EXERCISES.items() if not callable(e.right)])
def test_odd_numbers(number):
    """A number may be a tensor, and rounded; whatever is not listed gets the hint."""
    right, hint = checks.EXERCISES[number].right, checks.EXERCISES[number].hint
    for answer in (right, torch.tensor(right), torch.tensor([right], dtype=torch.double), float(f"{right:.9g}")):
        assert check(number, answer)[0]
    assert check(number, 0.618 * right) == check(number, math.nan) == (False, hint)
    assert check(number, "two hundred")[1] == "it returns something of type str, expected one number"


def test_slips():
    """What is tried with every exercise, here on a matrix."""
    exercise = checks.Exercise("0.0", lambda: torch.tensor([[0.3, 0.7], [2.0, 5.0]]))
    for message, slip in checks.SLIPS.items():
        assert check("0.0", partial(slip, exercise.right())) == (False, message)
    assert (
        check("0.0", lambda: exercise.right().int())[1]
        == "it returns int32 of shape [2, 2], expected float32 of shape [2, 2]"
    )
    assert check("0.0", lambda: exercise.right() + 0.3) == (False, "the result at [1, 1] is 5.3, expected 5")
    del checks.EXERCISES["0.0"], checks.RESULTS["0.0"]


def test_what_a_checker_leaves_alone():
    """The random numbers of the notebook; and it notices an answer that does not leave its input alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for number in ("1.3", "6.3"):
        assert check(number, checks.EXERCISES[number].right)[0]
    assert torch.equal(torch.get_rng_state(), state)
    told = False, "it changes its input in place: work on a copy"
    assert check("2.1", lambda x, bits: (checks.absmax(x, bits), x.mul_(0))[0]) == told
    assert check("4.2", lambda layer: layer.weight.mul_(2)) == told
    assert check("5.2", lambda q: (q.dequantize(), q.qdata.zero_())[0]) == told
    assert check("7.3", lambda losses, text: (checks.bits_per_byte(losses, text), losses.zero_())[0]) == told


def counted_from_the_smallest(x):
    step = (x.max() - x.min()) / 255
    codes = ((x - x.min()) / step).round() - 128
    return codes.to(torch.int8), (codes + 128) * step + x.min()


def largest_column_first(w, moment, scale):
    order = moment.diagonal().argsort(descending=True)
    return checks.gptq(w[:, order], moment[order][:, order], scale)[:, order.argsort()]


RIGHT = [
    ("1.3", lambda m: sum({t.data_ptr(): t.nbytes for t in m.state_dict().values()}.values())),
    ("2.1", lambda x, bits: ((q := ql.absmax_quantize(x, bits)).qdata, q.scale.item())),
    ("2.1", lambda x, bits: [*checks.absmax(x, bits, to_code=lambda x: (x + 0.5).floor(), zero=9)]),
    ("3.1", lambda x: ((q := ql.zeropoint_quantize(x)).qdata, q.scale, q.zero_point.item())),
    ("3.1", lambda x: checks.zeropoint(x) if x.any() else (torch.zeros_like(x, dtype=torch.int8), 1, 0)),
    ("3.2", 3.6),
    ("3.3", counted_from_the_smallest),
    ("3.4", lambda codes, limit: sum(abs(code) >= limit for code in codes.flatten().tolist())),
    ("4.1", ql.in_block),
    ("4.1", lambda name, parameter: True if ".h." in name and parameter.dim() > 1 else None),
    ("5.3", lambda w: (w.abs() > 6 * w.square().mean().sqrt()).float().mean(0).argmax().item()),
    ("6.1", lambda logits, k: (p := torch.where(logits < logits.topk(k)[0][-1], 0, logits.softmax(-1))) / p.sum()),
    ("7.1", 3.16),
    ("7.2", partial(checks.interval, errors=2.2)),
    ("7.3", lambda losses, text: sum(losses.tolist()) / math.log(2) / len(bytes(text, "utf-8"))),
    ("8.2", ql.pack_int4),
    ("9.1", 27),
    ("9.2", lambda work, *how: [call() for call in 2 * [*work.values()]] and checks.time_each(work, *how)),
    ("10.1", 0.41),
    ("10.2", lambda layer, n, bits: ql.absmax_quantize(layer.weight.double().T, bits, 0, n).dequantize().T),
    ("11.1", lambda packed: torch.stack([packed << 4, packed], -1).flatten(1).view(torch.int8) >> 4),
    ("11.2", lambda w: checks.hqq_zero(w.double())),
    ("12.2", lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).double()),
    ("14.2", lambda x, w, alpha: [*checks.smooth(x, w, alpha)]),
    ("14.3", lambda q, z, s, p, r: (q.int() - z) @ p.int().T * s * r.T),
    ("17.2", largest_column_first),
    ("17.3", lambda w, h, scale, levels: checks.gptq_levels(w.double(), h.double(), scale.double(), levels.double())),
    ("19.1", lambda w, scale: torch.fake_quantize_per_tensor_affine(w, scale, 0, -7, 7)),
    ("20.1", 11.3),
    ("20.3", lambda points: [*"abeh"]),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=[f"{n}-{i}" for i, (n, _) in enumerate(RIGHT)])
def test_other_right_answers(number, answer):
    passed, message = check(number, answer)
    assert passed, message


# The notebooks -------------------------------------------------------------------------------------------------------


def code(path) -> list:
    """(id, source, printed text) of the code cells of a notebook, without those that set it up."""
    cells = nbformat.read(path, as_version=4).cells
    kept = [c for c in cells if c.cell_type == "code" and not {"setup", "parameters"} & {*c.metadata.get("tags", [])}]
    return [(c.get("id"), c.source, "".join(o.get("text", "") for o in c.outputs)) for c in kept]


def calls(path) -> dict:
    """Number of an exercise -> (source of the cell that calls its checker, its printed text)."""
    found = [(re.findall(r"checks\.check_(\d\d)_(\d)\(", source), source, text) for _, source, text in code(path)]
    return {f"{int(n[0][0])}.{n[0][1]}": (source, text) for n, source, text in found if n}


def imported(path) -> dict:
    """The names that the import lines of a notebook define."""
    sources = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    exec("\n".join(re.findall(r"^(?:import|from) [\w., ]+$", sources, flags=re.M)), names := {})
    return names


def run(source, names) -> str:
    """What a cell prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(source, names)
    return printed.getvalue()


def test_each_exercise_stands_in_its_notebook_and_in_the_solutions():
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"):
        assert [number for name in CHAPTERS for number in calls(folder / name)] == [*checks.EXERCISES]
    for name in CHAPTERS:
        assert {int(number.split(".")[0]) for number in calls(NOTEBOOKS / name)} == {int(name[:2])}


@pytest.mark.parametrize("name", CHAPTERS)
def test_stubs_and_bugs(name):
    """An untouched stub is not solved yet, as the notebook shows; what is to be repaired is a mistake that we know."""
    names = imported(NOTEBOOKS / name)
    bugs = {i: source for i, source, _ in code(NOTEBOOKS / name) if str(i).endswith("-bug")}
    for number, (source, text) in calls(NOTEBOOKS / name).items():
        assert run(source, names) == text == f"Exercise {number}: not solved yet\n"
        bug = ast.parse(bugs.get(f"exercise-{number.replace('.', '-')}-bug", ""))
        for node in [node for node in bug.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))][:1]:
            run(ast.unparse(node), names)
            passed, message = check(number, names[node.name])
            assert passed is False and message in [*checks.EXERCISES[number].wrong, *checks.SLIPS], message


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions(name):
    """Each cell of the worked solutions runs, is asserted to be right, and prints what is stored."""
    path = NOTEBOOKS / "solutions" / name
    names = imported(path)
    for _, source, text in code(path):
        assert run(source, names) == text
    assert all("assert checks.check_" in source and "right. " in text for source, text in calls(path).values())


def test_grading(tmp_path, monkeypatch, capsys):
    """A notebook with exercises wrong, right, unsolved and left out, and an error between; and one that is torn."""
    solved = calls(NOTEBOOKS / "solutions" / "03_zero_point.ipynb")["3.4"][0]
    sources = ["import checks", "checks.check_03_2(-3.6)", "1 / 0", solved, "checks.check_03_1(...)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    ada, torn = tmp_path / "ada.ipynb", tmp_path / "torn.ipynb"
    nbformat.write(nb, ada)
    torn.write_text("{")
    before = ada.read_bytes()
    monkeypatch.setattr(sys, "argv", ["checks.py", str(ada), str(torn)])
    runpy.run_path(str(NOTEBOOKS / "checks.py"), run_name="__main__")
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        str(ada),
        "3.1 - not solved yet",
        f"3.2 no {check('3.2', -3.6)[1]}",
        "3.3 - the checker was not called",
        f"3.4 yes {checks.EXERCISES['3.4'].reward}",
        str(torn),
        "all no it could not be run: NotJSONError",
    ]
    assert ada.read_bytes() == before
    assert json.loads(json.dumps(checks.RESULTS)).keys() == checks.RESULTS.keys()
