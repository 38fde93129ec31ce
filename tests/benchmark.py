"""What quantization saves and what it costs, beside other libraries: one table, all candidates in turns, in one run.

    python tests/benchmark.py                        # GPT-2 124M with random weights
    python tests/benchmark.py --compile              # torch.compile as well
    python tests/benchmark.py --public               # as on a CPU without PyTorch's private operations
    python tests/benchmark.py --model pocket-gpt2    # a trained model, by name or folder
    python tests/benchmark.py --model xl --product   # on a GPU: GPT-2 XL, and one matrix-vector product
    python tests/benchmark.py --quality              # what each bit buys, on pocket-gpt2 (or --model, a trained one)

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

`--quality` gives every method the same matrices, those inside the blocks, and leaves all else in float, activations too.
So it compares how weights are rounded, not the layers that the libraries would run them in. Every number is of the
evaluation text, in windows of the whole context that do not overlap; intervals are of 95 %, from the losses of the same
tokens under both models.

- bits: codes, scales and zero points, as stored, per weight of these matrices; of model: per parameter of the whole
  model, what is not quantized in 16 bits. Tables that are the same for all models (NF4's levels) do not count.
- ΔNLL: loss above that of the float model, nats per token. KL, top-1: of the predicted distributions, against it.
- beside ours: loss of the peer minus that of our method of the same kind, and minus that of our GPTQ; both take no more
  bits than the peer. Above 0, the peer is worse.

GPTQ and AWQ calibrate on text that the model samples from itself, both AWQ on the same. torchao's own GPTQ needs CUDA.

Results
=======

On a CPU, `--compile`:

AMD EPYC, 2 threads; torch 2.13.0+cpu, transformers 5.23.0, torchao 0.18.0, bitsandbytes 0.50.2
gpt2, random weights, 7 rounds
torchao int4, bfloat16: ImportError: Requires mslk >= 1.0.0
                        stored quantize s            decode ms x fp32           prefill ms x fp32     error  top-1
fp32                     1.000             38.46 (37.95–38.93)   1.00  607.5 (600.7–642.8)    1.00  0.0e+00  1.000
bfloat16                 0.500               25.5 (23.61–27.3)   1.51  344.2 (338.1–357.6)    1.77  1.2e-02  0.938
quantlib int8            0.257        1.7  14.48 (13.93–14.71)   2.66  422.2 (415.9–437.2)    1.44  2.4e-02  0.938
quantlib int4            0.147        1.5     8.588 (8.246–11)   4.48    498.5 (490.4–504)    1.22  3.2e-01  0.383
torchao int8             0.567        2.5   83.2 (82.02–85.37)   0.46  683.6 (670.2–802.1)    0.89  2.2e-02  0.945
torchao int8, bfloat16   0.408        1.8  46.06 (45.86–46.93)   0.83  371.6 (364.3–378.8)    1.63  2.6e-02  0.938
bitsandbytes int8        0.566        4.0  17.74 (17.62–18.29)   2.17    323.3 (317.8–328)    1.88  3.4e-02  0.922
bitsandbytes nf4         0.718        1.9  22.48 (22.26–23.15)   1.71    468 (458.6–494.2)    1.30  2.6e-01  0.547
fp32, compiled                             36.14 (35.43–163.4)   1.06
quantlib int8, compiled                    7.931 (7.691–139.8)   4.85
quantlib int4, compiled                    6.234 (6.062–6.475)   6.17

Of the peers of 8 bits, torchao in bfloat16 and bitsandbytes read a prompt faster. Both give the activations 8 bits of
precision, one as bfloat16 and the other as int8, where ours keep about 15. In one process or another torchao's times
differ twofold. The largest times of the compiled models hold a second compilation.

The same machine, `--public --only quantlib`, the second of five such runs:

gpt2, random weights, 7 rounds
              stored quantize s            decode ms x fp32           prefill ms x fp32     error  top-1
fp32           1.000             40.77 (39.44–42.27)   1.00  681.1 (649.5–787.1)    1.00  0.0e+00  1.000
quantlib int8  0.257        0.9    26.81 (24.4–35.2)   1.52  726.9 (718.8–745.6)    0.94  2.4e-02  0.938
quantlib int4  0.139        1.2  41.96 (38.88–53.12)   0.97  783.9 (761.4–899.1)    0.87  3.2e-01  0.383

All five: int8 1.52, 1.52, 1.55, 1.36, 1.66 in decode and 1.02, 0.94, 0.93, 0.90, 0.83 in prefill; int4 0.99, 0.97, 1.03,
0.71, 1.07 and 0.92, 0.87, 0.88, 0.84, 0.83.

On a GPU, `--compile --product`, and then `--compile --model xl --only float16,quantlib`:

First products: one row in float16 times one matrix, in a CUDA graph, preparing the row included. Then whole models.

NVIDIA H200, Intel(R) Xeon(R) Processor, 16 threads; torch 2.11.0, transformers 5.17.0, triton 3.6.0
                        fp16 us              int8 us              int4 us x int8 x int4 int8 TB/s
product
768→2304    4.322 (4.308–4.329)  4.113 (4.104–4.129)  4.157 (4.144–4.186)   1.05   1.04      0.43
3072→768    7.566 (7.547–7.601)  4.821 (4.806–4.829)  4.973 (4.964–4.985)   1.57   1.52      0.49
768→50257    29.48 (29.4–29.69)  14.42 (14.17–14.48)  13.63 (13.49–13.79)   2.04   2.16      2.68
1600→6400   8.108 (8.057–8.139)  7.369 (7.276–7.426)  8.948 (8.864–9.031)   1.10   0.91      1.39
6400→1600   10.64 (10.52–10.65)  7.734 (7.684–7.793)   8.278 (8.26–8.308)   1.38   1.28      1.32
4096→14336  31.03 (30.98–31.05)  18.97 (18.64–19.12)  16.65 (16.55–16.97)   1.64   1.86      3.10
gpt2, random weights, 7 rounds
                               stored quantize s               decode ms x fp32           prefill ms x fp32     error  top-1
fp32                            1.000                6.183 (4.898–7.126)   1.00  7.017 (6.222–8.188)    1.00  0.0e+00  1.000
float16                         0.500                7.126 (5.696–7.883)   0.87  7.367 (6.516–10.45)    0.95  1.5e-03  1.000
quantlib int8                   0.253        0.1     12.48 (11.66–14.09)   0.50  12.02 (10.21–18.97)    0.58  2.5e-02  0.969
quantlib int4                   0.135        0.1     12.16 (9.967–15.07)   0.51  17.43 (14.43–20.13)    0.40  3.3e-01  0.477
float16, graph                                    0.8141 (0.8133–0.8172)   7.60
quantlib int8, graph                              0.8349 (0.8334–0.8391)   7.41
quantlib int4, graph                              0.8418 (0.8397–0.8428)   7.35
float16, compiled, graph                          0.4975 (0.4944–0.5028)  12.43
quantlib int8, compiled, graph                    0.4372 (0.4355–0.4389)  14.14
quantlib int4, compiled, graph                      0.46 (0.4585–0.4742)  13.44

xl, random weights, 7 rounds
                               stored quantize s            decode ms x fp32           prefill ms x fp32     error  top-1
fp32                            1.000             20.19 (18.29–31.16)   1.00   49.44 (49.13–51.3)    1.00  0.0e+00  1.000
float16                         0.500             21.94 (20.28–24.63)   0.92  36.62 (23.43–45.91)    1.35  2.2e-03  1.000
quantlib int8                   0.251        0.4   37.11 (34.84–51.6)   0.54  51.99 (37.44–66.49)    0.95  2.9e-02  0.977
quantlib int4                   0.133        0.5  37.94 (36.48–43.92)   0.53     81.56 (54–98.44)    0.61  3.5e-01  0.352
float16, graph                                      3.8 (3.798–3.804)   5.31
quantlib int8, graph                              3.782 (3.779–3.783)   5.34
quantlib int4, graph                              4.067 (4.063–4.073)   4.96
float16, compiled, graph                          2.455 (2.441–2.456)   8.22
quantlib int8, compiled, graph                    2.125 (2.119–2.126)   9.50
quantlib int4, compiled, graph                    2.462 (2.458–2.467)   8.20
"""

