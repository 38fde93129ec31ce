"""Tests of calibration: what the model reads, moments of inputs, clipping, GPTQ, AWQ, NF4's levels, true bits."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal

import quantlib as ql

torch.set_num_threads(1)  # what is computed here is small: two threads waiting for each other would take longer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(tokens, channels, seed=0):
    """Inputs as they are in models: channels that go along with each other, and of unequal size."""
    x = randn(tokens, channels, seed=seed) + 2 * randn(tokens, 3, seed=seed + 1) @ randn(3, channels, seed=seed + 2)
    return x * randn(channels, seed=seed + 3).exp()


def moment_of(x):
    return (x.double().T @ x.double() / len(x)).float()


def same_logits(a, b, ids):
    with torch.no_grad():
        x, y = a(ids).logits, b(ids).logits
    return (x - y).abs().max() < 1e-4 * x.abs().max()


@pytest.fixture(scope="module")
def ids(tiny):
    """Tokens that fill the context of tiny; the number of sequences is no multiple of a batch."""
    return torch.randint(tiny.config.vocab_size, (6, 32), generator=torch.Generator().manual_seed(0))


# --- what the model reads ---


def test_calibration_tokens(pocket, tiny):
    """The beginning of the text, cut into sequences; by default of 512 tokens or a context; no more than there is."""
    model, tokenizer = pocket
    ids = ql.calibration_tokens(model, tokenizer, sequences=3)
    text = tokenizer(ql.load_text("calibration"), return_tensors="pt", verbose=False)["input_ids"][0]
    assert ids.shape == (3, 512) and torch.equal(ids.flatten(), text[: 3 * 512])
    assert ql.calibration_tokens(tiny, tokenizer).shape == (16, 32)
    assert ql.calibration_tokens(model, tokenizer, 2, length=5).shape == (2, 5)
    assert ql.calibration_tokens(model, tokenizer, 1, length=1).shape == (1, 1)
    for sequences, length in ((0, 5), (100, 512)):
        with pytest.raises(ValueError, match=f"{sequences=} of {length=}: .* only {len(text)}"):
            ql.calibration_tokens(model, tokenizer, sequences, length)


def test_input_moments(tiny, ids):
    """The mean of x xᵀ over all tokens, from inputs caught by hand; of all layers in the blocks, and no hook stays."""
    layers, caught = ql.block_layers(tiny), {}
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(layers) == [f"transformer.h.{i}.{kind}" for i in (0, 1) for kind in kinds]
    hooks = [m.register_forward_hook(lambda m, x, y, n=n: caught.update({n: x[0]})) for n, m in layers.items()]
    with torch.no_grad():
        tiny(ids)
    for hook in hooks:
        hook.remove()
    moments = ql.input_moments(tiny, ids)
    assert list(moments) == list(layers)
    for name, x in caught.items():
        x = x.reshape(-1, x.shape[-1]).double()
        assert len(x) == 6 * 32 and moments[name].dtype == torch.float32
        torch.testing.assert_close(moments[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * x.square().mean())
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_watching_ends_when_it_fails(tiny, ids):
    """An error in `watch` comes through, and the model is left without hooks."""
    with pytest.raises(ZeroDivisionError):
        ql.watch_inputs(tiny, ids, lambda name, x: 1 / 0)
    assert not any(layer._forward_pre_hooks for layer in ql.block_layers(tiny).values())
    for model, message in ((copy.deepcopy(tiny).train(), "training mode"), (ql.quantize_model(tiny), "nn.Linear")):
        with pytest.raises(ValueError, match=message):
            ql.input_moments(model, ids)


def test_output_error():
    """What the formula says of the moments is what happens at the outputs."""
    x, d = activations(100, 12), randn(5, 12, seed=9)
    direct = (x @ d.T).square().sum(1).mean().item()
    assert ql.output_error(d, moment_of(x)) == pytest.approx(direct, rel=1e-4)
    assert ql.output_error(d, torch.eye(12)) == pytest.approx(d.square().sum().item(), rel=1e-5)


# --- clipping ---


@pytest.mark.parametrize("sharing", [{"axis": 0}, {"axis": 0, "group_size": 8}], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_clipping_is_a_search(sharing, weighed):
    """Each group gets the share of its absmax that trying all of them finds; the result is never worse than absmax."""
    x, shares = randn(16, 24) ** 3, (1, 0.9, 0.7, 0.5)
    importance = randn(24 if weighed else 1, seed=1).exp().expand_as(x)
    q = ql.clip_quantize(x, 3, importance=importance if weighed else None, shares=shares, **sharing)
    full = ql.absmax_quantize(x, 3, **sharing)
    clipped = 0
    values, weights, found, plain = x, importance, q.dequantize(), full.dequantize()
    size = sharing.get("group_size", 24)
    for row in range(len(values)):
        for i in range(0, values.shape[1], size):
            group, weight = values[row, i : i + size], weights[row, i : i + size]
            steps = [group.abs().max() * share / 3 for share in shares]
            tried = [(group / step).round().clamp(-3, 3) * step for step in steps]
            errors = [((t - group).square() * weight).sum().item() for t in tried]
            best = errors.index(min(errors))
            clipped += best > 0
            assert torch.allclose(found[row, i : i + size], tried[best], rtol=1e-5)
            error = ((plain[row, i : i + size] - group).square() * weight).sum().item()
            assert min(errors) <= error * (1 + 1e-5)
    assert clipped > 3  # not a search with nothing to find


def test_importance_decides_what_is_clipped():
    """An outlier that matters is kept, and one that does not is cut off."""
    x = torch.cat([randn(1, 63) * 0.1, torch.tensor([[1.0]])], 1)
    heavy, light = torch.ones(64), torch.ones(64)
    heavy[-1], light[-1] = 1e4, 1e-4
    kept, cut = (ql.clip_quantize(x, 3, axis=0, importance=w).dequantize()[0, -1].item() for w in (heavy, light))
    assert kept == pytest.approx(1, abs=1e-5) and cut == pytest.approx(0.4, abs=1e-5)


# --- GPTQ ---


def brute_force(weight, moment, bits, size, scale_dtype, clip, damp):
    """At each column solve for the best place of all columns that are still free, from the beginning, in float64."""
    w, h = weight.double(), moment.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h))
    d, codes, scales, qmax = torch.zeros_like(w), torch.zeros_like(w), [], 2 ** (bits - 1) - 1
    for i in range(w.shape[1]):
        d[:, i:] = -torch.linalg.solve(h[i:, i:], h[i:, :i] @ d[:, :i].T).T
        if i % size == 0:
            columns, importance = (w + d)[:, i : i + size].float(), moment.diagonal()[i : i + size]
            if clip:
                q = ql.clip_quantize(columns, bits, 0, None, scale_dtype, importance)
            else:
                q = ql.absmax_quantize(columns, bits, 0, None, scale_dtype)
            scales.append(q.scale)
        scale = scales[-1].double()[:, 0]
        codes[:, i] = ((w + d)[:, i] / scale).round().clamp(-qmax, qmax)
        d[:, i] = codes[:, i] * scale - w[:, i]
    return codes.to(torch.int8), torch.cat(scales, 1)


@pytest.mark.parametrize("size, inputs", [(None, 24), (8, 24), (None, 264)])  # 264: more than two blocks of columns
@pytest.mark.parametrize("bits, clip, scale_dtype", [(3, False, None), (4, True, None), (2, True, torch.float16)])
def test_gptq_is_least_squares_at_each_column(size, inputs, bits, clip, scale_dtype):
    weight, moment = randn(6, inputs), moment_of(activations(500, inputs, seed=5))
    codes, scales = brute_force(weight, moment, bits, size or inputs, scale_dtype, clip, 0.01)
    q = ql.gptq_quantize(weight, moment, bits, size, scale_dtype, clip)
    assert torch.equal(q.qdata, codes)
    assert q.scale.dtype == (scale_dtype or torch.float32)
    # In fp16 a scale may fall to its neighbour.
    assert torch.allclose(q.scale, scales, rtol=2e-3 if scale_dtype else 1e-4)
    assert (q.bits, q.group_size, q.axis, q.shape) == (bits, size, 0, weight.shape)
    nearest = ql.absmax_quantize(weight, bits, 0, size, scale_dtype)
    assert not torch.equal(q.qdata, nearest.qdata)
    errors = [ql.output_error(t.dequantize() - weight, moment) for t in (q, nearest)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("size", [48, 288])
def test_groups_that_do_not_fill_blocks(size):
    """A group gets its scale from columns that have taken up all errors before it, however columns are computed."""
    weight, moment = randn(6, 2 * size), moment_of(activations(900, 2 * size, seed=5))
    codes, scales = brute_force(weight, moment, 3, size, None, False, 0.01)
    q = ql.gptq_quantize(weight, moment, 3, size, clip=False)
    assert torch.equal(q.qdata, codes) and torch.allclose(q.scale, scales, rtol=1e-4)


def test_usual_arguments():
    """4 bits in groups of 64, scales in float32, clipped; as they are in the notebooks."""
    weight, moment = randn(4, 128), moment_of(activations(300, 128))
    for quantize in (ql.gptq_quantize, ql.awq_quantize):
        q, same = quantize(weight, moment), quantize(weight, moment, 4, 64, torch.float32, True)
        assert (q.bits, q.group_size, q.scale.dtype) == (4, 64, torch.float32) and torch.equal(q.qdata, same.qdata)
        assert not torch.equal(q.scale, quantize(weight, moment, clip=False).scale)
    codes = [ql.gptq_quantize(weight, moment, **more).qdata for more in ({}, {"damp": 0.01}, {"damp": 1.0})]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert torch.equal(ql.awq_quantize(weight, moment).factors, ql.awq_quantize(weight, moment, steps=20).factors)
    assert ql.nf4_quantize(weight).group_size == 64
    q = ql.clip_quantize(weight)
    assert (q.bits, q.axis, q.group_size) == (4, None, None)
    for quantize in (ql.absmax_quantize, ql.zeropoint_quantize):
        q = quantize(weight)
        assert (q.bits, q.axis, q.group_size) == (8, None, None)


def test_one_column_moves_as_least_squares_on_the_activations():
    """Not from moments but from the inputs themselves: the last column makes up for the first as far as it can."""
    x = randn(300, 2) @ torch.tensor([[4.0, 2.0], [0.0, 0.5]])  # the first channel is the stronger, the second follows
    weight = torch.tensor([[0.0367, 3.0]])  # 1.55 steps of the scale, rounded to 2
    q = ql.gptq_quantize(weight, moment_of(x), bits=8, group_size=None, clip=False, damp=0.0)
    step = 3.0 / 127
    d0 = (weight[0, 0] / step).round() * step - weight[0, 0]
    move = torch.linalg.lstsq(x[:, 1:], -x[:, :1] * d0).solution.item()
    assert abs(move) > step / 2  # enough for another code
    assert q.qdata[0, 1] == round((3.0 + move) / step) != 127


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("clip", [False, True])
def test_gptq_without_correlations_is_rounding_to_nearest(size, clip):
    """With the identity for H nothing can cancel, nor with any other diagonal; the diagonal weighs the clipping."""
    weight = randn(6, 24)
    for moment in (torch.eye(24), randn(24, seed=1).exp().diag()):
        q = ql.gptq_quantize(weight, moment, 3, size, clip=clip)
        if clip:
            nearest = ql.clip_quantize(weight, 3, 0, size, importance=moment.diagonal())
        else:
            nearest = ql.absmax_quantize(weight, 3, 0, size)
        assert torch.equal(q.qdata, nearest.qdata) and torch.equal(q.scale.flatten(), nearest.scale.flatten())


def test_damping():
    """It is added to the diagonal, as a share of its mean; it makes a singular H usable; much of it stops all moves."""
    weight, singular = randn(6, 24), moment_of(activations(5, 24))  # 5 tokens, 24 channels
    q = ql.gptq_quantize(weight, singular, 3, 8, clip=False, damp=0.05)
    added = singular + 0.05 * singular.diagonal().mean() * torch.eye(24)
    assert torch.equal(q.qdata, ql.gptq_quantize(weight, added, 3, 8, clip=False, damp=0.0).qdata)
    nearest = ql.absmax_quantize(weight, 3, 0, 8)
    assert not torch.equal(q.qdata, nearest.qdata)
    assert torch.equal(ql.gptq_quantize(weight, singular, 3, 8, clip=False, damp=1e6).qdata, nearest.qdata)
    usual = singular + 0.01 * singular.diagonal().mean() * torch.eye(24)
    q = ql.gptq_quantize(weight, singular, 3, 8, clip=False)
    assert torch.equal(q.qdata, ql.gptq_quantize(weight, usual, 3, 8, clip=False, damp=0.0).qdata)


# --- AWQ ---


def test_awq_without_strong_channels_changes_nothing():
    """With the identity for H there is nothing to scale up: factors of one, and the codes of absmax or clipping."""
    weight = randn(6, 24)
    for clip, nearest in ((False, ql.absmax_quantize), (True, ql.clip_quantize)):
        q = ql.awq_quantize(weight, torch.eye(24), 3, 8, clip=clip)
        assert torch.equal(q.factors, torch.ones(24)) and torch.equal(q.qdata, nearest(weight, 3, 0, 8).qdata)


@pytest.mark.parametrize("clip", [False, True])
def test_awq_finds_the_best_ratio(clip):
    """Of 0, a quarter, …, 1, by trying each; and it is neither end here. Then clipping, each error weighed rightly."""
    weight, x = randn(6, 24) * randn(24, seed=1).mul(-0.5).exp(), activations(200, 24, seed=1)
    moment = moment_of(x)
    strength = x.double().square().mean(0).sqrt()
    tried = {}
    for ratio in (0, 0.25, 0.5, 0.75, 1):
        f = strength**ratio
        f = (f / (f.max() * f.min()).sqrt()).float()
        q = ql.absmax_quantize(weight * f, 3, 0, 8)
        tried[ratio] = ((x @ (q.dequantize() / f - weight).T).square().sum().item(), f)
    best = min(tried, key=lambda ratio: tried[ratio][0])
    assert 0 < best < 1 and tried[best][0] < 0.97 * tried[0][0]
    q, f = ql.awq_quantize(weight, moment, 3, 8, clip=clip, steps=4), tried[best][1]
    assert (q.axis, q.group_size, q.bits) == (0, 8, 3)
    torch.testing.assert_close(q.factors, f, rtol=1e-4, atol=0)
    expected = ql.absmax_quantize(weight * q.factors, 3, 0, 8)
    if clip:  # an error of a scaled weight counts 1 / f² of what it would count unscaled
        expected = ql.clip_quantize(weight * q.factors, 3, 0, 8, importance=moment.diagonal() / q.factors**2)
    assert torch.equal(q.qdata, expected.qdata) and torch.equal(q.scale, expected.scale)
    assert torch.allclose(q.dequantize(), expected.dequantize() / q.factors)


def test_awq_survives_a_dead_channel():
    """A channel that is always zero gets a small factor, not none: all numbers stay finite."""
    x = activations(50, 8)
    x[:, 3] = 0
    for clip in (False, True):
        q = ql.awq_quantize(randn(4, 8), moment_of(x), 4, 4, clip=clip)
        assert torch.isfinite(q.dequantize()).all() and (q.factors > 0).all()


def test_awq_without_any_activation():
    """Where nothing ever comes in there is nothing to weigh, and no number breaks."""
    weight = randn(4, 8)
    q = ql.awq_quantize(weight, torch.zeros(8, 8), 4, 4, clip=False)
    assert torch.equal(q.factors, torch.ones(8)) and torch.equal(q.qdata, ql.absmax_quantize(weight, 4, 0, 4).qdata)


def test_awq_does_not_ask_how_large_the_activations_are():
    """Only their ratios count."""
    weight, moment = randn(4, 8), moment_of(activations(50, 8))
    large, small = (ql.awq_quantize(weight, m, 4, 4, clip=False) for m in (moment, 1e-16 * moment))
    torch.testing.assert_close(small.factors, large.factors, rtol=1e-4, atol=0)
    assert small.factors.max() > 1.05 * small.factors.min()


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_awq_tries_as_many_ratios_as_it_says(steps, monkeypatch):
    """0, 1/steps, …, 1: one more than steps."""
    tried, quantize = [], ql.absmax_quantize
    monkeypatch.setattr(ql, "absmax_quantize", lambda *arguments: tried.append(1) or quantize(*arguments))
    ql.awq_quantize(randn(4, 8), moment_of(activations(50, 8)), 4, 4, clip=False, steps=steps)
    assert len(tried) == steps + 1


def test_factors_fold_into_what_makes_the_input(pocket):
    """Before rounding the logits stay the same; after it, a folded model equals one that divides by the factors."""
    model, tokenizer = pocket
    text = tokenizer(ql.load_text()[:600], return_tensors="pt")["input_ids"]
    name, norm = "transformer.h.1.mlp.c_fc", "transformer.h.1.ln_2"
    layer = ql.block_layers(model)[name]
    q = ql.awq_quantize(layer.weight.T, ql.input_moments(model, text)[name], 3, 64)
    assert q.factors.max() / q.factors.min() > 1.01

    def folded(weight):  # [out, in], of the layer that reads; the LayerNorm before it divides by the factors
        return ql.fake_quantize_model(model, {
            f"{norm}.weight": model.get_submodule(norm).weight / q.factors,
            f"{norm}.bias": model.get_submodule(norm).bias / q.factors, f"{name}.weight": weight,
        })  # fmt: skip

    assert same_logits(model, folded(layer.weight.T * q.factors), text)
    divided = ql.fake_quantize_model(model, {f"{name}.weight": q})
    assert not same_logits(model, divided, text)
    assert same_logits(divided, folded(q.dequantize() * q.factors), text)


def test_planted_outliers(pocket, ids):
    """The same logits, from inputs in which some channels are `factor` times larger; the original stays as it was."""
    model = pocket[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    planted = ql.plant_outliers(model, channels=3, factor=20.0)
    assert same_logits(model, planted, ids)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    old, new = ({n: h.diagonal().sqrt() for n, h in ql.input_moments(m, ids).items()} for m in (model, planted))
    for name in old:
        ratio = new[name] / old[name].clamp(min=1e-9)
        count = 0 if name.endswith("mlp.c_proj") else 3  # GELU stands in front of it: no factor passes
        assert (ratio > 10).sum() == count and ((ratio - 1).abs() < 0.01).sum() == len(ratio) - count, name
    gains = [m.transformer.h[0].ln_1.weight for m in (model, ql.plant_outliers(model))]
    assert (gains[1] / gains[0]).round().unique(return_counts=True)[1].min() == 4 and (gains[1] / gains[0]).max() > 29.9
    again, other = ql.plant_outliers(model, 3, 20.0), ql.plant_outliers(model, 3, 20.0, seed=1)
    gains = [m.transformer.h[0].ln_1.weight for m in (planted, again, other)]
    assert torch.equal(gains[0], gains[1]) and not torch.equal(gains[0], gains[2])


@pytest.mark.parametrize("quantize", [ql.gptq_quantize, ql.awq_quantize])
@pytest.mark.parametrize("weight, moment, arguments, message", [
    (torch.ones(4, 8), torch.eye(8), {"group_size": 3}, "group_size=3"),
    (torch.ones(4, 8) * math.nan, torch.eye(8), {"group_size": 4}, "32 NaN"),
    (torch.ones(4, 8), torch.eye(8), {"group_size": 4, "bits": 1}, "bits=1"),
])  # fmt: skip
def test_what_does_not_fit(quantize, weight, moment, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, moment, **arguments)


# --- levels and bits ---


def test_levels_of_nf4_are_quantiles():
    """Of the normal distribution: eight above zero, seven below, with the outermost at the same, then scaled to one."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the mean of what 8 and 7 quantiles a side would begin with
    above = Normal(0, 1).icdf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -Normal(0, 1).icdf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(torch.tensor(ql.NF4).double(), levels / levels.max(), rtol=0, atol=1e-4)


