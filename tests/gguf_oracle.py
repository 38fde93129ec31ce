"""Compare the formats of notebook 13 with the package gguf, byte for byte, and with the encoder of llama.cpp itself.

    python3 -m venv peers && . peers/bin/activate
    pip install -r requirements.txt gguf xllamacpp
    python tests/gguf_oracle.py > tests/results/gguf.txt

The functions are taken from the notebook's own cells. Blocks of Q4_K come from ggml, inside xllamacpp: the package gguf
decodes k-quants but encodes none. Without xllamacpp those lines are left out. Not collected by pytest.
"""

import ctypes
import json
import struct
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "13_gguf.ipynb"
ENDS = {"by-hand": "\nfor", "q8": "\nx = ", "q4": "\nblocks = ", "q4k-decode": "\nrandom", "q4k-encode": "\nvalues"}


def functions():
    """What the cells named in ENDS define, without what they print."""
    names = {"np": np, "torch": torch, "struct": struct}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        exec("".join(cell["source"]).partition(ENDS[cell["id"]])[0] if cell["id"] in ENDS else "", names)
    return names


def tensors(rng):
    """Name and blocks of 32: random ones of several sizes, few digits (which make ties), edge cases."""
    for power in (-12, -6, 0, 6, 12):
        yield f"random, size 2^{power}", (rng.standard_normal((20_000, 32)) * 2.0**power).astype(np.float32)
    yield "few digits", (rng.integers(-127, 128, (20_000, 32)) / 2).astype(np.float32)
    yield "zeros and constants", np.repeat(np.float32([[0], [1], [-1], [1e-8]]), 32, axis=1)
    yield "just below a half", np.float32([[127] + 31 * [np.nextafter(np.float32(0.5), np.float32(0))]])


def report(name, ours, theirs):
    print(f"{name:58s} {np.count_nonzero(np.asarray(ours) != np.asarray(theirs)):>7,} of {theirs.size:,} differ")


def ggml_q4_k(w):
    """float32 [rows, 256 n] -> uint8 [super-blocks, 144], by llama.cpp."""
    chunk = ctypes.CDLL(str(next(Path(find_spec("xllamacpp").origin).parent.glob("xllamacpp*.so")))).ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *3 * [ctypes.c_int64], ctypes.c_void_p]
    out = np.zeros((w.size // 256, 144), np.uint8)
    assert chunk(int(Kind.Q4_K), w.ctypes.data, out.ctypes.data, 0, *w.shape, None) == out.nbytes
    return out


def main():
    ours, rng, peers = functions(), np.random.default_rng(0), [p for p in ("gguf", "xllamacpp") if find_spec(p)]
    print("python tests/gguf_oracle.py;", *(f"{p} {version(p)}" for p in peers))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        Path(file.name).write_bytes(ours["content"])
        report("the file written by hand", ours["numbers"], gguf.GGUFReader(file.name).tensors[0].data)
    for kind in (Kind.Q8_0, Kind.Q4_0):
        for label, x in tensors(rng):
            name, blocks = kind.name.lower(), quantize(x, kind)
            report(f"encode_{name}, bytes, {label}", ours[f"encode_{name}"](x), blocks)
            report(f"decode_{name}, numbers, {label}", ours[f"decode_{name}"](blocks), dequantize(blocks, kind))
    if "xllamacpp" in peers:
        w = (rng.standard_normal((384, 1536)) * 0.05).astype(np.float32)
        blocks = ggml_q4_k(w)
        theirs = dequantize(blocks, Kind.Q4_K).reshape(w.shape)
        report("decode_q4_k, numbers, encoded by llama.cpp", ours["decode_q4_k"](blocks).reshape(w.shape), theirs)
        for name, x in (("llama.cpp", theirs), ("the notebook's q4_k", ours["q4_k"](torch.tensor(w))[0].numpy())):
            print(f"SQNR on normal weights, {name}: {10 * np.log10((w**2).sum() / ((w - x) ** 2).sum()):.2f} dB")


if __name__ == "__main__":
    main()
