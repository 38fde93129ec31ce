"""Properties of the quantizers that hold for every tensor: Hypothesis makes up tensors and looks for one that fails.

50 tensors for each property by default, the same in every run; 1,000 new ones for each with
`HYPOTHESIS_PROFILE=long pytest tests/test_properties.py -o addopts=`. Offline, on the CPU; what needs a GPU is skipped
where there is none.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import quantlib as ql

torch.set_num_threads(1)
SYMMETRIC = [ql.absmax_quantize, ql.clip_quantize]
QUANTIZERS = [*SYMMETRIC, ql.zeropoint_quantize]
quantizers = pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda function: function.__name__)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# What is lost to rounding in float32, in scales: a code, up to 255, goes through at most six roundings of 2^-24 each
# (the reciprocal of the scale, times x, and the same for the zero point; the zero point minus 128; times the scale).
SLACK = 6 * 255 * 2.0**-24  # 9.1e-5

# --- tensors ---

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["whole", "transposed", "sliced", "expanded", "channels"]
KINDS = ["normal", "uniform", "skewed", "outlier", "constant", "grid", "sparse", "signs", "wide"]


def values(kind, shape, generator):
    """Numbers of this kind, of size about 1, float64."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "uniform":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        return x.exp()
    if kind == "outlier":  # one huge one, anywhere
        where, power = (torch.randint(*ends, (), generator=generator) for ends in ((x.numel(),), (2, 8)))
        x.view(-1)[where] = 10.0**power
        return x
    if kind == "constant":
        return torch.ones_like(x) * x.view(-1)[0]
    if kind == "grid":  # few digits: ties
        return (8 * x).round() / 2
    if kind == "sparse":
        return x * (torch.rand(shape, generator=generator) < 0.2)
    if kind == "signs":  # nothing but the two ends
        return x.sign()
    if kind == "wide":  # every magnitude at once
        return x * 10.0 ** torch.randint(-30, 1, shape, generator=generator)
    return x


def arrange(x, layout):
    """x, or another tensor made of its numbers, of the same number of dimensions, laid out in memory as asked for."""
    if layout == "transposed":
        return x.transpose(0, -1) if x.ndim else x
    if layout == "sliced" and x.ndim:
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2]  # NaN lies in between
    if layout == "expanded" and x.ndim:
        return x[:1].expand(x.shape)
    if layout == "channels" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    return x