def test_true_bits_by_hand(tiny):
    """Codes, scales, zero points and factors of what was quantized; 16 bits for each number of what was not."""
    layers = ql.block_layers(tiny)
    weights = sum(layer.weight.numel() for layer in layers.values())
    rows = sum(layer.weight.shape[1] for layer in layers.values())  # a Conv1D: [in, out]
    channels = sum(layer.weight.shape[0] for layer in layers.values())
    total = sum(p.numel() for p in tiny.parameters())
    assert weights == 2 * 12 * 32 * 32 and ql.bits_per_weight(tiny) == 16

    def expect(quantizer, bits):
        model = ql.fake_quantize_model(tiny, quantizer, ql.in_block)
        assert ql.bits_per_weight(model) == pytest.approx((bits + 16 * (total - weights)) / total, rel=1e-9)

    def results(quantize):
        return {f"{n}.weight": quantize(m.weight.T, torch.eye(m.weight.shape[0])) for n, m in layers.items()}

    half = torch.float16
    expect(lambda w: ql.absmax_quantize(w, 3, 0, 16, half), 3 * weights + weights // 16 * 16)
    expect(lambda w: ql.absmax_quantize(w, 8, 0), 8 * weights + 32 * rows)
    expect(lambda w: ql.zeropoint_quantize(w, 4, 0, 16, half), 4 * weights + weights // 16 * 24)
    expect(results(lambda w, h: ql.gptq_quantize(w, h, 3, 16, half)), 3 * weights + weights // 16 * 16)
    expect(results(lambda w, h: ql.awq_quantize(w, h, 3, 16, half)), 3 * weights + weights // 16 * 16 + 16 * channels)


def test_a_dict_of_results_takes_the_place_of_a_quantizer(tiny):
    """Only what it names is replaced, a matrix given as [out, in]; a name that the model lacks is an error."""
    name = "transformer.h.1.mlp.c_proj.weight"
    q = ql.absmax_quantize(tiny.get_parameter(name).T, 3, axis=0)
    model = ql.fake_quantize_model(tiny, {name: q})
    for other, p in tiny.named_parameters():
        expected = q.dequantize().T if other == name else p
        assert torch.equal(model.get_parameter(other), expected)
