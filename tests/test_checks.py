"""The exercises and their checkers, notebooks/checks.py: what is right passes, what is wrong is told what is wrong.

The solutions are run by nbval too; here they are only cells to take functions from.
"""

import ast
import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn

import quantlib as ql

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CALL = re.compile(r"checks\.check_(\d\d)_(\d)\((\w+)\)")

spec = importlib.util.spec_from_file_location("checks", NOTEBOOKS / "checks.py")
checks = importlib.util.module_from_spec(spec)
sys.modules["checks"] = checks  # under this name the cells import it
spec.loader.exec_module(checks)


def cells(folder=NOTEBOOKS) -> dict:
    """Number of an exercise -> (file, source of the cell that calls its checker, source of the buggy cell or None)."""
    found = {}
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        sources = {cell.get("id", i): cell.source for i, cell in enumerate(nb.cells) if cell.cell_type == "code"}
        for source in sources.values():
            for chapter, n, _ in CALL.findall(source):
                number = f"{int(chapter)}.{n}"
                assert number not in found, f"the checker of {number} is called twice"
                found[number] = path, source, sources.get(f"exercise-{int(chapter)}-{n}-bug")
    return found


STUBS, SOLUTIONS = cells(), cells(NOTEBOOKS / "solutions")


def run(source, **more) -> dict:
    """The names after a cell has run, without the call of its checker."""
    source = re.sub(r"^(?:assert )?checks\.check_.*$", "", source, flags=re.M)
    names = dict(torch=torch, nn=nn, ql=ql, math=math, statistics=statistics, Conv1D=ql.Conv1D, checks=checks, **more)
    exec(compile(source, "cell", "exec"), names)
    return names


def argument(source) -> str:
    return CALL.search(source)[3]


def check(number, answer):
    """(passed, message) of a checker."""
    passed = checks.EXERCISES[number](answer)
    assert checks.RESULTS[number][0] is passed
    return checks.RESULTS[number]


# ---------------------------------------------------------------------------------------------------------------------
# Stubs and solutions
# ---------------------------------------------------------------------------------------------------------------------


def test_each_exercise_has_a_stub_and_a_solution():
    assert sorted(STUBS) == sorted(checks.EXERCISES) == sorted(SOLUTIONS)
    for number, (path, _, _) in STUBS.items():
        assert path.name.startswith(f"{int(number.split('.')[0]):02d}_")
        assert path.name == SOLUTIONS[number][0].name


def test_each_chapter_has_two_to_four_exercises_numbered_from_one():
    for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        numbers = [int(number.split(".")[1]) for number, (where, _, _) in STUBS.items() if where == path]
        assert 2 <= len(numbers) <= 4 and numbers == list(range(1, len(numbers) + 1)), path.name


@pytest.mark.parametrize("number", STUBS)
def test_untouched_stub_is_not_solved_yet(number, capsys):
    source = STUBS[number][1]
    assert check(number, run(source)[argument(source)]) == (None, "not solved yet")
    assert capsys.readouterr().out == f"Exercise {number}: not solved yet\n"
    assert checks.EXERCISES[number]() is None


@pytest.mark.parametrize("number", SOLUTIONS)
def test_solution_passes(number):
    source = SOLUTIONS[number][1]
    passed, message = check(number, run(source)[argument(source)])
    assert passed, message
    assert f"assert checks.check_{int(number.split('.')[0]):02d}" in source


