"""The exercises' checkers: each states an exercise's right answer, its cases, and mistakes with what to say of them.

    checks.check_02_1(absmax)      # in a notebook: prints one sentence; returns True, False, or None if not solved yet

A checker compares an answer with the right one, case by case. Where they differ, it says the message of the mistake
that gives the same there, or else what was expected. It never raises, so that "Run All" reaches the end with exercises
unsolved. For teachers, a table of what is solved in whole notebooks, with whatever code is in them:

    python notebooks/checks.py STUDENT.ipynb ...

To add an exercise, make an `Exercise` named `check_NN_M`; what to state is listed in that class.
"""

import copy
import inspect
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a notebook's setup cell has done so already
import quantlib as ql  # noqa: E402

EXERCISES = {}  # "2.1" -> Exercise
RESULTS = {}  # "2.1" -> (True, False or None, message) of the last call
SLIPS = {  # mistakes that are tried with every exercise: what to say -> what is made of a right number or tensor
    "the sign is wrong": lambda x: -x,
    "it is upside down": lambda x: 1 / x,
    "it comes back turned round: rows and columns have changed places": lambda x: x.movedim(0, -1),
    "that is eight times too much: a byte has eight bits": lambda x: 8 * x,
    "that is an eighth of it: a byte has eight bits": lambda x: x / 8,
    "that is twice as much as it should be": lambda x: 2 * x,
    "that is half of what it should be": lambda x: x / 2,
    "give a share between 0 and 1, not per cent": lambda x: 100 * x,
    "that is the share of all the others": lambda x: 1 - x,
}


class Wrong(Exception):
    """What is wrong with an answer, in one sentence; without one, it is still the stub."""


@dataclass
class Exercise:
    """An exercise; called with an answer it prints the verdict and returns True, False, or None for the stub."""

    number: str
    right: object = None  # the right answer: a number, a function or a class
    reward: str = ""  # what to say of a right answer; may hold fields, to be filled in with what counts
    cases: object = lambda: [()]  # makes the list of cases, each an input or a tuple of inputs
    wrong: dict = field(default_factory=dict)  # what to say -> a mistaken answer; if a dict, the right one's options
    ask: object = None  # (answer, *inputs) -> what counts, in order, by name, where it takes more than a call
    view: object = None  # (result, *inputs) -> what counts of a result, each part an argument; by default all of it
    hint: str = ""  # what to say of mistakes that are not listed; by default, what was expected
    tolerance: float = 0.0  # a share; by default 2 % of a number to predict, else 0.1 %; whole numbers must be exact

    def __post_init__(self):
        EXERCISES[self.number] = self

    def __call__(self, answer=...):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                for inputs in self.cases():
                    counts = self.compare(answer, inputs if isinstance(inputs, tuple) else (inputs,))
                passed, message = True, self.reward.format_map(counts)
            except Wrong as fault:
                passed, message = (False, str(fault)) if str(fault) else (None, "not solved yet")
        print(f"Exercise {self.number}: {'right. ' if passed else '' if passed is None else 'not yet. '}{message}")
        RESULTS[self.number] = passed, message
        return passed

    def compare(self, answer, inputs) -> dict:
        """What counts of an answer for these inputs, if it is that of the right one; else Wrong."""
        expected, got = self.outcome(self.right, inputs), self.outcome(answer, inputs)
        same = partial(alike, tolerance=self.tolerance or (1e-3 if callable(self.right) else 0.02))
        for i, name in enumerate(expected, 1):
            if same(got[name], expected[name]):
                continue
            for message, mistake in self.wrong.items():
                made = self.outcome(mistake, inputs)
                if all(same(got[n], made[n]) for n in [*made][:i]):  # what comes later may follow from it
                    raise Wrong(message)
            for message, slip in SLIPS.items() if isinstance(expected[name], (float, Tensor)) else ():
                if same(got[name], slip(torch.as_tensor(expected[name]))):
                    raise Wrong(message)
            asked = partial(self.ask, None) if self.ask else self.right
            raise Wrong(self.hint or difference(name, got[name], expected[name], asked, inputs))
        return got

    def outcome(self, answer, inputs) -> dict:
        """What counts of an answer for these inputs, by name."""
        answer = partial(self.right, **answer) if isinstance(answer, dict) else answer
        try:
            if self.ask:
                return self.ask(answer, *inputs)
            model = self.right(*inputs) if callable(self.right) else self.right
            result = like(call(answer, *inputs) if callable(self.right) else answer, model)
            parts = result if isinstance(result, tuple) else (result,)
            if self.view:
                return self.view(*parts, *inputs)
            return dict(zip(("the result", "the second result"), parts, strict=False))
        except NotImplementedError:
            raise Wrong from None
        except Wrong:
            raise
        except Exception as error:  # in the student's code: we say which, and go on
            raise Wrong(f"it raised {type(error).__name__}: {error}") from None


def call(answer, *inputs):
    """What a function or a class returns for copies of the inputs, which it must leave as they were."""
    if answer is None or answer is ...:
        raise Wrong
    if not callable(answer):
        raise Wrong("give the function itself, not what it returns")
    copies = copy.deepcopy(inputs)
    result = answer(*copies)
    if not alike(inputs, copies, 0):
        raise Wrong("it changes its input in place: work on a copy")
    return result


def like(result, model):
    """A result in the form of the right one: plain numbers, tensors on the CPU; Wrong if it has another form."""
    if (result is None or result is ...) and model is not False:
        raise Wrong
    try:
        if isinstance(model, dict):
            return {key: like(dict(result)[key], value) for key, value in model.items()}
        if isinstance(model, tuple):
            parts = result if isinstance(result, (tuple, list)) else ()
            return tuple(like(*both) for both in zip(parts, model, strict=True))
        if not isinstance(model, Tensor) or not model.ndim:
            return (type(model) if isinstance(model, (bool, str, set)) else float)(result)
        x = torch.as_tensor(result).detach().cpu()
        if x.dtype == model.dtype or (x.is_floating_point() and model.is_floating_point()):
            if x.shape == model.shape or x.shape == model.squeeze().shape:
                return x.reshape(model.shape).to(model.dtype)
    except (TypeError, ValueError, KeyError, RuntimeError):
        pass
    raise Wrong(f"it returns {form(result)}, expected {form(model)}")


def form(x) -> str:
    if isinstance(x, (int, float)) or isinstance(x, Tensor) and not x.ndim:
        return "one number"
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} of shape {[*x.shape]}"
    return f"{len(x)} things" if isinstance(x, (tuple, dict)) else f"something of type {type(x).__name__}"


def alike(a, b, tolerance) -> bool:
    """Whether two things of one form are equal, numbers and tensors up to the tolerance."""
    if isinstance(a, (nn.Module, ql.QuantizedTensor)):
        a, b = (x.state_dict() if isinstance(x, nn.Module) else vars(x) for x in (a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Tensor, float)):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
        tolerance = 1e-9 if b.ndim == 0 and b == b.round() else tolerance
        return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * min(a.abs().max(), b.abs().max()) + 1e-6)
    return a == b


def difference(name, got, expected, right, inputs) -> str:
    """What was expected, for which inputs; of a tensor, where it is farthest off."""
    if isinstance(expected, Tensor):
        place = (got.double() - expected.double()).abs().nan_to_num(math.inf).argmax()
        name += f" at {[i.item() for i in torch.unravel_index(place, expected.shape)]}"
        got, expected = got.flatten()[place].item(), expected.flatten()[place].item()
    named = zip(inspect.signature(right).parameters, inputs, strict=False)
    given = ", ".join(f"{parameter}={x}" for parameter, x in named if isinstance(x, (int, float, str)))
    got, expected = (f"{round(x, 5):,}".removesuffix(".0") if isinstance(x, float) else str(x) for x in (got, expected))
    return f"{name} is {got}, expected {expected}" + (f", for {given}" if given else "")


def bell(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(*args, **how) -> Tensor:
    """What comes back from absmax."""
    return ql.absmax_quantize(*args, **how).dequantize()


def tiny_gpt2(tied=True):
    """A GPT-2 with 16 tokens and 2 blocks, 8 wide."""
    config = dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**config, tie_word_embeddings=tied)).eval()


def layer(kind, inputs: int, outputs: int):
    """A layer whose inputs and outputs differ in size, so that it matters which of them share a scale."""
    made = kind(outputs, inputs) if kind is Conv1D else kind(inputs, outputs)
    weight = bell(outputs, inputs) * torch.arange(1, outputs + 1)[:, None] * torch.arange(1, inputs + 1)
    made.weight.data = weight.T.contiguous() if kind is Conv1D else weight
    return made


def absmax(x, bits, qmax=lambda bits: 2 ** (bits - 1) - 1, top=torch.abs, to_code=torch.round, zero=1, power=1):
    scale = top(x).max() / qmax(bits)
    scale = torch.where(scale == 0, zero, scale)
    return to_code(x / scale).to(torch.int8), scale**power


