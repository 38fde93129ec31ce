"""What quantization saves and what it costs, beside other libraries: all candidates in turns, in one run.

    python tests/benchmark.py                               # GPT-2 124M with random weights: bytes, speed, memory
    python tests/benchmark.py --compile                     # torch.compile as well
    python tests/benchmark.py --compile --product           # on a GPU: recorded too, and single products
    python tests/benchmark.py --model xl --compile --only 16-bit,int8,int4
    python tests/benchmark.py --model pocket-gpt2 --quality # a trained model: loss and KL, with intervals

Speed and bytes do not depend on the values of the weights, so random weights of the published sizes ("gpt2", "xl") will
do. Times are medians of the rounds with the smallest and the largest; only ratios within one run mean something.

- stored: what is kept, each tensor once, relative to fp32. decode: milliseconds a token, one at a time with a cache.
  prefill: milliseconds for 512 tokens in one call. compiled: decoding through torch.compile; on a GPU recorded as a
  CUDA graph too, as notebook 9 does it, and then relative to the 16-bit model in the same form.
- memory: MB of a fresh process above what Python and its packages take, after loading and one token, and at most.

torchao and bitsandbytes take part where they are installed; keep them in an environment of their own. Both quantize
`nn.Linear` only, so they get a copy in which each `Conv1D` is a `Linear`; their head becomes a tensor of its own.
Results of runs are in tests/results/.
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache  # noqa: F401 - the notebook's class needs it
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import quantlib as ql  # noqa: E402

SIZES = {
    "gpt2": {},
    "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
GPU = ql.DEVICE.type == "cuda"
HALF = torch.float16 if GPU else torch.bfloat16
PRODUCTS = ((768, 2304), (3072, 768), (768, 50257), (1600, 6400), (6400, 1600), (4096, 14336))


def notebook_9(cell: str) -> str:
    """The source of one of its cells: what is timed here is what is taught there."""
    cells = json.loads((ROOT / "notebooks" / "09_speed.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join(next(c["source"] for c in cells if c["id"] == cell))


def build(name: str):
    """The model in fp32, with its tokenizer if it is a trained one."""
    if name not in SIZES:
        return ql.load_model(name)
    torch.manual_seed(0)
    with ql.DEVICE:
        return GPT2LMHeadModel(GPT2Config(**SIZES[name])).eval(), None


def linear(model):
    """A copy whose `Conv1D` layers are `nn.Linear`, for libraries that know nothing else."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            layer = nn.Linear(*module.weight.shape, device="meta")
            layer.weight, layer.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, layer)
    return model


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = linear(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def bitsandbytes(model, kind):
    import bitsandbytes as bnb

    model = linear(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if kind == "int8":
                layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, module.bias is not None, False)
                layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
                )
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.bias = module.bias
            model.set_submodule(name, layer.to(model.device))
    return model


def candidates(fp32, only):
    """Label -> model. On a GPU integers are multiplied with halves, as one would use them there."""
    source = copy.deepcopy(fp32).to(HALF) if GPU else fp32
    make = {
        "fp32": lambda: fp32,
        "16-bit": lambda: copy.deepcopy(fp32).to(HALF),
        "int8": lambda: ql.quantize_model(source),
        "int4": lambda: ql.quantize_model(source, 4),
        "torchao int8": lambda: torchao_int8(source),
        "bitsandbytes int8": lambda: bitsandbytes(source, "int8"),
        "bitsandbytes nf4": lambda: bitsandbytes(source, "nf4"),
    }
    models = {}
    for label in only or make:
        try:
            models[label] = make[label]()
        except Exception as error:  # not installed, or not for this machine
            print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return models


def row(times, base):
    """Median, smallest and largest, and the ratio to the base."""
    median = np.median(times)
    return f"{median:.4g} ({times.min():.4g}–{times.max():.4g})", f"{np.median(base) / median:.2f}"


