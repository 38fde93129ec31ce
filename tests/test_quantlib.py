"""Tests of quantlib: each holds a property that a notebook states or relies on. Seeded, offline, on the CPU."""

import base64
import copy
import dataclasses
import importlib
import json
import math
import socket
import warnings
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from traitlets.config import Config
from transformers import GPT2LMHeadModel

import quantlib as ql

torch.set_num_threads(1)  # what is computed here is small: two threads waiting for each other would take longer
QUANTIZERS = [ql.absmax_quantize, ql.zeropoint_quantize]
# How elements share scales; the shape of the scales and of the parts that have one each, for a tensor of 8 x 12.
SHARING = [({}, (), (8, 12)), ({"axis": 0}, (8, 1), (1, 12)), ({"axis": 1}, (1, 12), (8, 1)),
           ({"axis": -1}, (1, 12), (8, 1)), ({"group_size": 4}, (8, 3), (1, 4)),
           ({"axis": 0, "group_size": 6}, (8, 2), (1, 6))]  # fmt: skip
both = pytest.mark.parametrize("quantize", QUANTIZERS)
shared = pytest.mark.parametrize("sharing, scales, part", SHARING, ids=lambda value: str(value).replace(" ", ""))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- a tensor ---


def assert_within_half_a_scale(x, q, scale=None, message=""):
    """5e-5 of a scale is what computing in float32 adds: three roundings, 2^-24 each, of a code up to 255."""
    restored, scale = q.dequantize(), q.scale if scale is None else scale
    assert restored.shape == x.shape and torch.isfinite(restored).all(), message
    assert ((x.double() - restored.double()).abs() <= (0.5 + 5e-5) * scale.double()).all(), message


def assert_codes_of_pytorch(x, q):
    """The oracle: PyTorch's own fake quantization of x in fp32, with the scales and zero points of q."""
    zero_point, qmin = (q.zero_point, -128) if isinstance(q.zero_point, torch.Tensor) else (torch.tensor(0), -127)
    if q.axis is None:
        numbers = torch.fake_quantize_per_tensor_affine(x.float(), q.scale.item(), zero_point.item(), qmin, 127)
    else:
        points = zero_point.expand(q.scale.shape).flatten().int()
        numbers = torch.fake_quantize_per_channel_affine(x.float(), q.scale.flatten(), points, q.axis, qmin, 127)
    assert torch.equal(q.qdata.float(), torch.round(numbers / q.scale + zero_point))
    assert torch.equal(q.dequantize(), numbers)


@both
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T, lambda x: x[::2, 1::3]], ids=["whole", "T", "strided"])
def test_codes_are_those_of_pytorch(quantize, axis, dtype, layout):
    """Numbers of few digits (bf16) make ties: there it matters which way they round, and that the scale is inverted."""
    for seed in range(4):
        x = layout((randn(130, 256, seed=seed) + seed / 4).bfloat16().to(dtype))
        assert_codes_of_pytorch(x, quantize(x, axis=axis))


def test_code_range():
    """By default of 8 bits and symmetric; the smallest number of bits has one code on each side of 0."""
    assert (ql.code_range(), ql.code_range(8, False), ql.code_range(2)) == ((-127, 127), (-128, 127), (-1, 1))


@both
@shared
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_scale(quantize, sharing, scales, part, bits):
    """The promise of the docstrings, for each element of any distribution; x stays as it was, codes in their range."""
    normal, uniform = randn(8, 12), torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    outlier = torch.where(uniform == uniform.max(), -60, normal)
    lowest, highest = -(2 ** (bits - 1)) + (quantize is ql.absmax_quantize), 2 ** (bits - 1) - 1
    for x in (normal, normal.exp(), -normal.exp(), uniform + 1, -uniform - 1, uniform + 1000, outlier,
              normal.T.contiguous().T, normal.double() * 1e-300, nn.Parameter(normal)):  # fmt: skip
        before = x.detach().clone()
        q = quantize(x, bits=bits, **sharing)
        scale = q.scale.expand(scales or (1, 1)).repeat_interleave(part[0], 0).repeat_interleave(part[1], 1)
        assert_within_half_a_scale(before, q, scale, f"from {x.min():.3g} to {x.max():.3g}")
        assert q.qdata.dtype == torch.int8 and lowest <= q.qdata.min().item() and q.qdata.max().item() <= highest
        assert q.qdata.any() and q.scale.dtype == x.dtype  # 1e-300 exists only in fp64: not computed in fp32
        assert torch.equal(x, before)


def test_scales_are_exact():
    """absmax divides by 127 and not 128 or 100; zero-point spreads the range over 255 steps; the ends get the ends."""
    x = randn(3000) + 0.3
    q, z = (quantize(x) for quantize in QUANTIZERS)
    assert q.scale == x.abs().max() / 127 and q.qdata[x.abs().argmax()] == 127 * x[x.abs().argmax()].sign()
    assert z.scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
    assert z.qdata[x.argmin()] == -128 and z.qdata[x.argmax()] == 127
    assert z.zero_point == torch.round(-128 - x.min() / z.scale)


