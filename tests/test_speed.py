"""Tests of real speed in quantlib: however a product is computed, it is the product; and how time is taken."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_storage import DTYPES, both, gpt2, logits, quantized, randn
from torch import nn

import quantlib as ql

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(96, 64, 32), (100, 64, 64), (257, 128, 128), (40, 36, 12), (130, 100, 2), (600, 512, 256), (32, 64, 16)]


def layer(outputs, width, group_size, bits):
    return quantized(outputs, width, bits, group_size if bits == 4 else None)[1]


def assert_product(part, x, tolerance, multiply=ql.matmul):
    """Against the length of a row, or what it would be if its products had random signs and none cancelled."""
    y, wide, w = multiply(x, part.weight), x.double(), part.weight.dequantize(torch.float64).T
    length = torch.maximum((wide @ w).square(), wide.square() @ w.square()).sum(-1).sqrt()
    assert y.dtype == x.dtype and y.shape == (len(x), w.shape[1]) and torch.isfinite(y).all()
    assert ((y.double() - wide @ w).norm(dim=-1) <= tolerance * length).all()


def inputs(rows, width, dtype=torch.float32):
    """Rows of very different size; one of zeros and one with a huge element where there are enough."""
    x = randn(rows, width, seed=rows) * torch.logspace(-1, 2, rows)[:, None]
    if rows > 2:
        x[1], x[2, 3] = 0, 1e4
    return x.to(dtype)


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(bits, shape, dtype, monkeypatch):
    """At worst x and the result are rounded to bfloat16; without what rounds, it is as exact as the dtype."""
    apart = randn(9, 3, 2 * shape[1])[:, 1, ::2], randn(shape[1], 4).T, randn(0, shape[1])  # in memory; or no rows
    for x in (*(inputs(rows, shape[1]) for rows in (1, 2, 4, 5, 8, 9, 33, 128, 129)), *apart):
        assert_product(layer(*shape, bits), x.to(dtype), 8e-3)
    monkeypatch.setattr(ql, "CPU_HAS_BF16", False)
    monkeypatch.setattr(ql, "CPU_BLOCK", 0)
    for rows in (1, 5, 9, 128) if bits == 4 or shape[1] % 32 else (9, 128):
        assert_product(layer(*shape, bits), inputs(rows, shape[1], dtype), 5 * torch.finfo(dtype).eps)


@both
def test_product_at_the_ends_of_the_ranges(bits):
    """Sums that saturate in 16 bits would be off by half; a NaN or an infinity breaks its row, and no other."""
    part = layer(192, 768, 64, bits)
    part.weight.codes.fill_(127 if bits == 8 else 0xFF)  # 4 bits: 15, which stands for 7
    for rows, broken in ((1, torch.inf), (8, torch.nan), (100, torch.inf)):
        assert_product(part, x := torch.full((rows, 768), 1000.0), 8e-3)
        x[-1, 5] = broken
        assert torch.isfinite(ql.matmul(x, part.weight)).all(dim=1).tolist() == [True] * (rows - 1) + [False]


@both
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (1, 1, 1, 64), (0, 3, 64), (5, 64), (40, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_that_of_torch(bits, shape, bias):
    """Any number of dimensions; the bias; and the gradient of what enters, which the fast products do not have."""
    part, x = layer(100, 64, 32, bits), randn(*shape)
    part.bias = part.bias if bias else None
    y, expected = part(x), nn.functional.linear(x, weight := part.weight.dequantize(), part.bias)
    assert y.shape == expected.shape and (y - expected).norm() <= 8e-3 * expected.norm()
    (gradient,) = torch.autograd.grad(part(x.requires_grad_()), x, torch.ones_like(y))
    assert torch.allclose(gradient, torch.ones_like(y) @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ql.CPU_BLOCK == 0, reason="a CPU without these products")
@pytest.mark.parametrize("bits, rows, shape, way", [
    (8, 8, (96, 64, 0), "int8"), (8, 9, (96, 64, 0), None), (8, 1, (96, 36, 0), None), (4, 128, (96, 64, 32), "int4"),
    (4, 129, (96, 64, 32), None), (4, 1, (96, 64, 16), None),
])  # fmt: skip
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_which_way_a_product_takes(bits, rows, shape, way, wide, monkeypatch):
    """Any of them is right; this one was measured to be the fastest."""
    monkeypatch.setattr(ql, "CPU_HAS_BF16", wide == torch.bfloat16)
    x, part = randn(rows, shape[1]), layer(*shape, bits)
    with torch.profiler.profile() as profile:
        y = ql.matmul(x, part.weight)
    assert [way] * bool(way) == [event.name[14:18] for event in profile.events() if "pack_mm" in event.name]
    assert way or torch.equal(y, (x.to(wide) @ part.weight.dequantize(wide).T).float())


@both
@pytest.mark.parametrize("block", [ql.CPU_BLOCK, 0])
def test_product_while_compiling(bits, block, monkeypatch):
    """One graph, for few rows and many; few rows of 8 bits are not rounded, since the compiler makes a loop of them."""
    monkeypatch.setattr(ql, "CPU_BLOCK", block)
    torch.compiler.reset()
    for rows in (1, 4, 5, 128):
        multiply = torch.compile(ql.matmul, backend="eager", fullgraph=True, dynamic=False)
        assert_product(layer(100, 64, 32, bits), inputs(rows, 64), 1e-6 if bits == 8 and rows < 5 else 8e-3, multiply)


@pytest.mark.slow
@pytest.mark.parametrize("bits, rows", [(8, 1), (8, 5), (8, 9), (4, 1), (4, 5), (4, 129)])
def test_compiled_model(bits, rows):
    """The compiler changes the order of sums, not the logits."""
    model = ql.quantize_model(gpt2(n_positions=256, n_layer=1, vocab_size=512), bits)
    got = logits(torch.compile(model, dynamic=False), rows)
    assert (got - logits(model, rows)).norm() < 0.01 * got.norm()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_cpus(capability):
    """In PyTorch as older CPUs have it: there codes of 4 bits lie in another order, or their product is missing."""
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("storage", "speed", "architectures")]
    command = [sys.executable, "-m", "pytest", "-qx", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider"]
    subprocess.run(command + files, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.append(seconds)`."""
    passed = []
    monkeypatch.setattr(ql.time, "perf_counter", lambda: float(sum(passed)))
    return passed