def speed(models, rounds, compiled):
    first = next(iter(models))
    table = pd.DataFrame(index=list(models))
    whole = ql.model_nbytes(models["fp32"]) if "fp32" in models else None
    if whole:
        table["stored"] = [f"{ql.model_nbytes(model) / whole:.4f}" for model in models.values()]
    decode = ql.benchmark_decode(models, rounds=rounds)
    forms = dict(decode)
    ids = torch.arange(512, device=ql.DEVICE)[None]
    with torch.inference_mode():
        calls = {label: lambda m=model: m(ids, logits_to_keep=1) for label, model in models.items()}
        prefill = ql.time_interleaved(calls, rounds)
    for name, times in (("decode ms", decode), ("prefill ms", prefill)):
        table[[name, f"x {first}"]] = [row(times[label], times[first]) for label in models]
        table = table.rename(columns={f"x {first}": f"{name} x"})
    print(table.to_string())
    if compiled:
        exec(notebook_9("decoder"), globals())
        prompt, decoders = torch.arange(32, device=ql.DEVICE)[None], {}
        for label, model in models.items():
            torch._dynamo.reset()
            decoders[label] = Decoder(model, prompt, compiled=True, captured=GPU)  # noqa: F821 - the notebook's
            decoders[label].start()
            decoders[label].step()
        steps = {label: lambda d=d: [d.step() for _ in range(16)] for label, d in decoders.items()}
        times = ql.time_interleaved(steps, rounds, {label: d.start for label, d in decoders.items()})
        for label, ms in times.items():
            form = label + (", compiled, graph" if GPU else ", compiled")
            forms[form] = ms / 16
            print(f"{form:28s}", *row(ms / 16, times[first] / 16))
    return forms


def products(rounds):
    """One row in float16 times one matrix, in a CUDA graph, microseconds."""
    from triton.testing import do_bench_cudagraph

    table = {}
    for inputs, outputs in PRODUCTS:
        net = nn.Linear(inputs, outputs, bias=False, device=ql.DEVICE, dtype=torch.float16)
        x, times = torch.randn(1, inputs, device=ql.DEVICE, dtype=torch.float16), {}
        weights = {bits: ql.quantize_model(nn.Sequential(net), bits)[0].weight for bits in (8, 4)}
        calls = {"fp16": lambda x=x, net=net: x @ net.weight.T}
        calls |= {f"int{bits}": lambda x=x, w=w: ql.matmul(x, w) for bits, w in weights.items()}
        for label, call in calls.items():
            times[f"{label} µs"] = np.median([1e3 * do_bench_cudagraph(call) for _ in range(rounds)])
        table[f"{inputs}→{outputs}"] = times
    print(pd.DataFrame(table).T.round(1).to_string())


MEMORY = """
import sys; sys.path.insert(0, {root!r})
import torch, quantlib as ql
from transformers import GPT2LMHeadModel
def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[key].split()[0]) / 1e3 for key in ("VmRSS", "VmHWM")]
before = status()[0]
model = {load}
with torch.no_grad():
    model(torch.tensor([[0]]))
print(*(round(value - before) for value in status()))
"""


def memory(fp32):
    with tempfile.TemporaryDirectory() as folder:
        fp32.cpu().save_pretrained(f"{folder}/full")
        loads = {"fp32": f"GPT2LMHeadModel.from_pretrained('{folder}/full', dtype=torch.float32)"}
        for bits in (8, 4):
            ql.save_quantized(ql.quantize_model(fp32, bits), f"{folder}/int{bits}")
            loads[f"int{bits}"] = f"ql.load_quantized('{folder}/int{bits}', 'cpu')"
        for label, load in loads.items():
            code = MEMORY.format(root=str(ROOT), load=load)
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            print(f"{label:5s} resident, at most (MB):", run.stdout.strip())


def quality(models, tokenizer):
    found = ql.compare(models["fp32"], {k: m for k, m in models.items() if k != "fp32"}, tokenizer, ql.load_text())
    for label, r in found.items():
        print(f"{label:18s} Δloss {r.delta_nll:+.4f} [{r.ci[0]:+.4f}, {r.ci[1]:+.4f}]  KL {r.kl:.4f} "
              f"[{r.kl_ci[0]:.4f}, {r.kl_ci[1]:.4f}]  top-1 {r.top1_agreement:.3f}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Bytes, speed, memory and quality of quantized models.")
    parser.add_argument(
        "--model", default="gpt2", help="a size (gpt2, medium, xl), or a trained model by name or folder"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="labels, with commas; the first is the base")
    parser.add_argument("--rounds", type=int, default=7)
    for flag in ("--compile", "--product", "--quality"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    where = (
        torch.cuda.get_device_name() if GPU else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; {options.model}, {options.rounds} rounds"
    )
    if options.product:
        products(options.rounds)
    fp32, tokenizer = build(options.model)
    models = candidates(fp32, options.only)
    forms = speed(models, options.rounds, options.compile)
    print("card,model,form,ms,low,high")  # as tests/results/gpu.csv has them
    for form, ms in forms.items():
        print(f'{where},{options.model},"{form}",{np.median(ms):.4g},{ms.min():.4g},{ms.max():.4g}')
    if options.quality:
        quality(models, tokenizer)
    if not GPU and isinstance(fp32, GPT2LMHeadModel) and Path("/proc/self/status").exists():
        memory(fp32)


if __name__ == "__main__":
    main()