@both
def test_zeros_stay_zeros(quantize):
    """A tensor, a row, a group of zeros has scale 1; a zero (padding, a pruned weight) far from all else stays one."""
    q = quantize(torch.zeros(3, 4))
    assert q.scale == 1 and not q.dequantize().any()
    x = randn(3, 8) * torch.tensor([[1], [0], [1]])
    for sharing in ({"axis": 0}, {"group_size": 4}):
        q = quantize(x, **sharing)
        assert (q.scale[1] == 1).all() and not q.dequantize()[1].any() and (q.scale[[0, 2]] < 0.1).all()
    for offset in (-1000, -1, -0.3, 0, 0.3, 1, 1000):
        assert quantize(torch.cat([torch.zeros(1), randn(1000) + offset])).dequantize()[0] == 0


@both
@pytest.mark.parametrize("values", [
    [3.7] * 3, [-3.7] * 3, [1e-38] * 3, [-1e-40] * 3, [1e-45] * 3, [1e38] * 3, [-1e38], [-3e38, 0, 1e38, 3e38],
], ids=str)  # fmt: skip
def test_extreme_ranges(quantize, values):
    """A range without width, one whose reciprocal is no float32, and ±3e38, whose width is none."""
    assert_within_half_a_scale(torch.tensor(values), quantize(torch.tensor(values)))


@both
@pytest.mark.parametrize("x, arguments, message", [
    (torch.tensor([1, math.nan]), {}, "^x .*1 NaN"), (torch.tensor([-math.inf]), {}, "^x .*1 NaN or inf"),
    (torch.zeros(0, 3), {}, r"^x .*\[0, 3\]"), (torch.arange(1), {}, "^x .*int64"),
    (torch.tensor([True]), {}, "^x .*bool"),
    (torch.ones(4), {"bits": 1}, "bits=1:"),
    (torch.ones(4), {"bits": 9}, "bits=9"), (torch.ones(4), {"bits": 5.5}, r"bits=5\.5"),
    (torch.ones(4, 6), {"axis": 2}, "axis=2"), (torch.ones(4, 6), {"axis": -3}, "axis=-3"),
    (torch.ones(4, 6), {"axis": 7}, "axis=7"), (torch.ones(4, 6), {"axis": -7}, "axis=-7"),
    (torch.ones(()), {"axis": 0}, "axis=0"), (torch.ones(4, 6), {"group_size": 4}, "group_size=4"),
    (torch.ones(6), {"group_size": 0}, "_size=0"), (torch.ones(6), {"group_size": 2.5}, r"group_size=2\.5"),
])  # fmt: skip
def test_bad_arguments(quantize, x, arguments, message):
    """The message names the argument and what is wrong with it, or its value."""
    with pytest.raises(ValueError, match=message):
        quantize(x, **arguments)


@both
def test_vectors_tensors_of_more_dimensions_and_numbers_of_numpy(quantize):
    """A vector that keeps its axis has a scale for each element; groups cut the last dimension of any tensor."""
    x = randn(2, 3, 8)
    assert torch.equal(quantize(x[0, 0], axis=0).scale, quantize(x[0, 0], group_size=1).scale)
    torch.testing.assert_close(quantize(x[0, 0], axis=0).dequantize(), x[0, 0])
    assert torch.equal(quantize(x, group_size=4).qdata.view(6, 8), quantize(x.view(6, 8), group_size=4).qdata)
    assert torch.equal(quantize(x, np.int64(4), group_size=np.int64(4)).qdata, quantize(x, 4, group_size=4).qdata)


@both
def test_scales_are_stored_in_their_dtype(quantize):
    """Codes are chosen for the rounded scale; halves below the normal ones are used; what none can hold is refused."""
    for size in (1, 1e-3, 1e-4):
        q = quantize(size * randn(64, 64), axis=0, scale_dtype=torch.float16)
        assert q.scale.dtype == torch.float16 and (q.scale > 0).all()
        assert ql.sqnr_db(size * randn(64, 64), q.dequantize()) > 25
    for size in (1e-9, 1e9):
        with pytest.raises(ValueError, match="scale_dtype=torch.float16 cannot hold the scales"):
            quantize(size * randn(64, 64), scale_dtype=torch.float16)


