"""The exercises' checkers: each is the executable specification of one exercise, and says what is wrong.

    checks.check_02_1(absmax)      # in a notebook: prints one sentence; returns True, False, or None if not solved yet

An answer is a number, a function or a class. A checker tries it on cases of its own, accepts whatever is right, and
names the mistake where it knows it. It never raises, so that "Run All" reaches the end with exercises unsolved.

For teachers:

    python notebooks/checks.py STUDENT.ipynb ...

runs whole notebooks, with whatever code is in them, and prints a table: exercise, passed, message.

To add an exercise, write a function `check_NN_M` with the decorator `@exercise`. It calls `need(condition, message)`
for each thing it asks for, the likely mistakes first, and returns what to say when all is well.
"""

import functools
import math
import re
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a notebook's setup cell has done so already
import quantlib as ql  # noqa: E402

EXERCISES = {}  # "2.1" -> checker
RESULTS = {}  # "2.1" -> (True, False or None, message) of the last call

# ---------------------------------------------------------------------------------------------------------------------
# What all checkers share
# ---------------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """What is wrong with an answer, in one sentence."""


class Unsolved(Exception):
    """The answer is still the stub."""


def exercise(check):
    """Make a checker of a function `check_NN_M`: it prints and records its verdict, and never raises."""
    number = "{}.{}".format(*map(int, re.fullmatch(r"check_(\d\d)_(\d)", check.__name__).groups()))

    @functools.wraps(check)
    def checked(answer=...):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                if nothing(answer):
                    raise Unsolved
                passed, message = True, check(answer)
            except (Unsolved, NotImplementedError):
                passed, message = None, "not solved yet"
            except Wrong as wrong:
                passed, message = False, str(wrong)
            except Exception as error:  # in the student's code: we say which, and go on
                passed, message = False, f"it raised {type(error).__name__}: {error}"
        print(f"Exercise {number}: {'right. ' if passed else '' if passed is None else 'not yet. '}{message}")
        RESULTS[number] = passed, message
        return passed

    EXERCISES[number] = checked
    return checked


def need(condition, message: str) -> None:
    """Refuse the answer, with this sentence, unless the condition holds."""
    if not condition:
        raise Wrong(message)


def nothing(value) -> bool:
    """Whether it is what a stub holds or returns: `...` or None."""
    return value is None or value is ... or value is NotImplemented


def call(function, *inputs):
    """What the function returns for copies of the inputs, which it must leave as they were."""
    need(callable(function), f"give the function itself, not a {type(function).__name__}")
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    result = function(*copies)
    if nothing(result):
        raise Unsolved
    for x, y in zip(inputs, copies, strict=True):
        if isinstance(x, torch.Tensor):
            need(x.shape == y.shape and torch.equal(x, y), "it changes its input in place: work on a copy")
    return result


def several(result, *names) -> tuple:
    """The parts of a result that has as many as there are names."""
    text = f"return {len(names)} things: {', '.join(names)}"
    need(isinstance(result, (tuple, list)) and len(result) == len(names), text)
    return tuple(result)


def number(value, name="the answer") -> float:
    """A plain number, out of an int, a float, or a tensor of one element."""
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{name} should be one number, it is a {type(value).__name__}") from None
    need(math.isfinite(value), f"{name} is {value}: somewhere 0 was divided by 0, or a number by 0")
    return value


def numbers(value, shape, name="the result") -> torch.Tensor:
    """A float64 tensor of this shape on the CPU, out of a tensor or a list."""
    try:
        value = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{name} should be a tensor, it is a {type(value).__name__}") from None
    need(value.shape == shape, f"{name} has the shape {tuple(value.shape)}, expected {tuple(shape)}")
    need(torch.isfinite(value).all(), f"{name} holds NaN or infinity")
    return value.double()


def int8(codes, shape) -> torch.Tensor:
    """The codes, checked to be int8, as float64."""
    kind = getattr(codes, "dtype", type(codes).__name__)
    need(kind == torch.int8, f"the codes are {str(kind).removeprefix('torch.')}: store them as int8")
    return numbers(codes, shape, "codes")


def near(a: float, b: float, relative=1e-4) -> bool:
    return abs(a - b) <= relative * max(abs(a), abs(b))


def same(a: torch.Tensor, b: torch.Tensor, tolerance=1e-4) -> bool:
    """Whether two tensors agree, to a share of the largest number."""
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= tolerance * b.abs().max())