import argparse
import copy
import gc
import logging
import platform
import sys
import time
import warnings
from dataclasses import replace
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
    """In groups of 64; bfloat16 only. Version 0.18 has no 4-bit format for a CPU: there it fails, and says so."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = as_linear(model)
    quantize_(model, Int4WeightOnlyConfig(group_size=64))
    return model


def bitsandbytes(model, kind):
    """kind: "int8" or "nf4"; the weights are quantized when the layer is moved to its device.

    For NF4 the head stays in float, as in transformers: on a CPU, its kernel takes no matrix of 50257 rows.
    """
    import bitsandbytes as bnb

    model = as_linear(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or (kind == "nf4" and module is model.lm_head):
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
            candidate = make().eval()  # a layer that was put in anew is in training mode, where bitsandbytes is slow
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


def own(quantized):
    return quantized.dequantize(), 8 * quantized.nbytes


def nf4_8bit_scales(weight):
    """NF4 whose scales are stored in 8 bits themselves, less their mean; all of a matrix share one scale."""
    quantized = ql.nf4_quantize(weight)
    mean = quantized.scale.mean()
    scales = ql.absmax_quantize(quantized.scale - mean)
    quantized = replace(quantized, scale=scales.dequantize() + mean)
    return quantized.dequantize(), 4 * weight.numel() + 8 * scales.nbytes + 32


def bnb_4bit(weight, kind, double):
    """In blocks of 64; double: the scales in 8 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=double, quant_type=kind)
    bits = 8 * (packed.nbytes + state.absmax.nbytes)
    values = dequantize_4bit(packed, state)
    return values, bits + (8 * (state.state2.absmax.nbytes + state.offset.nbytes) if double else 0)