@both
@shared
def test_every_part_is_quantized_on_its_own(quantize, sharing, scales, part):
    """One scale per part means: as if each part were a tensor by itself. The formula of the notebooks undoes it."""
    x = randn(8, 12) * torch.arange(1, 9)[:, None] + 0.5
    q = quantize(x, **sharing)
    assert q.scale.shape == scales and q.qdata.shape == x.shape
    for i in range(0, 8, part[0]):
        for j in range(0, 12, part[1]):
            here = np.s_[i : i + part[0], j : j + part[1]]
            alone = quantize(x[here])
            assert torch.equal(q.qdata[here], alone.qdata) and torch.equal(q.dequantize()[here], alone.dequantize())
            assert alone.scale == (q.scale[i // part[0], j // part[1]] if scales else q.scale)
    if "group_size" not in sharing:
        assert torch.equal((q.qdata.float() - q.zero_point) * q.scale, q.dequantize())
    assert torch.equal(quantize(x.flatten(), group_size=4).qdata, quantize(x, group_size=4).qdata.flatten())


@shared
def test_symmetry_idempotence_and_bytes(sharing, scales, part):
    """Under absmax -x gets the opposite codes; numbers on the grid keep their codes; bytes as counted by hand."""
    x, count = randn(8, 12).bfloat16(), math.prod(scales)
    q, z = (quantize(x, **sharing) for quantize in QUANTIZERS)
    assert torch.equal(ql.absmax_quantize(-x, **sharing).qdata, -q.qdata)
    assert torch.equal(ql.absmax_quantize(q.dequantize(), **sharing).qdata, q.qdata)
    assert torch.equal(ql.zeropoint_quantize(z.dequantize(), **sharing).qdata, z.qdata)
    assert type(q.zero_point) is int and q.zero_point == 0
    assert z.zero_point.dtype == torch.int8 and z.zero_point.shape == scales
    assert (q.nbytes, z.nbytes) == (96 + 4 * count, 96 + 5 * count)  # a code: 1, an fp32 scale: 4, a zero point: 1
    assert q.bits_per_weight == pytest.approx(8 + 32 * count / 96) and z.bits_per_weight == 8 * z.nbytes / 96


def test_sqnr():
    """By hand: signal 25, noise 1. Half the error is 6.02 dB more, no error is infinity."""
    x, noise = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    assert ql.sqnr_db(x, x - noise) == pytest.approx(10 * math.log10(25))
    assert ql.sqnr_db(x, x - noise / 2) - ql.sqnr_db(x, x - noise) == pytest.approx(6.0206, abs=1e-4)
    assert ql.sqnr_db(x, x) == math.inf
    assert ql.sqnr_db(0 * x, 0 * x) == math.inf
    with pytest.raises(ValueError, match="shape"):
        ql.sqnr_db(x, x[:1])


# --- a whole model ---


def test_model_nbytes(pocket, tiny):
    """By arithmetic and by the state; tied weights once, a copy of them twice, buffers too; it needs no real memory."""
    model, c = pocket[0], pocket[0].config
    count = (c.vocab_size + c.n_positions) * c.n_embd + c.n_layer * (12 * c.n_embd + 13) * c.n_embd + 2 * c.n_embd
    assert 4 * count == sum(p.nbytes for name, p in model.state_dict().items() if name != "lm_head.weight")
    assert ql.model_nbytes(model) == 4 * count + sum(b.nbytes for b in model.buffers())  # older transformers have some
    untied, size, embedding = copy.deepcopy(tiny), ql.model_nbytes(tiny), tiny.transformer.wte.weight
    untied.lm_head.weight = nn.Parameter(embedding.detach().clone())
    assert ql.model_nbytes(untied) == size + embedding.nbytes
    untied.register_buffer("extra", torch.zeros(10, dtype=torch.int16))
    assert ql.model_nbytes(untied) == size + embedding.nbytes + 20
    with torch.device("meta"):
        assert ql.model_nbytes(GPT2LMHeadModel(tiny.config)) == size


@pytest.mark.parametrize("quantize", [*QUANTIZERS, lambda w: ql.absmax_quantize(w).dequantize()])
def test_fake_quantize_model(tiny, quantize):
    """All weights of the copy are on their grids, the tied head too; the original keeps its objects and its values."""
    before = {name: (p, p.detach().clone()) for name, p in tiny.named_parameters()}
    result = ql.fake_quantize_model(tiny, quantize)
    assert result is not tiny and not result.training and ql.model_nbytes(result) == ql.model_nbytes(tiny)
    assert result.lm_head.weight is result.transformer.wte.weight
    for name, p in tiny.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])
        q, rounded = quantize(before[name][1]), result.get_parameter(name)
        assert torch.equal(rounded, q if isinstance(q, torch.Tensor) else q.dequantize())
        assert rounded.data_ptr() != p.data_ptr() and rounded.dtype == p.dtype
        assert rounded.unique().numel() <= (256 if quantize is ql.zeropoint_quantize else 255)
    assert not torch.equal(result.lm_head.weight, tiny.lm_head.weight)


def test_fake_quantize_hands_matrices_over_as_out_in(tiny):
    """`Conv1D` stores [in, out]; the quantizer must not need to know. A tied weight comes once; select sees all."""
    shapes, names = [], []
    ql.fake_quantize_model(
        tiny, lambda w: shapes.append(tuple(w.shape)) or w, select=lambda name, p: names.append(name) or p.ndim == 2
    )
    layer = [(96, 32), (32, 32), (128, 32), (32, 128)]  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    assert shapes == [(8192, 32), (32, 32), *layer, *layer]
    assert names == [name for name, _ in tiny.named_parameters()]


def test_fake_quantize_per_output_channel(pocket):
    """With `axis=0` each output column of a `Conv1D` lies on the grid of its own scale; what is not selected stays."""
    name = "transformer.h.2.mlp.c_proj.weight"  # [1536, 384], stored as [in, out]
    result = ql.fake_quantize_model(pocket[0], lambda w: ql.absmax_quantize(w, axis=0), lambda n, _: n == name)
    before, after = pocket[0].get_parameter(name), result.get_parameter(name)
    scale = before.abs().amax(0) / 127
    assert scale.unique().numel() > 100 and ((after / scale).round() - after / scale).abs().max() < 1e-3
    assert max(column.unique().numel() for column in after.T) <= 255 < after.unique().numel()
    for other, p in pocket[0].named_parameters():
        assert torch.equal(p, result.get_parameter(other)) == (other != name)