@st.composite
def tensors(draw, ndim=(0, 4)):
    """A tensor, any: its numbers listed one by one, or of a kind and a magnitude that fits the dtype."""
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.integers(*ndim))
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)))
    largest = min(float(np.float32(1e38)), torch.finfo(dtype).max)
    if draw(st.booleans()) and math.prod(shape) <= 24:
        number = st.floats(-largest, largest, width=16 if dtype == torch.float16 else 32)
        numbers = draw(st.lists(number, min_size=math.prod(shape), max_size=math.prod(shape)))
        x = torch.tensor(numbers, dtype=torch.float64).view(shape)
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        x = values(draw(st.sampled_from(KINDS)), shape, generator) + draw(st.sampled_from([0, 0, 1, -3, 1000]))
        x = x * 10.0 ** draw(st.integers(-45, 38)) if draw(st.booleans()) else x
        x = x.clamp(-largest, largest)
    return arrange(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@dataclass
class Case:
    """A tensor and how to quantize it."""

    x: torch.Tensor
    how: dict

    def quantize(self, function, **more):
        """Or nothing to see here, if a scale does not fit its dtype, which the message then says."""
        try:
            return function(self.x, **self.how, **more)
        except ValueError as error:
            assert "scale_dtype" in str(error) and self.how["scale_dtype"] is not None, error
            assume(False)

    def parts(self, tensor):
        """The elements of a tensor shaped like x, or like the scales, that share a scale: [scales, elements]."""
        axis, group_size, ndim = self.how.get("axis"), self.how.get("group_size"), self.x.ndim
        tensor = tensor.expand(self.x.shape) if not group_size else tensor
        if group_size:
            share = 1 if tensor.numel() < self.x.numel() or group_size == 1 else group_size
            return tensor.reshape(-1, share).expand(-1, group_size)
        if axis is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(axis, 0).flatten(1) if ndim > 1 else tensor[:, None]


@st.composite
def cases(draw, bits=(2, 8), scale_dtypes=(None, None, torch.float16, torch.bfloat16)):
    """A tensor, bits, and which elements share a scale."""
    x = draw(tensors())
    how = {"bits": draw(st.integers(*bits)), "scale_dtype": draw(st.sampled_from(scale_dtypes))}
    how["axis"] = draw(st.none() | st.integers(-x.ndim, x.ndim - 1)) if x.ndim else None
    if x.ndim and draw(st.booleans()):
        inputs = x.shape[-1]
        how["group_size"] = draw(st.sampled_from([size for size in range(1, inputs + 1) if inputs % size == 0]))
    return Case(x, how)


def wide(tensor):
    return tensor.double() if isinstance(tensor, torch.Tensor) else torch.tensor(float(tensor), dtype=torch.float64)


# --- quantizing ---


@quantizers
@given(case=cases())
def test_codes_are_in_range(quantize, case):
    """One int8 for each number, in the range of `code_range`; x is not touched; scales can be inverted."""
    before = case.x.clone()
    q = case.quantize(quantize)
    qmin, qmax = ql.code_range(case.how["bits"], symmetric=quantize in SYMMETRIC)
    assert q.qdata.dtype == torch.int8 and q.qdata.shape == case.x.shape == q.dequantize().shape
    assert qmin <= q.qdata.min() and q.qdata.max() <= qmax
    assert q.scale.dtype == (case.how["scale_dtype"] or torch.promote_types(case.x.dtype, torch.float32))
    assert (q.scale > 0).all() and torch.isfinite(q.scale).all() and torch.isfinite(1 / q.scale.double()).all()
    assert torch.equal(case.x, before)
    if isinstance(q.zero_point, torch.Tensor):
        assert q.zero_point.dtype == torch.int8 and q.zero_point.shape == q.scale.shape
        assert qmin <= q.zero_point.min() and q.zero_point.max() <= qmax


@quantizers
@given(case=cases())
def test_error_is_at_most_half_a_scale(quantize, case):
    """Between the two ends of the codes; what lies beyond an end becomes that end."""
    q = case.quantize(quantize)
    qmin, qmax = ql.code_range(case.how["bits"], symmetric=quantize in SYMMETRIC)
    x, back, scale = (case.parts(wide(t)) for t in (case.x, q.dequantize(), q.scale))
    zero = case.parts(wide(q.zero_point)) if isinstance(q.zero_point, torch.Tensor) else 0
    inside = torch.minimum(torch.maximum(x, (qmin - zero) * scale), (qmax - zero) * scale)
    assert ((back - inside).abs() <= (0.5 + SLACK) * scale).all()
    if quantize is not ql.clip_quantize and case.how["scale_dtype"] is None:  # then nothing lies further beyond
        assert ((back - x).abs() <= (0.5 + SLACK) * scale).all()


@quantizers
@given(case=cases())
def test_order_is_kept(quantize, case):
    """Among numbers that share a scale, the larger one never gets the smaller code; equal ones get equal codes."""
    q = case.quantize(quantize)
    x, codes = case.parts(case.x), case.parts(q.qdata).int()
    order = x.double().argsort(dim=1)
    x, codes = x.gather(1, order), codes.gather(1, order)
    assert (codes.diff(dim=1) >= 0).all() and not codes.diff(dim=1)[x.diff(dim=1) == 0].any()


@quantizers
@given(case=cases())
def test_zero_comes_back_as_zero(quantize, case):
    """Exactly, as a positive zero, wherever it is; and a part of zeros has scale 1."""
    x = torch.where(torch.arange(case.x.numel()).view(case.x.shape) % 3 == 0, 0, case.x)
    zeros = Case(x, case.how)
    q = zeros.quantize(quantize)
    back = q.dequantize()
    assert (back[x == 0] == 0).all() and not torch.signbit(back[x == 0]).any()
    nothing = (zeros.parts(x) == 0).all(dim=1)
    assert (zeros.parts(q.scale)[nothing] == 1).all()


@given(case=cases())
def test_opposite_numbers_get_opposite_codes(case):
    q, negative = case.quantize(ql.absmax_quantize), Case(-case.x, case.how).quantize(ql.absmax_quantize)
    assert torch.equal(negative.qdata, -q.qdata) and torch.equal(negative.scale, q.scale)


@given(case=cases())
def test_absmax_twice_is_absmax_once(case):
    """The codes are the same, always. The scale is qmax * scale / qmax: the same to one unit in the last place."""
    q = case.quantize(ql.absmax_quantize)
    again = Case(q.dequantize(), case.how).quantize(ql.absmax_quantize)
    assert torch.equal(again.qdata, q.qdata)
    full = case.parts(q.qdata).any(dim=1, keepdim=True)  # where all codes are 0, the scale becomes 1
    scale, second = (torch.where(full, case.parts(t), 1).double() for t in (q.scale, again.scale))
    assert ((second - scale).abs() <= torch.finfo(q.scale.dtype).eps * scale).all()
    if case.how["scale_dtype"] is not None:  # products with 16-bit scales are exact in float32: so is all else
        assert torch.equal(again.dequantize(), q.dequantize())


@given(case=cases(scale_dtypes=[None]))
def test_zero_point_twice_is_zero_point_once(case):
    """The codes are the same if the first time took the whole range, both ends of it.

    It may take one code less: `[-1, 509]` has scale 2, both ends are ties (-0.5 and 254.5), and both round to even,
    to a range of 254 codes. The second time makes 255 of it. That is the method, and not how it is written.
    """
    q = case.quantize(ql.zeropoint_quantize)
    again = Case(q.dequantize(), case.how).quantize(ql.zeropoint_quantize)
    qmin, qmax = ql.code_range(case.how["bits"], symmetric=False)
    codes, zero = case.parts(q.qdata).int(), case.parts(q.zero_point).int()
    low, high = (function(codes, dim=1, keepdim=True) for function in (torch.amin, torch.amax))
    whole = (torch.minimum(low, zero[:, :1]) == qmin) & (torch.maximum(high, zero[:, :1]) == qmax)
    same = case.parts(again.qdata) == codes
    assert same[whole.expand_as(same)].all()


def test_zero_point_may_change_its_mind():
    """The exception of the property above."""
    q = ql.zeropoint_quantize(torch.tensor([-1.0, 509.0]))
    again = ql.zeropoint_quantize(q.dequantize())
    assert (q.scale, q.qdata.tolist(), again.qdata.tolist()) == (2, [-128, 126], [-128, 127])


@quantizers
@given(case=cases())
def test_every_part_is_quantized_on_its_own(quantize, case):
    """The elements that share a scale get the codes, the scale and the zero point that they get as a tensor alone."""
    q = case.quantize(quantize)
    zero = q.zero_point if isinstance(q.zero_point, torch.Tensor) else torch.zeros_like(q.scale)
    parts = zip(*(case.parts(t) for t in (case.x, q.qdata, q.scale, zero)), strict=True)
    for x, codes, scale, zero_point in parts:
        alone = quantize(x, bits=case.how["bits"], scale_dtype=case.how["scale_dtype"])
        if quantize is not ql.clip_quantize:  # its sum of errors depends on the order, and so may a near tie
            assert torch.equal(alone.qdata, codes) and alone.scale == scale[0] and alone.zero_point == zero_point[0]
        else:
            pairs = (alone.qdata, alone.scale), (codes, scale)
            own, here = ((wide(a) * wide(b) - wide(x)).square().sum() for a, b in pairs)
            assert own == pytest.approx(here.item(), rel=1e-4, abs=1e-12 * wide(x).square().sum().item())


@quantizers
@given(case=cases())
def test_layout_does_not_matter(quantize, case):
    """A transposed, sliced or expanded tensor gets the codes of its contiguous copy."""
    q, copy = case.quantize(quantize), Case(case.x.contiguous().clone(), case.how).quantize(quantize)
    if quantize is not ql.clip_quantize:  # as above
        assert torch.equal(q.qdata, copy.qdata) and torch.equal(q.scale, copy.scale)
    assert q.nbytes == copy.nbytes


@pytest.mark.parametrize("quantize", [ql.absmax_quantize, ql.zeropoint_quantize])
@given(case=cases(scale_dtypes=[None]), power=st.integers(-8, 8))
def test_a_power_of_two_changes_only_the_scale(quantize, case, power):
    """Where no number leaves the normal ones: times 2^n is exact, so the codes stay and the scale is times 2^n."""
    x = case.x.to(torch.promote_types(case.x.dtype, torch.float32))
    size = x.abs()[x != 0]
    assume(size.numel() and 1e-30 < size.min() and size.max() < 1e30)
    q, times = (Case(x * factor, case.how).quantize(quantize) for factor in (1, 2.0**power))
    nothing = case.parts(x == 0).all(dim=1)
    assert torch.equal(q.qdata, times.qdata)
    assert torch.equal((case.parts(q.scale) * 2.0**power)[~nothing], case.parts(times.scale)[~nothing])


def squared_errors(case, q):
    return (case.parts(wide(q.dequantize())) - case.parts(wide(case.x))).square().sum(dim=1)


@given(case=cases())
def test_clipping_is_never_worse_than_absmax(case):
    """In squared error, for each scale. The errors are summed in float32: a few units of the last digit may be lost."""
    clipped, full = case.quantize(ql.clip_quantize), case.quantize(ql.absmax_quantize)
    assert (squared_errors(case, clipped) <= squared_errors(case, full) * (1 + 1e-4)).all()
    largest, cut = (case.parts(wide(q.scale)) for q in (full, clipped))
    assert (cut <= largest).all()
    if case.how["scale_dtype"] is None and case.x.abs().max() > 1e-30:
        nothing = case.parts(wide(case.x).abs()).amax(dim=1) < 1e-30
        assert (cut >= 0.4 * (1 - 1e-6) * largest)[~nothing].all()


# --- NF4 ---


@st.composite
def nf4_cases(draw):
    x, how = draw(tensors()), {"scale_dtype": draw(st.sampled_from([None, None, torch.float16, torch.bfloat16]))}
    divisors = [size for size in range(1, x.shape[-1] + 1) if x.shape[-1] % size == 0] if x.ndim in (1, 2) else []
    return Case(x, how | {"group_size": draw(st.sampled_from([None, *divisors]))})


@given(case=nf4_cases())
def test_nf4_takes_the_nearest_level(case):
    """In units of the scale, to the rounding of one division and of one midpoint in float32."""
    q = case.quantize(ql.nf4_quantize)
    levels = torch.tensor(ql.NF4).double()
    x, codes, scale = (case.parts(t) for t in (case.x.double(), q.qdata.long(), q.scale.double()))
    distance = (x[..., None] / scale[..., None] - levels).abs()
    taken = distance.gather(-1, codes[..., None])[..., 0]
    assert q.qdata.dtype == torch.int8 and (codes >= 0).all() and (codes <= 15).all()
    assert (taken <= distance.amin(-1) + 2.0**-23).all()
    assert torch.equal(q.dequantize()[case.x == 0], torch.zeros_like(q.dequantize()[case.x == 0]))
    order = x.argsort(dim=1)
    assert (codes.gather(1, order).diff(dim=1) >= 0).all()


@given(case=nf4_cases())
def test_nf4_twice_is_nf4_once(case):
    """Exactly, in codes and in numbers: the largest level is 1, so the scale comes back as it was."""
    q = case.quantize(ql.nf4_quantize)
    again = Case(q.dequantize(), case.how).quantize(ql.nf4_quantize)
    assert torch.equal(again.qdata, q.qdata) and torch.equal(again.dequantize(), q.dequantize())


# --- bytes ---


@given(shape=st.lists(st.integers(0, 6), max_size=3), pairs=st.integers(0, 20), seed=st.integers(0, 2**32 - 1))
def test_packing_is_a_bijection(shape, pairs, seed):
    """Codes -> bytes -> codes, and bytes -> codes -> bytes, for any shape and however the codes lie in memory."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (*shape, 2 * pairs), generator=generator).to(torch.int8)
    packed = torch.randint(0, 256, (*shape, pairs), generator=generator).to(torch.uint8)
    assert torch.equal(ql.unpack_int4(ql.pack_int4(codes)), codes)
    assert torch.equal(ql.pack_int4(ql.unpack_int4(packed)), packed)
    assert ql.pack_int4(codes).nbytes == codes.nbytes // 2 and ql.pack_int4(codes).dtype == torch.uint8
    columns = torch.cat([codes, codes]).transpose(0, -1) if shape else codes
    if columns.shape[-1] % 2 == 0:
        assert torch.equal(ql.unpack_int4(ql.pack_int4(columns)), columns)


def packed_bits(codes, bits):
    """The codes one after the other in a string of bytes, `bits` each, without gaps."""
    two_complement = codes.flatten().to(torch.int64).numpy() & (2**bits - 1)
    return np.packbits((two_complement[:, None] >> np.arange(bits)) & 1).tobytes()


@pytest.mark.parametrize("quantize", [*QUANTIZERS, ql.nf4_quantize], ids=lambda function: function.__name__)
@given(data=st.data())
def test_nbytes_are_the_bytes_of_what_is_stored(quantize, data):
    """Write out all that `dequantize` needs, codes packed, and count."""
    case = data.draw(nf4_cases() if quantize is ql.nf4_quantize else cases())
    q = case.quantize(quantize)
    stored = packed_bits(q.qdata, q.bits)
    for tensor in (q.scale, q.zero_point):
        stored += tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if isinstance(tensor, torch.Tensor) else b""
    assert q.nbytes == len(stored) and q.bits_per_weight == 8 * len(stored) / case.x.numel()
    if q.bits == 4 and quantize in SYMMETRIC and case.x.ndim and case.x.shape[-1] % 2 == 0:
        assert len(packed_bits(q.qdata, 4)) == ql.pack_int4(q.qdata).nbytes


@given(seed=st.integers(0, 2**32 - 1), scale_dtype=st.sampled_from([None, torch.float16]), bits=st.integers(2, 8))
def test_nbytes_with_factors(seed, scale_dtype, bits):
    """AWQ's factors are stored beside codes and scales; dequantizing divides by them."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(4, 8, generator=generator), torch.randn(50, 8, generator=generator) ** 3
    q = ql.awq_quantize(weight, x.T @ x / 50, bits, 4, scale_dtype, clip=seed % 2 == 0, steps=3)
    assert q.factors.shape == (8,) and q.factors.dtype == (scale_dtype or torch.float32)
    assert q.nbytes == len(packed_bits(q.qdata, bits)) + 8 * q.scale.itemsize + 8 * q.factors.itemsize
    codes = q.qdata.float() * q.scale.float().repeat_interleave(4, dim=1)
    assert torch.equal(q.dequantize(), codes / q.factors.float())


# --- on a GPU ---


@on_gpu
@pytest.mark.parametrize("quantize", [*QUANTIZERS, ql.nf4_quantize], ids=lambda function: function.__name__)
@given(data=st.data())
def test_gpu_and_cpu_agree_code_for_code(quantize, data):
    """Also in scales, zero points and numbers, to the last bit. Clipping sums its errors in another order."""
    case = data.draw(nf4_cases() if quantize is ql.nf4_quantize else cases())
    q, other = case.quantize(quantize), Case(case.x.cuda(), case.how).quantize(quantize)
    if quantize is ql.clip_quantize:
        there = replace(other, qdata=other.qdata.cpu(), scale=other.scale.cpu())
        assert torch.allclose(squared_errors(case, there), squared_errors(case, q), rtol=1e-4, atol=0)
        return
    assert torch.equal(other.qdata.cpu(), q.qdata) and torch.equal(other.scale.cpu(), q.scale)
    assert torch.equal(other.dequantize().cpu(), q.dequantize())
    assert torch.equal(torch.as_tensor(other.zero_point).cpu(), torch.as_tensor(q.zero_point))