def test_functions_take_turns(clock):
    """One of each in every round; neither the first round counts, nor what runs before; the result is in ms."""
    log = []

    def run(label, seconds):
        log.append(label)
        clock.append(seconds * (100 if log.count(label) == 1 else log.count(label)))

    functions = {"a": lambda: run("a", 0.002), "b": lambda: run("b", 0.5)}
    times = ql.time_interleaved(functions, 3, before={"a": lambda: run("A", 9), "b": lambda: run("B", 9)})
    assert "".join(log) == "AaBb" * 4 and list(times) == ["a", "b"]
    assert times["a"].tolist() == pytest.approx([4, 6, 8]) and times["b"].tolist() == pytest.approx([1000, 1500, 2000])
    assert len(ql.time_interleaved(functions)["a"]) == 5 and "".join(log[16:]) == "ab" * 6


def test_decoding_is_timed_per_token(clock):
    """Only the steps after the prompt, each with the likeliest token and the cache of the one before."""
    calls = []

    def model(ids, use_cache, past_key_values=None):
        calls.append((ids.tolist(), past_key_values))
        clock.append(100 if past_key_values is None else 0.003)
        likely = nn.functional.one_hot(ids + 1, 50)
        return SimpleNamespace(logits=likely, past_key_values=len(calls) if use_cache else None)

    model.device = "cpu"
    assert ql.benchmark_decode(model, tokens=3, prompt=4, rounds=2).tolist() == pytest.approx([3, 3])
    assert calls[:4] == [([[0, 1, 2, 3]], None), ([[4]], 1), ([[5]], 2), ([[6]], 3)] and len(calls) == 12
    times = ql.benchmark_decode({"a": model, "b": model}, tokens=1, prompt=1)
    assert list(times) == ["a", "b"] and all(ms.tolist() == pytest.approx([3] * 5) for ms in times.values())


@on_gpu
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_on_a_gpu(bits, dtype):
    """By the kernel for few rows, by the widened weight for many; also of widths and outputs that fill no block."""
    odd = [(65, 1037, 0), (1, 37, 0)] if bits == 8 else [(33, 2 * g, g) for g in (2, 4, 8, 16, 32, 64, 128, 256)]
    for shape in [*SHAPES, *odd, (1, 64, 64), (768, 3072, 64), (8200, 768, 64)]:
        part, apart = layer(*shape, bits).cuda(), randn(3, 2, shape[1])[:, 1]
        for x in (*(inputs(rows, shape[1]) for rows in (1, 2, 3, 4, 5, 100)), apart):
            assert_product(part, x.to("cuda", dtype), max(2e-4, 5 * torch.finfo(dtype).eps))
    torch.compiler.reset()  # what other dtypes compiled counts against a limit
    for rows in (1, 4, 5):
        multiply = torch.compile(ql.matmul, fullgraph=True, dynamic=False)
        assert_product(layer(100, 128, 64, bits).cuda(), inputs(rows, 128, dtype).cuda(), 8e-3, multiply)


@on_gpu
@both
def test_models_move_to_a_gpu_and_back(bits, tmp_path):
    """With the codes and scales that the CPU gives, whatever was where; a file from there is loaded as it was."""
    here, there = ql.quantize_model(gpt2(), bits), ql.quantize_model(gpt2().cuda(), bits)
    ql.save_quantized(there, tmp_path / "file")
    moved, back = (ql.quantize_model(gpt2(), bits).cuda().half().float().to(device) for device in ("cuda", "cpu"))
    for other in (there, moved, ql.load_quantized(tmp_path / "file"), back):
        state, other_state = ({n: t for n, t in one.state_dict().items() if ".weight." in n} for one in (here, other))
        assert {t.device.type for t in other_state.values()} == {"cpu" if other is back else "cuda"}
        assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in other_state.items())
        assert other.lm_head.weight is other.transformer.wte.weight
        assert (logits(other).cpu() - logits(here)).norm() < 0.02 * logits(here).norm()
    assert back.lm_head.weight.block == here.lm_head.weight.block