def test_fake_quantize_errors(tiny):
    """Each names what is wrong: a wrong shape and where, NaN, nothing to do, a name that is none of the model."""
    for wrong in (lambda w: w[:1], lambda w: torch.cat([w, w]), lambda w: w / 0 * 0):
        with pytest.raises(ValueError, match=r"transformer.wte.weight, \[8192, 32\], became \["):
            ql.fake_quantize_model(tiny, wrong)
    with pytest.raises(ValueError, match="chosen are "):
        ql.fake_quantize_model(tiny, ql.absmax_quantize, select=lambda name, p: False)
    with pytest.raises(ValueError, match="chosen are .'no.such.name'"):
        ql.fake_quantize_model(tiny, {"no.such.name": torch.ones(2)})


def test_true_bits(tiny):
    """Of rounded copies what the codes would take, one after the other; of stored ones exactly what is stored."""
    name, count = "transformer.h.0.mlp.c_fc.weight", sum(p.numel() for p in tiny.parameters())
    first = ql.fake_quantize_model(tiny, lambda w: ql.absmax_quantize(w, 4, group_size=32), lambda n, p: n == name)
    assert ql.bits_per_weight(tiny) == 16 and first.stored_bits == {
        "transformer.h.0.mlp.c_fc.weight": 4 * 4096 + 32 * 128
    }
    assert ql.bits_per_weight(first) == pytest.approx((16 * (count - 4096) + 5 * 4096) / count)
    assert len(ql.fake_quantize_model(first, ql.absmax_quantize, ql.in_block).stored_bits) == 8
    for bits in (8, 4):
        stored = ql.quantize_model(tiny, bits, 32 if bits == 4 else None)
        parts = {name: t for name, t in stored.state_dict().items() if not name.startswith("lm_head")}
        assert ql.bits_per_weight(stored) == pytest.approx(8 * sum(t.nbytes for t in parts.values()) / count)


