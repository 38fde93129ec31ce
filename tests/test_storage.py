"""Tests of real storage in quantlib: two codes in a byte, weights that are never in float, and their files."""

import copy
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import quantlib as ql

torch.set_num_threads(1)
NORM = "transformer.ln_f.weight"
BOMB = b"cos\nmkdir\n(S'trace'\ntR."  # a pickle that makes a folder
DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16
both = pytest.mark.parametrize("bits", [8, 4])
blocks = pytest.mark.parametrize("block", {ql.CPU_BLOCK, 0})  # with the order of this CPU and without


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, count=9):
    return model(torch.arange(7, 7 + count, device=model.device)[None]).logits


def gpt2(**more):
    """Random and tiny; its vocabulary of 100 fills no block."""
    sizes = {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0} | more)).eval()


def quantized(outputs, inputs, bits, group_size=None):
    """A `QuantizedTensor`, and a `QuantizedLinear` of the same weight; its rows are of different size."""
    linear = nn.Linear(inputs, outputs)
    linear.weight.data = randn(outputs, inputs) * randn(outputs, 1, seed=1).exp() / 20
    q = ql.absmax_quantize(linear.weight, bits, 0, group_size, torch.float32 if bits == 8 else torch.bfloat16)
    return q, ql.quantize_model(nn.Sequential(linear), bits, group_size)[0]


