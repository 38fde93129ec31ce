"""What `compare` claims of its numbers: an interval of 95 % holds the truth in 95 of 100 cases, and signs are right.

Seeded, offline, on the CPU.
"""

import copy

import numpy as np
import pytest
import torch

import quantlib as ql

torch.set_num_threads(1)
TOKENS = 9818  # of the evaluation text that are scored, for the bundled model


def chain(values, rho):
    """From independent numbers of variance 1, [tokens, texts], such that correlate by rho with the one before."""
    values[1:] *= (1 - rho**2) ** 0.5
    for before, here in zip(values[:-1], values[1:], strict=True):
        here += rho * before
    return values


def coverage(tokens, rho, pairs, truth):
    """The share of simulated pairs of models whose interval holds the true difference of their losses.

    The candidate's loss is another by `truth` on average, and on a single token by ten times as much, up or down, more
    where the token is hard, with heavy tails. Only the difference counts, as in `compare`, which pairs the losses.
    """
    generator, shape = np.random.default_rng(0), (tokens, pairs)
    reference = np.exp(1 + 0.8 * chain(generator.standard_normal(shape), 0.2))
    noise = chain(generator.standard_t(5, shape) / (5 / 3) ** 0.5, rho)
    candidate = reference + truth + 0.15 * reference**0.5 * noise
    intervals = [ql.bootstrap_interval(pair) for pair in (candidate - reference).T.copy()]
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("rho, truth", [(0.3, 0.03)])
def test_intervals_hold_the_truth(rho, truth):
    """In 93 to 97 % of 1,000 pairs of models, on a text as long as ours.

    The differences of the bundled model and its copies in 8, 4 and 3 bits correlate by less than 0.03 from one token to
    the next. In 2 bits they are a little larger over whole paragraphs, which blocks of 64 tokens do not see.
    """
    share = coverage(TOKENS, rho, 1000, truth)
    print(f"{share:.1%} of 1,000 intervals hold the truth")
    assert 0.93 <= share <= 0.97


def test_a_false_alarm_is_rare():
    """Two models that differ in every token but not on average: "indistinguishable", but for about 1 in 20.

    A shorter text has fewer blocks, and is judged a little less carefully."""
    share = coverage(2000, 0.1, 1000, 0.0)
    print(f"{share:.1%} of 1,000 equal models are indistinguishable")
    assert 0.92 <= share <= 0.97


def words(text, **_):
    """A tokenizer for texts that are the tokens themselves, "17 4 8001"."""
    return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


TEXT = " ".join(map(str, torch.randint(8192, (400,), generator=torch.Generator().manual_seed(0)).tolist()))


@pytest.fixture(scope="module")
def family(tiny):
    """The same model in float, rounded, and stored in 8 and in 4 bits."""
    return {
        "float": tiny,
        "rounded": ql.fake_quantize_model(tiny, lambda weight: ql.absmax_quantize(weight, 4)),
        "8 bits": ql.quantize_model(tiny, 8),
        "4 bits": ql.quantize_model(tiny, 4, 32),
    }


@pytest.mark.parametrize("name", ["float", "rounded", "8 bits", "4 bits"])
def test_a_model_against_itself(family, name):
    """Exactly zero, on every token, in the mean, the interval and the KL; also against a copy, also in a crowd."""
    model = family[name]
    for candidate in (model, copy.deepcopy(model)):
        results = ql.compare(model, {"same": candidate, **family}, words, TEXT, window=32, stride=8)
        same = results["same"]
        assert torch.equal(same.candidate.token_nll, same.reference.token_nll)
        assert (same.delta_nll, same.ci, same.kl, same.top1_agreement) == (0, (0, 0), 0, 1)
        assert same.verdict == "indistinguishable"
        assert results[name].delta_nll == results[name].kl == 0


@pytest.mark.parametrize("first, second", [("float", "rounded"), ("8 bits", "4 bits"), ("float", "4 bits")])
def test_order_flips_the_sign(family, first, second):
    """On every token and in the mean exactly; the interval is its mirror image; "worse" becomes "better"."""
    there = ql.compare(family[first], family[second], words, TEXT)
    back = ql.compare(family[second], family[first], words, TEXT)
    assert torch.equal(there.candidate.token_nll, back.reference.token_nll)
    assert torch.equal(there.reference.token_nll, back.candidate.token_nll)
    assert there.delta_nll == -back.delta_nll != 0 and there.top1_agreement == back.top1_agreement < 1
    assert there.ci == pytest.approx((-back.ci[1], -back.ci[0]), rel=1e-9)
    assert {there.verdict, back.verdict} in ({"worse", "better"}, {"indistinguishable"})
    assert there.kl > 0 and back.kl > 0 and there.kl != back.kl
    difference = (there.candidate.token_nll - there.reference.token_nll).double().numpy()
    shifted = ql.bootstrap_interval(difference + 10)
    assert shifted == pytest.approx((there.ci[0] + 10, there.ci[1] + 10), rel=1e-9)
    assert ql.bootstrap_interval(3 * difference) == pytest.approx((3 * there.ci[0], 3 * there.ci[1]), rel=1e-9)


def test_measure(tiny, monkeypatch):
    """Each method as by `compare`, a few copies at a time or all at once; true bits of what was rounded."""
    methods = {
        "codes": lambda w: ql.absmax_quantize(w, 4, 0, 32, torch.float16),
        "pair": lambda w: (ql.absmax_quantize(w, 4, 0, 32, torch.float16).dequantize(), 4.5 * w.numel()),
        "values": lambda w: w.round(decimals=1),
    }
    results, table = ql.measure(tiny, words, methods, TEXT)
    sizes, compare = [], ql.compare
    with monkeypatch.context() as patch:
        patch.setattr(ql, "compare", lambda model, some, *rest: sizes.append(len(some)) or compare(model, some, *rest))
        one_by_one, same = ql.measure(tiny, words, methods, TEXT, memory=1)
        ql.measure(tiny, words, methods, TEXT, memory=2.5 * ql.model_nbytes(tiny))
    assert sizes == [1, 1, 1, 2, 1]
    assert same.equals(table) and list(table["bits"][:2]) == [4.5, 4.5] and table["bits"].isna()["values"]
    candidate = ql.fake_quantize_model(tiny, methods["codes"], ql.in_block)
    expected = ql.compare(tiny, candidate, words, TEXT, stride=ql.context_length(tiny))
    for got in (results["codes"], results["pair"], one_by_one["codes"]):
        assert torch.equal(got.token_kl, expected.token_kl) and got.ci == expected.ci
    assert table.loc["codes", ["KL", "Δ loss"]].tolist() == pytest.approx([expected.kl, expected.delta_nll], abs=1e-4)
    same = {"transformer.h.0.mlp.c_fc.weight": tiny.transformer.h[0].mlp.c_fc.weight.T}
    finished, rows = ql.measure(tiny, words, {"finished": candidate, "a dict": same}, TEXT)
    assert torch.equal(finished["finished"].token_kl, expected.token_kl) and finished["a dict"].kl < 1e-6
    assert rows.loc["finished"].equals(table.loc["codes"]) and rows["bits"].isna()["a dict"]