def zeropoint(x, widen=True, steps=255, whole=torch.round, zero=1, least=None):
    low, high = (x.min().clamp(max=0), x.max().clamp(min=0)) if widen else (x.min(), x.max())
    scale = (high - low) / steps
    scale = torch.where(scale == 0, zero, scale)
    z = whole(-128 - (least(x) if least else low) / scale)
    return ((x / scale).round() + z).clamp(-128, 127).to(torch.int8), scale, z


def interval(before, after, errors=1.96, variance=lambda before, after: (after - before).var()):
    centre, error = (after - before).mean(), (variance(before, after) / len(after)).sqrt()
    return centre - errors * error, centre + errors * error


def bits_per_byte(losses, text, log=math.log, total=torch.sum, size=lambda losses, text: len(text.encode())):
    return total(losses) / log(2) / size(losses, text)


class SmallLinear(nn.Module):
    def __init__(self, weight, bias, axis=0, dtype=torch.int8, kept=None):
        super().__init__()
        q = ql.absmax_quantize(weight, axis=axis)
        self.register_buffer("codes", q.qdata.to(dtype))
        self.register_buffer("scale", q.scale)
        self.bias, self.kept = nn.Parameter(bias), kept

    def forward(self, x):
        return x @ (self.codes * self.scale).T + self.bias


def time_each(functions, wait, clock, rounds, warm=1, after=True, average=statistics.median, turns=True, ready=True):
    times = {label: [] for label in functions}
    calls = [(label, turn) for turn in range(rounds + warm) for label in functions]
    for label, turn in calls if turns else sorted(calls):
        if ready:
            wait()
        begin = clock()
        functions[label]()
        if after and (ready or turn >= warm):
            wait()
        if turn >= warm:
            times[label].append(clock() - begin)
    return {label: average(seconds) for label, seconds in times.items()}


def true_bits(tensors, size=lambda t: t.nbytes):
    return sum(8 * size(t) for t in tensors) / sum(t.shape.numel() for t in tensors)


def e4m3(x, lowest=-6, digits=3, top=448.0):
    step = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=lowest).float() - digits)
    return ((x / step).round() * step).clamp(-top, top)


def four_or_six(w, tops=(6, 4), size=16, each=False):
    groups, best, least = w.unflatten(1, (-1, size)), torch.zeros(()), torch.tensor(torch.inf)
    for top in tops:
        scale = groups.abs().amax(2, keepdim=True) / top
        values = e4m3(groups / scale, lowest=0, digits=1, top=6.0) * scale
        error = (values - groups).square()
        error = error if each else error.sum(-1, keepdim=True)
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best.flatten(1)


def decode_4_bits(blocks, head=1, shift=8, axis=1, low=0, high=4):
    """Q4_0, or with head=2 and shift=0 Q4_1: fp16 numbers, then 16 bytes of nibbles."""
    d, m = (blocks[:, i : i + 2].contiguous().view(torch.float16).float() for i in (0, 2 * head - 2))
    pairs = blocks[:, 2 * head :]
    codes = torch.stack([pairs >> low & 15, pairs >> high & 15], axis).flatten(1).float()
    return d * (codes - shift) + (m if head == 2 else 0)


def hqq_zero(w, p=0.7, beta=10.0):
    scale = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 15
    zero = -w.amin(1, keepdim=True) / scale
    for step in range(20):
        q = (w / scale + zero).round().clamp(0, 15)
        e = w - (q - zero) * scale
        e = 0 * e if p is None else e.sign() * (e.abs() - e.abs() ** (p - 1) / (beta * 1.01**step)).clamp(min=0)
        zero = (q - (w - e) / scale).mean(1, keepdim=True)
    return zero


def hadamard_signs(n):
    """A Hadamard matrix, [n, n], and signs that no sign of its own matches."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5, torch.where(bell(n, seed=2) > 0, 1.0, -1.0)


def unrotate(y, signs, h):
    return (y @ h.T) * signs


def turned(n, seed=0):
    """A random rotation, [n, n], that is not its own inverse."""
    return torch.linalg.qr(bell(n, n, seed=seed))[0]


def both_sides(w, r_in, r_out, bits, left=True, right=True, back=True, flip=False, axis=0):
    r_in, r_out = r_in if right else torch.eye(len(r_in)), r_out if left else torch.eye(len(r_out))
    r_out = r_out.T if flip else r_out
    rounded_there = rounded(r_out.T @ w @ r_in, bits, axis=axis)
    return r_out @ rounded_there @ r_in.T if back else rounded_there


def by_channel(keys, bits, turn=torch.t, size=64):
    """KIVI's keys: groups of 64 tokens of a channel, minimum and step in fp16. turn, done twice, changes nothing."""
    rows, steps = turn(keys), 2**bits - 1
    groups = rows.unflatten(1, (-1, size or rows.shape[1]))
    low, high = groups.amin(2, keepdim=True).half().float(), groups.amax(2, keepdim=True)
    step = ((high - low) / steps).clamp(min=2**-14).half().float()
    return turn((((groups - low) / step).round().clamp(0, steps) * step + low).flatten(1))


def less_mean(keys, bits, dim=0, axis=0, before=1, after=0):
    mean = keys.mean(dim, keepdim=True)
    return rounded(keys - before * mean, bits, axis) + after * mean


def smooth(x, w, alpha, on_x=-1, on_w=1):
    s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    return x * s**on_x, w * s**on_w


def gptq(w, moment, scale, factor=lambda inverse: torch.linalg.cholesky(inverse, upper=True), share=1, qmax=7, start=1):
    w, u = w.clone(), factor(torch.linalg.inv(moment))
    for i in range(w.shape[1]):
        rounded = (w[:, i] / scale).round().clamp(-qmax, qmax) * scale
        error = (w[:, i] - rounded) / u[i, i]
        w[:, i] = rounded
        w[:, i + start :] -= share * error[:, None] * u[i, i + start :]
    return w


def gptq_ordered(w, moment, scale, descending=True, back=True, moment_too=True):
    order = moment.diagonal().argsort(descending=descending)
    result = gptq(w[:, order], moment[order][:, order] if moment_too else moment, scale)
    return result[:, order.argsort()] if back else result


def gptq_levels(w, moment, scale, levels, factor=None, share=1, scaled=True):
    w, u = w.clone(), (factor or partial(torch.linalg.cholesky, upper=True))(torch.linalg.inv(moment))
    for i in range(w.shape[1]):
        index = (w[:, i, None] / scale[:, None] - levels).abs().argmin(1)
        rounded = levels[index] * (scale if scaled else 1)
        error = (w[:, i] - rounded) / u[i, i]
        w[:, i] = rounded
        w[:, i + 1 :] -= share * error[:, None] * u[i, i + 1 :]
    return w


def fake_round(w, scale, limit=7, inside=True, detach=torch.detach):
    carrier = w.clamp(-7 * scale, 7 * scale) if inside else w
    return carrier + detach((w / scale).round().clamp(-limit, limit) * scale - carrier)


def look_inside(make, weight, bias, x) -> dict:
    """What a layer made of a weight and a bias returns, with outputs of equal size, and what it stores."""
    made = call(make, weight, bias)
    output = like(call(made, x), x @ weight.T) / weight.abs().amax(1)
    values = [value for part in made.modules() for value in [*vars(part).values(), *part.parameters(), *part.buffers()]]
    large = {value.dtype for value in values if isinstance(value, Tensor) and value.numel() >= weight.numel()}
    size = sum(tensor.nbytes for tensor in made.state_dict().values())
    return {"the output": output, "int8": torch.int8 in large, "float": len(large) > 1, "bytes": max(1792, size)}


class Device:
    """A simulated machine: work is queued and done later, a first call is slow, others run in between."""

    def __init__(self):
        self.now, self.free, self.calls = 0.0, 0.0, []

    def clock(self):
        return self.now

    def wait(self):
        self.now = max(self.now, self.free)

    def function(self, label, seconds):
        def run():
            self.now += 1e-5  # the launch
            busy = 20 if len(self.calls) == 12 else 2 if len(self.calls) >= 10 else 1
            first = 0 if label in self.calls else 0.5
            self.calls.append(label)
            self.free = max(self.now, self.free) + seconds * busy + first

        return run


