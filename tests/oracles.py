"""Compare quantlib's arithmetic, code for code, with PyTorch, torchao and bitsandbytes.

    python3 -m venv peers && . peers/bin/activate
    pip install -r requirements.txt torchao bitsandbytes
    python tests/oracles.py

An environment of its own, because torchao prints when transformers imports it, which spoils the notebooks' outputs.
PyTorch alone will do: a library that is missing is left out. Not collected by pytest, which checks the codes against
PyTorch as well.

Most rows run over the same tensors: random ones of several shapes, in float32, float16 and bfloat16, of magnitudes
from 1e-30 to 1e30 as far as the type goes; and edge cases: zeros, a constant, one outlier among small numbers, only
negative ones, numbers of few digits (which make ties), one of them not zero. Half-precision inputs are widened first
where a library would compute in half precision. The rows "their test" take shapes, types and groups from the library's
own tests (torchao's `test_quant_primitives.py`, bitsandbytes' `test_functional.py`), and the bound where there is one.

- same: share of the codes (or zero points) that are equal. steps: how far two codes are apart at most.
- scale: the largest relative difference between two scales.
- claim "same": the same bits everywhere, in codes, scales and numbers. "their rule": another convention, or another
  order of operations; a function below restates it (`torchao_symmetric`, …), and gives their codes to the bit; ours are
  at most one step away. "their bound": what their own test asks for.

The exit status is 1 if a claim fails.

Results
=======

@RESULTS@
"""

import platform
import sys
import warnings
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantlib as ql

SHAPES = [(64, 128), (33, 192), (1, 64), (257, 64), (12, 1280)]  # rows, inputs: whole groups of 64
TYPES = torch.float32, torch.float16, torch.bfloat16


def tensors():
    """Yield `(name, x)`: matrices [rows, inputs]."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator)
        for dtype in TYPES:
            for power in (-30, -20, -10, -3, 0, 3, 10, 20, 30):
                scaled = (x * 10.0**power).to(dtype)
                if torch.isfinite(scaled).all() and scaled.abs().max() > 0:
                    yield f"normal 1e{power} {dtype}", scaled
        outlier = x * 1e-3
        outlier[0, 0] = 1000
        few = torch.randint(-40, 41, shape, generator=generator) / 8
        edges = {"zeros": 0 * x, "constant": 0 * x + 0.3, "outlier": outlier, "negative": -x.abs(), "few digits": few}
        yield from edges.items()
        yield "positive", x.abs() + 5
        one = 0 * x
        one[-1, -1] = -2.5
        yield "one number", one


@dataclass
class Row:
    """What a comparison has seen. `add` takes one tensor's and notes its name if the claim does not hold."""

    claim: str
    apart: float = 3e-7  # how far two scales may be apart where the claim is "their rule"
    tensors: int = 0
    codes: int = 0
    equal: int = 0
    steps: int = 0
    scale: float = 0.0
    failures: list = field(default_factory=list)

    def add(self, name, codes, theirs, scales=None, values=None, restated=None):
        """codes: ours. scales, values: pairs of ours and theirs. restated: codes by their rule, from our functions."""
        codes, theirs = codes.flatten().double(), theirs.flatten().double()
        self.tensors, self.codes = self.tensors + 1, self.codes + len(codes)
        self.equal += (codes == theirs).sum().item()
        self.steps = max(self.steps, (codes - theirs).abs().max().int().item())
        if scales is not None:
            ours, other = (scale.flatten().double() for scale in scales)
            self.scale = max(self.scale, ((other - ours).abs() / ours).max().item())
        expected = codes if restated is None else restated.flatten().double()
        holds = torch.equal(expected, theirs) and (values is None or torch.equal(*values))
        if self.claim == "same":
            holds = holds and torch.equal(codes, theirs) and self.scale == 0
        else:
            holds = holds and self.steps <= 1 and self.scale <= self.apart
        if self.claim != "their bound" and not holds:
            self.failures.append(name)


# The rules of others, where they differ from ours. blocks: [blocks, elements that share a scale].