def bnb_int8(weight):
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight.contiguous())
    return int8_vectorwise_dequant(codes, absmax), 8 * (codes.nbytes + absmax.nbytes)


def ao_config(weight, config, bits):
    """What `quantize_` makes of a layer. Scales count; the zero points that it also stores, all 0, do not."""
    from torchao.quantization import quantize_

    layer = nn.Linear(*weight.T.shape, bias=False, device=weight.device)
    layer.weight.data = weight.detach().clone()
    quantize_(layer, config)
    return layer.weight.dequantize(), bits * weight.numel() + 8 * layer.weight.scale.nbytes


def ao_int8(weight):
    from torchao.quantization import Int8WeightOnlyConfig

    return ao_config(weight, Int8WeightOnlyConfig(), 8)


def ao_int4(weight, **arguments):
    """Symmetric, in groups of 64. Its scales are in the dtype of the weight: they are counted in 16 bits."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64), **arguments)
    values, _ = ao_config(weight, config, 4)
    return values, (4 + 16 / 64) * weight.numel()


def ao_asymmetric(weight):
    """By its primitives; float16 scales, int8 zero points."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    groups, limits = (1, 64), (-8, 7)
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.ASYMMETRIC,
        groups,
        torch.int8,
        *limits,
        scale_dtype=torch.float16,
        zero_point_dtype=torch.int8,
    )
    codes = quantize_affine(weight.contiguous(), groups, scale.float(), zero, torch.int8, *limits)
    values = dequantize_affine(codes, groups, scale.float(), zero, torch.int8, *limits)
    return values, 4 * weight.numel() + 8 * (scale.nbytes + zero.nbytes)


