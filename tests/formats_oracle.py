"""Compare the formats of notebook 12 with other implementations: ml_dtypes' casts, torchao's MX and NVFP4.

    python3 -m venv peers && . peers/bin/activate
    pip install -r requirements.txt ml_dtypes torchao
    python tests/formats_oracle.py > tests/results/formats.txt

The functions are taken from the notebook's own cells. A library that is missing is left out. Not collected by pytest,
which compares the E4M3 and E5M2 of the notebook with PyTorch's casts in the notebook itself.
"""

import json
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "12_block_formats.ipynb"


def functions():
    """What the cells `minifloat`, `mx` and `nvfp4` define, without what they print and draw."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]}
    names = {"torch": torch, "partial": partial}
    for name, end in (("minifloat", "\nx = "), ("mx", "\nblock = "), ("nvfp4", "\n_, ax")):
        exec(cells[name].partition(end)[0], names)
    return names


def numbers():
    """Every float32 that has few digits, so that there are ties, and random ones of all sizes; [n]."""
    generator = torch.Generator().manual_seed(0)
    few = torch.arange(-4096, 4097) / 64
    sizes = torch.exp2(torch.randint(-14, 9, (200_000,), generator=generator).float())
    return torch.cat([few, few * 2**-9, torch.randn(200_000, generator=generator) * sizes])


def report(name, ours, theirs):
    different = (ours != theirs).sum().item()
    print(f"{name:52s} {different:>7,} of {ours.numel():,} differ", end="")
    print(f", by {((ours - theirs).abs() / theirs.abs().clamp(min=1e-30)).max():.2g} at most" if different else "")


def main():
    ours, x = functions(), numbers()
    packages = [p for p in ("torch", "ml_dtypes", "torchao") if find_spec(p)]
    print("python tests/formats_oracle.py;", ", ".join(f"{p} {version(p)}" for p in packages))
    if find_spec("ml_dtypes"):
        import ml_dtypes

        tops = {"float8_e4m3fn": ("e4m3", 448), "float8_e5m2": ("e5m2", 57344), "float4_e2m1fn": ("e2m1", 6)}
        for kind, (name, top) in tops.items():
            inside = x.clamp(-top, top)
            cast = torch.from_numpy(inside.numpy().astype(getattr(ml_dtypes, kind)).astype("float32"))
            report(f"{name} and ml_dtypes.{kind}", ours[name](inside), cast)
    if find_spec("torchao"):
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        w = torch.randn(384, 1536, generator=torch.Generator().manual_seed(0)) * 0.05
        kind = torch.float4_e2m1fn_x2 if hasattr(torch, "float4_e2m1fn_x2") else "fp4_e2m1"
        theirs = MXTensor.to_mx(w, kind, 32, ScaleCalculationMode.FLOOR)
        report("mx and torchao's MXTensor, floor", ours["mx"](w)[0], theirs.dequantize(torch.float32))
        scale = per_tensor_amax_to_scale(w.abs().max())
        theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale)
        report("nvfp4 and torchao's NVFP4Tensor", ours["nvfp4"](w)[0], theirs.dequantize(torch.float32))


if __name__ == "__main__":
    main()