def torchao_symmetric(blocks, bits):
    """Its own range has one code more on the negative side, and a scale finer for it: amax / 127.5 for 8 bits."""
    qmax = 2 ** (bits - 1) - 1
    scale = (blocks.abs().amax(1, keepdim=True) / (qmax + 0.5)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(blocks * (1 / scale)).clamp(-qmax - 1, qmax)


def torchao_asymmetric(blocks, bits):
    """The range is divided at once, which overflows for the largest floats; the zero point comes by a division."""
    qmin, qmax = ql.code_range(bits, symmetric=False)
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return (torch.round(blocks * (1 / scale)) + zero).clamp(qmin, qmax), zero


def bitsandbytes_int8(blocks):
    """127 / absmax at once; we round absmax / 127 first, because that is the scale that is stored."""
    return torch.round(blocks * (127 / blocks.abs().amax(1, keepdim=True)))


def bitsandbytes_nf4(blocks, levels):
    """Times the reciprocal of the absmax; we divide by the absmax."""
    quotient = blocks * (1 / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38))
    return torch.bucketize(quotient.clamp(-1, 1), (levels[1:] + levels[:-1]) / 2)


def pytorch(table):
    """fake_quantize, with our scales and zero points: the same numbers come back, and so the same codes."""
    for quantize, low in ((ql.absmax_quantize, -127), (ql.zeropoint_quantize, -128)):
        for axis in (None, 0, 1):
            kind = "per_tensor" if axis is None else "per_channel"
            row = table["torch", f"fake_quantize_{kind}_affine", f"{quantize.__name__}(axis={axis})"] = Row("same")
            for name, x in tensors():
                q = quantize(x, axis=axis)
                zero = q.zero_point.int() if low == -128 else torch.zeros_like(q.scale).int()
                if axis is None:
                    theirs = torch.fake_quantize_per_tensor_affine(x.float(), q.scale, zero, low, 127)
                else:
                    scales = q.scale.flatten(), zero.flatten()
                    theirs = torch.fake_quantize_per_channel_affine(x.float(), *scales, axis, low, 127)
                codes = torch.round(theirs.double() / q.scale.double()) + zero
                row.add(name, q.qdata, codes, values=(q.dequantize(), theirs))