def bell(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_gpt2(tied=True):
    config = dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return ql.GPT2LMHeadModel(ql.GPT2Config(**config, tie_word_embeddings=tied)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# 1. A weight tensor
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_01_1(gpt2_bytes):
    """gpt2_bytes(vocabulary, positions, width, blocks, bits): bytes of all parameters, the tied head once."""
    sizes = {"gpt2": (50257, 1024, 768, 12), "gpt2-medium": (50257, 1024, 1024, 24)}
    for bits in (32, 16, 4):
        for name, (v, p, d, n) in sizes.items():
            matrices, vectors, last = v * d + p * d + 12 * n * d * d, 13 * n * d, 2 * d
            right = (matrices + vectors + last) * bits / 8
            got = number(call(gpt2_bytes, v, p, d, n, bits))
            need(not near(got, right + v * d * bits / 8, 1e-9), "the head is counted twice: it is the embedding")
            need(not near(got, 8 * right, 1e-9), "that is in bits: a byte has eight of them")
            need(not near(got, 8 * right / bits, 1e-9), "that is the number of parameters: how many bytes has each?")
            need(not near(got, 32 * right / bits, 1e-9) or bits == 32, f"with bits={bits} it still counts 32 bits")
            need(not near(got, matrices * bits / 8, 1e-9), "biases and layer norms are missing")
            need(not near(got, right - last * bits / 8, 1e-9), "the layer norm after the last block is missing")
            need(near(got, right, 1e-9), f"for {name} at {bits} bits it says {got:,.0f}, expected {right:,.0f} bytes")
    return f"gpt2 takes {4 * 124439808:,} bytes in float32, and an eighth of that at 4 bits."


@exercise
def check_01_2(answer):
    """What bfloat16 makes of 257: between 256 and 512 its numbers are 2 apart, and a tie goes to the even one."""
    value = number(answer)
    need(value != 257, "between 256 and 512 bfloat16 has 128 numbers (7 fraction bits), and 257 is none of them")
    need(value != 258, "256 and 258 are equally near; a tie goes to the one whose last fraction bit is 0")
    need(value == torch.tensor(257.0).to(torch.bfloat16).item(), "how far apart are the bfloat16 numbers above 256?")
    return "bfloat16 counts in steps of 2 there, and a tie goes to the even fraction."


@exercise
def check_01_3(model_bytes):
    """model_bytes(model): every stored byte once: tied tensors, other dtypes, buffers."""
    tied, untied, half = tiny_gpt2(), tiny_gpt2(tied=False), tiny_gpt2().half()
    for model in (tied, untied, half):  # some versions of transformers keep masks in buffers that no state_dict lists
        for owner, _, name in [name.rpartition(".") for name, _ in model.named_buffers()]:
            delattr(model.get_submodule(owner), name)
    head = tied.lm_head.weight.nbytes
    got = number(call(model_bytes, tied))
    need(got != ql.model_nbytes(tied) + head, "the tied head is counted twice, once under each name")
    need(got == ql.model_nbytes(tied), f"a small GPT-2 of {ql.model_nbytes(tied):,} bytes comes out as {got:,.0f}")
    got = number(call(model_bytes, untied))
    need(got != ql.model_nbytes(untied) - head, "with untied weights the head is a tensor of its own: count it")
    need(got == ql.model_nbytes(untied), "it is wrong for a model whose head is not tied")
    got = number(call(model_bytes, half))
    need(got != 2 * ql.model_nbytes(half), "it takes four bytes for every number, but a float16 has two")
    half.register_buffer("codes", torch.zeros(100, dtype=torch.int8))
    got = number(call(model_bytes, half))
    need(got != ql.model_nbytes(half) - 100, "buffers are stored as well: it leaves them out")
    need(got == ql.model_nbytes(half), "it is wrong where tensors differ in dtype: ask each for its bytes")
    return "each stored tensor once, in its own dtype, buffers too."


# ---------------------------------------------------------------------------------------------------------------------
# 2. Absmax
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_02_1(absmax):
    """absmax(x, bits): int8 codes and the scale, for 2 to 8 bits; zeros get a scale that does no harm."""
    x = bell(40, 25) * 0.05
    x[3, 4] = -0.4  # the largest magnitude is negative
    for bits in (8, 4, 2):
        qmax = 2 ** (bits - 1) - 1
        codes, scale = several(call(absmax, x, bits), "codes", "scale")
        codes, scale, right = int8(codes, x.shape), number(scale, "scale"), 0.4 / qmax
        need(not near(scale, 1 / right), "the scale is inverted: it should lead back, x is about codes * scale")
        need(bits == 8 or not near(scale, 0.4 / 127), f"with bits={bits} the scale is still that of 8 bits")
        need(not near(scale, 0.4 / (qmax + 1)), f"with {bits} bits the largest code is {qmax}, not {qmax + 1}")
        need(not near(scale, x.max().item() / qmax), "the largest magnitude may be negative: take abs() before max()")
        need(not near(scale, 0.4 / 100), "this wastes codes: the largest is 127, not 100")
        need(near(scale, right), f"with {bits} bits the scale is {scale:.5f}, expected {right:.5f}")
        error = (codes * scale - x).abs().max() / scale
        need(codes.abs().max() <= qmax, f"with {bits} bits there are codes beyond {qmax}")
        need(error > 1.01 or error <= 0.501, "some weights move by more than half a step: round before you convert")
        need(error <= 0.501, "codes times scale does not come back near x")
    codes, scale = several(call(absmax, torch.zeros(4), 8), "codes", "scale")
    need(number(scale, "scale of a tensor of zeros") != 0, "for a tensor of zeros the scale is 0, and 0 / 0 is NaN")
    need((int8(codes, (4,)) == 0).all(), "a tensor of zeros should get the codes 0")
    return "half a step at most, for any number of bits, and zeros stay zeros."


@exercise
def check_02_2(answer):
    """SQNR of a bell of standard deviation 1 that ends at 4, at 8 bits: 10 log10(1 / (step² / 12)), step = 4 / 127."""
    x = bell(200_000)
    x = torch.cat([x[x.abs() < 4], torch.tensor([4.0])])
    measured = ql.sqnr_db(x, ql.absmax_quantize(x).dequantize())
    step = 4 / 127
    db, right = number(answer), -10 * math.log10(step**2 / 12)
    need(abs(db + right) > 0.4, "the sign: signal over noise, and the noise is much smaller")
    need(abs(db - right / 2) > 0.4 and abs(db - 2 * right) > 0.4, "squares take 10 log10, root mean squares 20 log10")
    need(abs(db + 10 * math.log10(step**2)) > 0.4, "the noise is not a whole step: its RMS is step / √12")
    need(abs(db + 10 * math.log10(step**2 / 4)) > 0.4, "half a step is the largest error; its RMS is step / √12")
    need(abs(db + 10 * math.log10(step**2 / 3)) > 0.4, "absmax takes 127 steps to the largest value, 254 in all")
    need(abs(db - right) < 0.4, "step = 4 / 127, the noise has an RMS of step / √12, and the signal one of 1")
    return f"such a bell was just measured: {measured:.1f} dB."


@exercise
def check_02_3(repaired):
    """repaired(x): codes up to ±127, and the values they stand for."""
    for seed, sign in ((0, 1), (1, -1)):
        x = bell(500, seed=seed)
        x[7] = 5.0 * sign
        codes, back = several(call(repaired, x), "codes", "the values that come back")
        codes, back = int8(codes, x.shape), numbers(back, x.shape, "what comes back")
        top = codes[7].item() * sign
        need(top != 100, "the largest weight still gets code 100: 27 codes lie idle on either side")
        need(abs(top) != 128, "128 does not fit into int8: it wraps around to -128, or leaves out 127")
        need(top == 127, f"the largest weight gets code {top:.0f}, expected 127")
        need((back - x).abs().max() <= 5 / 127 * 0.501, "what comes back is off by more than half a step")
    return f"the repair is worth {20 * math.log10(1.27):.2f} dB, for nothing."


# ---------------------------------------------------------------------------------------------------------------------
# 3. Zero-point
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_03_1(zeropoint):
    """zeropoint(x): int8 codes, scale, zero point, over a range that is widened to include 0."""
    cases = {
        "a range across zero": bell(300).exp() - 1,
        "numbers from 10 to 11": torch.linspace(10, 11, 50),
        "numbers from -5 to -4": torch.linspace(-5, -4, 50),
        "a constant": torch.full((3,), 5.0),
        "a tensor of zeros": torch.zeros(3),
    }
    for name, x in cases.items():
        codes, scale, z = several(call(zeropoint, x), "codes", "scale", "zero point")
        scale, z = number(scale, f"the scale of {name}"), number(z, f"the zero point of {name}")
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        need(scale != 0, f"{name}: the scale is 0, and 0 / 0 is NaN")
        need(-128 <= z <= 127, f"{name}: the zero point is {z:.0f}, no int8; first widen the range to include 0")
        need(z == round(z), f"{name}: the zero point {z:.3f} is no whole number, so no code stands for 0.0")
        if high > low:
            right = (high - low) / 255
            need(not near(scale, 1 / right), "the scale is inverted: it should lead back")
            need(not near(scale, (high - low) / 256), "256 codes have 255 steps between them")
            need(near(scale, right, 1e-3), f"{name}: the scale is {scale:.5f}, expected {right:.5f}")
        back = (int8(codes, x.shape) - z) * scale
        need((back - x).abs().max() <= 0.51 * scale, f"{name}: what comes back is off by more than half a step")
    return "the range includes 0, so zeros are exact whatever comes in."


@exercise
def check_03_2(answer):
    """Gain of zero-point over absmax for values from -1 to 3: 20 log10((3 / 127) / (4 / 255)) dB."""
    db, right = number(answer), 20 * math.log10(3 / 127 / (4 / 255))
    need(abs(db + right) > 0.1, "the sign: the zero-point scale is the smaller one, so it gains")
    need(abs(db - right / 2) > 0.1, "the scales are amplitudes: 20 log10, not 10")
    need(abs(db - 20 * math.log10(4 / 3)) > 0.1 and abs(db + 20 * math.log10(4 / 3)) > 0.1,
         "absmax covers -3 to 3, a range of 6: 3 / 127 a step")  # fmt: skip
    need(abs(db - 20 * math.log10(2)) > 0.1, "a full bit is gained only where all values lie on one side of zero")
    need(abs(db - right) < 0.1, "put the two scales into the formula: 3 / 127 for absmax, 4 / 255 for zero-point")
    return f"the two scales alone give {right:.1f} dB."


@exercise
def check_03_3(repaired):
    """repaired(x): all codes from -128 to 127 in reach, and the values they stand for."""
    for seed in range(3):
        x = bell(1000, seed=seed).exp() - seed
        span = (x.max() - x.min()).item()
        codes, back = several(call(repaired, x), "codes", "the values that come back")
        codes, back = int8(codes, x.shape), numbers(back, x.shape, "what comes back")
        top, bottom = (codes[i].item() for i in (x.argmax(), x.argmin()))
        need(not 71 <= top <= 74, "the largest value still gets a code near 72: 200 steps from -128 end there")
        need(top >= bottom, "the largest value got a small code: without a clamp, int8 wraps around")
        need(top >= 126 and bottom <= -127, f"codes run from {bottom:.0f} to {top:.0f}, expected -128 to 127")
        error = ((back - x).abs().max() / span).item()
        need(error * 255 <= 0.52 or error * 255 > 1.6, "256 codes have 255 steps: the largest value is clamped")
        need(error * 255 <= 0.52, "what comes back is off by more than half a step")
    return f"the repair is worth {20 * math.log10(255 / 200):.2f} dB, for nothing."


@exercise
def check_03_4(count_far):
    """count_far(codes, limit): how many codes have a magnitude of at least the limit, -128 included."""
    codes = torch.tensor([[-128, -127, -100, 0], [100, 127, -128, -127]], dtype=torch.int8)
    for limit, right in ((127, 5), (128, 2), (100, 7), (3, 7)):
        got = number(call(count_far, codes, limit))
        need(got != right - 2, "it misses the two codes -128: in int8 their magnitude does not exist, and wraps")
        need(got == right, f"of {codes.flatten().tolist()}, {right} have at least {limit}, not {got:.0f}")
    return "widen first; the farthest code of all is -128."


# ---------------------------------------------------------------------------------------------------------------------
# 4. The whole model
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_04_1(select):
    """select(name, parameter): true for the matrices inside the blocks, and for nothing else."""
    chosen = {name: select(name, parameter) for name, parameter in tiny_gpt2().named_parameters()}
    if all(nothing(value) for value in chosen.values()):
        raise Unsolved
    for name, parameter in tiny_gpt2().named_parameters():
        if ".h." not in name:
            need(not chosen[name], f"it takes {name}, which is in no block")
        elif parameter.ndim == 1:
            need(not chosen[name], f"it takes {name}, a vector: look at parameter.ndim")
        else:
            need(chosen[name], f"it leaves out {name}, a matrix inside a block")
    return "four matrices for each block; embedding, head and vectors stay as they are."


@exercise
def check_04_2(round_per_output):
    """round_per_output(layer): the rounded weight, in the layout of the layer, a scale for each output channel."""
    for inputs, outputs in ((8, 24), (24, 8), (16, 16)):
        weight = bell(outputs, inputs) * torch.arange(1, outputs + 1)[:, None]
        weight = weight * torch.arange(1, inputs + 1)
        conv, linear = ql.Conv1D(outputs, inputs), torch.nn.Linear(inputs, outputs)
        conv.weight.data, linear.weight.data = weight.T.contiguous(), weight.clone()
        for layer, axis in ((linear, 0), (conv, 1)):
            x, kind = layer.weight.data.clone(), type(layer).__name__
            result = call(round_per_output, layer)
            need(torch.equal(layer.weight, x), "it changes the layer itself: return a new tensor")
            need(tuple(getattr(result, "shape", ())) != tuple(x.T.shape) or inputs == outputs,
                 f"for {kind} it comes back turned round: return it as the layer stores it")  # fmt: skip
            got = numbers(result, x.shape, "the rounded weight")
            need(not same(got, ql.absmax_quantize(x, axis=1 - axis).dequantize()),
                 f"for {kind} the scales belong to the inputs: "
                 f"it stores ({'inputs, outputs' if axis else 'outputs, inputs'})")  # fmt: skip
            need(not same(got, ql.absmax_quantize(x).dequantize()), "that is one scale for the whole matrix")
            need(not same(got, x, 1e-7), "the weight comes back as it was: nothing was rounded")
            need(same(got, ql.absmax_quantize(x, axis=axis).dequantize()), f"for {kind} it is not right")
    return "the class of the layer decides; a square matrix does not give its layout away."


@exercise
def check_04_3(saved):
    """saved(before, after): the share of the bytes that are really gone."""
    model = tiny_gpt2()
    fake, real = ql.fake_quantize_model(model, ql.absmax_quantize), ql.quantize_model(model)
    for name, other in {"a fake-quantized copy": fake, "a float16 copy": tiny_gpt2().half(), "int8": real}.items():
        right = 1 - ql.model_nbytes(other) / ql.model_nbytes(model)
        got = number(call(saved, model, other))
        need(not near(got, 0.75, 1e-3), f"for {name} it says 75 %: it counts one byte for each number, stored or not")
        need(not near(got, 100 * right) or right == 0, "give a share between 0 and 1, not per cent")
        need(not near(got, 1 - right) or right in (0, 0.5), "that is the share that is left, not the share saved")
        need(abs(got - right) < 1e-6, f"for {name} it says {got:.1%}, but {right:.1%} of the stored bytes are gone")
    return "nothing is saved until the codes are what is stored."


# ---------------------------------------------------------------------------------------------------------------------
# 5. Histograms
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_05_1(zero_share):
    """zero_share(k): share of a bell that 8-bit absmax rounds to zero, the largest weight at k standard deviations."""

    def inside(sigmas):
        return math.erf(sigmas / math.sqrt(2))

    for k in (5.0, 25.0, 80.0):
        got, right = number(call(zero_share, k)), inside(k / 254)
        need(not near(got, inside(k / 127), 1e-2), "half a step rounds to zero on either side, not a whole one")
        need(not near(got, right / 2, 1e-2), "that is one side of zero only: the bell has two")
        need(not near(got, 100 * right, 1e-2), "give a share between 0 and 1, not per cent")
        need(not near(got, math.erf(k / 254), 1e-2), "erf takes the distance divided by √2")
        need(not near(got, 1 - right, 1e-2), "that is the share which does not become zero")
        need(near(got, right, 1e-2), f"for k = {k:g} it says {got:.4f}; half a step is k / 254 standard deviations")
    return f"with its largest weight at 50 σ, a bell loses {inside(50 / 254):.0%} of its weights to zero."


@exercise
def check_05_2(values):
    """values(q): the weights that a QuantizedTensor stands for, one scale or many, with zero point or without."""
    x = bell(6, 50).exp()
    cases = {
        "absmax": ql.absmax_quantize(x),
        "absmax with a scale for each row": ql.absmax_quantize(x, axis=0),
        "zero-point": ql.zeropoint_quantize(x),
    }
    for name, q in cases.items():
        got = numbers(call(values, q), x.shape, "what is plotted")
        codes = q.qdata.double()
        need(not same(got, codes), f"{name}: these are the codes; the scale makes weights of them")
        need(name != "zero-point" or not same(got, codes * q.scale), "zero-point: take the zero point off the codes")
        wrapped = (q.qdata - q.zero_point).double() * q.scale
        need(name != "zero-point" or not same(got, wrapped), "zero-point: int8 minus int8 wraps around, widen first")
        need(same(got, q.dequantize()), f"{name}: these are not the values that the codes stand for")
    return "a plot of weights has the range of the weights."


@exercise
def check_05_3(richest_column):
    """richest_column(w): the index of the column with most weights beyond 6 standard deviations of the matrix."""
    w = bell(400, 200)
    w[:6, 17] = -20.0  # the most outliers, negative
    w[5, 40:60] = 15.0  # a rich row
    w[9, 3] = 50.0  # the farthest
    w[9:12, 80] = 18.0
    got = number(call(richest_column, w))
    need(got != 5, "that is a row: count along dimension 0 to get one number for each column")
    need(got != 3, "that column holds the farthest weight, not the most outliers")
    need(got != 80, "outliers may be negative: compare magnitudes")
    need(got == 17, f"it says column {got:.0f}; column 17 of the test matrix holds the most")
    return "a scale for each column would keep the damage inside it."


# ---------------------------------------------------------------------------------------------------------------------
# 6. Text
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_06_1(top_k):
    """top_k(logits, k): probabilities of which only the k largest are left, and sum to one."""
    logits = bell(50) * 3 - 1
    for k in (1, 5, 50):
        right = torch.zeros(50).double()
        best = logits.topk(k).indices
        right[best] = logits[best].double().softmax(-1)
        got = numbers(call(top_k, logits, k), logits.shape, "the result")
        kept = (got != 0).sum().item()
        need(kept <= k, f"with k={k}, {kept} tokens are left: a logit of -inf has the probability 0, not a logit of 0")
        need(kept == k, f"with k={k}, only {kept} tokens are left")
        need((got >= 0).all(), "a probability is negative: these look like logits")
        need((right[got != 0] > 0).all(), "it keeps the wrong tokens: the largest logits are the likeliest")
        need(abs(got.sum().item() - 1) < 1e-3, f"the probabilities sum to {got.sum().item():.3f}: scale them up to 1")
        need(same(got, right, 1e-3), "the kept tokens should keep their proportions")
    return "drawing from these is what `top_k=30` does."


@exercise
def check_06_2(answer):
    """Texts per model for a standard error of 0.01 nats, at a spread of 0.2 nats: (0.2 / 0.01)² = 400."""
    texts = number(answer)
    need(abs(texts - 20) > 1, "the standard error falls with the square root of the number of texts: square the ratio")
    need(texts > 1, "a standard error twenty times smaller than the spread needs many texts")
    need(abs(texts - 400) <= 4, "standard error = spread / √n; solve it for n")
    return "hundreds of texts to see a hundredth of a nat, where one text read by both models shows it."


@exercise
def check_06_3(write_all):
    """write_all(models, write, seed): name -> text, every model with the same luck."""

    def write(model):
        return model, *torch.randint(1000, (3,)).tolist()

    models = {"original": "A", "absmax": "B", "zero-point": "C"}
    first, again, other = (call(write_all, models, write, seed) for seed in (0, 0, 1))
    need(isinstance(first, dict) and set(first) == set(models), "return a dict with a text for each model")
    need(all(first[name][0] == model for name, model in models.items()), "each name should get its own model's text")
    need(first == again, "the same seed gives different texts: set it with torch.manual_seed")
    need(len({text[1:] for text in first.values()}) == 1, "the second model draws on where the first stopped")
    need(first != other, "it does not heed the seed that it is given")
    return "now any difference between the texts comes from the models."


@exercise
def check_06_4(losses):
    """losses(models, write, loss, text): name -> loss, all on the given text, which no model wrote."""
    read = []

    def write(model, text):
        return text + f" {model} was here"

    def loss(model, text):
        read.append(text)
        return len(model) + len(text) / 100

    models, text = {"original": "A", "absmax": "BB"}, "A text that nobody of us wrote."
    result = call(losses, models, write, loss, text)
    need(isinstance(result, dict) and set(result) == set(models), "return a dict with a loss for each model")
    need(len(set(read)) == 1, "the models read different texts: how hard a text is then counts as quality")
    need(read[0] == text, "a model wrote what they read: let all of them read the text that is given")
    right = {name: loss(model, text) for name, model in models.items()}
    need(result == right, "each name should get the loss of its own model")
    return "one text, all models, no author among them."


# ---------------------------------------------------------------------------------------------------------------------
# 7. Perplexity
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_07_1(repaired):
    """repaired(windows): perplexity from the token losses of windows of unequal length."""
    for lengths in ((512, 256, 256, 7), (30, 200)):
        windows = [bell(n, seed=i).abs() * (2 + i) for i, n in enumerate(lengths)]
        got, tokens = number(call(repaired, windows)), torch.cat(windows).double()
        means = torch.stack([w.double().mean() for w in windows])
        need(not near(got, means.mean().exp().item()), "a short window counts as much as a long one: average tokens")
        need(not near(got, means.exp().mean().item()), "that averages perplexities: average losses, then take exp once")
        need(not near(got, tokens.exp().mean().item()), "that averages exp(loss): the exponential comes last, once")
        need(not near(got, tokens.mean().item()), "that is the mean loss: perplexity is its exponential")
        need(near(got, tokens.mean().exp().item(), 1e-3), "perplexity is exp of the mean loss over all tokens")
    return "every token counts once, whatever window it was in."


@exercise
def check_07_2(interval):
    """interval(before, after): 95 % interval of mean(after - before), from pairs."""
    n = 4096
    hardness = 3 * bell(n)
    before, after = hardness + 4, hardness + 4.01 + 0.1 * bell(n, seed=1)
    difference = (after - before).double()
    mean, error = difference.mean().item(), difference.std().item() / n**0.5
    low, high = several(call(interval, before, after), "the low end", "the high end")
    low, high = number(low, "the low end"), number(high, "the high end")
    need(low < high, "give the low end first")
    half, centre = (high - low) / 2, (high + low) / 2
    need(half < 5 * error, f"the interval is {half / (1.96 * error):.0f} times too wide: the pairs are broken, so the "
         "hardness of the tokens does not cancel; draw one set of tokens for both")  # fmt: skip
    need(abs(centre + mean) > error, "the sign: after minus before, so that above 0 means worse")
    need(abs(centre - mean) < error, f"the interval is centred on {centre:.4f}, the mean difference is {mean:.4f}")
    need(half > 1.3 * error, "the interval is too narrow: cut off 2.5 % at each end of the resampled means")
    need(half < 2.8 * error, "the interval is too wide: take the resampled means from 2.5 % to 97.5 %")
    return f"the pairs make the interval {3 * 2**0.5 / 0.1:.0f} times narrower here."


@exercise
def check_07_3(kl):
    """kl(reference, candidate): mean KL(reference ‖ candidate) in nats, from logits [tokens, vocabulary]."""
    reference, candidate = 2 * bell(20, 30), 2 * bell(20, 30) + bell(20, 30, seed=1)
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    right = (p.exp() * (p - q)).sum(-1).mean().item()
    got = number(call(kl, reference, candidate))
    need(not near(got, (q.exp() * (q - p)).sum(-1).mean().item(), 1e-3), "the direction: weigh with the reference")
    need(not near(got, -right, 1e-3), "the sign: log p minus log q, and the result is never negative")
    need(not near(got, right / 30, 1e-3), "sum over the vocabulary, average over the tokens only")
    need(not near(got, right * 20, 1e-3), "that is the sum over all tokens: take their mean")
    need(not near(got, right / math.log(2), 1e-3), "that is in bits: use the natural logarithm")
    raw = (reference.exp() * (reference - candidate)).sum(-1).mean().item()
    need(not near(got, raw, 1e-3), "logits are no log-probabilities yet: apply log_softmax first")
    need(near(got, right, 1e-3), f"it says {got:.4f}, expected {right:.4f} nats")
    need(abs(number(call(kl, reference, reference))) < 1e-5, "for two equal models it should be 0")
    return "0 for equal models, and never negative."


@exercise
def check_07_4(answer):
    """Perplexity if half of the tokens are certain, and half are one of ten equally likely: √10."""
    value = number(answer)
    need(abs(value - 5.5) > 0.06, "that is the mean of the perplexities 1 and 10: average the losses instead")
    need(abs(value - 5) > 0.06, "half of ten is no perplexity: average the losses 0 and ln 10")
    need(abs(value - math.log(10) / 2) > 0.06, "that is the mean loss: perplexity is its exponential")
    need(abs(value - 10**0.5) < 0.06, "the losses are 0 and ln 10, half of each: perplexity is exp of their mean")
    return "exp(½ ln 10) = √10: perplexities average as a geometric mean."


# ---------------------------------------------------------------------------------------------------------------------
# 8. Real storage
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_08_1(answer):
    """Bytes of a layer 768 -> 3072: 4-bit codes, float16 scales for groups of 64, a float32 bias."""
    weights, got = 768 * 3072, number(answer)
    codes, scales, bias = weights // 2, 2 * weights // 64, 4 * 3072
    need(got != 8 * (codes + scales + bias), "that is in bits: a byte has eight of them")
    need(got != weights + scales + bias, "two codes share a byte")
    need(got != codes + scales, "the bias is missing: it stays in float32")
    need(got not in (codes + bias, codes), "the scales are missing: one for each group of 64")
    need(got != codes + 2 * scales + bias, "a scale is a float16 here, two bytes")
    need(got != codes + scales + bias // 2, "the bias stays in float32, four bytes")
    need(got != codes + 2 * 3072 + bias, "one scale for each group, not for each output channel")
    need(got != codes + scales + 4 * 768, "the layer has 3072 outputs, so as many numbers in the bias")
    need(got == codes + scales + bias, f"codes, scales and bias are not {got:,.0f} bytes: add them up one by one")
    return f"{codes:,} + {scales:,} + {bias:,} bytes."


@exercise
def check_08_2(pack):
    """pack(codes): uint8 [out, in / 2], codes plus 8, the first of a pair in the low nibble, the second in the high."""
    codes = (torch.arange(60) % 15 - 7).to(torch.int8)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    codes = codes.reshape(3, 20)
    packed = call(pack, codes)
    kind = getattr(packed, "dtype", type(packed).__name__)
    need(kind == torch.uint8, f"the packed bytes are {str(kind).removeprefix('torch.')}: make them uint8")
    got, right = numbers(packed, (3, 10), "packed"), ql.pack_int4(codes).double()
    swapped = ((ql.pack_int4(codes) % 16) * 16 + ql.pack_int4(codes) // 16).double()
    need(not torch.equal(got, swapped), "the nibbles are swapped: the first code of a pair goes into the low one")
    halves = ((codes[:, :10] + 8) + 16 * (codes[:, 10:].int() + 8)).double()
    need(not torch.equal(got, halves), "it pairs the two halves of a row: pair neighbours")
    spilled = ((codes[:, ::2].int() | codes[:, 1::2].int() * 16) % 256).double()
    need(not torch.equal(got, spilled), "a negative code has ones in all its high bits: add 8 before you combine")
    need(torch.equal(got, right), "ql.unpack_int4 does not get the codes back")
    return "ql.unpack_int4 gets every code back."


@exercise
def check_08_3(small_linear):
    """small_linear(weight, bias): a module that holds int8 codes and scales, and no float matrix anywhere."""
    rows = torch.logspace(0, 2, 32)  # outputs of very different size
    weight, bias, x = bell(32, 48) * rows[:, None], bell(32, seed=1), bell(5, 48, seed=2)
    layer = small_linear(weight.clone(), bias.clone())
    need(isinstance(layer, torch.nn.Module), "it should be a torch.nn.Module")
    got = numbers(call(layer, x), (5, 32), "the output")

    def gives(w, b, tolerance=1e-2):
        return same(got / rows, (x @ w.T + b) / rows, tolerance)

    rounded = ql.absmax_quantize(weight, axis=0).dequantize()
    need(not gives(weight, bias, 1e-6), "it still multiplies with the unrounded weight")
    need(not gives(rounded, 0), "the bias is missing from the output")
    need(not gives(ql.absmax_quantize(weight).dequantize(), bias), "that is one scale for the whole matrix")
    wrong = ql.absmax_quantize(weight, axis=1).dequantize()
    need(not gives(wrong, bias), "the scales belong to the inputs: give each output, a row of the weight, its own")
    need(gives(rounded, bias), "the output is not that of int8 weights with a scale for each output")
    state = layer.state_dict()
    need(any(t.dtype == torch.int8 for t in state.values()), "no int8 is stored: make the codes a buffer, as int8")
    for module in layer.modules():
        for name, value in [*vars(module).items(), *module.named_parameters(), *module.named_buffers()]:
            large = isinstance(value, torch.Tensor) and value.numel() >= weight.numel()
            need(not large or value.dtype == torch.int8, f"it still keeps a float matrix, in {name}: nothing is saved")
    size = sum(tensor.nbytes for tensor in state.values())
    need(size <= weight.numel() + 8 * len(bias) + 64, f"it stores {size} bytes: codes, a scale and a bias take 1,792")
    return f"{4 * weight.numel() + 4 * len(bias):,} bytes have become {size:,}."


# ---------------------------------------------------------------------------------------------------------------------
# 9. Speed
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_09_1(answer):
    """Tokens per second at most: 100 GB/s over 7 billion weights of 4.25 bits."""
    got, right = number(answer), 100e9 / (7e9 * 4.25 / 8)
    need(not near(got, right / 8, 0.03), "bits and bytes: bandwidth is in bytes per second")
    need(not near(got, 1000 / right, 0.03), "that is milliseconds per token: the question is tokens per second")
    need(not near(got, 1 / right, 0.03), "that is seconds per token: the question is tokens per second")
    need(not near(got, 100 / 7, 0.03), "that is for a byte each: here a weight takes 4.25 bits")
    need(near(got, right, 0.03), "divide the bytes per second by the bytes of all weights")
    return f"{right:.0f} tokens per second, and nothing that reads every weight can be faster."


class Device:
    """A simulated machine: work is queued and done later, a first call is slow, others run in between."""

    def __init__(self):
        self.now, self.free, self.called, self.order = 0.0, 0.0, set(), []

    def clock(self):
        return self.now

    def wait(self):
        self.now = max(self.now, self.free)

    def function(self, label, seconds):
        def run():
            self.order.append(label)
            self.now += 1e-5  # the launch
            call = len(self.order)
            busy = 20 if call == 13 else 2 if call > 10 else 1
            first = 0 if label in self.called else 0.5
            self.called.add(label)
            self.free = max(self.now, self.free) + seconds * busy + first

        return run


@exercise
def check_09_2(time_each):
    """time_each(functions, wait, clock, rounds): label -> median seconds; warmed up, in turns, waited for."""
    device = Device()
    work = {"fp32": device.function("fp32", 0.004), "int8": device.function("int8", 0.002)}
    result = call(time_each, work, device.wait, device.clock, 7)
    need(isinstance(result, dict) and set(result) == set(work), "return a dict with a time for each function")
    seconds = {label: number(value, f"the time of {label}") for label, value in result.items()}
    need(len(device.order) >= 14, f"with rounds=7 and two functions it makes only {len(device.order)} calls")
    need(min(seconds.values()) > 1e-4, "it stops the clock when the work is launched, not when it is done: wait first")
    need(max(seconds.values()) < 1, "the times are not in seconds")
    need(max(seconds.values()) < 0.05, "the slow first call is in the result: run each function once unmeasured")
    turns = "".join(label[0] for label in device.order)
    need("fff" not in turns[-14:] and "iii" not in turns[-14:],
         "the candidates run one after the other, so a busy spell hits only the last: let them take turns")  # fmt: skip
    need(len(device.order) >= 16, "each function needs one unmeasured call on top of the rounds")
    ratio = seconds["fp32"] / seconds["int8"]
    need(1.8 < ratio < 2.2, f"fp32 takes twice as long as int8 here, not {ratio:.1f} times: does the clock start with "
         "earlier work still running, or is the mean taken instead of the median?")  # fmt: skip
    return "warmed up, waited for, in turns: the ratio survives a busy machine."


@exercise
def check_09_3(break_even):
    """break_even(bytes_per_weight, bandwidth, arithmetic): tokens at which arithmetic takes as long as reading."""
    for size, bandwidth, arithmetic in ((4, 20e9, 200e9), (1, 20e9, 200e9), (0.53, 4e12, 400e12)):
        got, right = number(call(break_even, size, bandwidth, arithmetic)), size * arithmetic / (2 * bandwidth)
        need(not near(got, 2 * right), "a weight costs two operations for a token: a multiplication and an addition")
        need(not near(got, 1 / right) or near(right, 1), "that is upside down: the answer is a number of tokens")
        need(
            not near(got, right / size) or size == 1,
            "fewer bytes are read sooner: use bytes_per_weight",
        )
        need(not near(got, right / size**2) or size == 1, "the more bytes a weight takes, the later arithmetic binds")
        need(near(got, right), f"with {size} bytes a weight it says {got:.3g} tokens, expected {right:.3g}")
    return "fewer bytes reach the flat part of the roof at fewer tokens, and gain nothing from there on."


# ---------------------------------------------------------------------------------------------------------------------
# 10. Granularity
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_10_1(answer):
    """What one outlier costs 1,000 rows with a scale each: one row's noise is 100 times larger, in dB of all noise."""
    db, right = number(answer), 10 * math.log10((999 + 100) / 1000)
    need(abs(db + right) > 0.02, "it asks for decibels lost: a positive number")
    need(abs(db - 20) > 0.5, "that is for one scale for the whole matrix: here only one row gets coarser steps")
    need(abs(db) > 0.01, "999 rows lose nothing, but the noise of one row is large: add up the noise of all rows")
    need(abs(db - 10 * math.log10(1.009)) > 0.01, "ten times the step is a hundred times the squared error")
    need(abs(db - 2 * right) > 0.02, "squares take 10 log10, root mean squares 20 log10")
    need(abs(db - right) < 0.02, "of 1,000 rows one has a hundred times the noise: how much larger is the sum?")
    rows = bell(1000, 256).clamp(-4, 4)
    rows[:, 0] = 4
    spiked = rows.clone()
    spiked[0, 0] = 40
    before, after = ((x - ql.absmax_quantize(x, axis=0).dequantize()).square().sum() for x in (rows, spiked))
    return f"such a matrix was just measured: {10 * math.log10(after / before):.2f} dB. The damage stays in its row."


@exercise
def check_10_2(round_groups):
    """round_groups(layer, group_size, bits): rounded weight of a Conv1D, [in, out], groups along the inputs."""
    for inputs, outputs, size in ((64, 96, 32), (64, 64, 16)):
        layer = ql.Conv1D(outputs, inputs)
        weight = bell(inputs, outputs) * torch.logspace(0, 1, inputs)[:, None] * torch.logspace(0, 1, outputs)
        layer.weight.data = weight.clone()
        result = call(round_groups, layer, size, 4)
        need(torch.equal(layer.weight, weight), "it changes the layer itself: return a new tensor")
        right = ql.absmax_quantize(weight, 4, axis=1, group_size=size).dequantize()
        need(tuple(getattr(result, "shape", ())) != (outputs, inputs) or inputs == outputs,
             "it comes back turned round: return it as the layer stores it, [in, out]")  # fmt: skip
        got = numbers(result, weight.shape, "the rounded weight")
        along_outputs = ql.absmax_quantize(weight, 4, axis=0, group_size=size).dequantize()
        need(not same(got, along_outputs), "the groups lie along the outputs: a group has the weights of one input")
        need(not same(got, ql.absmax_quantize(weight, 4, axis=1).dequantize()), "a scale for each output, no groups")
        need(not same(got, ql.absmax_quantize(weight, 4).dequantize()), "that is one scale for the whole matrix")
        finer = ql.absmax_quantize(weight, 8, axis=1, group_size=size).dequantize()
        need(not same(got, finer), "it does not heed the number of bits")
        need(same(got, right), "a group should be neighbouring inputs of one output, with a scale of its own")
    return "groups run along what is summed over, so that every output keeps its own scales."


@exercise
def check_10_3(true_bits):
    """true_bits(tensors): stored bits per weight of a list of QuantizedTensors and float tensors."""
    x, vector = bell(64, 128), bell(512).half()
    coarse, fine = ql.absmax_quantize(bell(32, 64), 8), ql.absmax_quantize(x, 4, group_size=32, scale_dtype=torch.half)
    zero = ql.zeropoint_quantize(x, 4, axis=0, group_size=64)
    for given in ([fine], [coarse, fine], [zero], [coarse, zero, vector]):
        got, bits = number(call(true_bits, given)), [8 * tensor.nbytes for tensor in given]
        sizes = [tensor.shape.numel() for tensor in given]
        right, alike = sum(bits) / sum(sizes), [b / n for b, n in zip(bits, sizes, strict=True)]

        def is_it(value, got=got):
            return near(got, value, 1e-6)

        need(len(given) > 1 or not is_it(4), "only the codes are counted: each group stores a scale too")
        need(len(given) == 1 or not is_it(sum(alike) / len(given)), "a small tensor counts as much as a large one: "
             "divide all bits by all weights")  # fmt: skip
        need(not is_it(right / 8), "those are bytes per weight")
        need(given != [zero] or not is_it(right - 8 / 64), "the zero points are stored as well: it leaves them out")
        need(len(given) < 3 or not is_it(sum(bits[:2]) / sum(sizes[:2])), "what stays in float is stored too: count it")
        need(is_it(right), f"it says {got:.4f} bits per weight, expected {right:.4f}")
    return "all bits that are stored, over all weights: the only size by which schemes can be compared."


@exercise
def check_10_4(clip_scale):
    """clip_scale(w, importance, bits): for each row the best scale at 1, 0.95, …, 0.4 of its absmax."""
    w = bell(40, 64).abs().pow(1.7) * bell(40, 64, seed=1).sign()
    importance = torch.logspace(0, 3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    shares = [1 - i / 20 for i in range(13)]
    for bits in (4, 3):
        qmax = 2 ** (bits - 1) - 1
        full = w.abs().amax(1, keepdim=True) / qmax

        def errors(weighing, clamp=qmax, power=2, full=full):
            tried = [w - (w / (full * s)).round().clamp(-clamp, clamp) * full * s for s in shares]
            return torch.stack([(e.abs() ** power * weighing).sum(1, keepdim=True) for e in tried])

        def choice(errors, full=full):
            return torch.tensor(shares)[errors.argmin(0)] * full

        result = call(clip_scale, w, importance, bits)
        got = numbers(result.reshape(-1, 1) if getattr(result, "ndim", 0) == 1 else result, (40, 1), "the scales")
        error = (((w - (w / got).round().clamp(-qmax, qmax) * got).square()) * importance).sum(1, keepdim=True)
        weighted, alike = errors(importance), errors(torch.ones(64))
        right = bool((error <= weighted.amin(0) * 1.001).all())

        def is_it(scale, got=got, right=right):
            return not right and bool((got / scale - 1).abs().max() < 1e-4)

        need(not is_it(choice(weighted) / full), "those are the shares: multiply by the row's absmax / qmax")
        need(not is_it(1 / choice(weighted)), "the scale is inverted: it should lead back")
        need(not is_it(full), "no row is clipped: the largest magnitude is always kept")
        need(not is_it(choice(errors(importance, clamp=math.inf))), "without a clamp finer is better: clip the codes")
        need(not is_it(choice(alike)), "all columns count alike: weigh the squared errors with the importance")
        need(not is_it(choice(errors(importance**2))), "the importance weighs the squared error: do not square it")
        need(not is_it(choice(errors(importance, power=1))), "it takes the magnitudes of the errors: square them")
        matrix = shares[weighted.sum(1).argmin()] * full
        need(not is_it(matrix), "all rows are clipped at the same share: choose for each row by itself")
        need(right, "for some rows another of the scales has a smaller weighted error")
    return "a few weights are clipped, all others get finer steps; what the data say matters counts most."


# ---------------------------------------------------------------------------------------------------------------------
# 11. Four bits
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_11_1(unpack):
    """unpack(packed): int8 [out, in] from two's complement nibbles, the first of a pair low: uint8 [out, in / 2]."""
    codes = (torch.arange(48) % 16 - 8).to(torch.int8)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    codes = codes.reshape(3, 16)
    low, high = (codes[:, ::2].int() & 15), (codes[:, 1::2].int() & 15)
    got = call(unpack, (low + 16 * high).to(torch.uint8))
    got = int8(got, codes.shape)
    signed = codes.double()
    unsigned = (codes.int() & 15).double()

    def swap(x):
        return x.unflatten(1, (-1, 2)).flip(2).flatten(1)

    need(not torch.equal(got, unsigned), "codes from 8 to 15 are left: in two's complement they stand for -8 to -1")
    need(not torch.equal(got, unsigned - 8), "8 is taken off every code: that undoes another layout, that of "
         "ql.pack_int4; here 0 is stored as 0")  # fmt: skip
    need(not torch.equal(got, swap(signed)), "the nibbles are swapped: the first code of a pair is in the low one")
    need(not torch.equal(got, torch.cat([signed[:, ::2], signed[:, 1::2]], 1)), "the pairs are torn apart: first all "
         "low nibbles, then all high ones")  # fmt: skip
    need((got.abs() <= 8).all(), "there are codes beyond -8 and 7: a high nibble must be shifted down by 4 bits")
    need(torch.equal(got, signed), "not every code comes back")
    return "the highest of the four bits is the sign, and int8 must be told so."


@exercise
def check_11_2(levels):
    """levels(bits): the levels of NormalFloat with 2**bits levels, from -1 to 1, one of them exactly 0."""
    for bits in (4, 3):
        n = 2**bits
        share, normal = (1 / n + 1 / (n - 1)) / 4, torch.distributions.Normal(0.0, 1.0)
        below = normal.icdf(torch.linspace(share, 0.5, n // 2, dtype=torch.float64))
        above = normal.icdf(torch.linspace(0.5, 1 - share, n // 2 + 1, dtype=torch.float64))
        right = torch.cat([below / -below[0], above[1:] / above[-1]])
        got = call(levels, bits)
        need(getattr(got, "shape", (len(got),))[0] != n + 1, f"{n + 1} levels: 0 is there twice, keep it once")
        got = numbers(got, (n,), f"with {bits} bits the list of levels")
        need((got.diff() > 0).all(), "the levels should rise, each above the one before")
        need((got == 0).any() or got.abs().min() > 1e-6, "the level next to 0 is not exactly 0: set it so")
        need((got == 0).any(), "no level is exactly 0: a weight of 0 would come back as something else")
        need(abs(got[0]) <= 1.001 and abs(got[-1]) <= 1.001, "divide by the outermost: the levels end at -1 and 1")
        need(abs(got[0] + 1) < 1e-3 and abs(got[-1] - 1) < 1e-3, "each side should end at 1: divide it by its own last")
        need(not same(got, -right.flip(0), 1e-3), "turned round: the side above 0 has one level more")
        even = torch.cat([torch.linspace(-1, 0, n // 2), torch.linspace(0, 1, n // 2 + 1)[1:]])
        need(not same(got, even, 1e-3), "these are evenly spaced: take quantiles of the normal distribution")
        need(same(got, right, 1e-3), f"with {bits} bits these are not the quantiles that the text asks for")
    return "with 4 bits these are the sixteen numbers of NF4."


@exercise
def check_11_3(nf4_round):
    """nf4_round(x, group_size): the values that come back from NF4, a scale (the absmax) for each group of a row."""
    x = bell(8, 256)
    x[::2, 3::64] = -4.5  # far out, and negative
    for size in (64, 32):
        got = numbers(call(nf4_round, x, size), x.shape, "what comes back")
        groups = x.unflatten(1, (-1, size))

        def with_scale(scale, groups=groups):
            levels = torch.tensor(ql.NF4)
            index = (groups[..., None] / scale[..., None] - levels).abs().argmin(-1)
            return (levels[index] * scale).flatten(1)

        signed = with_scale(groups.amax(-1, keepdim=True))
        need(not same(got, signed), "the largest magnitude may be negative: take abs() before amax()")
        need(got.abs().amax() > 4.4, "the largest weights come back much smaller: the levels end at 1, so the scale "
             "must reach the largest magnitude")  # fmt: skip
        one = ql.nf4_quantize(x, None).dequantize()
        need(not same(got, one), "that is one scale for the whole tensor: each group has its own")
        need(not same(got, ql.absmax_quantize(x, 4, group_size=size).dequantize()), "these are evenly spaced levels")
        need(same(got, ql.nf4_quantize(x, size).dequantize()), "not every weight comes back as the nearest level")
    got = call(nf4_round, torch.zeros(2, 64), 64)
    need((numbers(got, (2, 64), "what comes back of zeros") == 0).all(), "a group of zeros should come back as zeros")
    return "the scale is the absmax, so all weights lie within the levels."


@exercise
def check_11_4(answer):
    """Bits per weight: 3-bit codes, groups of 32, 8-bit scales of which each 256 share a float32."""
    got, right = number(answer), 3 + 8 / 32 + 32 / (32 * 256)
    need(abs(got - 3) > 1e-3, "the scales are missing")
    need(abs(got - 3.25) > 2e-3, "8-bit scales need a scale themselves: a float32 for each 256 of them")
    need(abs(got - 3.375) > 1e-3, "256 scales belong to 256 groups: a float32 is shared by 256 · 32 weights")
    need(abs(got - 4) > 1e-3, "that is with a float32 for each group: here a scale takes 8 bits")
    need(abs(got - 3.5) > 1e-3, "that is with 16 bits for each scale: here a scale takes 8")
    need(abs(got - right) < 1e-3, "add up: the code, its share of a scale, its share of a float32")
    return f"3 + 8/32 + 32/8192 = {right:.3f}: the scales have become cheap."


# ---------------------------------------------------------------------------------------------------------------------
# 12. Outliers
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_12_1(answer):
    """Bytes of a cache: 24 layers, 1024 wide, 1000 tokens, 8 bits, 32 more for each 64 numbers."""
    got, count = number(answer), 24 * 1024 * 1000
    right = 2 * count * (8 + 32 / 64) / 8
    need(not near(got, 8 * right), "that is in bits: a byte has eight of them")
    need(not near(got, right / 2), "keys and values: two of everything")
    need(not near(got, 2 * count), "each group of 64 stores a scale and a lowest value besides")
    need(not near(got, 2 * count * (8 + 16 / 64) / 8), "a scale and a lowest value: 16 bits each, for each group")
    need(not near(got, right / 24), "that is for one layer")
    need(not near(got, right / 1000), "that is for one token")
    need(near(got, right), "2 · layers · width · tokens numbers, of 8 bits and their share of 32 more")
    return f"{right:,.0f} bytes, and a second text would take as many again."


@exercise
def check_12_2(smooth):
    """smooth(x, w, alpha): both smoothed, x [tokens, in] and w [out, in]; the product stays the same."""
    for outputs, inputs in ((24, 16), (16, 16)):
        x, w = bell(40, inputs), bell(outputs, inputs, seed=1)
        x[:, 3] *= 50
        w[:, 5] *= 4
        for alpha in (0.5, 0.75):
            s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
            new_x, new_w = several(call(smooth, x, w, alpha), "the activations", "the weight")
            new_x, new_w = numbers(new_x, x.shape, "the activations"), numbers(new_w, w.shape, "the weight")
            is_x, is_w = same(new_x, (x / s).double(), 1e-3), same(new_w, (w * s).double(), 1e-3)
            need(not (is_x and same(new_w, w.double(), 1e-6)), "only the activations were divided: the product changes")
            need(not (is_w and same(new_x, x.double(), 1e-6)), "only the weight was multiplied: the product changes")
            need(not (is_x and same(new_w, (w / s).double(), 1e-3)), "both were divided: multiply the weight")
            need(not (same(new_x, (x * s).double(), 1e-3) and same(new_w, (w / s).double(), 1e-3)),
                 "the other way round: divide the activations, multiply the weight")  # fmt: skip
            need(same(new_x @ new_w.T, (x @ w.T).double(), 1e-3), "the product of the two is no longer the same")
            need(not (same(new_x, x.double(), 1e-6)), "nothing was smoothed")
            need(is_x and is_w, "the product is the same, but the factors are not those of the formula")
    return "what leaves the activations must come up in the weight, or it is another function."


@exercise
def check_12_3(product):
    """product(q, zero_point, s, p, r): s · r · Σ (q - zero_point) p; q [tokens, in], p [out, in], r [out, 1]."""
    x, w = bell(5, 300).abs() - 0.1, bell(7, 300, seed=1)
    a, b = ql.zeropoint_quantize(x), ql.absmax_quantize(w, axis=0)
    a_codes, b_codes = a.qdata.double(), b.qdata.double()
    z, scales = a.zero_point.item(), a.scale.double() * b.scale.double().T
    got = call(product, a.qdata, z, a.scale.item(), b.qdata, b.scale)
    need(tuple(getattr(got, "shape", ())) != (7, 5), "it comes back turned round: [tokens, out]")
    got = numbers(got, (5, 7), "the product")
    right = (a_codes - z) @ b_codes.T * scales
    need(not same(got, a_codes @ b_codes.T * scales, 1e-3), "the zero point is missing: take it off the codes")
    need(not same(got, (a_codes + z) @ b_codes.T * scales, 1e-3), "take the zero point off, do not add it")
    need(not same(got, (a_codes @ b_codes.T - z) * scales, 1e-3), "each of the terms has a zero point: the sum of the "
         "weight's codes, times the zero point, is to be taken off")  # fmt: skip
    wrapped = (a.qdata - torch.tensor(z, dtype=torch.int8)).double() @ b_codes.T * scales
    need(not same(got, wrapped, 1e-3), "int8 minus int8 wraps around: widen first")
    sums = a_codes.long() @ b_codes.long().T
    overflown = [(sums - part).to(kind).double() * scales for kind in (torch.int8, torch.int16)
                 for part in (0, z * b_codes.long().sum(1))]  # fmt: skip
    need(not any(same(got, o, 1e-3) for o in overflown), "the sum does not fit into 8 or 16 bits: widen to int32 first")
    need(not same(got, (a_codes - z) @ b_codes.T, 1e-3), "the two scales are missing")
    need(same(got, right, 1e-5), "it should be s · r · Σ (q - zero_point) p")
    return "the correction, z times the sum of each output's codes, can be computed once and for all."


# ---------------------------------------------------------------------------------------------------------------------
# 13. Calibration
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_13_1(answer):
    """How far the second weight moves if rounding added 0.1 to the first: -0.1 · H12 / H22, with 1.2 and 4."""
    got, right = number(answer), -0.1 * 1.2 / 4
    need(abs(got + right) > 1e-3, "the sign: where the inputs rise together, the second weight must go down")
    need(abs(got + 0.12) > 1e-3 and abs(got - 0.12) > 1e-3, "divide by the mean square of the second input")
    need(abs(got + 0.06) > 1e-3, "that divides by the mean square of the first input: the second moves")
    need(abs(got + 0.1) > 1e-3, "the inputs are not equal: they have different sizes, and rise together only in part")
    need(abs(got - right) < 1e-3, "write the squared error with both changes in it, and set its derivative to zero")
    return "the error of the output that is left is what the second input cannot explain of the first."


@exercise
def check_13_2(gptq):
    """gptq(w, moment, scale): all weights on the grid (multiples of the scale, codes -7 to 7), errors passed on."""
    ratios, plain = [], []
    for seed in range(3):
        w = bell(24, 20, seed=seed)
        x = bell(400, 20, seed=seed + 50) @ (torch.eye(20) + 0.35 * bell(20, 20, seed=seed + 9))
        h, scale = x.T @ x / 400, (w.abs().max() / 10).item()
        got = numbers(call(gptq, w, h, scale), w.shape, "the rounded weight")
        codes = got / scale
        on_grid = (codes - codes.round()).abs() < 1e-3
        need(not same(got, w, 1e-6), "nothing is rounded: return multiples of the scale")
        need(on_grid.all(), f"only {on_grid.double().mean():.0%} of the weights lie on the grid: errors were passed to "
             "columns that were rounded already")  # fmt: skip
        need(codes.abs().max() < 7.5, "some codes lie beyond -7 and 7: a weight that was moved may leave the range")
        h, w = h.double(), w.double()
        u, right = torch.linalg.cholesky(torch.linalg.inv(h), upper=True), w.clone()
        for i in range(20):
            rounded = (right[:, i] / scale).round().clamp(-7, 7) * scale
            right[:, i + 1 :] -= ((right[:, i] - rounded) / u[i, i])[:, None] * u[i, i + 1 :]
            right[:, i] = rounded
        nearest = (w / scale).round().clamp(-7, 7) * scale
        error = ql.output_error(got - w, h)
        ratios.append(error / ql.output_error(right - w, h))
        plain.append(error / ql.output_error(nearest - w, h))
        need(not same(got, nearest, 1e-6), "every weight is rounded to the nearest: no error is passed on")
    worse, than_plain = sum(ratios) / 3, sum(plain) / 3
    need(than_plain < 1, f"the output's error is {than_plain:.1f} times that of plain rounding. Is the sign right? And "
         "does the inverse forget a column once it is rounded, as the rows of its Cholesky factor do?")  # fmt: skip
    need(worse < 1.1, f"the output's error is {worse:.2f} times what GPTQ reaches: are the errors divided by the "
         "diagonal, and passed to all columns still in float?")  # fmt: skip
    return f"on the grid, and {1 / than_plain:.1f} times less error in the output than plain rounding."


@exercise
def check_13_3(choose):
    """choose(candidates, loss, calibration, evaluation): (the best by calibration, its loss on the evaluation text)."""
    table = {"calibration": [3.0, 2.0, 1.0, 4.0], "evaluation": [5.0, 1.0, 2.0, 6.0]}
    read = []

    def loss(candidate, text):
        read.append((candidate, text))
        return table[text]["abcd".index(candidate)]

    best, value = several(call(choose, list("abcd"), loss, "calibration", "evaluation"), "the best", "its loss")
    need(best in list("abcd"), "return the candidate itself and its loss")
    need(best != "b", "the evaluation text chose: then its loss is the best of many, and no longer an honest measure")
    need(best != "d", "that is the worst of them")
    need(best == "c", "it is not the candidate with the least loss on the calibration text")
    need(number(value, "the loss") != 1.0, "that is the loss on the calibration text, which has chosen")
    need(number(value, "the loss") == 2.0, "report the loss of the chosen one on the evaluation text")
    judged = {candidate for candidate, text in read if text == "evaluation"}
    need(judged == {"c"}, "the evaluation text is for the chosen one only")
    return "one text chooses, another one judges."


@exercise
def check_13_4(fake_round):
    """fake_round(w, scale): 4-bit rounding with codes -7 to 7; gradient 1 where nothing is clipped, 0 beyond."""
    w, scale = 3 * bell(6, 50), 0.4
    leaf = w.clone().requires_grad_(True)
    with torch.enable_grad():
        result = fake_round(leaf, scale)
        if nothing(result):
            raise Unsolved
        got = numbers(result, w.shape, "the rounded weight")
        right = (w / scale).round().clamp(-7, 7) * scale
        need(not same(got, (w / scale).round() * scale), "codes beyond -7 and 7 are left: clamp them")
        need(not same(got, w, 1e-6), "the weights come back as they were: nothing was rounded")
        need(same(got, right), "the values are not those of 4-bit rounding with this scale")
        need(result.requires_grad, "no gradient comes through: detach only what should not count")
        (gradient,) = torch.autograd.grad(result.sum(), leaf, allow_unused=True)
    need(gradient is not None, "no gradient reaches the weight")
    inside, beyond = w.abs() < 6.9 * scale, w.abs() > 7.6 * scale  # between the two, either may be meant
    need((gradient != 0).any(), "the gradient is 0: rounding is flat, go round it with detach")
    need(not (gradient[beyond] != 0).any(), "beyond the range the value does not move: there the gradient is 0")
    need(not near(gradient[inside].mean().item(), 1 / scale), "the gradient is 1 / scale: the scale must lead back too")
    need(not near(gradient[inside].mean().item(), 2), "the gradient is 2: the weight counts twice")
    need(same(gradient[inside], torch.ones(inside.sum())), "the gradient should be 1 inside the range and 0 beyond")
    return "straight through where rounding moves with the weight, nothing where it is clipped."


# ---------------------------------------------------------------------------------------------------------------------
# 14. Choosing a scheme
# ---------------------------------------------------------------------------------------------------------------------


@exercise
def check_14_1(answer):
    """Billions of weights of 4.25 bits in 8 GB, of which 2 GB stay free for the cache."""
    got, right = number(answer), 6e9 * 8 / 4.25 / 1e9
    need(not near(got, right * 1e9, 0.02), "give it in billions")
    need(not near(got, 8e9 * 8 / 4.25 / 1e9, 0.02), "2 GB stay free for the cache")
    need(not near(got, 12, 0.01), "that is for 4 bits: the scales take a quarter of a bit more")
    need(not near(got, 16, 0.01), "that is for 4 bits, and without the 2 GB that stay free")
    need(not near(got, right / 8, 0.02), "bits and bytes: a byte has eight bits")
    need(not near(got, 3, 0.02), "that is for 16 bits")
    need(near(got, right, 0.02), "divide the bits that there are by the bits of a weight")
    return f"{right:.1f} billion; in 16 bits it would be 3."


@exercise
def check_14_2(gain):
    """gain(uniform, bits, loss): Δ loss of a uniform model of the same bits (logarithms interpolated), minus loss."""
    uniform = {2.25: 1.6, 3.25: 0.2, 4.25: 0.025, 8.25: 0.001}
    for bits, loss in ((3.75, 0.06), (4.25, 0.02), (2.5, 1.2), (6.25, 0.004)):
        low, high = max(b for b in uniform if b <= bits), min(b for b in uniform if b >= bits)
        t = (bits - low) / (high - low) if high > low else 0.0
        right = uniform[low] ** (1 - t) * uniform[high] ** t - loss
        got = number(call(gain, dict(uniform), bits, loss), "the gain")
        need(abs(got + right) > 1e-6 or abs(right) < 1e-6, "the sign: uniform minus mixed, so that above 0 is a gain")
        if 0 < t < 1:

            def is_it(value, got=got, loss=loss):
                return abs(got - (value - loss)) < 1e-6

            need(not is_it(uniform[low]), f"a uniform model of {low} bits is smaller than a mixed one of {bits}: of "
                 "course it loses, compare at equal bits")  # fmt: skip
            need(not is_it(uniform[high]), f"a uniform model of {high} bits is larger than a mixed one of {bits}")
            straight, swapped = (1 - t) * uniform[low] + t * uniform[high], uniform[low] ** t * uniform[high] ** (1 - t)
            need(not is_it(straight), "a straight line flatters the mixed model: interpolate the logarithm of Δ loss")
            need(t == 0.5 or not is_it(swapped), "the neighbours have changed places: the nearer one counts more")
        need(abs(got - right) < 1e-5, f"at {bits} bits it says {got:+.4f}, expected {right:+.4f}")
    return "at equal bits; a mixed scheme gains only what is left then."


@exercise
def check_14_3(front):
    """front(points): the names in {name: (bits, Δ loss)} that no other one beats."""
    points = {
        "a": (4.25, 0.03), "b": (4.5, 0.01), "c": (4.5, 0.02), "d": (8.25, 0.0), "e": (3.25, 0.2), "f": (5.0, 0.01),
        "g": (9.0, 0.05), "h": (3.25, 0.2), "i": (4.3, 0.5),
    }  # fmt: skip
    result = call(front, dict(points))
    need(isinstance(result, (list, tuple, set, dict)) and all(isinstance(n, str) for n in result), "return names")
    got, right = set(result), {"a", "b", "d", "e", "h"}
    need(len(list(result)) == len(got), "some name is there twice")
    need(got != set(points) - right, "these are the ones that are beaten: return the others")
    need("c" not in got and "f" not in got, "at equal bits the loss decides, at equal loss the bits")
    need("g" not in got and "i" not in got, "it keeps a scheme although another one is smaller and better")
    need({"e", "h"} & got, "the smallest one belongs to the front: nothing so small is better")
    need({"e", "h"} <= got, "two equal points do not beat each other: keep both")
    need(got == right, f"it says {sorted(got)}, expected {sorted(right)}")
    return "whatever is not on the front, something else beats: only the front is to be discussed."


# ---------------------------------------------------------------------------------------------------------------------
# For teachers
# ---------------------------------------------------------------------------------------------------------------------


def grade(path) -> dict:
    """Run a student's notebook in this folder; "2.1" -> (passed, message) for every exercise of its chapters."""
    import json

    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    chapters = {int(chapter) for chapter in re.findall(r"checks\.check_(\d\d)_", "".join(c.source for c in nb.cells))}
    nb.cells.append(nbformat.v4.new_code_cell("import checks, json\nprint(json.dumps(checks.RESULTS))"))
    client = NotebookClient(nb, timeout=600, interrupt_on_timeout=True, kernel_name="python3", allow_errors=True)
    client.execute(cwd=str(Path(__file__).resolve().parent))
    text = "".join(output.get("text", "") for output in nb.cells[-1].outputs) or "{}"
    results = json.loads(text.strip().splitlines()[-1])
    expected = [number for number in EXERCISES if int(number.split(".")[0]) in chapters]
    return {number: tuple(results.get(number, (None, "the checker was not called"))) for number in expected}


def main(paths: list[str]) -> None:
    for path in paths:
        print(path)
        try:
            results = grade(path)
        except Exception as error:  # one spoilt file should not cost the others their grades
            results = {"all": (False, f"it could not be run: {type(error).__name__}")}
        for number, (passed, message) in results.items():
            print(f"  {number:5s} {'yes' if passed else '-' if passed is None else 'no':4s} {message}")


if __name__ == "__main__":
    main(sys.argv[1:])