def test_any_network_can_be_rounded():
    """Also one without blocks or a configuration, with other layers."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    rounded = ql.fake_quantize_model(net, lambda w: ql.absmax_quantize(w, axis=0), lambda name, p: p.ndim > 1)
    assert torch.equal(rounded[0].weight, ql.absmax_quantize(net[0].weight, axis=0).dequantize())
    assert not ql.in_block("weight", net[2].weight) and ql.in_block("2.weight", net[2].weight)


# --- perplexity ---


def numbers(text, **_):
    """A tokenizer for texts that are the tokens themselves, "17 4 8001": so a text has exactly the length wanted."""
    return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


def text_of(length):
    return " ".join(map(str, torch.randint(8192, (length,), generator=torch.Generator().manual_seed(0)).tolist()))


@torch.no_grad()
def plain_nll(model, ids, window, stride):
    """Token by token: feed what is visible before it, look at the last position. Slow, with no label to shift."""
    losses = []
    for t in range(1, len(ids)):
        moves = max(0, math.ceil((t - window) / stride))  # of the window, until it reaches the token before t
        losses.append(cross_entropy(model(ids[None, moves * stride : t]).logits[0, -1], ids[t]))
    return torch.stack(losses)


def assert_result(result, expected):
    assert result.token_nll.shape == expected.shape and result.token_nll.dtype == torch.float32
    torch.testing.assert_close(result.token_nll, expected, rtol=1e-4, atol=1e-4)
    assert result.nll == pytest.approx(expected.double().mean().item(), rel=1e-4)
    assert result.ppl == pytest.approx(math.exp(result.nll))


def test_perplexity_is_that_of_the_plain_loop(pocket):
    """On real text with the real tokenizer, all of it in one window."""
    model, tokenizer = pocket
    text = ql.load_text()[:150]
    expected = plain_nll(model, tokenizer(text, return_tensors="pt")["input_ids"][0], 512, 256)
    assert_result(ql.perplexity(model, tokenizer, text), expected)


@pytest.mark.parametrize("window, stride", [(32, 16), (32, 32), (32, 5), (10, 1), (7, 3), (1, 1), (None, None)])
@pytest.mark.parametrize("more", [0, 1, 2, 45])
def test_sliding_perplexity_is_that_of_the_plain_loop(tiny, window, stride, more):
    """Whatever window, stride, batch and end of the text: each token but the first once, with the right context."""
    text = text_of(max(2, (window or 32) + more))
    expected = plain_nll(tiny, numbers(text)["input_ids"][0], window or 32, stride or 16)
    assert_result(ql.perplexity(tiny, numbers, text, window, stride), expected)


def test_windows_tile_the_text():
    """No token is left out or scored twice, and past the first window each sees `window - stride` before its own."""
    for n, window in [(n, window) for n in range(1, 41) for window in range(1, 13)]:
        for stride in range(1, window + 1):
            spans = ql.sliding_windows(n, window, stride)
            assert [t for _, end, scored in spans for t in range(end - scored, end)] == list(range(n))
            assert all(0 <= begin < end <= begin + window and scored > 0 for begin, end, scored in spans)
            assert all(end - begin - scored == window - stride for begin, end, scored in spans[1:])


@pytest.mark.parametrize("measure", [ql.perplexity, lambda model, *rest, **kw: ql.compare(model, model, *rest, **kw)])
@pytest.mark.parametrize("text, arguments, message", [
    (text_of(50), {"window": 33}, "window=33"), (text_of(50), {"window": 0}, "window=0"), ("5", {}, "^text='5': "),
    (text_of(50), {"stride": 0}, "stride=0"), (text_of(50), {"window": 8, "stride": 9}, "stride=9"),
])  # fmt: skip
def test_perplexity_errors(tiny, measure, text, arguments, message):
    """The message names the argument and its value; dropout in training mode would make the result random."""
    with pytest.raises(ValueError, match=message):
        measure(tiny, numbers, text, **arguments)
    with pytest.raises(ValueError, match="training mode"):
        measure(copy.deepcopy(tiny).train(), numbers, text_of(50))


@pytest.fixture(scope="module")
def other(tiny):
    """tiny in 5 bits and a tenth too large, so that it is also surer of itself: KL depends on the direction then."""
    return ql.fake_quantize_model(tiny, lambda w: 1.1 * ql.absmax_quantize(w, bits=5).dequantize())


def test_results_cannot_be_changed(tiny):
    """A number that was measured stays what it was."""
    c = ql.compare(tiny, tiny, numbers, text_of(40))
    for result, name in ((c, "kl"), (c.reference, "token_nll"), (ql.absmax_quantize(torch.ones(3)), "scale")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, name, 0)
        assert result != copy.copy(result)  # tensors in them have no single truth value: only the same object is equal


def test_compare_with_itself(tiny):
    """No difference at all: exact zeros, not small numbers."""
    c = ql.compare(tiny, tiny, numbers, text_of(150))
    assert (c.delta_nll, c.ci, c.kl, c.kl_ci, c.top1_agreement) == (0, (0, 0), 0, (0, 0), 1)
    assert c.verdict == "indistinguishable" and not c.token_kl.any()


def test_what_is_not_finite_gets_no_verdict(tiny):
    """Where a loss is NaN or too large, the candidate is named; a loss beyond 709 nats has an infinite perplexity."""
    broken, sure = copy.deepcopy(tiny), copy.deepcopy(tiny)
    broken.transformer.ln_f.bias.data[0] = math.nan
    sure.transformer.ln_f.weight.data *= 1e5
    with pytest.raises(ValueError, match="^wrong: losses are NaN or infinite"):
        ql.compare(tiny, {"fine": tiny, "wrong": broken}, numbers, text_of(50))
    assert ql.perplexity(sure, numbers, text_of(50)).ppl == math.inf


def test_two_candidates_in_pairs(tiny, other):
    """Second minus first, of KL and of loss, token by token; the verdict is on the second, by KL."""
    text = text_of(300)
    near = ql.fake_quantize_model(tiny, ql.absmax_quantize)
    found = ql.compare(tiny, {"near": near, "other": other}, numbers, text)
    there, back = ql.paired(found["near"], found["other"]), ql.paired(found["other"], found["near"])
    assert there.delta_kl == pytest.approx(found["other"].kl - found["near"].kl) and there.verdict == "worse"
    assert there.delta_nll == pytest.approx(found["other"].delta_nll - found["near"].delta_nll) == -back.delta_nll
    assert there.kl_ci[0] < there.delta_kl < there.kl_ci[1] and there.ci[0] < there.delta_nll < there.ci[1]
    assert back.verdict == "better" and back.kl_ci == pytest.approx((-there.kl_ci[1], -there.kl_ci[0]))
    assert ql.paired(found["near"], found["near"]).verdict == "indistinguishable"
    with pytest.raises(ValueError, match="different references or texts"):
        ql.paired(found["near"], ql.compare(tiny, other, numbers, text_of(200)))


def test_compare_agrees_with_perplexity(tiny, other):
    """delta_nll is candidate minus reference, so exchanging them flips it; a dict gives each what it gets alone."""
    text = text_of(300)
    c, back = ql.compare(tiny, other, numbers, text), ql.compare(other, tiny, numbers, text)
    reference, candidate = (ql.perplexity(model, numbers, text) for model in (tiny, other))
    assert torch.equal(c.reference.token_nll, reference.token_nll)
    assert torch.equal(c.candidate.token_nll, candidate.token_nll)
    assert c.delta_nll == pytest.approx(candidate.nll - reference.nll, abs=1e-6) and abs(c.delta_nll) > 1e-3
    assert c.ci == ql.bootstrap_interval(candidate.token_nll.double() - reference.token_nll.double())
    assert back.delta_nll == -c.delta_nll and back.ci == pytest.approx((-c.ci[1], -c.ci[0]))
    several = ql.compare(tiny, {"other": other, "same": tiny}, numbers, text)
    assert list(several) == ["other", "same"] and several["same"].kl == several["same"].delta_nll == 0
    for name in ("delta_nll", "ci", "kl", "top1_agreement"):
        assert getattr(several["other"], name) == getattr(c, name)


@torch.no_grad()
def test_kl_and_agreement(tiny, other):
    """Against PyTorch's KL(reference ‖ candidate), which is not the same the other way round."""
    c, ids = ql.compare(tiny, other, numbers, text_of(33)), numbers(text_of(33))["input_ids"]
    p, q = (model(ids[:, :-1]).logits[0].log_softmax(-1) for model in (tiny, other))
    assert c.kl == pytest.approx(kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-4)
    assert c.kl != pytest.approx(kl_div(p, q, log_target=True, reduction="batchmean").item(), rel=1e-3)
    torch.testing.assert_close(
        c.token_kl, kl_div(q, p, log_target=True, reduction="none").sum(-1), rtol=1e-3, atol=1e-5
    )
    assert c.kl_ci == ql.bootstrap_interval(c.token_kl) and c.kl_ci[0] < c.kl < c.kl_ci[1]
    half = ql.compare(tiny, copy.deepcopy(tiny).half(), numbers, text_of(33))
    assert 0 <= half.kl < 1e-4 and half.token_kl.min() >= 0  # rounding must not make it negative
    assert 0 < c.top1_agreement < 1 and c.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean()