def test_packing():
    """-8 is stored as 0; the first half of a group is in the low halves of its bytes. All comes back, in its order."""
    assert ql.pack_int4(torch.tensor([[-8, 7], [7, -8], [0, -7]])).tolist() == [[0xF0], [0x0F], [0x18]]
    two_groups = torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1, 7, 6, 5, 4, 3, 2, 1, 0])
    assert ql.pack_int4(two_groups, 8).tolist() == [0x40, 0x51, 0x62, 0x73, 0xBF, 0xAE, 0x9D, 0x8C]
    for size in (2, 4, 8, 10, 32, 64, 128, 256):
        pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).repeat_interleave(size // 2, -1).char()
        mixed = torch.randint(-8, 8, (2, 3, 5 * size), dtype=torch.int8)
        assert len(ql.pack_int4(pairs, size).unique()) == 256  # a byte of its own for each pair
        for codes in (pairs, mixed, mixed[:0]):
            packed, again = ql.pack_int4(codes, size), ql.unpack_int4(ql.pack_int4(codes, size), size)
            assert packed.dtype == torch.uint8 and packed.shape == (*codes.shape[:-1], codes.shape[-1] // 2)
            assert again.dtype == torch.int8 and torch.equal(again, codes)
    for codes, size in (([0] * 3, 2), (1, 2), ([0, 8], 2), ([-9, 0], 2), ([0.0, 0.0], 2), ([0] * 6, 3), ([0] * 6, 4)):
        with pytest.raises(ValueError, match=f"{torch.tensor(codes).dtype}.*{size}"):
            ql.pack_int4(torch.tensor(codes), size)


@blocks
@pytest.mark.parametrize("shape", [  # that fill the blocks of a CPU, that have to be padded, that stay as they are
    (64, 64, 4, 32), (100, 64, 4, 64), (130, 256, 4, 128), (1100, 32, 4, 32), (3, 512, 4, 256),
    (33, 48, 4, 16), (70, 36, 4, 2), (64, 512, 4, 512), (100, 36, 8, None), (1, 1, 8, None),
], ids=str)  # fmt: skip
def test_a_weight_is_the_tensor_that_it_was_made_from(shape, block, monkeypatch):
    """All of it and any rows, in every dtype; a state_dict has plain codes, whatever the order in memory."""
    monkeypatch.setattr(ql, "CPU_BLOCK", block)
    (outputs, inputs, bits, group_size), (q, layer) = shape, quantized(*shape)
    weight, codes = layer.weight, q.qdata if bits == 8 else ql.pack_int4(q.qdata, group_size)
    assert weight.block == (block if group_size in (32, 64, 128, 256) else 0) and weight.shape == q.shape
    assert f"[{outputs}, {inputs}], bits={bits}" in repr(layer) and copy.deepcopy(weight).to("meta").block == 0
    for dtype in DTYPES:
        parts = q.qdata.unflatten(1, (-1, group_size or inputs)).to(dtype)
        expected = q.dequantize() if dtype == torch.float32 else (parts * q.scale.to(dtype)[..., None]).flatten(1)
        assert weight.dequantize(dtype).dtype == dtype and torch.equal(weight.dequantize(dtype), expected)
        for some in (torch.randint(outputs, (2, 3, 4)), torch.arange(outputs), torch.tensor(outputs - 1)):
            assert torch.equal(weight.rows(some, dtype), expected[some])
        layer.to("cpu").to(dtype)  # leaves codes and scales alone; a kernel reads them as they lie in memory
        for got, stored, was in zip(weight.plain(), weight.state_dict().values(), (codes, q.scale), strict=True):
            assert got.dtype == stored.dtype == was.dtype and torch.equal(got, was) and torch.equal(stored, was)
            assert got.is_contiguous() and layer.bias.dtype == dtype


@pytest.mark.parametrize("bits, most", [(8, 0.258), (4, 0.15)])
def test_stored_bytes_of_gpt2(bits, most):
    """By its shapes: of 124 million weights, all but the positions, biases and norms become codes."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    matrices = {m.weight: m for m in model.modules() if isinstance(m, (Conv1D, nn.Linear))}
    shapes = [weight.T.shape if isinstance(m, Conv1D) else weight.shape for weight, m in matrices.items()]
    size = sum(ql.model_nbytes(ql.QuantizedWeight(*shape, bits, 64)) for shape in shapes)
    size += sum(p.nbytes for p in model.parameters() if p not in matrices)
    whole = sum(p.nbytes for p in model.parameters())  # transformers 4.57 keeps causal masks beside them
    assert 0.9 * most < size / whole <= most and whole == 4 * 124_439_808


@pytest.mark.parametrize("make, arguments, message", [
    (gpt2, (5,), "bits=5"), (gpt2, (True,), "bits=True"), (gpt2, (8, 64), "group_size=64"), (gpt2, (4, 0), "=0"),
    *((gpt2, (4, size), f"^transformer.wte.weight: .*{size}") for size in (7, 24, 128, 1)),
    (lambda: gpt2(n_inner=80), (4, 32), r"^transformer\.h\.0\.mlp\.c_proj\.weight: .*group_size=32"),
    (lambda: gpt2(initializer_range=1e39), (8,), "^transformer.wte.weight: .*infinite"),
    (lambda: ql.quantize_model(gpt2(), 4), (8,), "GPT2LMHeadModel.*nothing to quantize"),
    (lambda: nn.Sequential(nn.Embedding(64, 64), nn.LayerNorm(64)), (4,), "Sequential.*nothing"),
    (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64), (8,), "Linear.*nothing"),
])  # fmt: skip
def test_what_cannot_be_quantized(make, arguments, message):
    """Arguments and weights, the first matrix that they do not fit is named; what is quantized, or of another class."""
    with pytest.raises(ValueError, match=message):
        ql.quantize_model(make(), *arguments)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


def save_as(path, bits=8, norm=None, **config):
    """Save a tiny model with a right checksum, but with this norm in it, or this said about it."""
    model = ql.quantize_model(gpt2(), bits)
    model.transformer.ln_f, about = norm or model.transformer.ln_f, model.config.to_dict() | config
    model.config.to_dict = lambda: about
    ql.save_quantized(model, path)
    return model


def refused(path, *words):
    """One error that names the path, the words and a remedy, and nothing of the libraries below."""
    with pytest.raises(ValueError) as caught:
        ql.load_quantized(path, "cpu")
    words = os.path.expanduser(path), "save_quantized", "Give ", *words
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.__suppress_context__ and len(str(caught.value)) < 700


@blocks
@both
def test_a_file_holds_the_state_dict(bits, block, file, monkeypatch):
    """A tied tensor once, and the configuration as JSON: nothing else. It does not depend on the CPU that writes it."""
    state = save_as(file, bits).state_dict()
    before, tensors = file.read_bytes(), load_file(file)
    assert set(tensors) == {name for name in state if "lm_head" not in name} and not any("like" in n for n in state)
    assert 0 < len(before) - sum(tensor.nbytes for tensor in tensors.values()) < 10_000
    monkeypatch.setattr(ql, "CPU_BLOCK", block)
    save_as(file, bits)
    assert file.read_bytes() == before and os.listdir(file.parent) == ["file"] and file.stat().st_mode & 0o444 == 0o444
    for found in (tensors, ql.load_quantized(file, "cpu").state_dict()):
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


@both
def test_damaged_and_foreign_files_are_refused(bits, file, monkeypatch):
    """Cut or too long; one changed bit, wherever it is; tensors and words of others; a pickle, a text; no file."""
    monkeypatch.chdir(file.parent)
    save_as(file, bits)
    content, tensors, draw = file.read_bytes(), load_file(file), torch.Generator().manual_seed(0)
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    start, end = 8 + int.from_bytes(content[:8], "little"), len(content)
    damaged = [content[:kept] for kept in (0, 1, 7, 8, 9, -1, *torch.randint(end, (30,), generator=draw).tolist())]
    header, data = (torch.randint(*ends, (150,), generator=draw).tolist() for ends in ((8, start), (start, end)))
    for i, at in enumerate([*range(8), *header, start - 1, start, *data, end - 1]):
        changed = content[at] ^ 1 << i % 5  # not the bit of capitals: 1E-5 is 1e-5
        damaged.append(content[:at] + bytes([changed]) + content[at + 1 :])
    for said in (about["quantlib"].replace('"n_head": 2', '"n_head": 4'), "{", "[]", "{}"):
        damaged.append(save(tensors, {"quantlib": said}))
    for change in ({NORM: torch.zeros(64)}, {"more": torch.ones(1)}, {"other": tensors.pop(NORM)}, {}):
        damaged.append(save(tensors | change, about))
    for one in [*damaged, save(tensors), content + b"\0", BOMB, b"This is no model. " * 99]:
        file.write_bytes(one)
        refused(file)
    for path in ("missing", "no/folder/file", "~/file", "~nobody/file", ".", ql.BUNDLED_FOLDER / "model.safetensors"):
        refused(path)
    assert os.listdir() == ["file"]


@both
@pytest.mark.parametrize("change, named", [
    *(({"norm": norm}, NORM) for norm in (nn.LayerNorm(63), nn.Identity(), nn.LayerNorm(64).half())),
    ({"n_layer": 3}, "transformer.h.2."), ({"n_embd": 128}, "[100, "), ({"vocab_size": 101}, "transformer.wte.weight"),
    ({"tie_word_embeddings": False}, "lm_head.weight.codes"), ({"n_head": 5}, ""), ({"n_embd": -64}, ""),
    ({"activation_function": "no such"}, "no such"), ({"model_type": "no such"}, "no such"),
], ids=str)  # fmt: skip
def test_files_that_contradict_themselves_are_refused(change, named, bits, file):
    """The checksum is right, and yet the tensors are not those of the model that the file describes."""
    save_as(file, bits, **change)
    refused(file, named)


def test_code_named_in_a_file_is_not_run(file, monkeypatch):
    """An implementation of attention may be code on the hub. By default a model is on the device of the module."""
    evil = dict.fromkeys(("_attn_implementation", "attn_implementation"), "kernels-community/evil")
    model = save_as(file, **evil, auto_map={"AutoModelForCausalLM": "e.C"}, trust_remote_code=True)
    loaded = ql.load_quantized(file, "cpu")
    assert loaded.config._attn_implementation == "sdpa" and torch.equal(logits(loaded), logits(model))
    monkeypatch.setattr(ql, "DEVICE", torch.device("meta"))
    assert ql.load_quantized(file).device.type == "meta" and ql.load_quantized(file, "cpu").device.type == "cpu"


def test_failed_saving_leaves_what_was_there(file):
    """Not of quantize_model, or no language model; no such folder, no file, a disk that is full too early."""
    resource, (_, before) = pytest.importorskip("resource"), (save_as(file), file.read_bytes())
    for model in (gpt2(), ql.quantize_model(nn.Sequential(nn.Linear(64, 64)))):
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*quantize_model"):
            ql.save_quantized(model, file)
    for path in (file, file.with_name("new"), file.parent, file.with_name("missing") / "file"):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, limits[1]))
        with pytest.raises(ValueError, match=f"{path}.*Give a file in a folder that exists"):
            save_as(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == before and os.listdir(file.parent) == ["file"]