def on_a_device(time_each, rounds) -> dict:
    """The order of magnitude of the seconds, and their ratio: how many calls come first is left open."""
    device = Device()
    work = {"fp32": device.function("fp32", 0.004), "int8": device.function("int8", 0.002)}
    result = call(time_each, work, lambda: device.wait(), lambda: device.clock(), rounds)
    fp32, int8 = (max(seconds, 1e-9) for seconds in like(result, {"fp32": 1.0, "int8": 1.0}).values())
    return {"the power of ten": math.log10(fp32) // 1, "fp32, in times of int8,": fp32 / int8}


SHARE = "the output error of the nearest, over that of the answer,"  # of GPTQ


def on_the_grid(got, w, moment, scale) -> dict:
    """Whether all weights are codes from -7 to 7, and how much less error the output has than with the nearest."""
    codes, nearest = got / scale, (w / scale).round().clamp(-7, 7) * scale
    gain = ql.output_error(nearest - w, moment) / max(ql.output_error(got - w, moment), 1e-9)
    off, farthest = (codes - codes.round()).abs().max().item(), codes.abs().max().item()
    return {"that all weights are on the grid": off < 1e-3, "that all codes are in range": farthest < 7.5, SHARE: gain}


def loosely(beats):
    """The front by a comparison that is not told when two points are equal."""
    return lambda points: {n for n, p in points.items() if not any(m != n and beats(q, p) for m, q in points.items())}


def matrix_bytes(model, once=True, key=id):
    modules = model.named_modules(remove_duplicate=False)
    weights = [m.weight for _, m in modules if getattr(m, "weight", None) is not None and m.weight.ndim == 2]
    return sum(w.nbytes for w in ({key(w): w for w in weights}.values() if once else weights))


def inner_blocks(name, parameter, blocks, first=0, last=1, ndim=2, outside=False):
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if number is None:
        return outside and parameter.ndim >= ndim
    return first < number < blocks - last and parameter.ndim >= ndim


def on_levels(got, w, moment, scale, levels) -> dict:
    """Whether all weights are levels times scales, and how much less error the output has than with the nearest."""
    ratio, nearest = got / scale[:, None], levels[(w[..., None] / scale[:, None, None] - levels).abs().argmin(-1)]
    gain = ql.output_error(nearest * scale[:, None] - w, moment) / max(ql.output_error(got - w, moment), 1e-9)
    on = (ratio[..., None] - levels).abs().amin(-1).max().item() < 1e-3
    return {"that all weights are levels times scales": on, SHARE: gain}


def with_gradient(fake_round, w, scale) -> dict:
    """The values, and their gradient where it is clear whether a weight is clipped."""
    result, leaf = like(call(fake_round, w, scale), w), w.clone().requires_grad_()
    with torch.enable_grad():
        values = fake_round(leaf, scale)
        (gradient,) = torch.autograd.grad(values.sum() + 0 * leaf.sum(), leaf)
    clear = (w.abs() / scale < 6.9) | (w.abs() / scale > 7.6)
    return {"the result": result, "the presence of a gradient": values.requires_grad, "the gradient": gradient[clear]}


# The exercises -------------------------------------------------------------------------------------------------------

check_01_1 = e = Exercise("1.1", cases=lambda: [(50257, 1024, 768, 12, 32), (50257, 1024, 1024, 24, 4)])
e.right = lambda v, p, d, n, bits, head=1, block=13, last=2, size=lambda bits: bits / 8: (
    (head * v * d + p * d + 12 * n * d * d + block * n * d + last * d) * size(bits)
)
e.reward = f"gpt2 takes {4 * 124439808:,} bytes in float32, and an eighth of that at 4 bits."
e.wrong["the head is counted twice: it is the embedding"] = dict(head=2)
e.wrong["it still counts 32 bits, whatever `bits` says"] = dict(size=lambda bits: 4)
e.wrong["biases and layer norms are missing"] = dict(block=0, last=0)
e.wrong["the layer norm after the last block is missing"] = dict(last=0)

check_01_2 = e = Exercise("1.2", 256, "bfloat16 counts in steps of 2 there, and a tie goes to the even fraction.")
e.wrong["between 256 and 512 bfloat16 has 128 numbers (7 fraction bits), and 257 is none of them"] = 257
e.wrong["256 and 258 are equally near; a tie goes to the one whose last fraction bit is 0"] = 258
e.hint = "how far apart are the bfloat16 numbers above 256?"

check_01_3 = e = Exercise("1.3", lambda model: sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
e.cases = lambda: [tiny_gpt2(), tiny_gpt2(tied=False), tiny_gpt2().half(), ql.quantize_model(tiny_gpt2())]
e.reward = "each stored tensor once, in its own dtype, buffers too."
e.wrong["the tied head is counted twice, under each name"] = lambda m: sum(t.nbytes for t in m.state_dict().values())
e.wrong["buffers are stored as well: it leaves them out"] = lambda m: sum(p.nbytes for p in m.parameters())
e.wrong["it takes four bytes for every number, but a float16 has two"] = lambda m: 4 * m.num_parameters()
e.wrong["an untied head is a tensor of its own: count it"] = lambda m: sum(p.nbytes for p in m.transformer.parameters())

check_02_1 = e = Exercise("2.1", absmax, "half a step at most, for any number of bits, and zeros stay zeros.")
e.cases = lambda: [(-bell(200).exp(), 8), (bell(200), 4), (bell(200), 2), (torch.zeros(4), 8)]
e.view = lambda codes, scale, x, bits: {"the scale": scale if x.any() else scale != 0, "the list of codes": codes}
e.wrong["the scale is inverted: it should dequantize, x is about codes * scale"] = dict(power=-1)
e.wrong["whatever `bits` says, the scale is that of 8 bits"] = dict(qmax=lambda bits: 127)
e.wrong["the largest code is one less: with 8 bits 127, not 128"] = dict(qmax=lambda bits: 2 ** (bits - 1))
e.wrong["the largest magnitude may be negative: take abs() before max()"] = dict(top=torch.clone)
e.wrong["some weights move by more than half a step: round before you convert"] = dict(to_code=torch.trunc)
e.wrong["for a tensor of zeros the scale is 0, and 0 / 0 is NaN"] = dict(zero=0)

BELL = bell(200_000).clamp(-4, 4)
check_02_2 = e = Exercise("2.2", 10 * math.log10(12 / (4 / 127) ** 2))
e.reward = f"such a bell was just measured: {ql.sqnr_db(BELL, rounded(BELL)):.1f} dB."
e.wrong["the noise is not a whole step: its RMS is step / √12"] = 20 * math.log10(127 / 4)
e.wrong["half a step is the largest error; its RMS is step / √12"] = 20 * math.log10(127 / 2)
e.hint = "step = 4 / 127, the noise has an RMS of step / √12, and the signal one of 1"

check_02_3 = e = Exercise("2.3", lambda x, **how: ((q := absmax(x, 8, **how))[0], q[0] * q[1]))
e.cases = lambda: [bell(500) + 0.5, 0.5 - bell(500).exp()]
e.reward = "a negative weight may set the range, too."
e.wrong["the largest weight still gets code 100: 27 codes lie idle on either side"] = dict(qmax=lambda bits: 100)
e.wrong["the largest magnitude may be negative: take abs() before max()"] = dict(top=torch.clone)
e.wrong["128 does not fit into int8: it wraps around to -128"] = dict(qmax=lambda bits: 128)
e.wrong["clamping cuts the large negative weights off: let the largest magnitude set the scale"] = dict(
    top=torch.clone, to_code=lambda x: x.round().clamp(-127, 127)
)

check_03_1 = e = Exercise("3.1", zeropoint, "the range includes 0, so zeros are exact whatever comes in.")
e.cases = lambda: [torch.tensor(x) for x in ([-0.3, 1, 2], [10, 10.3, 11], [-5, -4.1, -4], [5.0, 5.0], [0.0, 0.0])]
e.view = lambda codes, scale, z, x: {
    "the scale": scale if x.any() else scale != 0,
    "codes less zero point": codes - z,
    "the zero point, as an int8,": -128 <= z <= 127,
}
e.wrong["the zero point is no int8: first widen the range to include 0"] = dict(widen=False)
e.wrong["the zero point is no int8: the scale is that of the widened range, z is not"] = dict(least=torch.min)
e.wrong["the zero point is no whole number, so no code stands for 0.0"] = dict(whole=torch.clone)
e.wrong["256 codes have 255 steps between them"] = dict(steps=256)
e.wrong["for a tensor of zeros the scale is 0, and 0 / 0 is NaN"] = dict(zero=0)

check_03_2 = e = Exercise("3.2", 20 * math.log10(3 / 127 / (4 / 255)))
e.reward = f"the two scales alone give {e.right:.1f} dB."
e.wrong["the scales are amplitudes: 20 log10, not 10"] = e.right / 2
e.wrong["absmax covers -3 to 3, a range of 6: 3 / 127 a step"] = 20 * math.log10(4 / 3)
e.wrong["a full bit is gained only where all values lie on one side of zero"] = 20 * math.log10(2)
e.hint = "put the two scales into the formula: 3 / 127 for absmax, 4 / 255 for zero-point"

check_03_3 = e = Exercise("3.3", cases=lambda: [bell(1000, seed=seed).exp() - 1 - seed for seed in range(3)])
e.right = lambda x, steps=255: ((q := zeropoint(x, steps=steps))[0], (q[0] - q[2]) * q[1])
e.view = lambda codes, back, x: {  # where a tie goes, and from where one counts, is left open
    "the code of the largest value": min(126, codes[x.argmax()].item()),
    "the number of errors above half a step": (255 * (back - x).abs() > 0.52 * (x.max() - x.min())).sum().item(),
}
e.reward = f"the repair is worth {20 * math.log10(255 / 200):.2f} dB, for nothing."
e.wrong["the largest value still gets a code near 72: 200 steps from -128 end there"] = dict(steps=200)
e.wrong["256 codes have 255 steps: the largest value is clamped"] = dict(steps=256)

check_03_4 = e = Exercise("3.4", lambda codes, limit, dtype=torch.int: (codes.to(dtype).abs() >= limit).sum())
e.cases = lambda: [(torch.tensor([-128, -127, -9, 0, 9, 127], dtype=torch.int8), limit) for limit in (127, 128, 3)]
e.reward = "widen first; the farthest code of all is -128."
e.wrong["it misses the code -128: in int8 its magnitude does not exist, and wraps"] = dict(dtype=torch.int8)

check_04_1 = e = Exercise("4.1", lambda name, p, part=".h.", dimensions=(2,): part in name and p.ndim in dimensions)
e.cases = lambda: sorted(tiny_gpt2().named_parameters(), key=lambda named: "c_fc.weight" not in named[0])
e.reward = "four matrices for each block; embedding, head and vectors stay as they are."
e.wrong["it takes a matrix that is in no block"] = dict(part="")
e.wrong["it takes a vector: look at parameter.ndim"] = dict(dimensions=(1, 2))
e.wrong["it leaves out a matrix inside a block"] = dict(part=".mlp.")

check_04_2 = e = Exercise("4.2")
e.right = lambda layer, linear=0, conv1d=1: rounded(layer.weight, axis=conv1d if type(layer) is Conv1D else linear)
e.cases = lambda: [layer(kind, n, m) for n, m in ((8, 24), (24, 8), (16, 16)) for kind in (nn.Linear, Conv1D)]
e.reward = "the class of the layer decides; a square matrix does not give its layout away."
e.wrong["for Conv1D the scales belong to the inputs: it stores (inputs, outputs)"] = dict(conv1d=0)
e.wrong["for Linear the scales belong to the inputs: it stores (outputs, inputs)"] = dict(linear=1)
e.wrong["that is one scale for the whole matrix"] = dict(linear=None, conv1d=None)

check_04_3 = e = Exercise("4.3", lambda before, after: 1 - ql.model_nbytes(after) / ql.model_nbytes(before))
e.cases = lambda: [(tiny_gpt2(), change(tiny_gpt2())) for change in (copy.copy, nn.Module.half, ql.quantize_model)]
e.reward = "nothing is saved until the codes are what is stored."
e.wrong["it counts one byte for each number, stored or not"] = lambda before, after: 0.75
e.wrong["buffers are stored as well: the codes of a quantized model are buffers"] = lambda before, after: (
    1 - sum(p.nbytes for p in after.parameters()) / sum(p.nbytes for p in before.parameters())
)
e.wrong["the tied head is counted twice, under each name"] = lambda before, after: (
    1 - sum(t.nbytes for t in after.state_dict().values()) / sum(t.nbytes for t in before.state_dict().values())
)

check_05_1 = e = Exercise("5.1", lambda k, steps=254, root=2**0.5: math.erf(k / steps / root))
e.cases = lambda: [25.0, 80.0]
e.reward = f"with its largest weight at 50 σ, a bell loses {e.right(50):.0%} of its weights to zero."
e.wrong["half a step rounds to zero on either side, not a whole one"] = dict(steps=127)
e.wrong["erf takes the distance divided by √2"] = dict(root=1)
e.wrong["absmax has 127 steps on either side of zero: a step is k / 127"] = dict(steps=255)

check_05_2 = e = Exercise("5.2", reward="a plot of weights has the range of the weights.")
e.right = lambda q, zero=1, power=1, dtype=torch.float: (q.qdata.to(dtype) - zero * q.zero_point) * q.scale**power
e.cases = lambda: [f(bell(6, 50).exp(), axis=i) for f in (ql.absmax_quantize, ql.zeropoint_quantize) for i in (0, None)]
e.wrong["these are the codes; the scale makes weights of them"] = dict(power=0)
e.wrong["zero-point: take the zero point off the codes"] = dict(zero=0)
e.wrong["zero-point: take the zero point off before you multiply"] = lambda q: q.qdata.float() * q.scale - q.zero_point
e.wrong["zero-point: int8 minus int8 wraps around, widen first"] = dict(dtype=torch.int8)

OUTLIERS = bell(400, 99)
OUTLIERS[:6, 17] = -20  # the most in a column
OUTLIERS[5, 40:60] = 15  # the most in a row
OUTLIERS[:3, 80], OUTLIERS[9, 3] = 18, 50
check_05_3 = e = Exercise("5.3", lambda w, dim=0, size=torch.abs: (size(w) > 6 * w.std()).sum(dim).argmax())
e.cases = lambda: [OUTLIERS]
e.reward = "a scale for each column would keep the damage inside it."
e.wrong["that is a row: count along dimension 0 to get one number for each column"] = dict(dim=1)
e.wrong["that column holds the farthest weight, not the most outliers"] = lambda w: w.abs().amax(0).argmax()
e.wrong["outliers may be negative: compare magnitudes"] = dict(size=torch.clone)
e.wrong["that is how many outliers the column has: give its index"] = lambda w: (w.abs() > 6 * w.std()).sum(0).max()

check_06_1 = e = Exercise("6.1", cases=lambda: [(bell(50) * 3 - 1, k) for k in (5, 1, 50)])
e.right = lambda logits, k, fill=-math.inf: torch.where(logits >= logits.topk(k)[0][-1], logits, fill).softmax(-1)
e.reward = "drawing from these is what `top_k=30` does."
e.wrong["a logit of -inf has the probability 0, not a logit of 0: more than k tokens are left"] = dict(fill=0.0)
e.wrong["the probabilities do not sum to 1: scale them up"] = lambda x, k: x.softmax(-1) * (x >= x.topk(k)[0][-1])

check_06_2 = e = Exercise("6.2", 400)
e.reward = "hundreds of texts to see a hundredth of a nat, where one text read by both models shows it."
e.wrong["the standard error falls with the square root of the number of texts: square the ratio"] = 20
e.wrong["a standard error twenty times smaller than the spread needs many texts"] = (0.01 / 0.2) ** 2
e.hint = "standard error = spread / √n; solve it for n"

check_06_3 = e = Exercise("6.3", reward="now any difference between the texts comes from the models.")
e.right = lambda models, write, seed, first=bool, each=torch.manual_seed: (
    first(seed) and {name: each(seed) and write(model) for name, model in models.items()}
)
e.cases = lambda: [({"original": "A", "absmax": "B"}, lambda m: f"{m} {torch.randint(99, (3,))}", n) for n in (1, 2)]
e.wrong["the same seed gives different texts: set it with torch.manual_seed"] = dict(each=bool)
e.wrong["the second model draws on where the first stopped"] = dict(first=torch.manual_seed, each=bool)
e.wrong["it does not heed the seed that it is given"] = dict(each=lambda seed: torch.manual_seed(0))

check_06_4 = e = Exercise("6.4", reward="one text, all models, no author among them.")
e.right = lambda models, write, loss, text, author=None: {
    name: loss(model, write(author or model, text) if author is not None else text) for name, model in models.items()
}
e.cases = lambda: [({"fp32": "A", "int8": "BB"}, lambda m, text: text + m, lambda m, text: len(m + 2 * text), "Text")]
e.wrong["the models read different texts: how hard a text is then counts as quality"] = dict(author="")
e.wrong["a model wrote what they read: let all of them read the text that is given"] = dict(author="BB")
e.wrong["the first model wrote what they read: let all of them read the text that is given"] = dict(author="A")
e.wrong["one model grades what each has written: let each model read the text that is given"] = (
    lambda models, write, loss, text: {name: loss("A", write(model, text)) for name, model in models.items()}
)

check_07_1 = e = Exercise("7.1", 10**0.5, "exp(½ ln 10) = √10: perplexities average as a geometric mean.")
e.wrong["that is the mean of the perplexities 1 and 10: average the losses instead"] = 5.5
e.wrong["that is the mean loss: perplexity is its exponential"] = math.log(10) / 2
e.hint = "the losses are 0 and ln 10, half of each: perplexity is exp of their mean"

check_07_2 = e = Exercise("7.2", interval, "the pairs make the interval 42 times narrower here.", tolerance=0.2)
e.cases = lambda: [(3 * bell(4096) + 4, 3 * bell(4096) + 4.007 + 0.1 * bell(4096, seed=1))]
e.wrong["the pairs are broken: draw one set of tokens for both"] = dict(variance=lambda x, y: x.var() + y.var())
e.wrong["give the low end first"] = dict(errors=-1.96)
e.wrong["that is the spread of single tokens: resample, and take the mean of each resample"] = dict(
    variance=lambda before, after: (after - before).var() * len(after)
)
e.wrong["the interval has no width: draw with replacement, or every mean is the same"] = dict(
    variance=lambda before, after: torch.tensor(0.0)
)
e.wrong["the sign: after minus before, so that above 0 means worse"] = lambda before, after: interval(after, before)
e.wrong["the interval is too narrow: cut off 2.5 % at each end of the resampled means"] = dict(errors=1)

check_07_3 = e = Exercise("7.3", bits_per_byte, "now models with different tokenizers can be compared, on one text.")
e.cases = lambda: [(3 * bell(20).abs(), "A café, a naïve façade, a rôle."), (torch.ones(3), "three")]
e.wrong["that is in nats: one bit is ln 2 nats"] = dict(log=lambda two: 1)
e.wrong["divide by ln 2: a bit is less than a nat, so there are more of them"] = dict(log=lambda two: 1 / math.log(two))
e.wrong["that is per token: divide by the bytes of the text"] = dict(size=lambda losses, text: len(losses))
e.wrong["that is per character: an é takes two bytes, see text.encode()"] = dict(size=lambda losses, text: len(text))
e.wrong["that is the mean loss divided by the bytes: add up the losses"] = dict(total=torch.mean)

CODES, SCALES, BIAS = 768 * 3072 // 2, 2 * 768 * 3072 // 64, 4 * 3072  # bytes
check_08_1 = e = Exercise("8.1", CODES + SCALES + BIAS, f"{CODES:,} + {SCALES:,} + {BIAS:,} bytes.")
e.wrong["two codes share a byte"] = 2 * CODES + SCALES + BIAS
e.wrong["the bias is missing: it stays in float32"] = CODES + SCALES
e.wrong["the scales are missing: one for each group of 64"] = CODES + BIAS
e.wrong["a scale is a float16 here, two bytes"] = CODES + 2 * SCALES + BIAS
e.hint = "add up the bytes of codes, scales and bias one by one"

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
check_08_2 = e = Exercise("8.2", cases=lambda: [(3 * bell(3, 20)).round().clamp(-7, 7).to(torch.int8)])
e.right = lambda c, add=8, low=EVEN, high=ODD: (c[:, low].int() + add | c[:, high].int() + add << 4).to(torch.uint8)
e.reward = "ql.unpack_int4 gets every code back."
e.wrong["the nibbles are swapped: the first code of a pair goes into the low one"] = dict(low=ODD, high=EVEN)
e.wrong["it pairs the two halves of a row: pair neighbours"] = dict(low=slice(0, 10), high=slice(10, 20))
e.wrong["a negative code has ones in all its high bits: add 8 before you combine"] = dict(add=0)

check_08_3 = e = Exercise("8.3", SmallLinear, "6,272 bytes have become {bytes:,}.", ask=look_inside, tolerance=0.01)
e.cases = lambda: [(bell(32, 48) * torch.logspace(0, 2, 32)[:, None], bell(32, seed=1), bell(5, 48, seed=2))]
e.wrong["the scales belong to the inputs: give each output, a row of the weight, its own"] = dict(axis=1)
e.wrong["the bias is missing from the output"] = lambda weight, bias: SmallLinear(weight, 0 * bias)
e.wrong["no int8 is stored: make the codes a buffer, as int8"] = dict(dtype=torch.float32)
e.wrong["it still keeps a float matrix: nothing is saved"] = dict(kept=torch.zeros(32, 48))

check_09_1 = e = Exercise("9.1", 100e9 / (7e9 * 4.25 / 8))
e.reward = f"{e.right:.0f} tokens per second, and nothing that reads every weight can be faster."
e.wrong["that is milliseconds per token: the question is tokens per second"] = 1000 / e.right
e.wrong["that is for a byte each: here a weight takes 4.25 bits"] = 100 / 7
e.wrong["the scales are read as well: each group of 64 weights has one of 16 bits"] = 100 / (7 * 4 / 8)
e.hint = "divide the bytes per second by the bytes of all weights"

check_09_2 = e = Exercise("9.2", time_each, cases=lambda: [1, 7], ask=on_a_device, tolerance=0.1)
e.reward = "warmed up, waited for, in turns: the ratio survives a busy machine."
e.wrong["it stops the clock when the work is launched, not when it is done: wait first"] = dict(after=False)
e.wrong["the slow first call is in the result: run each function once unmeasured"] = dict(warm=0)
e.wrong["a busy spell hits only the last candidate: let them take turns"] = dict(turns=False)
e.wrong["one slow call counts too much: take the median"] = dict(average=statistics.mean)
e.wrong["measure single calls, in turns, and take the median"] = dict(turns=False, average=statistics.mean)
e.wrong["4 ms look like seconds: wait for the warm-up before you start the clock; give seconds"] = dict(ready=False)

check_09_3 = e = Exercise("9.3", cases=lambda: [(4, 20e9, 200e9), (1, 20e9, 200e9), (0.53, 4e12, 400e12)])
e.right = lambda size, bandwidth, arithmetic, power=1: (size**power / bandwidth) / (2 / arithmetic)
e.reward = "fewer bytes reach the flat part of the roof at fewer tokens, and gain nothing more from there on."
e.wrong["fewer bytes are read sooner: use bytes_per_weight"] = dict(power=0)

ROWS = bell(1000, 256).clamp(-4, 4).index_fill(1, torch.tensor(0), 4)
SPIKED = ROWS.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(40.0))
NOISE, MORE = ((x - rounded(x, axis=0)).square().sum().item() for x in (ROWS, SPIKED))
check_10_1 = e = Exercise("10.1", 10 * math.log10((999 + 100) / 1000), tolerance=0.05)
e.reward = f"such a matrix was just measured: {10 * math.log10(MORE / NOISE):.2f} dB. The damage stays in its row."
e.wrong["that is for one scale for the whole matrix: here only one row gets coarser steps"] = 20
e.wrong["999 rows lose nothing, but the noise of one row is large: add up the noise of all rows"] = 0
e.wrong["ten times the step is a hundred times the squared error"] = 10 * math.log10((999 + 10) / 1000)
e.hint = "of 1,000 rows one has a hundred times the noise: how much larger is the sum?"

check_10_2 = e = Exercise("10.2", lambda layer, size, bits: rounded(layer.weight.T, bits, group_size=size).T)
e.cases = lambda: [(layer(Conv1D, 64, 96), 32, 4), (layer(Conv1D, 64, 64), 16, 8)]
e.reward = "groups run along what is summed over, so that every output keeps its own scales."
e.wrong["the groups lie along the outputs"] = lambda layer, size, bits: rounded(layer.weight, bits, group_size=size)
e.wrong["a scale for each output, no groups"] = lambda layer, size, bits: rounded(layer.weight, bits, axis=1)

Q8, Q4 = ql.absmax_quantize(bell(32, 64)), ql.absmax_quantize(bell(64, 128), 4, group_size=32)
Z4 = ql.zeropoint_quantize(bell(64, 128), 4, axis=0, group_size=64)
check_10_3 = e = Exercise("10.3", true_bits, cases=lambda: [[Q4], [Q8, Q4], [Z4], [Q8, Z4, bell(512).half()]])
e.reward = "all bits that are stored, over all weights: the only size by which schemes can be compared."
e.wrong["only the codes are counted: each group stores a scale too"] = dict(size=lambda t: t.shape.numel() / 2)
e.wrong["4 bits are packed: two codes in a byte, though qdata has one in each"] = dict(
    size=lambda t: t.qdata.nbytes + t.scale.nbytes if hasattr(t, "bits") else t.nbytes
)
e.wrong["a zero point is stored too"] = dict(
    size=lambda t: t.nbytes - getattr(getattr(t, "zero_point", 0), "nbytes", 0)
)
e.wrong["a float need not have 32 bits: ask the tensor"] = dict(
    size=lambda t: t.nbytes if hasattr(t, "bits") else 4 * t.numel()
)
e.wrong["a small tensor counts as much as a large one"] = lambda ts: sum(true_bits([t]) for t in ts) / len(ts)
e.wrong["what stays in float is stored too: count it"] = lambda ts: true_bits([t for t in ts if hasattr(t, "bits")])

check_11_1 = e = Exercise("11.1", cases=lambda: [torch.arange(256).to(torch.uint8).reshape(4, 64)])
e.right = lambda packed, sign=lambda codes: (codes ^ 8) - 8, join=torch.stack, low=0, high=4: sign(
    join([packed >> low & 15, packed >> high & 15], -1).flatten(1).to(torch.int8)
)
e.reward = "the highest of the four bits is the sign, and int8 must be told so."
e.wrong["codes from 8 to 15 are left: in two's complement they stand for -8 to -1"] = dict(sign=lambda codes: codes)
e.wrong["8 is taken off every code: that undoes the layout of ql.pack_int4"] = dict(sign=lambda codes: codes - 8)
e.wrong["the nibbles are swapped: the first code of a pair is in the low one"] = dict(low=4, high=0)
e.wrong["the two codes of a byte are neighbours: only Q4_0 puts all low nibbles first"] = dict(join=torch.cat)

check_11_2 = e = Exercise("11.2", hqq_zero, "errors that survive the shrinkage are left out: the middle fits better.")
e.cases = lambda: [bell(8, 64) + 0.3, bell(8, 32) ** 3]
e.wrong["no error is left: subtract from w those that survive the shrinkage"] = dict(p=None)
e.wrong["the zero point never moved: shrink the errors first"] = lambda w: (
    -w.amin(1, keepdim=True) * 15 / (w.amax(1, keepdim=True) - w.amin(1, keepdim=True))
)
e.wrong["that shrinks too little: |e| is raised to the power p - 1, which is negative"] = dict(p=1.7)

check_11_3 = e = Exercise("11.3", 3 + 8 / 32 + 32 / (32 * 256), tolerance=1e-3)
e.reward = f"3 + 8/32 + 32/8192 = {e.right:.3f}: the scales have become cheap."
e.wrong["the scales are missing"] = 3
e.wrong["8-bit scales need a scale themselves: a float32 for each 256 of them"] = 3 + 8 / 32
e.wrong["256 scales belong to 256 groups: a float32 is shared by 256 · 32 weights"] = 3 + 8 / 32 + 32 / 256
e.hint = "add up: the code, its share of a scale, its share of a float32"

check_12_1 = e = Exercise("12.1", 6 / 16, "the scale is 1/16, the weight lands on 7, E2M1 ends at 6.", tolerance=1e-3)
e.wrong["E2M1 has no 7: what lies above 6 is cut off"] = 7 / 16
e.wrong["that is with the scale rounded up: the standard rounds its exponent down"] = 8 / 16
e.wrong["that is the element: times the scale it is the weight"] = 6
e.hint = "1/4 is the power of two below; the scale is a quarter of it; divide, round to E2M1, multiply"

check_12_2 = e = Exercise("12.2", e4m3, "below the smallest normal number the spacing stays, down to 0.")
e.cases = lambda: [bell(200) * 2**-6, bell(200) * 200, torch.tensor([0.0, 3.0, 500.0])]
e.wrong["numbers below 2 ** -6 are subnormal, not 0"] = lambda x: torch.where((y := e4m3(x)).abs() < 2**-6, 0, y)
e.wrong["below 2 ** -6 the spacing stays at 2 ** -9: clamp the exponent from below"] = dict(lowest=-99)
e.wrong["what is larger than 448 must become 448"] = dict(top=1e9)

check_12_3 = e = Exercise("12.3", four_or_six, "a block with weights near 5/6 of its largest gains by landing on 4.")
e.cases = lambda: [bell(16, 64), bell(4, 32, seed=1) ** 3]
e.wrong["that is amax / 6 for all blocks: try amax / 4 too"] = dict(tops=(6,))
e.wrong["that is amax / 4 for all blocks"] = dict(tops=(4,))
e.wrong["a block has one scale: add up its squared errors, and choose for the whole block"] = dict(each=True)
e.wrong["a block of NVFP4 has 16 weights"] = dict(size=32)

check_13_1 = e = Exercise("13.1", 110 * 8 / 256, tolerance=1e-3)
e.reward = "96 bytes of codes, 12 of scales, 2 for d: 110 bytes for 256 weights."
e.wrong["the sixteen scales take six bits each: 6/16 of a bit for a weight"] = 3 + 16 / 256
e.wrong["the fp16 number is missing: 16/256 of a bit"] = 3.375
e.wrong["only the codes are counted"] = 3
e.wrong["there is one fp16 number: Q3_K has no minimum, and so no dmin"] = 3.5
e.hint = "add up the bytes of a super-block, and share them among 256 weights"

BYTES = torch.randint(256, (6, 20), generator=torch.Generator().manual_seed(0)).byte()
BYTES[:, [1, 3]] &= 0x3B  # no infinite scale
check_13_2 = e = Exercise("13.2", decode_4_bits, "low nibbles are the first half of a block, high ones the second.")
e.cases, e.view = lambda: [BYTES[:, 2:]], lambda result, blocks: {"the result": result.float()}
e.wrong["low and high nibbles still alternate: all low ones come first"] = dict(axis=2)
e.wrong["8 must be taken off every code"] = dict(shift=0)
e.wrong["the halves are swapped: the low nibbles are the first half"] = dict(low=4, high=0)

check_13_3 = e = Exercise("13.3", partial(decode_4_bits, head=2, shift=0), "a scale and a minimum: two fp16 numbers.")
e.cases, e.view = lambda: [BYTES], check_13_2.view
e.wrong["8 is taken off: Q4_1 has a minimum instead"] = partial(decode_4_bits, head=2, shift=8)
e.wrong["the minimum is not added"] = lambda b: decode_4_bits(b[:, [0, 1, *range(4, 20)]], shift=0)
e.wrong["low and high nibbles alternate: the order is that of Q4_0, all low ones first"] = partial(
    decode_4_bits, head=2, shift=0, axis=2
)
e.wrong["here the minimum is added, with its sign: Q4_K takes it off"] = lambda b: (
    2 * decode_4_bits(b[:, [0, 1, *range(4, 20)]], shift=0) - decode_4_bits(b, head=2, shift=0)
)
e.wrong["d comes first, then m"] = lambda b: decode_4_bits(b[:, [2, 3, 0, 1, *range(4, 20)]], head=2, shift=0)

check_14_1 = e = Exercise("14.1", 64 / (64**0.75 / 0.25**0.25))
e.reward = "64 and 1/4, each to the power of 1/4: the weight keeps the other three quarters, and is the larger now."
e.wrong["that is the factor: the channel is divided by it"] = 64**0.75 / 0.25**0.25
e.wrong["that is for one half: here the activations give away three quarters"] = 4.0
e.wrong["the weight's magnitude belongs into the factor too"] = 64**0.25
e.wrong["the channel is divided by the factor; it was multiplied"] = 64 * 64**0.75 / 0.25**0.25
e.hint = "find the factor: 64 to the power of 3/4, over 1/4 to the power of 1/4; then divide"

check_14_2 = e = Exercise("14.2", smooth)
e.cases = lambda: [(bell(40, 16) * 9 ** bell(16), bell(n, 16, seed=1), a) for n in (24, 16) for a in (0.75, 0.5)]
e.reward = "what leaves the activations must come up in the weight, or it is another function."
e.wrong["only the activations were divided: the product changes"] = dict(on_w=0)
e.wrong["the activations are as large as they were: divide them by the factors"] = dict(on_x=0)
e.wrong["the other way round: divide the activations, multiply the weight"] = dict(on_x=1, on_w=-1)

Q, P = ql.zeropoint_quantize(bell(5, 300).abs() - 0.1), ql.absmax_quantize(bell(7, 300, seed=1), axis=0)
check_14_3 = e = Exercise("14.3", cases=lambda: [(Q.qdata, Q.zero_point.item(), Q.scale.item(), P.qdata, P.scale)])
e.right = lambda q, z, s, p, r, dtype=torch.int32, sign=-1, sums=lambda p: p.int().sum(1): (
    ((q.int() @ p.int().T).to(dtype) + sign * z * sums(p)) * s * r.T
)
e.reward = "the correction, z times the sum of each output's codes, can be computed once and for all."
e.wrong["the zero point is missing: multiply (q - z) p out, its part is the correction"] = dict(sign=0)
e.wrong["the correction comes off: it has a minus"] = dict(sign=1)
e.wrong["the codes of the weight are to be added up, for each output, not those of the activations"] = (
    lambda q, z, s, p, r: (q.int() @ p.int().T - z * q.int().sum(1, keepdim=True)) * s * r.T
)
e.wrong["each of the terms has a zero point: take off z times the sum of the weight's codes"] = dict(sums=lambda p: 1)
e.wrong["int8 minus int8 wraps around: widen first"] = lambda q, z, s, p, r: (q - z).int() @ p.int().T * s * r.T
e.wrong["the sum does not fit into 8 bits: widen to int32 first"] = dict(dtype=torch.int8)

check_15_1 = e = Exercise("15.1", 16 / 128**0.5)
e.reward = "16/√128 = √2: only the block that holds the entry shares it, and signs change no magnitude."
e.wrong["it is shared by its own block only, not by all 256"] = 16 / 256**0.5
e.wrong["a rotation keeps the length, the sum of squares, and not the sum"] = 16 / 128
e.wrong["a rotation keeps the length of the vector, but not its largest entry"] = 16
e.hint = "128 entries of one magnitude have together the length 16"

check_15_2 = e = Exercise("15.2", unrotate, "what was done last is undone first.")
e.cases = lambda: [((bell(5, n) * s) @ h, s, h) for n in (4, 64) for h, s in [hadamard_signs(n)]]
e.wrong["that does the same again: signs first, though they came first already"] = lambda y, s, h: (y * s) @ h
e.wrong["the signs are still in it"] = lambda y, s, h: y @ h
e.wrong["the Hadamard matrix is still in it"] = lambda y, s, h: y * s

check_15_3 = e = Exercise("15.3", both_sides, "two rotations there, two back; the outputs need one too.")
e.cases = lambda: [(bell(24, 16), turned(16), turned(24, seed=1), bits) for bits in (4, 3)]
e.wrong["only the inputs are rotated"] = dict(left=False)
e.wrong["only the outputs are rotated"] = dict(right=False)
e.wrong["rounded in rotated coordinates and left there"] = dict(back=False)
e.wrong["nothing is rotated"] = dict(left=False, right=False)
e.wrong["the outputs turn the wrong way: a column c becomes c @ r_out, so w becomes r_out.T @ w"] = dict(flip=True)
e.wrong["one scale for each row: axis=0"] = dict(axis=None)
e.wrong["one scale for each row, not for each column: axis=0"] = dict(axis=1)
e.wrong["the inputs turn the wrong way: a row w becomes w @ r_in"] = lambda w, r_in, *rest: both_sides(w, r_in.T, *rest)
e.wrong["it should round to `bits` bits, not always to 4"] = lambda w, r_in, r_out, bits: both_sides(w, r_in, r_out, 4)

check_16_1 = e = Exercise("16.1", 2 * 28 * 8 * 128 * 1000 * (8 + 32 / 64) / 8)
e.reward = f"{e.right / 1e6:.0f} MB; of the 24 query heads nothing is kept."
e.wrong["query heads store nothing: count the key-value heads"] = 3 * e.right
e.wrong["query heads store nothing, and every 64 numbers need a step and a minimum"] = 3 * 2 * 28 * 8 * 128 * 1000
e.wrong["every 64 numbers need a step and a minimum besides"] = 2 * 28 * 8 * 128 * 1000
e.wrong["a step and a minimum: 16 bits each, for every 64 numbers"] = 2 * 28 * 8 * 128 * 1000 * (8 + 16 / 64) / 8
e.wrong["keys and values: two of everything"] = e.right / 2
e.wrong["give it in bytes"] = e.right / 1e6
e.hint = "2 · layers · key-value heads · head size · tokens numbers, of 8 bits and their share of 32 more"

check_16_2 = e = Exercise("16.2", less_mean, "what all keys share, a softmax does not see: no bits are spent on it.")
e.cases = lambda: [(bell(96, 16) + 6 * bell(16, seed=1), bits) for bits in (4, 8)]
e.wrong["no mean is taken off"] = dict(before=0)
e.wrong["it rounds first: the mean has to go before"] = dict(before=0, after=-1)
e.wrong["the mean has been put back: attention does not need it, and it costs nothing to leave it out"] = dict(after=1)
e.wrong["that is the mean of each token's channels: take one vector, the mean over the tokens"] = dict(dim=1)
e.wrong["that is one scale for all tokens: axis=0 keeps one for each"] = dict(axis=None)
e.wrong["that is one scale for each channel: axis=0 keeps one for each token"] = dict(axis=1)

check_16_3 = e = Exercise("16.3", by_channel, "reshape keeps the order in memory; only a transpose changes axes.")
e.cases = lambda: [(bell(128, 16) + 20 * (torch.arange(16) == 3), 4), (bell(192, 64), 2)]
e.wrong["reshape turns nothing: what it calls channels are not"] = dict(turn=lambda x: x.reshape(x.shape[::-1]))
e.wrong["turned on the way in, but not on the way out"] = lambda k, bits: by_channel(k, bits).T.reshape(k.shape)
e.wrong["that is by token: the channels of a token share a step"] = dict(turn=torch.clone, size=None)
e.wrong["all tokens of a channel share a step: 64 of them should"] = dict(size=None)

check_17_1 = e = Exercise("17.1", -0.1 * 1.2 / 4)
e.reward = "the error of the output that is left is what the second input cannot explain of the first."
e.wrong["the sign: where the inputs rise together, the second weight must go down"] = 0.1 * 1.2 / 4
e.wrong["divide by the mean square of the second input"] = -0.1 * 1.2
e.wrong["that divides by the mean square of the first input: the second moves"] = -0.1 * 1.2 / 2
e.hint = "write the squared error with both changes in it, and set its derivative to zero"

UNEVEN = torch.logspace(1, -1, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
W, X = bell(64, 20), bell(400, 20, seed=55) @ (torch.eye(20) + 0.35 * bell(20, 20, seed=11)) * UNEVEN
check_17_2 = e = Exercise("17.2", gptq_ordered, view=on_the_grid, tolerance=0.05)
e.cases = lambda: [(W, X.T @ X / 400, W.abs().max().item() / 10)]
e.reward = f"the strongest inputs first, every column back in its place: RTN has {{{SHARE}:.1f}} times the error."
e.wrong["the columns come back in another order: undo it"] = dict(back=False)
e.wrong["that applies the order a second time: order.argsort() undoes it"] = lambda w, moment, scale: gptq_ordered(
    w, moment, scale, back=False
)[:, moment.diagonal().argsort(descending=True)]
e.wrong["the strongest inputs should come first"] = dict(descending=False)
e.wrong["that is the order in which the columns stand"] = lambda w, moment, scale: gptq(w, moment, scale)
e.wrong["H must be put in the new order too, rows and columns"] = dict(moment_too=False)

check_17_3 = e = Exercise("17.3", gptq_levels, view=on_levels, tolerance=0.05)
e.cases = lambda: [(W, X.T @ X / 400, W.abs().amax(1), torch.tensor(some)) for some in (ql.NF4, (-1.0, -0.2, 0.3, 1.0))]
e.reward = f"GPTQ only asks for what a column has left over: the nearest levels have {{{SHARE}:.1f}} times the error."
e.wrong["every weight takes the nearest level: no error is passed on"] = dict(share=0)
e.wrong["the error of the output grows: is the sign right?"] = dict(share=-1)
e.wrong["the inverse must forget a column once it is rounded, as its Cholesky factor does"] = dict(factor=torch.clone)
e.wrong["the levels must be multiplied by the scale of the row"] = dict(scaled=False)
e.wrong["that is the Cholesky factor of H: take that of its inverse"] = dict(
    factor=lambda inverse: torch.linalg.cholesky(torch.linalg.inv(inverse), upper=True)
)

check_18_1 = e = Exercise("18.1", reward="one text chooses, another one judges.")
e.right = lambda c, loss, *texts, by=0, of=1: (best := min(c, key=lambda c: loss(c, texts[by])), loss(best, texts[of]))
e.cases = lambda: [("abcd", lambda c, text: float(text["abcd".index(c)]), "3214", "5126")]
e.wrong["the evaluation text chose: then its loss is the best of many, and no longer an honest measure"] = dict(by=1)
e.wrong["that is the loss on the calibration text, which has chosen"] = dict(of=0)

check_18_2 = e = Exercise("18.2", 1 / 7 / 2 / 4)
e.reward = "a 56th: the step stays, since 4/5 is less than 1, and the division makes half of it four times smaller."
e.wrong["that is without the factor: the division makes the error four times smaller"] = 1 / 14
e.wrong["rounding is off by half a step at most"] = 1 / 28
e.wrong["codes from -7 to 7 make 7 steps up to the largest weight"] = 1 / 8 / 2 / 4
e.hint = "the step is 1/7, rounding errs by half of it, and then you divide"

check_18_3 = e = Exercise("18.3", lambda w1, b1, w2, f, row=1, bias=1: (w1 / f[:, None] ** row, b1 / f**bias, w2 * f))
e.cases = lambda: [(bell(n, 8), bell(n, seed=1), bell(5, n, seed=2), bell(n, seed=3).exp()) for n in (16, 8)]
e.reward = "what the columns of the second layer gain, the rows of the first give up, the bias too."
e.wrong["the bias passes through the ReLU as well: divide it too"] = dict(bias=0)
e.wrong["the first layer must make its outputs smaller: the function has changed"] = dict(row=0, bias=0)
e.wrong["the first layer must be divided by the factors, not multiplied"] = dict(row=-1, bias=-1)

check_19_1 = e = Exercise("19.1", fake_round, cases=lambda: [(3 * bell(6, 50), 0.4)], ask=with_gradient)
e.reward = "straight through where rounding moves with the weight, nothing where it is clipped."
e.wrong["codes beyond -7 and 7 are left: clamp them"] = dict(limit=99)
e.wrong["no gradient comes through: detach only what should not count"] = lambda w, scale: fake_round(w.detach(), scale)
e.wrong["the gradient is 0: rounding is flat, go round it with detach"] = dict(detach=torch.clone)
e.wrong["beyond the range the value does not move: there the gradient is 0"] = dict(inside=False)

ADAPTERS = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # numbers in A and B
check_19_2 = e = Exercise("19.2", 8 * ADAPTERS / 1e6)
e.reward = f"{ADAPTERS:,} numbers, eight bytes for each: {e.right:.0f} MB instead of 56,000."
e.wrong["Adam keeps two averages of each number, of four bytes each"] = 4 * ADAPTERS / 1e6
e.wrong["the adapters themselves and their gradients are not Adam's: count its two averages"] = 16 * ADAPTERS / 1e6
e.wrong["only the square matrices are counted"] = 8 * 32 * 8 * 4 * (4096 + 4096) / 1e6
e.wrong["A or B is missing: each matrix has both"] = 8 * 32 * 8 * 7 * 4096 / 1e6
e.wrong["that is one block: there are 32"] = 8 * ADAPTERS / 32 / 1e6
e.wrong["these are the numbers of the adapters, in millions: Adam keeps eight bytes for each"] = ADAPTERS / 1e6
e.wrong["give it in megabytes, of a million bytes"] = 8 * ADAPTERS
e.hint = "A and B together have 8 · (in + out) numbers; Adam keeps two float32 numbers for each"

check_19_3 = e = Exercise("19.3", reward="one matrix, no detour; to store it in 4 bits, it must be rounded again.")
e.right = lambda w, a, b, alpha, by=0, turn=torch.t: w + turn(alpha / (1 if by is None else a.shape[by]) * (b @ a))
e.cases = lambda: [(bell(16, 16), bell(r, 16, seed=1), bell(16, r, seed=2), 8) for r in (4, 2)]
e.wrong["what is alpha divided by, and how does a Conv1D store its weight?"] = dict(by=1, turn=torch.clone)
e.wrong["B A is [out, in], and the weight [in, out]: turn it"] = dict(turn=torch.clone)
e.wrong["alpha is divided by the rank, not by the number of inputs"] = dict(by=1)
e.wrong["alpha is not divided by the rank"] = dict(by=None)
e.wrong["the strength is missing: alpha over the rank"] = lambda w, a, b, alpha: w + (b @ a).T

check_20_1 = e = Exercise("20.1", (8 - 2) * 8 / 4.25)
e.reward = f"{e.right:.1f} billion; in 16 bits it would be 3."
e.wrong["give it in billions"] = 1e9 * e.right
e.wrong["2 GB stay free for the cache"] = 8 * 8 / 4.25
e.wrong["that is for 4 bits: the scales take a quarter of a bit more"] = (8 - 2) * 8 / 4
e.hint = "divide the bits that there are by the bits of a weight"

check_20_2 = e = Exercise("20.2", reward="at equal bits; a mixed scheme gains only what is left then.")
e.right = lambda u, bits, kl, log=np.log, exp=np.exp: exp(np.interp(bits, [*u], log([*u.values()]))) - kl
e.cases = lambda: [({2.25: 1.6, 3.25: 0.2, 4.25: 0.025, 8.25: 0.001}, bits, 0.1) for bits in (2.5, 3.75, 4.25, 6.25)]
e.wrong["a smaller model loses, of course: compare at equal bits"] = lambda u, b, x: min(u[n] for n in u if n <= b) - x
e.wrong["a larger model wins, of course: compare at equal bits"] = lambda u, b, x: max(u[n] for n in u if n >= b) - x
e.wrong["a straight line flatters the mixed model: interpolate the logarithm of KL"] = dict(log=np.array, exp=float)
e.wrong["that is the middle between the neighbours: mind where between them `bits` lies"] = lambda u, b, x: (
    (min(u[n] for n in u if n <= b) * max(u[n] for n in u if n >= b)) ** 0.5 - x
)
e.wrong["that is the difference of the logarithms: give that of the KLs, in nats"] = lambda u, b, x: (
    np.interp(b, [*u], np.log([*u.values()])) - np.log(x)
)

POINTS = dict(a=(4.25, 0.03), b=(4.5, 0.01), c=(4.5, 0.02), e=(3.25, 0.2), f=(5, 0.01), g=(9, 0.05), h=(3.25, 0.2))
check_20_3 = e = Exercise("20.3", cases=lambda: [POINTS])
e.right = lambda points, beats=lambda a, b: a[0] <= b[0] and a[1] <= b[1] and a != b: {
    name for name, point in points.items() if not any(beats(other, point) for other in points.values())
}
e.reward = "whatever is not on the front, something else beats: only the front is to be discussed."
e.wrong["two equal points do not beat each other: keep both"] = loosely(lambda q, p: q[0] <= p[0] and q[1] <= p[1])
e.wrong["of two equal points both stay: neither beats the other"] = lambda points: {
    *{points[name]: name for name in sorted(check_20_3.right(points), reverse=True)}.values()
}
e.wrong["a point does not beat itself"] = dict(beats=lambda a, b: a[0] <= b[0] and a[1] <= b[1])
e.wrong["at equal bits the KL decides, at equal KL the bits"] = dict(beats=lambda a, b: a[0] < b[0] and a[1] < b[1])
e.wrong["at equal KL, fewer bits beat more"] = loosely(lambda q, p: q[0] <= p[0] and q[1] < p[1])
e.wrong["at equal bits, the smaller KL beats the larger"] = loosely(lambda q, p: q[0] < p[0] and q[1] <= p[1])


TIED, UNTIED = (nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 50)) for _ in range(2))
TIED[2].weight = TIED[0].weight
PARTS = ("mlp.up_proj.weight", torch.ones(2, 2)), ("norm.weight", torch.ones(2))
NAMED = [(f"model.layers.{i}.{part}", p) for i in (5, 0, 1, 10, 11) for part, p in PARTS]
NAMED += [("model.embed_tokens.weight", torch.ones(2, 2)), ("transformer.h.10.attn.c_attn.weight", torch.ones(2, 2))]
NAMED += [(f"model.layers.{i}.mlp.experts.{j}.up_proj.weight", torch.ones(2, 2)) for i, j in ((3, 11), (3, 0), (0, 3))]
check_21_1 = e = Exercise("21.1", (12e9 - 1.5e9 - 8e9 * 4.5 / 8) / (128e3 * 8.5 / 16) / 1e3, tolerance=0.01)
e.reward = f"{e.right:.0f} thousand tokens, of one conversation or of all of them together."
e.wrong["that is with a cache in 16 bits"] = (12e9 - 1.5e9 - 8e9 * 4.5 / 8) / 128e3 / 1e3
e.wrong["1.5 GB stay free as room"] = (12e9 - 8e9 * 4.5 / 8) / (128e3 * 8.5 / 16) / 1e3
e.wrong["give it in thousands of tokens"] = 1e3 * e.right
e.wrong["the cache takes half a bit more: 8.5"] = 6e9 / 64e3 / 1e3
e.wrong["the weights take half a bit more: 4.5"] = (12e9 - 1.5e9 - 8e9 * 4 / 8) / (128e3 * 8.5 / 16) / 1e3
e.hint = "take weights and room off the memory, and divide what is left by the bytes of a token"

