"""What quantization saves and what it costs, beside other libraries: one table, all candidates in turns, in one run.

    python tests/benchmark.py                        # GPT-2 124M with random weights
    python tests/benchmark.py --compile              # torch.compile as well
    python tests/benchmark.py --model pocket-gpt2    # a trained model, by name or folder
    python tests/benchmark.py --model xl --product   # on a GPU: GPT-2 XL, and one matrix-vector product

Speed and bytes do not depend on the values of the weights, so random weights of the published sizes ("gpt2", "xl") will
do. Errors do: take them from a trained model. Times are medians with the smallest and the largest of the rounds; only
ratios within one run mean something.

- stored: parameters and buffers, each once, in bytes relative to fp32. quantize: seconds, once.
- decode: milliseconds per token, one token at a time with a cache. prefill: milliseconds for 512 tokens in one call.
- error: of the logits, relative to those of fp32, root mean square. top-1: share of tokens with the same favourite.

torchao and bitsandbytes take part where they are installed; keep them in an environment of their own:
`pip install -r requirements.txt torchao bitsandbytes`. Both quantize `nn.Linear` only, and GPT-2 is built of `Conv1D`,
so they get a copy in which each `Conv1D` is a `Linear`. The head becomes a tensor of its own for them, since the token
table stays in float.

Results
=======

On a CPU, `--compile`:

AMD EPYC, 2 threads; torch 2.13.0+cpu, transformers 5.23.0, torchao 0.18.0, bitsandbytes 0.50.2
gpt2, random weights, 7 rounds
torchao int4, bfloat16: ValueError: Unsupported int4 packing format: opaque
                        stored quantize s            decode ms x fp32           prefill ms x fp32     error  top-1
fp32                     1.000             41.57 (39.96–43.43)   1.00    715.4 (686.6–787)    1.00  0.0e+00  1.000
bfloat16                 0.500              27.5 (25.01–36.06)   1.51    403.4 (395–435.6)    1.77  1.2e-02  0.938
quantlib int8            0.257        1.8  17.04 (14.55–18.37)   2.44  525.9 (512.7–535.9)    1.36  2.4e-02  0.938
quantlib int4            0.147        1.4   9.28 (8.772–11.35)   4.48    651 (577.3–721.2)    1.10  3.2e-01  0.383
torchao int8             0.567        1.8  97.69 (89.86–106.2)   0.43  822.5 (729.4–948.3)    0.87  2.2e-02  0.945
torchao int8, bfloat16   0.408        1.2  32.24 (26.64–39.47)   1.29    413.9 (370.3–451)    1.73  2.6e-02  0.938
bitsandbytes int8        0.566        5.2  106.5 (98.54–130.3)   0.39  804.3 (746.5–891.1)    0.89  2.3e-02  0.953
bitsandbytes nf4         0.445        3.7  102.1 (95.75–136.1)   0.41  787.5 (738.5–853.6)    0.91  2.7e-01  0.531
fp32, compiled                             39.58 (37.67–526.9)   1.05
quantlib int8, compiled                    11.09 (8.394–785.7)   3.75
quantlib int4, compiled                    7.315 (6.782–8.188)   5.68

At the same bits no peer decodes faster. torchao reads a prompt faster in bfloat16: it rounds the activations to 8 bits
of precision there, where ours keep about 15. The largest times of the compiled models hold
a second compilation.

On a GPU, `--product`: one row in float16 times one matrix, in a CUDA graph, preparing the row included.

NVIDIA H200, Intel(R) Xeon(R) Processor, 16 threads; torch 2.11.0, transformers 5.17.0, triton 3.6.0
                        fp16 us              int8 us              int4 us x int8 x int4 int8 TB/s
product
768→2304    4.337 (4.333–4.448)  4.528 (4.517–4.534)  4.668 (4.651–4.694)   0.96   0.93      0.39
3072→768    7.583 (7.533–7.614)  4.818 (4.806–4.829)  5.424 (5.423–5.485)   1.57   1.40      0.49
768→50257   29.87 (29.65–30.37)  14.32 (14.24–14.93)   13.5 (13.46–13.84)   2.09   2.21      2.69
1600→6400    8.085 (8.052–8.26)   7.09 (7.063–7.306)  7.815 (7.796–7.834)   1.14   1.03      1.44
6400→1600   10.67 (10.61–10.87)  7.714 (7.667–7.766)  8.801 (8.771–8.883)   1.38   1.21      1.33
4096→14336  31.54 (31.29–31.73)  19.16 (19.08–19.26)  17.36 (17.09–17.54)   1.65   1.82      3.07
"""

