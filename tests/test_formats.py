"""Tests of what joined quantlib for Part IV: FP8, NVFP4, Q4_K, rotations, rounded inputs, the stored results."""

import math

import pytest
import torch

import quantlib as ql


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(values, levels):
    return levels[(values[..., None] - levels).abs().argmin(-1)]


def test_fp8():
    """Each row takes the nearest of all finite E4M3 numbers, times its scale."""
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()]
    x = randn(5, 100) * torch.tensor([1e-6, 1e-2, 1, 30, 1e4])[:, None]
    scale = x.abs().amax(1, keepdim=True) / 448
    values, bits = ql.fp8_quantize(x, axis=0)
    assert torch.allclose(values, nearest(x / scale, levels) * scale, rtol=1e-6) and bits == 8 * 500 + 32 * 5
    assert torch.allclose(values.abs().amax(1), x.abs().amax(1), rtol=1e-6)
    assert ql.fp8_quantize(torch.zeros(3, 2))[0].eq(0).all() and ql.fp8_quantize(x)[1] == 8 * 500 + 32


def test_nvfp4():
    """In each block of 16 the nearest of E2M1's numbers; scales are E4M3 numbers times one for the tensor."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels, levels])
    x = randn(6, 64) * torch.tensor([1e-6, 3e-5, 1e-4, 1e-2, 0.3, 1])[:, None]  # scales down to the least, 2 ** -9
    values, bits = ql.nvfp4_quantize(x)
    tensor = x.abs().max() / (448 * 6)
    scale = (x.unflatten(1, (-1, 16)).abs().amax(2, keepdim=True) / 6 / tensor).to(torch.float8_e4m3fn).float()
    scale = scale.clamp(min=2**-9) * tensor
    expected = (nearest(x.unflatten(1, (-1, 16)) / scale, levels) * scale).flatten(1)
    error, least = (values - x).abs(), (expected - x).abs()
    assert torch.allclose(error, least, rtol=1e-4, atol=1e-12)  # ties may break either way
    assert bits == 4 * 384 + 8 * 24 + 32
    assert ql.nvfp4_quantize(torch.zeros(2, 16))[0].eq(0).all()
    with pytest.raises(ValueError, match="group_size=16"):
        ql.nvfp4_quantize(randn(4, 24))


@pytest.mark.parametrize(("width", "bits"), [(512, 4.5), (96, 4 + 12 / 32 + 32 / 96)])
def test_q4_k(width, bits):
    """Values are on 16 steps of each block, better than absmax in groups of 32, and importance moves the error."""
    x = randn(20, width) + 0.3
    values, stored = ql.q4_k_quantize(x)
    assert stored == bits * x.numel()
    assert max(len(block.unique()) for block in values.reshape(-1, 32)) <= 16
    plain = ql.absmax_quantize(x, 4, group_size=32).dequantize()
    assert (values - x).square().sum() < 0.8 * (plain - x).square().sum()
    importance = torch.ones(width).index_fill(0, torch.arange(0, width, 4), 1000.0)
    chosen = [(ql.q4_k_quantize(x, i)[0] - x)[:, ::4].square().sum() for i in (None, importance)]
    assert chosen[1] < 0.9 * chosen[0]
    assert ql.q4_k_quantize(torch.zeros(2, 32))[0].eq(0).all()


def test_q4_k_block_by_block():
    """The same as by plain loops over blocks and pairs of ends, on blocks of one sign and of unequal size too."""
    x = randn(4, 512) * torch.logspace(-1, 1, 16).repeat_interleave(32) + torch.tensor([0.0, 3.0, -3.0, 0])[:, None]
    x[3] = x[3] ** 3  # long tails, which are cut
    values, _ = ql.q4_k_quantize(x)
    for part, got in zip(x.reshape(-1, 8, 32), values.reshape(-1, 8, 32), strict=True):
        ends = []
        for block in part:
            low, high = min(block.min().item(), 0), max(block.max().item(), 0)
            tried = []
            for a in (1, 0.85, 0.7):
                for b in (1, 0.85, 0.7):
                    scale = (high * b - low * a) / 15
                    back = ((block - low * a) / scale).round().clamp(0, 15) * scale + low * a
                    tried.append(((back - block).square().sum().item(), scale, -low * a))
            ends.append(min(tried)[1:])
        d, dmin = (torch.tensor(max(max(column), 63e-7) / 63).half().item() for column in zip(*ends, strict=True))
        for block, (scale, minimum), back in zip(part, ends, got, strict=True):
            scale, minimum = d * min(round(scale / d), 63), dmin * min(round(minimum / dmin), 63)
            expected = ((block + minimum) / (scale or 1)).round().clamp(0, 15) * scale - minimum
            assert torch.isclose(back, expected, rtol=1e-4, atol=1e-5).float().mean() > 0.95  # but for ties
            assert (back - expected).abs().max() <= 1.01 * scale and len(back.unique()) <= 16


@pytest.mark.parametrize(("width", "block"), [(384, 128), (64, 64), (48, 16)])
def test_rotate(width, block):
    """Orthogonal, undone by back, of equally large entries within a block; another seed is another rotation."""
    matrix = ql.rotate(torch.eye(width))  # row i is what becomes of unit vector i
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=1e-5)
    assert torch.equal(matrix != 0, torch.block_diag(*[torch.ones(block, block)] * (width // block)).bool())
    assert torch.allclose(matrix[matrix != 0].abs(), torch.tensor(block**-0.5))
    x, w = randn(2, 7, width), randn(5, width, seed=1)
    assert torch.allclose(ql.rotate(x), x @ matrix, atol=1e-5)
    assert torch.allclose(ql.rotate(ql.rotate(x), back=True), x, atol=1e-5)
    assert torch.allclose(ql.rotate(x, seed=3) @ ql.rotate(w, seed=3).T, x @ w.T, atol=1e-4)
    assert not torch.equal(ql.rotate(x, seed=3), ql.rotate(x))
    assert ql.rotate(x.double()).dtype == torch.float64
    signs = (matrix[:block, :block] > 0).sum(0)
    assert len(signs.unique()) > 1, "no random signs: the columns of a Hadamard matrix but the first are half positive"


def test_round_inputs(tiny):
    """Each layer of the blocks gets what the function returns for its name; the model itself stays."""
    seen, ids = {}, torch.arange(20)[None]

    def activation(name, x):
        seen[name] = x.shape
        return torch.zeros_like(x)

    before = tiny(ids).logits
    rounded = ql.round_inputs(tiny, activation)
    name = next(iter(ql.block_layers(tiny)))
    rounded.get_submodule(name).register_forward_hook(lambda m, x, y: seen.update(out=y))
    rounded(ids)
    assert set(seen) - {"out"} == set(ql.block_layers(tiny)) and seen[name] == (1, 20, tiny.config.n_embd)
    assert torch.equal(seen["out"], tiny.get_submodule(name).bias.expand_as(seen["out"]))
    assert torch.equal(tiny(ids).logits, before)
    assert torch.equal(ql.round_inputs(tiny, lambda name, x: x)(ids).logits, before)


def test_large_results(capsys):
    """The rows of one chapter, and where they come from."""
    table = ql.large_results(10)
    assert set(table["chapter"]) == {10} and {"candidate", "bits", "measure", "value", "low", "high"} < set(table)
    assert "124,046,592 parameters" in capsys.readouterr().out
    kl = table[(table["measure"] == "KL (nats)")]
    assert len(kl) > 3 and (kl["low"] < kl["value"]).all() and math.isfinite(kl["value"].sum())