def in_blocks(x, block):
    """x, any shape, cut into blocks of a shape: [blocks, elements], as torchao's block_size counts them."""
    cut = [size for length, part in zip(x.shape, block, strict=True) for size in (length // part, part)]
    outer, inner = range(0, 2 * x.ndim, 2), range(1, 2 * x.ndim, 2)
    return x.reshape(cut).permute(*outer, *inner).flatten(x.ndim).flatten(0, -2)


def torchao(table):
    """choose_qparams_affine and quantize_affine; then quantize_affine and dequantize_affine with our scales."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    symmetric, asymmetric = MappingType.SYMMETRIC, MappingType.ASYMMETRIC

    def compare(data, label, bits, arguments, block_of, mapping, own_range, shared, prefix=""):
        """One row; and `shared`, one for their zero points and one for quantizing with our scales."""
        quantize = ql.absmax_quantize if mapping is symmetric else ql.zeropoint_quantize
        qmax = 2 ** (bits - 1) - 1
        qmin = -qmax - 1 if own_range else -qmax
        kind = f"{prefix}{mapping.name.lower()}, {qmin}…{qmax}"
        row = table["torchao", kind, f"{quantize.__name__}({label})"] = Row("their rule" if own_range else "same")
        row.apart = 0.5001 / qmax if mapping is symmetric else row.apart
        zeros, given = shared
        for name, x in data:
            x = x.float()
            block, q = block_of(x), quantize(x, bits, **arguments)
            scale, zero = choose_qparams_affine(x, mapping, block, torch.int8, qmin, qmax)
            codes = quantize_affine(x, block, scale, zero, torch.int8, qmin, qmax)
            blocks, restated = in_blocks(x, block), None
            ours, theirs = in_blocks(q.qdata, block).int(), in_blocks(codes, block).int()
            if mapping is asymmetric:
                restated, points = torchao_asymmetric(blocks, bits)
                zeros.add(name, q.zero_point, zero, restated=points)
                ours, theirs = ours - q.zero_point.reshape(-1, 1).int(), theirs - zero.reshape(-1, 1).int()
                restated = restated - points
            elif own_range:
                restated = torchao_symmetric(blocks, bits)
            filled = blocks.abs().amax(1) > 0
            scales = q.scale.flatten(), torch.where(filled, scale.flatten(), 1)  # of zeros: theirs is 1.2e-38, ours 1
            row.add(name, ours, theirs, scales, restated=restated)
            if mapping is asymmetric or not own_range:
                zero = q.zero_point if mapping is asymmetric else torch.zeros_like(q.scale).to(torch.int8)
                codes = quantize_affine(x, block, q.scale, zero, torch.int8, qmin, qmax)
                values = dequantize_affine(codes, block, q.scale, zero, torch.int8, qmin, qmax)
                given.add(name, q.qdata, codes, values=(q.dequantize(), values))

    settings = [  # bits, how scales are shared, our arguments, block of theirs
        (8, "8 bits", {}, lambda x: tuple(x.shape)), (8, "8 bits, axis=0", {"axis": 0}, lambda x: (1, x.shape[1])),
        *((b, f"{b} bits, group_size=64", {"group_size": 64}, lambda x: (1, 64)) for b in (8, 4, 2)),
    ]  # fmt: skip
    shared = Row("their rule"), Row("same")
    for mapping, own_range in ((symmetric, False), (symmetric, True), (asymmetric, True)):
        for bits, label, arguments, block in settings:
            compare(tensors(), label, bits, arguments, block, mapping, own_range, shared)
    for kind, row in zip(("asymmetric, zero points", "both, with our scales"), shared, strict=True):
        table["torchao", kind, "all of these"] = row
    cases = [  # from its tests of these functions: shape, our arguments, block of theirs, mapping, own range
        ((10, 10), {"group_size": 2}, (1, 2), symmetric, True), ((10, 10), {}, (10, 10), symmetric, True),
        ((10, 10), {"axis": 0}, (1, 10), symmetric, False), ((10, 10), {"axis": 0}, (1, 10), asymmetric, True),
        ((10, 10), {}, (10, 10), asymmetric, True), ((10, 10), {"axis": 1}, (10, 1), asymmetric, True),
        ((3, 3, 10, 10), {"axis": 2}, (3, 3, 1, 10), asymmetric, True),
    ]  # fmt: skip
    generator, shared = torch.Generator().manual_seed(0), (Row("their rule"), Row("same"))
    for shape, arguments, block, mapping, own_range in cases:
        data = [(f"seed {i}", torch.randn(shape, generator=generator)) for i in range(20)]
        data.append(("zeros", torch.zeros(shape)))
        label = ", ".join([*(f"{name}={value}" for name, value in arguments.items()), f"{list(shape)}"])
        compare(data, label, 8, arguments, lambda x, block=block: block, mapping, own_range, shared, "their test: ")
    for kind, row in zip(("asymmetric, zero points", "both, with our scales"), shared, strict=True):
        table["torchao", f"their test: {kind}", "all of these"] = row


def bitsandbytes(table):
    """quantize_4bit and dequantize_4bit, nf4; int8_vectorwise_quant."""
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, int8_vectorwise_quant, quantize_4bit

    levels = get_4bit_type("nf4", device="cpu")
    row = table["bitsandbytes", "the levels of nf4", "NF4"] = Row("same")
    row.add("levels", torch.tensor(ql.NF4), levels)

    def nf4(row, name, x, size):
        """Returns the mean error of our numbers, and the mean relative error."""
        q = ql.nf4_quantize(x, size)
        packed, state = quantize_4bit(x, blocksize=size, quant_type="nf4")
        codes = torch.stack([packed >> 4, packed & 15], dim=-1)  # the first of a pair takes the high half
        scales = q.scale.flatten(), torch.where(state.absmax > 0, state.absmax, 1)  # of zeros: theirs is 0, ours 1
        pairs = q.qdata.reshape(-1, 2).to(torch.uint8)
        state.absmax, state.dtype = q.scale.flatten(), torch.float32
        values = dequantize_4bit((pairs[:, :1] << 4) | pairs[:, 1:], state).reshape(x.shape)  # our codes, their values
        restated = bitsandbytes_nf4(x.float().reshape(-1, size), levels)
        row.add(name, q.qdata, codes, scales, (q.dequantize(), values), restated)
        error = (x.float() - q.dequantize()).abs()
        return error.mean().item(), (error / (x.float().abs() + 1e-8)).mean().item()

    for size in (64, 32):
        row = Row("their rule")
        for name, x in tensors():
            nf4(row, name, x, size)
        table["bitsandbytes", "quantize_4bit, dequantize_4bit", f"nf4_quantize(group_size={size})"] = row
    row = table["bitsandbytes", "int8_vectorwise_quant", "absmax_quantize(axis=0)"] = Row("their rule")
    for name, x in tensors():
        q = ql.absmax_quantize(x, axis=0)
        codes, absmax, _ = int8_vectorwise_quant(x.float())
        filled = absmax > 0  # 127 / 0 times 0 is no number, so a row of zeros is left out
        if filled.any():
            scales = q.scale[filled, 0], absmax[filled] / 127
            row.add(name, q.qdata[filled], codes[filled], scales, restated=bitsandbytes_int8(x.float()[filled]))

    # The bounds of its own tests: of NF4, the mean error and the mean relative error, which it lets grow by 0.001; of
    # int8, one step in 1 of 500 codes.
    expected = {
        64: (0.072792, 0.203299), 128: (0.076835, 0.215252), 256: (0.080326, 0.226044), 512: (0.083535, 0.236021),
        1024: (0.086603, 0.245365),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for size, bounds in expected.items():
        function = "their test: errors {:.4f}, {:.4f}".format(*bounds)
        codes = Row("their rule")
        errors = [
            nf4(codes, str(dtype), torch.randn(1024, 1024, generator=generator).to(dtype), size) for dtype in TYPES
        ]
        worst = [max(kind) for kind in zip(*errors, strict=True)]
        ours = "nf4_quantize(group_size={}): {:.4f}, {:.4f}".format(size, *worst)
        table["bitsandbytes", function, ours] = replace(codes, claim="their bound")
        if any(got > bound + 1e-3 for got, bound in zip(worst, bounds, strict=True)):
            table["bitsandbytes", function, ours].failures.append(str(worst))
    row = Row("their bound")
    table["bitsandbytes", "their test: 1 step in 1 of 500", "absmax_quantize(axis=0), float16"] = row
    for shape in ((1024, 1024), (999, 4095), (7, 33)):
        x = torch.randn(shape, generator=generator).half()
        row.add(str(shape), ql.absmax_quantize(x, axis=0).qdata, int8_vectorwise_quant(x)[0])
    if row.steps > 1 or row.equal < (1 - 1 / 500) * row.codes:
        row.failures.append(f"{row.steps} steps, {row.equal} of {row.codes} the same")


NOTES = """\
Where two do not coincide, and why:
- torchao, symmetric, -128…127, the range it takes by default: it divides amax by 127.5 (4 bits: -8…7, by 7.5). The
  scale is finer by 127 / 127.5; the largest number, if positive, rounds to 128 and is clipped to 127, half a step off.
- torchao, asymmetric: its scale is (max - min) / 255, ours max / 255 - min / 255, which cannot overflow. They differ in
  the last bit, which decides some ties, of codes and of zero points. Codes are compared less their zero points.
- torchao, all zeros: its scale is the smallest normal number, ours 1. Both give zeros back.
- bitsandbytes, nf4: it multiplies by the reciprocal of the absmax, ours divides by it: a last bit, which may decide a
  tie (in these tensors it did so as often as "same" says).
- bitsandbytes, nf4, all zeros: its absmax is 0, our scale 1. Both give zeros back.
- bitsandbytes, int8: it stores the absmax, ours absmax / 127; it multiplies by 127 / absmax, ours by
  1 / (absmax / 127), as PyTorch does; that decides some ties. Its row of zeros is 0 times infinity, so left out here.
- bitsandbytes packs the first of two codes into the high half of a byte, `pack_int4` into the low half."""


def main() -> int:
    warnings.filterwarnings("ignore")
    table, missing = {}, []
    for compare in (pytorch, torchao, bitsandbytes):
        try:
            compare(table)
        except ImportError as error:
            missing.append(f"{compare.__name__} left out: {error}")
    print(f"Python {platform.python_version()}, {platform.machine()}", *missing, sep="\n")
    form = "{:38}{:44}{:>7}{:>9}{:>9}{:>6}{:>7}  {:12}{}".format
    for library, rows in groupby(table.items(), key=lambda item: item[0][0]):
        columns = "ours", "tensors", "codes", "same", "steps", "scale", "claim", "holds"
        print("\n" + form(f"{library} {version(library)}", *columns))
        for (_, function, ours), row in rows:
            same = "all" if row.equal == row.codes else f"{row.equal / row.codes:.3%}"
            scale = f"{row.scale:.0e}" if row.scale else "0"
            holds = "no" if row.failures else "yes"
            print(form(function, ours, row.tensors, row.codes, same, row.steps, scale, row.claim, holds))
    print(f"\n{NOTES}")
    failed = [f"{' '.join(key)}: {', '.join(row.failures[:5])}" for key, row in table.items() if row.failures]
    print(*(f"FAILED {line}" for line in failed), sep="\n", end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