import argparse
import copy
import gc
import platform
import sys
import time
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantlib as ql

SIZES = {"gpt2": {}, "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25}}


def as_linear(model):
    """A copy in which each Conv1D is an nn.Linear, and the head is no longer tied to the token table."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, device=model.device, dtype=model.dtype)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            model.set_submodule(name, linear)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = as_linear(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_int4(model):
    """In groups of 64; on a CPU only bfloat16, in the order that PyTorch's own 4-bit product reads."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = as_linear(model)
    order = {"int4_packing_format": "opaque"} if model.device.type == "cpu" else {}
    quantize_(model, Int4WeightOnlyConfig(group_size=64, **order))
    return model


def bitsandbytes(model, kind):
    """kind: "int8" or "nf4"; the weights are quantized when the layer is moved to its device."""
    import bitsandbytes as bnb

    model = as_linear(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        arguments = module.in_features, module.out_features, module.bias is not None
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*arguments, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*arguments, quant_type="nf4", compute_dtype=model.dtype)
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        layer.bias = module.bias
        model.set_submodule(name, layer.to(model.device))
    return model


def candidates(model):
    """Label -> function that makes the model; `model` itself is the fp32 one."""
    half = torch.float16 if model.device.type == "cuda" else torch.bfloat16
    base = copy.deepcopy(model).to(half) if model.device.type == "cuda" else model
    return {
        "fp32": lambda: model,
        str(half).removeprefix("torch."): lambda: copy.deepcopy(model).to(half),
        "quantlib int8": lambda: ql.quantize_model(base),
        "quantlib int4": lambda: ql.quantize_model(base, bits=4),
        "torchao int8": lambda: torchao_int8(base),
        "torchao int8, bfloat16": lambda: torchao_int8(copy.deepcopy(model).bfloat16()),
        "torchao int4, bfloat16": lambda: torchao_int4(copy.deepcopy(model).bfloat16()),
        "bitsandbytes int8": lambda: bitsandbytes(base, "int8"),
        "bitsandbytes nf4": lambda: bitsandbytes(base, "nf4"),
    }


def stored_nbytes(model):
    """As `ql.model_nbytes`, and what tensor subclasses (torchao) and layer states (bitsandbytes) hold inside."""
    seen, total = set(), 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if hasattr(tensor, "__tensor_flatten__"):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            state = getattr(tensor, "quant_state", None)
            parts = [tensor, getattr(tensor, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)]
        for part in parts:
            if isinstance(part, torch.Tensor) and part.data_ptr() not in seen:
                seen.add(part.data_ptr())
                total += part.nbytes
    return total


def shown(ms):
    return f"{np.median(ms):.4g} ({ms.min():.4g}–{ms.max():.4g})"


def forward(model, ids, **how):
    with torch.no_grad():
        return model(ids, **how).logits


def table(model, arguments):
    """One row for each candidate; a candidate that fails says so and is left out."""
    rows, models, exact = {}, {}, None
    ids = torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0)).to(model.device)
    context = min(512, model.config.n_positions)
    for label, make in candidates(model).items():
        if label != "fp32" and not any(part in label for part in arguments.only.split(",")):
            continue
        try:
            begin = time.perf_counter()
            candidate = make()
            rows[label] = {
                "quantize s": f"{time.perf_counter() - begin:.1f}" if "int" in label or "nf" in label else ""
            }
            logits = forward(candidate, ids[:, :128]).float()
        except Exception as error:  # a peer that is missing, or that this machine does not suit
            rows.pop(label, None)
            print(f"{label}: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
            continue
        models[label] = candidate
        exact = logits if exact is None else exact
        rows[label]["stored"] = f"{stored_nbytes(candidate) / stored_nbytes(model):.3f}"
        rows[label]["error"] = f"{((logits - exact).norm() / exact.norm()).item():.1e}"
        rows[label]["top-1"] = f"{(logits.argmax(-1) == exact.argmax(-1)).float().mean().item():.3f}"
        gc.collect()
    decoders = {label: ql.Decoder(m, 64, captured=False) for label, m in models.items()}
    ours = {label: m for label, m in models.items() if "torchao" not in label and "bits" not in label}
    if model.device.type == "cuda":
        decoders |= {f"{label}, graph": ql.Decoder(m, 64) for label, m in ours.items() if label != "fp32"}
    if arguments.compile:
        chosen = [label for label in ours if label != "bfloat16" and (model.device.type == "cpu" or label != "fp32")]
        kind = "compiled, graph" if model.device.type == "cuda" else "compiled"
        decoders |= {f"{label}, {kind}": ql.Decoder(ours[label], 64, compiled=True) for label in chosen}
    decode = ql.benchmark_decode(decoders, tokens=16, prompt=32, rounds=arguments.rounds)
    calls = {label: partial(forward, m, ids[:, :context], logits_to_keep=1) for label, m in models.items()}
    prefill = ql.time_interleaved(calls, rounds=arguments.rounds)
    for label, ms in decode.items():
        row = rows.setdefault(label, {})
        row |= {"decode ms": shown(ms), "x fp32": f"{np.median(decode['fp32']) / np.median(ms):.2f}"}
    for label, ms in prefill.items():
        rows[label] |= {"prefill ms": shown(ms), "x fp32 ": f"{np.median(prefill['fp32']) / np.median(ms):.2f}"}
    columns = ["stored", "quantize s", "decode ms", "x fp32", "prefill ms", "x fp32 ", "error", "top-1"]
    return pd.DataFrame(rows).T.reindex(columns=columns).fillna("")


def graph_us(functions, rounds):
    """Microseconds per function, in a CUDA graph that runs all of them; events leave out the launch of the graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    times = []
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(functions))
    return np.array(times[2:])


def products(rounds):
    """One row of float16 times one matrix; many copies of it take turns, so that no cache holds them."""
    rows = []
    for inputs, outputs in [(768, 2304), (3072, 768), (768, 50257), (1600, 6400), (6400, 1600), (4096, 14336)]:
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.float16)
        copies = max(4, 600_000_000 // weight.nbytes)
        x, floats = weight[:1].clone(), [weight.clone() for _ in range(copies)]
        times = {"fp16 us": graph_us([partial(torch.matmul, x, w.T) for w in floats], rounds)}
        for bits, group_size in ((8, None), (4, 64)):
            quantized = ql.QuantizedWeight(outputs, inputs, bits, group_size).cuda()
            quantized.codes.random_(-127 if bits == 8 else 0, 128 if bits == 8 else 256)
            quantized.scale.fill_(0.01)
            ours = [copy.deepcopy(quantized) for _ in range(copies)]
            times[f"int{bits} us"] = graph_us([partial(ql.matmul, x, w) for w in ours], rounds)
        row = {"product": f"{inputs}→{outputs}"} | {label: shown(us) for label, us in times.items()}
        median = {label: np.median(us) for label, us in times.items()}
        row |= {f"x {b}": f"{median['fp16 us'] / median[f'{b} us']:.2f}" for b in ("int8", "int4")}
        row["int8 TB/s"] = f"{outputs * inputs / median['int8 us'] / 1e6:.2f}"
        rows.append(row)
    return pd.DataFrame(rows).set_index("product")


def where():
    """The machine and the versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = []
    for package in ("torch", "transformers", "torchao", "bitsandbytes", "triton"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads; {', '.join(versions)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help='"gpt2" or "xl" (random weights), else a name or folder')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help='candidates beside fp32, by parts of their labels: "float16,int8"')
    parser.add_argument("--compile", action="store_true", help="add torch.compile")
    parser.add_argument("--product", action="store_true", help="on a GPU: one matrix-vector product in a CUDA graph")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 40)
    print(where())
    if options.product:
        print(products(options.rounds).to_string(), flush=True)
    torch.manual_seed(0)
    if options.model in SIZES:
        with ql.default_device():
            reference = GPT2LMHeadModel(GPT2Config(**SIZES[options.model])).eval()
    else:
        reference = ql.load_model(options.model)[0]
    print(f"{options.model}{', random weights' if options.model in SIZES else ''}, {options.rounds} rounds")
    print(table(reference, options).to_string())