def ao_hqq(weight):
    """Half-quadratic quantization with scales and zero points in float16; codes 0…15."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as hqq

    codes, scale, zero, _ = hqq(weight, 4, 64, device=weight.device.type, raw_output=True)
    values = (codes.float().unflatten(1, (-1, 64)) - zero.float()[..., None]) * scale.float()[..., None]
    return values.flatten(1), 4 * weight.numel() + 8 * (scale.nbytes + zero.nbytes)


def ao_awq(weight, inputs):
    """Its search for the factors, then its 4-bit format; the factors count in 16 bits."""
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))
    observer = AWQObserver(weight.detach().contiguous(), None, config)
    observer(inputs, None)
    factors = observer.calculate_qparams()
    values, bits = ao_int4(weight * factors)
    return values / factors, bits + 16 * len(factors)


def methods(moments, inputs, group):
    """Label -> function of a layer's name and weight [out, in], which returns rounded values and the bits they take.

    group: of 128 or a little more, which needs no more bits than what peers do with 8-bit scales.
    """
    half = {"scale_dtype": torch.float16}
    return {
        "int8": lambda n, w: own(ql.absmax_quantize(w, axis=0)),
        "int4": lambda n, w: own(ql.absmax_quantize(w, 4, group_size=64, **half)),
        "int4, clipped": lambda n, w: own(ql.clip_quantize(w, 4, 0, 64, **half)),
        "int4, zero point": lambda n, w: own(ql.zeropoint_quantize(w, 4, group_size=64, **half)),
        "NF4": lambda n, w: own(ql.nf4_quantize(w, 64, **half)),
        "NF4, 8-bit scales": lambda n, w: nf4_8bit_scales(w),
        "AWQ": lambda n, w: own(ql.awq_quantize(w, moments[n], 4, 64, **half)),
        "GPTQ": lambda n, w: own(ql.gptq_quantize(w, moments[n], 4, 64, **half)),
        f"GPTQ, groups of {group}": lambda n, w: own(ql.gptq_quantize(w, moments[n], 4, group, **half)),
        "torchao int8": lambda n, w: ao_int8(w),
        "torchao int4": lambda n, w: ao_int4(w),
        "torchao int4, HQQ scales": lambda n, w: ao_int4(w, intx_choose_qparams_algorithm="hqq_scale_only"),
        "torchao int4, zero point": lambda n, w: ao_asymmetric(w),
        "torchao int4, HQQ": lambda n, w: ao_hqq(w),
        "torchao int4, AWQ": lambda n, w: ao_awq(w, inputs[n]),
        "bitsandbytes int8": lambda n, w: bnb_int8(w),
        "bitsandbytes NF4": lambda n, w: bnb_4bit(w, "nf4", False),
        "bitsandbytes NF4, 8-bit scales": lambda n, w: bnb_4bit(w, "nf4", True),
        "bitsandbytes FP4": lambda n, w: bnb_4bit(w, "fp4", False),
        "bitsandbytes FP4, 8-bit scales": lambda n, w: bnb_4bit(w, "fp4", True),
    }


BESIDE = {  # peer -> our method of the same kind
    "torchao int8": "int8",
    "torchao int4": "int4",
    "torchao int4, HQQ scales": "int4, clipped",
    "torchao int4, zero point": "int4, zero point",
    "torchao int4, HQQ": "int4, clipped",
    "torchao int4, AWQ": "AWQ",
    "bitsandbytes int8": "int8",
    "bitsandbytes NF4": "NF4",
    "bitsandbytes NF4, 8-bit scales": "NF4, 8-bit scales",
    "bitsandbytes FP4": "NF4",
    "bitsandbytes FP4, 8-bit scales": "NF4, 8-bit scales",
}


def interval(mean, low_high):
    return "{:+.4f} ({:+.4f}, {:+.4f})".format(mean, *low_high)


def quality(model, tokenizer):
    """One row for each method; a peer that is missing says so and is left out. Second: GPTQ against rounding."""
    ids = ql.calibration_tokens(model)
    layers, moments, inputs = ql.block_layers(model), ql.input_moments(model, ids), {}
    ql.watch_inputs(model, ids, lambda name, x: inputs.setdefault(name, []).append(x))
    inputs = {name: torch.cat(parts) for name, parts in inputs.items()}
    widths = [moment.shape[0] for moment in moments.values()]
    group = next(size for size in range(128, 1 + max(widths)) if all(width % size == 0 for width in widths))
    sizes, models, bits = sum(layer.weight.numel() for layer in layers.values()), {}, {}
    for label, method in methods(moments, inputs, group).items():
        try:
            done = {f"{name}.weight": method(name, layer.weight.detach().T) for name, layer in layers.items()}
        except Exception as error:
            print(f"{label}: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
            continue
        models[label] = ql.fake_quantize_model(model, {name: values for name, (values, _) in done.items()})
        models[label].stored_bits = {name: stored for name, (_, stored) in done.items()}
        bits[label] = sum(models[label].stored_bits.values()) / sizes
    results = ql.compare(model, models, tokenizer, ql.load_text(), stride=model.config.n_positions)
    rows = {}
    for label, result in results.items():
        rows[label] = {
            "bits": f"{bits[label]:.3f}",
            "of model": f"{ql.bits_per_weight(models[label]):.3f}",
            "ΔNLL (95 % interval)": interval(result.delta_nll, result.ci),
            "KL": f"{result.kl:.4f}",
            "top-1": f"{result.top1_agreement:.3f}",
            "verdict": result.verdict,
        }
        if label not in BESIDE:
            continue
        pairs = {"beside ours of its kind": BESIDE[label], "beside our GPTQ": "GPTQ"}
        if bits[label] < bits["GPTQ"]:
            pairs["beside our GPTQ"] = f"GPTQ, groups of {group}"
        for column, partner in pairs.items():
            if bits[partner] > bits[label] + 1e-3:
                raise ValueError(f"{partner} takes {bits[partner]} bits, {label} only {bits[label]}")
            apart = (result.candidate.token_nll - results[partner].candidate.token_nll).double().numpy()
            low, high = ql.bootstrap_interval(apart)
            verdict = "worse" if low > 0 else "better" if high < 0 else "same"
            rows[label][column] = f"{interval(apart.mean(), (low, high))} {verdict}"
    columns = [*rows["int8"], "beside ours of its kind", "beside our GPTQ"]
    share = results["GPTQ"].delta_nll / results["int4"].delta_nll
    return pd.DataFrame(rows).T.reindex(columns=columns).fillna(""), share


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
    parser.add_argument("--model", help='"gpt2" (default), "xl": random weights; else a trained model')
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help='candidates beside fp32, by parts of their labels: "float16,int8"')
    parser.add_argument("--compile", action="store_true", help="add torch.compile")
    parser.add_argument("--public", action="store_true", help="as on a CPU without PyTorch's private operations")
    parser.add_argument("--product", action="store_true", help="on a GPU: one matrix-vector product in a CUDA graph")
    parser.add_argument("--quality", action="store_true", help="losses at equal bits instead of times (pocket-gpt2)")
    options = parser.parse_args()
    options.model = options.model or ("pocket-gpt2" if options.quality else "gpt2")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # bitsandbytes warns in each call
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.max_colwidth", 40)
    print(where())
    if options.quality:
        losses, share = quality(*ql.load_model(options.model))
        print(f"{options.model}, evaluation text\n{losses.to_string()}")
        print(f"GPTQ costs {share:.2f} of what rounding to the nearest (int4) costs, in the same bits.")
        sys.exit()
    if options.product:
        print(products(options.rounds).to_string(), flush=True)
    if options.public:
        for name in ("_weight_int8pack_mm", "_int_mm", "_weight_int4pack_mm_for_cpu"):
            vars(torch).pop(name, None)
        ql._cpu_has_bf16 = lambda: False
    torch.manual_seed(0)
    if options.model in SIZES:
        with ql.default_device():
            reference = GPT2LMHeadModel(GPT2Config(**SIZES[options.model])).eval()
    else:
        reference = ql.load_model(options.model)[0]
    print(f"{options.model}{', random weights' if options.model in SIZES else ''}, {options.rounds} rounds")
    print(table(reference, options).to_string())