def signatures(source) -> dict:
    """Names that a cell defines -> their arguments, those of methods too."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.unparse(node.args)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = ast.unparse(node.bases)
        elif isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("number", STUBS)
def test_stub_is_its_solution_with_holes(number):
    stub, solution = STUBS[number][1], SOLUTIONS[number][1]
    assert argument(stub) == argument(solution)
    assert signatures(stub).items() <= signatures(solution).items()
    assert "..." in stub


@pytest.mark.parametrize("number", [number for number in STUBS if STUBS[number][2]])
def test_bug_is_found(number):
    """The function that the reader is to repair is refused, and not as unsolved."""
    tree = ast.parse(STUBS[number][2])
    tree.body = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = run(ast.unparse(tree))
    (buggy,) = [name for name in names if "buggy" in name.lower()]
    passed, message = check(number, names[buggy])
    assert passed is False and not message.startswith("it raised"), message


# ---------------------------------------------------------------------------------------------------------------------
# Other right answers, and wrong ones with what they are told
# ---------------------------------------------------------------------------------------------------------------------


def solved(number):
    source = SOLUTIONS[number][1]
    return run(source)[argument(source)]


def ledger(head=1, vectors=13, last=2, per_byte=8, fixed=None):
    def gpt2_bytes(v, p, d, n, bits=32):
        numbers = head * v * d + p * d + 12 * n * d * d + vectors * n * d + last * d
        return numbers * (fixed or bits) / per_byte

    return gpt2_bytes


def absmax(qmax=None, invert=False, top=torch.Tensor.abs, to_code=torch.round, guard=True, dtype=torch.int8):
    def answer(x, bits=8):
        limit = qmax(bits) if qmax else 2 ** (bits - 1) - 1
        scale = top(x).max() / limit
        scale = torch.ones(()) if guard and scale == 0 else scale
        return to_code(x / scale).clamp(-128, 127).to(dtype), 1 / scale if invert else scale

    return answer


def absmax_in_place(x, bits=8):
    codes, scale = absmax()(x, bits)
    return codes, scale, x.mul_(0)


def zeropoint(widen=True, levels=255, invert=False, integer=True, guard=True):
    def answer(x):
        low, high = (x.min().clamp(max=0), x.max().clamp(min=0)) if widen else (x.min(), x.max())
        scale = (high - low) / levels
        scale = torch.ones(()) if guard and scale == 0 else scale
        z = -128 - low / scale
        z = z.round() if integer else z
        codes = ((x / scale).round() + z).clamp(-128, 127).to(torch.int8)
        return codes, 1 / scale if invert else scale, z

    return answer


def zeropoint_back(levels=255, clamp=True, wrap=False):
    def answer(x):
        scale = (x.max() - x.min()) / levels
        z = (-128 - x.min() / scale).round()
        codes = (x / scale).round() + z
        codes = (codes.clamp(-128, 127) if clamp else codes).to(torch.int8)
        return codes, (codes - z.to(torch.int8) if wrap else codes - z) * scale

    return answer


def wrapped(x):
    scale = (x.max() - x.min()) / 255
    codes = ((x - x.min()) / scale).round().int()  # 0 to 255
    return codes.to(torch.int8), codes * scale + x.min()


def one_axis(axis):
    return lambda layer: ql.absmax_quantize(layer.weight, axis=axis).dequantize()


def kept(fill, scaled=True):
    def top_k(logits, k):
        best = logits.topk(k)
        new = torch.full_like(logits, fill)
        new[best.indices] = best.values
        return new.softmax(-1) if scaled else new

    return top_k


def cut_probabilities(logits, k):
    p = logits.softmax(-1)
    return torch.where(p >= p.topk(k).values[-1], p, 0)


def write_seeded(seeded=True):
    def write_all(models, write, seed):
        texts = {}
        for name, model in models.items():
            torch.manual_seed(seed if seeded else 0)
            texts[name] = write(model)
        return texts

    return write_all


def read_own_text(models, write, loss, text):
    return {name: loss(m, write(m, text)) for name, m in models.items()}


def read_first_text(models, write, loss, text):
    text = write(next(iter(models.values())), text)
    return {name: loss(m, text) for name, m in models.items()}


def plain_interval(z, sign=1):
    def interval(before, after):
        d = sign * (after - before)
        error = z * d.std() / len(d) ** 0.5
        return (d.mean() - error).item(), (d.mean() + error).item()

    return interval


def kl(p_first=True, reduce="sum", over="mean", base=1.0, soft=True):
    def answer(reference, candidate):
        p, q = (x.log_softmax(-1) if soft else x for x in (reference, candidate))
        p, q = (p, q) if p_first else (q, p)
        terms = getattr(p.exp() * (p - q), reduce)(-1)
        return getattr(terms, over)() / base

    return answer


def packer(offset=8, first="low", pairs="neighbours", dtype=torch.uint8):
    def pack(codes):
        n = codes.int() + offset
        a, b = (n[:, ::2], n[:, 1::2]) if pairs == "neighbours" else n.chunk(2, 1)
        a, b = (a, b) if first == "low" else (b, a)
        return ((a | b << 4) & 255).to(dtype)

    return pack


class Layer(nn.Module):
    """A linear layer in 8 bits, with a choice of mistakes."""

    def __init__(self, weight, bias, codes=torch.int8, hoard=False, use_bias=True, exact=False, axis=0):
        super().__init__()
        q = ql.absmax_quantize(weight, axis=axis)
        self.register_buffer("codes", q.qdata.to(codes))
        self.register_buffer("scale", q.scale)
        self.bias, self.use_bias = nn.Parameter(bias), use_bias
        self.kept = weight if hoard or exact else None
        self.exact = exact

    def forward(self, x):
        w = self.kept if self.exact else self.codes.float() * self.scale
        return x @ w.T + (self.bias if self.use_bias else 0)


def layer(**how):
    return lambda weight, bias: Layer(weight, bias, **how)


def timer(warm=True, wait_first=True, wait_last=True, turns=True, average=statistics.median, unit=1):
    def time_each(functions, wait, clock, rounds=7):
        times = {label: [] for label in functions}

        def measure(label, keep):
            if wait_first:
                wait()
            begin = clock()
            functions[label]()
            if wait_last:
                wait()
            if keep:
                times[label].append(unit * (clock() - begin))

        if turns:
            for turn in range(rounds + warm):
                for label in functions:
                    measure(label, turn >= warm)
        else:
            for label in functions:
                for turn in range(rounds + warm):
                    measure(label, turn >= warm)
        return {label: average(seconds) for label, seconds in times.items()}

    return time_each


def groups(axis=1, size=None, bits=None, turn=False):
    def round_groups(layer, group_size, b=4):
        q = ql.absmax_quantize(layer.weight, bits or b, axis=axis, group_size=None if size == 0 else group_size)
        return q.dequantize().T if turn else q.dequantize()

    return round_groups


def grouped_by_hand(layer, group_size, bits=4):
    w = layer.weight.T.unflatten(1, (-1, group_size))
    scale = w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((w / scale).round() * scale).flatten(1).T


def parts(q):
    """Bits of codes, of scales, of zero points."""
    if not isinstance(q, ql.QuantizedTensor):
        return 8 * q.nbytes, 0, 0
    zeros = 8 * q.zero_point.nbytes if isinstance(q.zero_point, torch.Tensor) else 0
    return q.bits * q.qdata.numel(), 8 * q.scale.nbytes, zeros


def bits(codes=1, scales=1, zeros=1, plain=True, unit=1):
    def true_bits(tensors):
        chosen = [q for q in tensors if plain or isinstance(q, ql.QuantizedTensor)]
        each = [sum(x * take for x, take in zip(parts(q), (codes, scales, zeros), strict=True)) for q in chosen]
        return sum(each) / sum(q.shape.numel() for q in chosen) / unit

    return true_bits


def clip(weigh=lambda i: i, power=2, clamp=True, together=False, share=False, invert=False, flat=False):
    def clip_scale(w, importance, bits=4):
        qmax = 2 ** (bits - 1) - 1
        full, shares = w.abs().amax(1, keepdim=True) / qmax, torch.arange(20, 7, -1) / 20
        errors = []
        for s in shares:
            codes = (w / (full * s)).round()
            codes = codes.clamp(-qmax, qmax) if clamp else codes
            errors.append(((codes * full * s - w).abs() ** power * weigh(importance)).sum(1, keepdim=True))
        errors = torch.stack(errors)
        best = shares[(errors.sum(1, keepdim=True) if together else errors).argmin(0)].expand_as(full)
        scale = best if share else best * full
        return (1 / scale if invert else scale).flatten() if flat else 1 / scale if invert else scale

    return clip_scale


def unpacker(offset=0, signed=True, order="pairs", shift=4):
    def unpack(packed):
        low, high = (packed & 15).int(), (packed >> shift).int()
        if signed:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        low, high = (high, low) if order == "swapped" else (low, high)
        codes = torch.cat([low, high], 1) if order == "torn" else torch.stack([low, high], -1).flatten(1)
        return (codes - offset).to(torch.int8)

    return unpack


def sign_and_magnitude(packed):
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, 8 - nibbles, nibbles)


def unpack_by_shifts(packed):
    return torch.stack([packed << 4, packed], -1).flatten(1).view(torch.int8) >> 4


def normal_float(icdf=torch.special.ndtri, zero=True, twice=False, turned=False, own=True, tail=None):
    def levels(bits):
        n = 2**bits
        out = (1 / n + 1 / (n - 1)) / 4 if tail is None else tail
        below, above = icdf(torch.linspace(out, 0.5, n // 2)), icdf(torch.linspace(0.5, 1 - out, n // 2 + 1))
        if own:
            below, above = below / below[0].abs(), above / above[-1]
        middle = torch.zeros(1 + twice) if zero else torch.full((1,), 1e-7)
        new = torch.cat([below[:-1], middle, above[1:]])
        return -new.flip(0) if turned else new

    return levels


def nf4(scale=lambda g: g.abs().amax(-1, keepdim=True)):
    def nf4_round(x, group_size):
        levels, g = torch.tensor(ql.NF4), x.unflatten(-1, (-1, group_size))
        s = scale(g)
        s = torch.where(s == 0, 1, s)
        return (levels[(g[..., None] / s[..., None] - levels).abs().argmin(-1)] * s).flatten(-2)

    return nf4_round


def smoothed(on_x=-1, on_w=1, dim=0, swap=False):
    def smooth(x, w, alpha):
        a = 1 - alpha if swap else alpha
        s = x.abs().amax(0) ** a / w.abs().amax(dim) ** (1 - a)
        return x * s**on_x, w * s**on_w

    return smooth


def integers(kind=torch.int32, sign=-1, correct="sum", scales=True):
    def product(q, z, s, p, r):
        total = q.long() @ p.long().T
        total = total + sign * z * (p.long().sum(1) if correct == "sum" else 1)
        return total.to(kind) * (s * r.T if scales else 1)

    return product


def gptq_like(row="cholesky", sign=-1, clamp=True, divide=True):
    def gptq(w, moment, scale):
        w, inverse = w.clone(), torch.linalg.inv(moment)
        u = torch.linalg.cholesky(inverse, upper=True) if row == "cholesky" else inverse
        for i in range(w.shape[1]):
            rounded = (w[:, i] / scale).round()
            rounded = (rounded.clamp(-7, 7) if clamp else rounded) * scale
            error = (w[:, i] - rounded) / (u[i, i] if divide else 1)
            w[:, i] = rounded
            if row != "none":
                w[:, i + 1 :] += sign * error[:, None] * u[i, i + 1 :]
        return w

    return gptq


def gptq_damped(w, moment, scale):
    return gptq_like()(w, moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment)), scale)


def gptq_in_order(w, moment, scale):
    """The columns that carry most come first."""
    order = moment.diagonal().argsort(descending=True)
    return gptq_like()(w[:, order], moment[order][:, order], scale)[:, order.argsort()]


def gptq_by_elimination(w, moment, scale):
    w, inverse = w.double().clone(), torch.linalg.inv(moment.double())
    for i in range(w.shape[1]):
        rounded = (w[:, i] / scale).round().clamp(-7, 7) * scale
        w -= ((w[:, i] - rounded) / inverse[i, i])[:, None] * inverse[i]
        w[:, i] = rounded
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w


def choose(by="calibration", report="evaluation", function=min):
    def answer(candidates, loss, calibration, evaluation):
        texts = {"calibration": calibration, "evaluation": evaluation}
        best = function(candidates, key=lambda c: loss(c, texts[by]))
        return best, loss(best, texts[report])

    return answer


def through(clamp=True, inside=True, detach=True, more=0, unit=1):
    def fake_round(w, scale):
        value = (w / scale).round()
        value = (value.clamp(-7, 7) if clamp else value) * scale
        if not detach:
            return value
        carrier = unit * (w.clamp(-7 * scale, 7 * scale) if inside else w) + more * w
        return carrier + (value - carrier).detach()

    return fake_round


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(context, w, scale):
        codes = (w / scale).round()
        context.save_for_backward(codes.abs() <= 7)
        return codes.clamp(-7, 7) * scale

    @staticmethod
    def backward(context, gradient):
        (inside,) = context.saved_tensors
        return gradient * inside, None


def rival(weight=lambda t: t, log=True, sign=1):
    def gain(uniform, bits, loss):
        low, high = max(b for b in uniform if b <= bits), min(b for b in uniform if b >= bits)
        t = weight((bits - low) / (high - low)) if high > low else 0
        a, b = uniform[low], uniform[high]
        return sign * ((a ** (1 - t) * b**t if log else (1 - t) * a + t * b) - loss)

    return gain


def front(beats):
    return lambda points: [n for n, p in points.items() if not any(beats(o, p) for o in points.values())]


def sweep(points):
    names, best, bits_of_best = [], math.inf, None
    for name, (size, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < best or (size, loss) == (bits_of_best, best):
            names.append(name)
            best, bits_of_best = loss, size
    return names


def dedupe(model):
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


RIGHT = [
    ("1.2", torch.tensor(256.0)), ("1.3", ql.model_nbytes), ("1.3", dedupe),
    ("2.1", absmax()), ("2.1", lambda x, bits: ((q := ql.absmax_quantize(x, bits)).qdata, q.scale.item())),
    ("2.2", 40.75), ("3.1", zeropoint()), ("3.2", 3.6), ("3.3", zeropoint_back()),
    ("3.4", lambda codes, limit: sum(abs(c) >= limit for c in codes.flatten().tolist())),
    ("3.4", lambda codes, limit: ((codes.short() >= limit) | (codes.short() <= -limit)).sum()),
    ("4.1", lambda name, p: name.startswith("transformer.h.") and p.dim() > 1), ("4.1", ql.in_block),
    ("4.2", lambda layer: one_axis(int(isinstance(layer, ql.Conv1D)))(layer)),
    ("4.3", lambda a, b: (ql.model_nbytes(a) - ql.model_nbytes(b)) / ql.model_nbytes(a)),
    ("5.2", lambda q: (q.qdata.double() - q.zero_point) * q.scale.double()),
    ("5.3", lambda w: (w.abs() > 6 * w.square().mean().sqrt()).float().mean(0).argmax()),
    ("6.1", lambda logits, k: (p := cut_probabilities(logits, k)) / p.sum()), ("6.2", 400), ("6.3", write_seeded()),
    ("7.1", lambda windows: math.exp(sum(w.sum() for w in windows) / sum(len(w) for w in windows))),
    ("7.2", plain_interval(1.96)), ("7.3", kl()), ("7.4", 3.16), ("8.1", torch.tensor(1265664)), ("8.2", packer()),
    ("8.3", layer()), ("9.1", 27), ("9.2", timer()), ("9.3", lambda b, m, a: b * a / m / 2),
    ("10.1", 0.41), ("10.2", groups()), ("10.2", grouped_by_hand), ("10.3", bits()), ("10.4", clip()),
    ("10.4", clip(flat=True)), ("11.1", unpacker()), ("11.1", unpack_by_shifts), ("11.2", normal_float()),
    ("11.2", lambda b: normal_float()(b).tolist()), ("11.3", nf4()),
    ("11.3", lambda x, size: ql.nf4_quantize(x, size).dequantize()), ("11.4", 3.254), ("12.1", 52_224_000),
    ("12.2", smoothed()), ("12.3", integers()), ("12.3", lambda q, z, s, p, r: (q.int() - z) @ p.int().T * s * r.T),
    ("13.1", torch.tensor(-0.03)), ("13.2", gptq_like()), ("13.2", gptq_by_elimination),
    ("13.2", gptq_damped), ("13.2", gptq_in_order), ("13.3", choose()),
    ("13.4", through()), ("13.4", Straight.apply), ("14.1", 11.3), ("14.2", rival()),
    ("14.3", front(lambda o, p: o != p and max(o, p) == p and o[1] <= p[1])),
    ("14.3", sweep), ("14.3", lambda points: set(sweep(points))),
]  # fmt: skip

WRONG = [
    ("1.1", ledger(head=2), "head is counted twice"), ("1.1", ledger(per_byte=1), "in bits"),
    ("1.1", ledger(fixed=32), "still counts 32 bits"), ("1.1", ledger(vectors=0, last=0), "biases and layer norms"),
    ("1.1", ledger(last=0), "layer norm after the last block"), ("1.1", ledger(vectors=12), "expected"),
    ("1.1", lambda *a: ledger()(*a) * 8 / a[-1], "number of parameters"), ("1.1", 5, "give the function itself"),
    ("1.2", 257, "257 is none of them"), ("1.2", 258, "tie"), ("1.2", 260, "how far apart"),
    ("1.2", "two hundred", "should be one number"),
    ("1.3", lambda m: sum(t.nbytes for t in m.state_dict().values()), "counted twice"),
    ("1.3", lambda m: sum(t.nbytes for n, t in m.state_dict().items() if "lm_head" not in n), "untied"),
    ("1.3", lambda m: 4 * sum(p.numel() for p in m.parameters()), "float16 has two"),
    ("1.3", lambda m: sum(p.nbytes for p in m.parameters()), "buffers"),
    ("1.3", lambda m: m.no_such_thing, "it raised AttributeError"),
    ("2.1", absmax(invert=True), "inverted"), ("2.1", absmax(qmax=lambda bits: 127), "still that of 8 bits"),
    ("2.1", absmax(qmax=lambda bits: 2 ** (bits - 1)), "the largest code is 127, not 128"),
    ("2.1", absmax(top=lambda x: x), "take abs() before max()"), ("2.1", absmax(qmax=lambda bits: 100), "wastes codes"),
    ("2.1", absmax(to_code=torch.trunc), "round before you convert"), ("2.1", absmax(guard=False), "scale is 0"),
    ("2.1", absmax(dtype=torch.float32), "store them as int8"), ("2.1", absmax_in_place, "in place"),
    ("2.1", lambda x, bits: absmax()(x, bits)[0], "return 2 things: codes, scale"),
    ("2.1", lambda x, bits: (absmax()(x, bits)[0].flatten(), absmax()(x, bits)[1]), "has the shape (1000,)"),
    ("2.2", -40.8, "sign"), ("2.2", 20.4, "20 log10"), ("2.2", 30.0, "not a whole step"), ("2.2", 36.05, "half a step"),
    ("2.2", 34.8, "127 steps to the largest"), ("2.2", 50, "step = 4 / 127"), ("2.2", float("nan"), "0 was divided"),
    ("2.3", lambda x: ((c := (x / (s := x.abs().max() / 100)).round().to(torch.int8)), c * s), "27 codes lie idle"),
    ("2.3", lambda x: ((c := (x / (s := x.abs().max() / 128)).round().to(torch.int8)), c * s), "128 does not fit"),
    ("2.3", lambda x: ((c := absmax()(x)[0]), c / 127), "more than half a step"),
    ("3.1", zeropoint(widen=False), "widen the range"), ("3.1", zeropoint(levels=256), "255 steps"),
    ("3.1", zeropoint(invert=True), "inverted"), ("3.1", zeropoint(integer=False), "no whole number"),
    ("3.1", zeropoint(guard=False), "0 was divided by 0"),
    ("3.2", -3.55, "sign"), ("3.2", 1.78, "20 log10, not 10"), ("3.2", 2.5, "a range of 6"), ("3.2", 6.02, "full bit"),
    ("3.2", 5, "put the two scales"),
    ("3.3", zeropoint_back(200), "near 72"), ("3.3", zeropoint_back(256), "255 steps"),
    ("3.3", wrapped, "wraps around"), ("3.3", zeropoint_back(wrap=True), "off by more"),
    ("3.4", lambda codes, limit: (codes.abs() >= limit).sum(), "misses the two codes -128"),
    ("3.4", lambda codes, limit: (codes.int().abs() > limit).sum(), "have at least 127"),
    ("3.4", lambda codes, limit: (codes.int() >= limit).sum(), "have at least"),
    ("4.1", lambda name, p: p.ndim == 2, "which is in no block"), ("4.1", lambda name, p: ".h." in name, "a vector"),
    ("4.1", lambda name, p: ".h." in name and "mlp" in name and p.ndim == 2, "it leaves out"),
    ("4.2", one_axis(0), "for Conv1D the scales belong to the inputs"),
    ("4.2", one_axis(1), "for Linear the scales belong to the inputs"), ("4.2", one_axis(None), "one scale for the"),
    ("4.2", lambda layer: solved("4.2")(layer).T, "turned round"),
    ("4.2", lambda layer: layer.weight.clone(), "nothing was rounded"),
    ("4.2", lambda layer: layer.weight.copy_(solved("4.2")(layer)), "it changes the layer"),
    ("4.3", lambda a, b: 0.75, "counts one byte for each number"),
    ("4.3", lambda a, b: 100 * solved("4.3")(a, b), "not per cent"),
    ("4.3", lambda a, b: ql.model_nbytes(b) / ql.model_nbytes(a), "of the stored bytes are gone"),
    ("5.1", lambda k: math.erf(k / 127 / 2**0.5), "half a step"), ("5.1", lambda k: solved("5.1")(k) / 2, "one side"),
    ("5.1", lambda k: 100 * solved("5.1")(k), "not per cent"), ("5.1", lambda k: math.erf(k / 254), "divided by √2"),
    ("5.1", lambda k: 1 - solved("5.1")(k), "does not become zero"), ("5.1", lambda k: k / 254, "half a step is"),
    ("5.2", lambda q: q.qdata.float(), "these are the codes"), ("5.2", lambda q: q.qdata * q.scale, "take the zero"),
    ("5.2", lambda q: (q.qdata - q.zero_point) * q.scale, "widen first"),
    ("5.2", lambda q: (q.qdata.float() + q.zero_point) * q.scale, "not the values"),
    ("5.3", lambda w: (w.abs() > 6 * w.std()).sum(1).argmax(), "that is a row"),
    ("5.3", lambda w: w.abs().amax(0).argmax(), "farthest"),
    ("5.3", lambda w: (w > 6 * w.std()).sum(0).argmax(), "may be negative"),
    ("5.3", lambda w: w.argmax(), "it says column"),
    ("6.1", kept(0.0), "-inf"), ("6.1", cut_probabilities, "scale them up"),
    ("6.1", lambda logits, k: logits, "50 tokens are left"),
    ("6.1", lambda logits, k: kept(float("-inf"))(-logits, k), "wrong tokens"),
    ("6.1", lambda logits, k: (kept(float("-inf"))(logits, k) > 0) / k, "keep their proportions"),
    ("6.2", 20, "square the ratio"), ("6.2", 0.0025, "needs many texts"), ("6.2", 40, "solve it for n"),
    ("6.3", lambda models, write, seed: (torch.manual_seed(seed), {n: write(m) for n, m in models.items()})[1],
     "draws on"),
    ("6.3", lambda models, write, seed: {n: write(m) for n, m in models.items()}, "gives different texts"),
    ("6.3", write_seeded(False), "does not heed the seed"),
    ("6.3", lambda models, write, seed: [write(m) for m in models.values()], "return a dict"),
    ("6.4", read_own_text, "different texts"), ("6.4", read_first_text, "a model wrote what they read"),
    ("7.1", lambda windows: torch.stack([w.mean() for w in windows]).mean().exp(), "a short window counts"),
    ("7.1", lambda windows: torch.stack([w.mean().exp() for w in windows]).mean(), "averages perplexities"),
    ("7.1", lambda windows: torch.cat(windows).exp().mean(), "averages exp(loss)"),
    ("7.1", lambda windows: torch.cat(windows).mean(), "that is the mean loss"),
    ("7.2", plain_interval(50), "pairs are broken"), ("7.2", plain_interval(1.96, -1), "the sign"),
    ("7.2", plain_interval(1), "too narrow"), ("7.2", plain_interval(4), "too wide"),
    ("7.2", lambda b, a: plain_interval(1.96)(b, a)[::-1], "low end first"),
    ("7.3", kl(p_first=False), "direction"), ("7.3", kl(reduce="mean"), "sum over the vocabulary"),
    ("7.3", kl(over="sum"), "take their mean"), ("7.3", kl(base=math.log(2)), "in bits"),
    ("7.3", kl(soft=False), "log_softmax"), ("7.3", kl(base=-1), "the sign"),
    ("7.4", 5.5, "mean of the perplexities"), ("7.4", 5, "half of ten"), ("7.4", 1.15, "that is the mean loss"),
    ("7.4", 10, "losses are 0 and ln 10"),
    ("8.1", 8 * 1265664, "in bits"), ("8.1", 1253376, "the bias is missing"), ("8.1", 1179648 + 12288, "scales"),
    ("8.1", 1265664 + 73728, "two bytes"), ("8.1", 1265664 - 12288 + 3072, "3072 outputs"), ("8.1", 10, "one by one"),
    ("8.1", 2359296 + 73728 + 12288, "two codes share"), ("8.1", 1179648 + 6144 + 12288, "for each group"),
    ("8.2", packer(first="high"), "swapped"), ("8.2", packer(pairs="halves"), "two halves of a row"),
    ("8.2", packer(offset=0), "add 8"), ("8.2", packer(dtype=torch.int16), "make them uint8"),
    ("8.2", packer(offset=7), "does not get the codes back"),
    ("8.2", lambda codes: packer()(codes.T).T, "has the shape"),
    ("8.3", layer(codes=torch.float32), "no int8 is stored"), ("8.3", layer(hoard=True), "still keeps a float matrix"),
    ("8.3", layer(use_bias=False), "bias is missing"), ("8.3", layer(exact=True), "unrounded weight"),
    ("8.3", layer(axis=1), "the scales belong to the inputs"),
    ("8.3", layer(axis=None), "one scale for the whole"), ("8.3", lambda w, b: 7, "torch.nn.Module"),
    ("9.1", 3.4, "bits and bytes"), ("9.1", 37.2, "milliseconds"), ("9.1", 14.3, "a byte each"),
    ("9.1", 28.6, "divide the bytes"), ("9.1", 0.037, "seconds per token"),
    ("9.2", timer(wait_first=False, wait_last=False), "when the work is launched"),
    ("9.2", timer(warm=False, average=max), "slow first call"), ("9.2", timer(turns=False), "take turns"),
    ("9.2", timer(average=statistics.mean), "median"), ("9.2", timer(unit=1000), "not in seconds"),
    ("9.2", timer(warm=False), "one unmeasured call"),
    ("9.3", lambda b, m, a: b * a / m, "two operations"), ("9.3", lambda b, m, a: 2 * m / (b * a), "upside down"),
    ("9.3", lambda b, m, a: a / m / 2, "use bytes_per_weight"), ("9.3", lambda b, m, a: a / m / 2 / b, "later"),
    ("10.1", -0.41, "positive"), ("10.1", 20, "one scale for the whole matrix"), ("10.1", 0, "add up the noise"),
    ("10.1", 0.039, "a hundred times the squared error"), ("10.1", 0.82, "10 log10"), ("10.1", 3, "how much larger"),
    ("10.2", groups(axis=0), "along the outputs"), ("10.2", groups(size=0), "no groups"),
    ("10.2", groups(turn=True), "turned round"),
    ("10.2", groups(axis=None, size=0), "one scale for the whole"), ("10.2", groups(bits=8), "number of bits"),
    ("10.3", bits(scales=0, zeros=0), "only the codes"), ("10.3", bits(zeros=0), "zero points"),
    ("10.3", bits(plain=False), "what stays in float"), ("10.3", bits(unit=8), "bytes per weight"),
    ("10.3", lambda t: sum(8 * q.nbytes / q.shape.numel() for q in t) / len(t), "a small tensor counts as much"),
    ("10.3", lambda t: bits()(t) + 1, "expected"),
    ("10.4", clip(weigh=torch.ones_like), "all columns count alike"), ("10.4", clip(power=1), "square them"),
    ("10.4", clip(clamp=False), "without a clamp"), ("10.4", clip(together=True), "each row by itself"),
    ("10.4", clip(share=True), "those are the shares"), ("10.4", clip(invert=True), "inverted"),
    ("10.4", clip(weigh=torch.square), "do not square it"),
    ("10.4", lambda w, i, bits: w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1), "no row is clipped"),
    ("10.4", lambda w, i, bits: clip()(w, i, bits).expand_as(w), "has the shape"),
    ("11.1", unpacker(signed=False), "stand for -8 to -1"),
    ("11.1", unpacker(signed=False, offset=8), "another layout"),
    ("11.1", unpacker(order="swapped"), "swapped"), ("11.1", unpacker(order="torn"), "torn apart"),
    ("11.1", unpacker(signed=False, shift=0), "shifted down"), ("11.1", sign_and_magnitude, "not every code"),
    ("11.1", lambda packed: unpacker()(packed).int(), "store them as int8"),
    ("11.2", normal_float(zero=False), "not exactly 0"), ("11.2", normal_float(twice=True), "0 is there twice"),
    ("11.2", normal_float(icdf=lambda p: 2 * p - 1, tail=0.0), "evenly spaced"),
    ("11.2", normal_float(turned=True), "turned round"), ("11.2", normal_float(own=False), "divide by the outermost"),
    ("11.2", normal_float(tail=0.05), "not the quantiles"),
    ("11.2", lambda b: normal_float()(b).flip(0), "should rise"),
    ("11.2", lambda b: normal_float()(4), "expected (8,)"),
    ("11.3", nf4(lambda g: g.std(-1, keepdim=True)), "the levels end at 1"),
    ("11.3", nf4(lambda g: 3 * g.std(-1, keepdim=True)), "much smaller"),
    ("11.3", nf4(lambda g: g.abs().max().expand(*g.shape[:-1], 1)), "one scale for the whole tensor"),
    ("11.3", nf4(lambda g: g.amax(-1, keepdim=True)), "take abs()"),
    ("11.3", lambda x, size: ql.absmax_quantize(x, 4, group_size=size).dequantize(), "evenly spaced"),
    ("11.4", 3, "scales are missing"), ("11.4", 3.25, "need a scale themselves"), ("11.4", 3.375, "256 · 32"),
    ("11.4", 4, "a float32 for each group"), ("11.4", 3.5, "16 bits for each scale"), ("11.4", 5, "add up"),
    ("12.1", 8 * 52_224_000, "in bits"), ("12.1", 26_112_000, "keys and values"),
    ("12.1", 49_152_000, "stores a scale"),
    ("12.1", 50_688_000, "16 bits each"), ("12.1", 2_176_000, "one layer"), ("12.1", 52_224, "one token"),
    ("12.2", smoothed(on_w=0), "only the activations"), ("12.2", smoothed(on_x=0), "only the weight"),
    ("12.2", smoothed(on_w=-1), "both were divided"), ("12.2", smoothed(on_x=1, on_w=-1), "the other way round"),
    ("12.2", smoothed(swap=True), "not those of the formula"), ("12.2", lambda x, w, alpha: (x, w), "nothing was"),
    ("12.3", integers(sign=0), "zero point is missing"), ("12.3", integers(sign=1), "do not add"),
    ("12.3", integers(correct="one"), "each of the terms"), ("12.3", integers(scales=False), "scales are missing"),
    ("12.3", integers(kind=torch.int8), "does not fit into 8"), ("12.3", integers(kind=torch.int16), "does not fit"),
    ("12.3", lambda q, z, s, p, r: (q - z).int() @ p.int().T * s * r.T, "widen first"),
    ("12.3", lambda *a: integers()(*a).T, "turned round"),
    ("13.1", 0.03, "sign"), ("13.1", -0.12, "divide by the mean square"), ("13.1", -0.06, "the first input"),
    ("13.1", -0.1, "not equal"), ("13.1", 0, "derivative"),
    ("13.2", gptq_like(row="inverse"), "forget a column"), ("13.2", gptq_like(sign=1), "Is the sign right"),
    ("13.2", gptq_like(row="none"), "rounded to the nearest"), ("13.2", gptq_like(clamp=False), "beyond -7 and 7"),
    ("13.2", lambda w, moment, scale: w.clone(), "nothing is rounded"),
    ("13.3", choose(by="evaluation"), "the evaluation text chose"),
    ("13.3", choose(report="calibration"), "has chosen"),
    ("13.3", choose(function=max), "worst"), ("13.3", lambda *a: choose()(*a)[0], "return 2 things"),
    ("13.3", lambda c, loss, a, b: choose()(c, lambda *x: loss(*x) + 0 * loss(x[0], b), a, b), "chosen one only"),
    ("13.4", through(detach=False), "the gradient is 0"), ("13.4", through(clamp=False), "clamp them"),
    ("13.4", through(inside=False), "does not move"),
    ("13.4", lambda w, scale: through()(w, scale).detach(), "no gradient"),
    ("13.4", through(unit=2), "the gradient is 2"), ("13.4", lambda w, scale: w.clamp(-2.8, 2.8), "4-bit rounding"),
    ("14.1", 11.3e9, "in billions"), ("14.1", 15.06, "2 GB stay free"), ("14.1", 12, "scales take a quarter"),
    ("14.1", 1.41, "bits and bytes"), ("14.1", 3, "16 bits"), ("14.1", 16, "without the 2 GB"), ("14.1", 7, "divide"),
    ("14.2", rival(lambda t: 0), "smaller than a mixed"), ("14.2", rival(lambda t: 1), "larger than a mixed"),
    ("14.2", rival(log=False), "logarithm"), ("14.2", rival(sign=-1), "the sign"),
    ("14.2", rival(lambda t: 1 - t), "changed places"), ("14.2", lambda u, b, x: rival()(u, b, x) * 2, "expected"),
    ("14.3", front(lambda o, p: o[0] < p[0] and o[1] < p[1]), "at equal bits"),
    ("14.3", front(lambda o, p: o[0] <= p[0] and o[1] <= p[1]), "belongs"),
    ("14.3", lambda points: set(points) - set(sweep(points)), "beaten: return the others"),
    ("14.3", lambda points: [n for n in sweep(points) if n != "h"], "keep both"),
    ("14.3", lambda points: sweep(points) * 2, "twice"),
    ("14.3", lambda points: [n for n in points if n not in "cf"], "smaller and better"),
    ("14.3", lambda points: [*sweep(points)[:-1]], "expected"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=[f"{n}-{i}" for i, (n, _) in enumerate(RIGHT)])
def test_other_right_answers(number, answer):
    passed, message = check(number, answer)
    assert passed, message


@pytest.mark.parametrize(("number", "answer", "told"), WRONG, ids=[f"{w[0]}-{w[2][:25]}" for w in WRONG])
def test_wrong_answers(number, answer, told):
    passed, message = check(number, answer)
    assert passed is False and told in message, message


def test_each_exercise_has_two_wrong_answers():
    assert {n for n in checks.EXERCISES if sum(w[0] == n for w in WRONG) < 2} == set()


def test_a_checker_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check("6.3", write_seeded())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# For teachers
# ---------------------------------------------------------------------------------------------------------------------


def test_grading(tmp_path, capsys):
    """One notebook with exercises untouched, right, wrong and deleted, and an error between; and one that is torn."""
    nb, solutions = (nbformat.read(cells["3.1"][0], as_version=4) for cells in (STUBS, SOLUTIONS))
    wanted = ("exercises-import", "exercise-3-1-stub", "exercise-3-2-stub")
    nb.cells = [cell for cell in nb.cells if cell.id in wanted or "setup" in cell.metadata.get("tags", [])]
    nb.cells[3].source = nb.cells[3].source.replace("...", "-3.6")
    nb.cells.insert(3, nbformat.v4.new_code_cell("raise SystemError('of the student')"))
    nb.cells += [cell for cell in solutions.cells if cell.id == "solution-3-3"]
    files = [str(tmp_path / "ada.ipynb"), str(tmp_path / "torn.ipynb")]
    nbformat.write(nb, files[0])
    Path(files[1]).write_text("{")
    before = Path(files[0]).read_bytes()
    checks.main(files)
    ada, torn = capsys.readouterr().out.split(files[1])
    assert "it could not be run" in torn
    assert re.findall(r"^  (\S+) +(yes|no|-) +(.*)$", ada, re.M) == [
        ("3.1", "-", "not solved yet"),
        ("3.2", "no", check("3.2", -3.6)[1]),
        ("3.3", "yes", check("3.3", zeropoint_back())[1]),
        ("3.4", "-", "the checker was not called"),
    ]
    assert Path(files[0]).read_bytes() == before


def test_results_can_be_handed_over():
    """The grading reads them as JSON, so each verdict is a plain True, False or None."""
    for number, answer, _ in WRONG:
        check(number, answer)
    assert json.loads(json.dumps(checks.RESULTS)).keys() == checks.RESULTS.keys()