@pytest.mark.parametrize("rho", [0, 0.9])
def test_interval_is_as_wide_as_the_dependence_asks(rho):
    """AR(1): the mean is sqrt((1 + rho) / (1 - rho)) less certain than 1.96 standard errors, the textbook, says."""
    values = np.random.default_rng(1).normal(size=64 * 400)
    for i in range(1, len(values)):
        values[i] += rho * values[i - 1]
    low, high = ql.bootstrap_interval(values)
    assert (low, high) == ql.bootstrap_interval(torch.tensor(values)) != ql.bootstrap_interval(values, seed=1)
    assert (low, high) == ql.bootstrap_interval(values, block=64, seed=0)
    assert low < values.mean() < high
    textbook = 2 * 1.96 * values.std() / len(values) ** 0.5
    assert (high - low) / textbook == pytest.approx(((1 + rho) / (1 - rho)) ** 0.5, rel=0.1 if rho == 0 else 0.2)
    for few in ([2.0], [1.0, 2.0, 6.0]):  # fewer than a block
        low, high = ql.bootstrap_interval(few)
        assert min(few) <= low + 1e-9 <= np.mean(few) + 2e-9 <= high + 3e-9 <= max(few) + 4e-9


# --- text ---


def test_generated_text(pocket):
    """The seed alone decides; the caller's random state is not disturbed; greedy is the likeliest token each time."""
    model, tokenizer, prompt = *pocket, "The old house"
    state = torch.get_rng_state()
    first, again, another = (ql.generate_text(*pocket, prompt, max_new_tokens=12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != another and first.startswith(prompt) and len(first) > len(prompt)
    greedy = {ql.generate_text(*pocket, prompt, max_new_tokens=5, do_sample=False, seed=seed) for seed in (0, 1)}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert greedy == {tokenizer.decode(ids[0])}


def test_short_and_long_prompts(pocket):
    """No token to go on from, or more than the context holds, is refused before the model sees it."""
    for prompt, new in ((" the" * 600, 5), ("The", 512), (" the" * 511, 2), (" the" * 300, 300)):
        with pytest.raises(ValueError, match=rf"^prompt has \d+ tokens .*give at most {512 - new}"):
            ql.generate_text(*pocket, prompt, max_new_tokens=new)
    with pytest.raises(ValueError, match="model.eval"):
        ql.generate_text(copy.deepcopy(pocket[0]).train(), pocket[1], "The old house")
    for function in (ql.perplexity, ql.generate_text):
        for nothing in ("", ["A list.", "Of texts."], None):
            with pytest.raises(ValueError, match=r"^text=.*give one text, not a list"):
                function(*pocket, nothing)


def test_what_a_checkpoint_presets_does_not_count(pocket):
    """Its repetition penalty, its temperature, its number of results, several ends, and ids that are not asked for."""
    model, tokenizer, prompt = copy.deepcopy(pocket[0]), pocket[1], "The old house"
    plain = [ql.generate_text(*pocket, prompt, 12, do_sample=sample) for sample in (False, True)]
    presets = {
        "repetition_penalty": 5.0,
        "temperature": 9.0,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
    }
    model.generation_config.update(do_sample=True, **presets)
    model.generation_config.eos_token_id = [0, 8191]

    def with_types(text, **how):
        found = tokenizer(text, **how)
        found["token_type_ids"] = torch.ones_like(found["input_ids"])
        return found

    with_types.decode = tokenizer.decode
    assert [ql.generate_text(model, with_types, prompt, 12, do_sample=sample) for sample in (False, True)] == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_load_text(tmp_path):
    """The evaluation text is long enough to measure on; a path works; an unknown name is told the choices."""
    assert len(ql.load_text("evaluation").split()) >= 6000
    (tmp_path / "own.txt").write_text("Grüße", encoding="utf-8")
    assert ql.load_text(str(tmp_path / "own.txt")) == "Grüße"
    assert ql.load_text("calibration") and ql.load_text("calibration") != ql.load_text()
    (tmp_path / "own.txt").write_text("Grüße", encoding="utf-8-sig")  # with a mark that no token should come from
    assert ql.load_text(tmp_path / "own.txt") == "Grüße"
    (tmp_path / "own.txt").write_bytes("Grüße".encode("cp1252"))
    for name in ("no-such", str(tmp_path / "own.txt")):
        with pytest.raises(ValueError, match=f"name='.*{name}' failed.*evaluation.*UTF-8"):
            ql.load_text(name)


# --- loading ---


@pytest.fixture
def network(monkeypatch):
    """Whatever asks for the network fails; the list of what asked."""
    calls = []

    def refuse(*arguments, **_):
        calls.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


@pytest.fixture
def folder(tiny, pocket, tmp_path):
    """tiny and its tokenizer as save_pretrained leaves them."""
    tiny.save_pretrained(tmp_path)
    pocket[1].save_pretrained(tmp_path)
    return tmp_path


def assert_refused(name, reason):
    """One clear error in a line: the name, the reason, what to give instead, no traceback of the libraries below."""
    with pytest.raises(ValueError, match=reason) as caught:
        ql.load_model(name, device="cpu")
    assert repr(str(name)) in str(caught.value) and "pocket-gpt2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_loading(tiny, pocket, folder, network, monkeypatch):
    """The bundled model and a folder need no network; `$QUANTLIB_MODEL` chooses, an explicit name beats it."""
    model, tokenizer = ql.load_model(device="cpu")
    assert model.config.n_embd == 384 and len(tokenizer) == model.config.vocab_size and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.setenv("QUANTLIB_MODEL", str(folder))
    for model, tokenizer in (ql.load_model(folder, "cpu"), ql.load_model(device="cpu")):
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in tiny.named_parameters())
        assert model.lm_head.weight is model.transformer.wte.weight and not model.training
        assert tokenizer("The old house")["input_ids"] == pocket[1]("The old house")["input_ids"]
    assert ql.load_model("pocket-gpt2", "cpu")[0].config.n_embd == 384
    assert not network


def test_what_cannot_be_loaded(tiny, folder, network):
    """Unknown names; missing weights, weights that could run code (pickle), another architecture: all told why."""
    assert_refused(folder / "missing", f"{folder}/missing")
    assert_refused("no-such-model-of-quantlib", "no-such-model-of-quantlib")
    state = tiny.state_dict()
    tiny.save_pretrained(folder, state_dict={k: v for k, v in state.items() if k != "transformer.ln_f.weight"})
    assert_refused(folder, "lacks 1 weights, among them transformer.ln_f.weight")
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    assert_refused(folder, "[Hh]eader")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_refused(folder, "safetensors")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert_refused(folder, "'vit' model")


def test_no_code_of_a_checkpoint_runs(tiny, folder, network):
    """Neither what `auto_map` points to nor an attention that the configuration names on the hub."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config"}, "attn_implementation": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation": "evil/kernel"}))
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')")
    model, _ = ql.load_model(folder, "cpu")
    assert model.config._attn_implementation in ("sdpa", "eager") and not network


def test_setup(monkeypatch, capsys):
    """`$QUANTLIB_MODEL` stands in for the default; `import checks` works after it; old packages are named."""
    assert ql.setup("gpt2") == "gpt2" and ql.setup() == "pocket-gpt2"
    monkeypatch.setenv("QUANTLIB_MODEL", "some-folder")
    assert ql.setup("gpt2") == "gpt2" and ql.setup() == "some-folder" and torch.__version__ in capsys.readouterr().out
    assert importlib.util.find_spec("checks").origin.endswith("notebooks/checks.py")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
    with pytest.raises(ImportError, match="(?s)torch>=2.6.*pip install -U 'torch>=2.6'"):
        ql.setup()


# --- pictures ---


def test_histograms_show_every_value(capsys):
    """One outline per tensor over common bins, whose counts add up to the tensor; more tensors than styles is fine."""
    plt.switch_backend("Agg")
    ql.setup()  # titles on the left
    tensors = {f"tensor {i}": randn(20, 10 * i, seed=i) for i in range(1, 8)}
    ax = ql.plot_histograms(tensors, bins=50, log=False, title="A title", xlabel="a value")
    low, high = (
        function(t.min() if function is min else t.max() for t in tensors.values()).item() for function in (min, max)
    )
    assert len(ax.patches) == 7
    for patch, tensor in zip(ax.patches, tensors.values(), strict=True):
        x, y = patch.get_xy().T
        assert x.min() == pytest.approx(low) and x.max() == pytest.approx(high)
        counts = np.histogram(tensor, 50, (low, high))[0]
        assert y.max() == counts.max() and sum(counts) == tensor.numel()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(tensors)
    assert (ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) == ("A title", "a value", "count per bin")
    assert ql.plot_histograms({"one": torch.ones(3)}, limits=(0, 2), ax=ax) is ax and ax.get_yscale() == "log"
    assert ql.plot_histograms({"constant": torch.full((3,), 5.0)}, bins=10).patches
    plt.close("all")


@pytest.mark.parametrize("quantize, bits", [(ql.absmax_quantize, 8), (ql.zeropoint_quantize, 3)])
def test_the_drawing_of_a_mapping(quantize, bits):
    """An arrow from each value down to its code, on an axis that counts codes; light where codes are idle."""
    plt.switch_backend("Agg")
    x = torch.tensor([0.5, -1.0, 3.0, 0.0])
    q = quantize(x, bits)
    ax = ql.draw_mapping(x, q, title="A title")
    ends = sorted(mark.xy[0] for mark in ax.texts if hasattr(mark, "arrow_patch"))
    assert ends == sorted(q.qdata.tolist())
    used = ax.containers[0][1]  # the line of codes, and on it those in use
    assert (used.get_x() + 0.5, used.get_width()) == (min(ends), max(ends) - min(ends) + 1)
    points = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    low, high = (-x.abs().max(), x.abs().max()) if quantize is ql.absmax_quantize else (x.min(), x.max())
    qmin, qmax = ql.code_range(bits, quantize is ql.absmax_quantize)
    above = (qmin + (x - low) / (high - low) * (qmax - qmin)).sort().values  # above its code, but for rounding
    assert all(any(abs(point - place) < 1e-3 for point in points) for place in above.tolist())
    many = randn(41)
    for values, made in ((many, quantize(many)), (x, quantize(x, group_size=2)), (x[:3], q)):
        with pytest.raises(ValueError, match="up to 40 values"):
            ql.draw_mapping(values, made)
    for values in (torch.zeros(3), torch.tensor([2.0]), randn(40)):
        assert ql.draw_mapping(values, quantize(values, bits), ax=ax) is ax
    for sign, end in ((1, "floats: low\n= 0"), (-1, "high\n= 0")):  # the range of a zero point includes 0
        x = sign * torch.tensor([2.0, 0.5])
        assert end in [text.get_text() for text in ql.draw_mapping(x, ql.zeropoint_quantize(x, 3)).texts]
    plt.close("all")


# What was drawn when somebody last looked at it: a checksum of all places and words.
DRAWN = {(ql.absmax_quantize, 3, 4): 827684439, (ql.zeropoint_quantize, 3, 4): 3118736459,
         (ql.absmax_quantize, 6, 6): 1820941579,
         (ql.absmax_quantize, 8, 8): 43030123, (ql.zeropoint_quantize, 8, 13): 2190330868}  # fmt: skip


@pytest.mark.parametrize("quantize, bits, count", DRAWN)
def test_the_drawing_is_as_it_was_looked_at(quantize, bits, count):
    """If this fails: call `ql.draw_mapping` on these values, look at the picture, put the new number in the table."""
    plt.switch_backend("Agg")
    x = torch.tensor([-0.7, 0.3, 2.4, 6.0, 0.9, 4.6, -0.4, 3.3, 1.7, 5.2, 0.0, 2.9, 3.9])[:count]
    with plt.style.context("default"):  # whatever theme another test has set
        ax = ql.draw_mapping(x, quantize(x, bits))
    shapes = [line.get_xydata() for line in ax.lines] + [s for lines in ax.collections for s in lines.get_segments()]
    shapes += [patch.get_patch_transform().transform(patch.get_path().vertices) for patch in ax.patches]
    shapes += [[text.xy, text.xyann] for text in ax.texts if hasattr(text, "arrow_patch")]
    shapes += [ax.get_xlim(), ax.get_ylim()]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker(), line.get_linewidth()) for line in ax.lines]
    looks += [np.array(artist.get_linewidth(), dtype=float).tolist() for artist in (*ax.collections, *ax.patches)]
    looks += [artist.get_zorder() for artist in (*ax.lines, *ax.collections, *ax.patches)]
    looks += [np.round(patch.get_facecolor(), 2).tolist() for patch in ax.patches]
    looks += [(text.get_text(), np.round(text.get_position(), 2).tolist(), text.get_color()) for text in ax.texts]
    seen = repr([np.round(shape, 2).tolist() for shape in shapes] + looks).replace("-0.0", "0.0")
    plt.close("all")
    checksum = zlib.crc32(seen.encode())  # by a name, or pytest prints all that was seen
    assert checksum == DRAWN[quantize, bits, count]


@pytest.fixture
def shell():
    """What notebooks run in; without it nothing is displayed."""
    plt.switch_backend("Agg")  # no backend for notebooks
    yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()
    plt.close("all")


def test_pictures_are_described(shell):
    """`show` displays a PNG whatever the backend, with the description where readers of notebooks look for it."""
    plt.figure()
    with capture_output() as captured:
        ql.show("A bell.")
    (shown,) = captured.outputs
    assert base64.b64decode(shown.data["image/png"]).startswith(b"\x89PNG") and not plt.get_fignums()
    assert shown.metadata["image/png"] == {"alt": "A bell."}


def test_sliders_draw_again(shell, monkeypatch):
    """A slider starts at the default of its argument; moving it replaces the picture."""
    boxes = []
    monkeypatch.setattr("ipywidgets.VBox", lambda children: boxes.append(children))

    def draw(bits=4, share=0.5):
        plt.subplots()[1].set_title(f"{bits} bits")
        ql.show(f"{bits} bits, {share:.2f} of the range")

    ql.slider(draw, bits=(2, 8), share=(0.0, 1.0, 0.25))
    bits, share, picture = boxes[0]
    assert (bits.value, bits.min, bits.max, bits.description) == (4, 2, 8, "bits")
    assert (share.value, share.step, share.description) == (0.5, 0.25, "share")
    first = picture.value
    assert first.startswith('<img src="data:image/png;base64,iVBOR')
    assert first.endswith('alt="4 bits, 0.50 of the range">')
    bits.value = 3
    assert picture.value.endswith('alt="3 bits, 0.50 of the range">') and picture.value[:5000] != first[:5000]


def test_deprecated_calls_are_errors_here():
    """The settings of pytest see to it, for our own modules only."""
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        with pytest.raises(kind):
            warnings.warn_explicit("soon gone", kind, "quantlib.py", 1, module="quantlib")
        with pytest.warns(kind):
            warnings.warn_explicit("soon gone", kind, "other.py", 1, module="other")