check_21_2 = e = Exercise("21.2", matrix_bytes, cases=lambda: [nn.Sequential(nn.Linear(8, 6), TIED), TIED, UNTIED])
e.reward = "one tensor, however many names it has."
e.wrong["a tied matrix is counted twice"] = dict(once=False)
e.wrong["vectors are not matrices: leave biases and gains out"] = lambda m: sum(p.nbytes for p in m.parameters())
e.wrong["two matrices of one shape are two: go by identity, not by shape"] = dict(key=lambda w: w.shape)

check_21_3 = e = Exercise("21.3", inner_blocks, cases=lambda: [(name, p, 12) for name, p in NAMED])
e.reward = "a predicate like this is how every library is told what to leave alone."
e.wrong["the first block has the number 0"] = dict(first=1)
e.wrong["with 12 blocks the last one has the number 11"] = dict(last=0)
e.wrong["only matrices: norms and biases stay"] = dict(ndim=1)
e.wrong["what is in no block has no number: leave it alone"] = dict(outside=True)


def grade(path: str) -> dict:
    """Run a student's notebook in this folder; "2.1" -> (passed, message) for every exercise of its chapters."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    chapters = {int(n) for cell in nb.cells for n in re.findall(r"checks\.check_(\d\d)_", cell.source)}
    nb.cells.append(nbformat.v4.new_code_cell("import checks, json\nprint(json.dumps(checks.RESULTS))"))
    client = NotebookClient(nb, timeout=600, interrupt_on_timeout=True, kernel_name="python3", allow_errors=True)
    client.execute(cwd=str(Path(__file__).resolve().parent))
    results = json.loads(nb.cells[-1].outputs[-1].text.splitlines()[-1])
    missing = {number: (None, "the checker was not called") for number in EXERCISES}
    return {number: each for number, each in (missing | results).items() if int(number.split(".")[0]) in chapters}


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path)
        try:
            results = grade(path)
        except Exception as error:  # one spoilt file should not cost the others their grades
            results = {"all": (False, f"it could not be run: {type(error).__name__}")}
        for number, (passed, message) in results.items():
            print(f"  {number:5s} {'yes' if passed else '-' if passed is None else 'no':4s} {message}")
