"""quantlib: what more than one notebook of this series needs, in one file that reads in one sitting.

Conventions, which are torchao's and quanto's:

- `x ≈ (qdata - zero_point) * scale`: the scale multiplies when dequantizing; it is never stored inverted.
- `axis` is the dimension of which each index has its own scale; `None` is one scale for the whole tensor.
- `group_size` cuts the last dimension, the inputs of a weight `[out, in]`, into groups that have a scale each.
- Rounding is `torch.round`, ties to even. Intervals hold 95 %. Errors are `ValueError`, and say what to give instead.
"""

import copy
import inspect
import io
import json
import math
import os
import sys
import time
import zlib
from collections import namedtuple
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import safetensors.torch
import seaborn as sns
import torch
import transformers
from IPython.display import Image, display
from IPython.utils.capture import capture_output
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.versions import require_version

try:  # comes with PyTorch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HERE, BUNDLED = Path(__file__).resolve().parent, "pocket-gpt2"
BUNDLED_FOLDER = HERE / "notebooks" / BUNDLED
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where models go if nothing else is said
# (line style, colour) of the first, second, … curve: safe for the colour-blind (Okabe and Ito, 2008) and in grey
STYLES = [("-", "#1b1b1b"), ("--", "#d55e00"), ("-.", "#0072b2"), (":", "#009e73")]
STYLES += [((0, (5, 1, 1, 1, 1, 1)), "#cc79a7"), ((0, (1, 3)), "#7f4f24")]


# --- The model ---
def setup(model: str = BUNDLED) -> str:
    """Check versions, set the theme of the pictures, print where we are. Returns the name of the model to load;
    `$QUANTLIB_MODEL`, if set, takes the place of the default."""
    for need in ("torch>=2.6", "transformers>=4.57"):
        require_version(need, f"Run: pip install -U '{need}'")
    transformers.utils.logging.disable_progress_bar()  # of loading a file; downloads keep theirs
    sys.path.append(str(BUNDLED_FOLDER.parent))  # where `import checks` finds the checkers of the exercises
    rc = {"figure.figsize": (8, 4), "figure.dpi": 100, "figure.constrained_layout.use": True, "axes.titlesize": 12}
    rc |= {"axes.titlelocation": "left", "patch.linewidth": 0, "savefig.facecolor": "white"}  # also in a dark notebook
    sns.set_theme(style="whitegrid", palette=[colour for _, colour in STYLES], rc=rc)
    model = os.environ.get("QUANTLIB_MODEL") or BUNDLED if model == BUNDLED else model
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {DEVICE}, {model}")
    return model


def load_model(name: str | None = None, device=None):
    """A causal language model in float32, in evaluation mode, and its tokenizer. name: "pocket-gpt2" (bundled), an id
    on the Hugging Face hub such as "gpt2", or a folder; by default `$QUANTLIB_MODEL`, else the bundled one. Only
    safetensors are read, and no code that comes with a model is run."""
    name = str(name or os.environ.get("QUANTLIB_MODEL") or BUNDLED)
    source = str(BUNDLED_FOLDER) if name == BUNDLED else os.path.expanduser(name)
    remedy = f'"{BUNDLED}", an id on the hub (mind spelling and network) or a folder with safetensors and a tokenizer'
    with _explained(f"name={name!r} (as a folder: {os.path.abspath(source)})", remedy):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config._attn_implementation = None  # the default: a checkpoint may name code on the hub here
        _need(type(config) in MODEL_FOR_CAUSAL_LM_MAPPING, f"a {config.model_type!r} model writes no text")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        how = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(source, **how)
        missing = info["missing_keys"]  # transformers would leave them random
        _need(not missing, f"the checkpoint lacks {len(missing)} weights, among them {min(missing, default='')}")
    return model.to(device or DEVICE).eval(), tokenizer


def _need(fits, message: str) -> None:
    if not fits:
        raise ValueError(message)


@contextmanager
def _explained(what: str, remedy: str):
    """Whatever kind of error a library raises in here becomes a ValueError of one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # no other name or path would help
        raise
    except Exception as error:
        cause = " ".join((str(error) or type(error).__name__).split())[:400]
        raise ValueError(f"{what} failed: {cause}. Give {remedy}.") from None


def context_length(model) -> int:
    """The most tokens that a model takes at once; 2048 where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048


def _inputs(model, ids: Tensor) -> Tensor:
    """The ids on the model's device, once it is clear that the model can read them."""
    able = isinstance(model, transformers.PreTrainedModel) and model.get_output_embeddings()
    what, last = f"model is a {type(model).__name__}", ids.max().item()
    _need(able, f"{what}: give a language model, of DataParallel .module, of PEFT .merge_and_unload()")
    _need(model.device.type != "meta", f"{what} on meta: load its weights first")
    _need(not model.training, f"{what} in training mode, where dropout makes it random: call model.eval()")
    _need(model.config.return_dict, f"{what} that returns tuples: set model.config.return_dict = True")
    size = model.config.get_text_config().vocab_size
    _need(last < size, f"token {last}: the model has {size}, call model.resize_token_embeddings(len(tokenizer))")
    return ids.to(model.device)


# --- A tensor ---
@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes with what it takes to dequantize them."""

    qdata: Tensor  # int8, one code a byte while we compute with them, in the shape of the original
    scale: Tensor  # float: a number, or shaped to broadcast over qdata; with groups [..., n / group_size]
    zero_point: Tensor | int  # the code of 0.0, int8, shaped like scale; the plain int 0, not stored, if symmetric
    bits: int
    shape: torch.Size
    axis: int | None = None
    group_size: int | None = None
    codebook: Tensor | None = None  # the number that each code stands for, where that is not the code itself (NF4)
    factors: Tensor | None = None  # [in]: what the inputs of a weight were multiplied by before rounding (AWQ)

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for: float32, or float64 if `scale` is, in the original shape."""
        scale, zero_point = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32)), self.zero_point
        codes = self.qdata.to(scale.dtype) if self.codebook is None else self.codebook.to(scale)[self.qdata.long()]
        if self.group_size is not None:
            codes, scale = codes.unflatten(-1, (-1, self.group_size)), scale[..., None]  # [..., groups, group_size]
            zero_point = zero_point[..., None] if torch.is_tensor(zero_point) else 0
        x = ((codes - zero_point) * scale).reshape(self.shape)
        return x if self.factors is None else x / self.factors.to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: packed codes, scales, zero points, factors; not the codebook, which all share."""
        rest = [t.nbytes for t in (self.scale, self.zero_point, self.factors) if isinstance(t, Tensor)]
        return math.ceil(self.qdata.numel() * self.bits / 8) + sum(rest)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits divided by the number of weights."""
        return 8 * self.nbytes / self.shape.numel()


def code_range(bits: int = 8, symmetric: bool = True) -> tuple[int, int]:
    """The smallest and the largest code: for 8 bits -127…127 if symmetric, else -128…127."""
    _need(bits in range(2, 9), f"{bits=}: give a whole number from 2 to 8")
    qmax = 2 ** (int(bits) - 1) - 1
    return (-qmax if symmetric else -qmax - 1), qmax


def absmax_quantize(x: Tensor, bits=8, axis=None, group_size=None, scale_dtype=None):
    """Symmetric quantization to a `QuantizedTensor`: `scale = amax / 127`, `qdata = round(x / scale)`, codes -127…127
    for 8 bits. Every element comes back within half a scale. scale_dtype: how scales are stored; codes are chosen for
    the rounded scale. Source: Dettmers et al., "LLM.int8()", 2022, section 2.1."""
    _, qmax = code_range(bits)
    parts, shared = _parts(x, axis, group_size)
    scale = _scale(parts.abs().amax(shared, keepdim=True), qmax, scale_dtype)
    return _round(x, parts, scale, 0, bits, axis, group_size)


def zeropoint_quantize(x: Tensor, bits=8, axis=None, group_size=None, scale_dtype=None):
    """Asymmetric (affine) quantization: `scale = (max - min) / 255`, `zero_point = round(-128 - min / scale)`,
    `qdata = round(x / scale) + zero_point`, codes -128…127 for 8 bits. The range is widened to include 0.0, which then
    comes back exactly. Source: Jacob et al., "Quantization and Training of Neural Networks …", 2018."""
    qmin, qmax = code_range(bits, symmetric=False)
    parts, shared = _parts(x, axis, group_size)
    low, high = parts.amin(shared, keepdim=True).clamp(max=0), parts.amax(shared, keepdim=True).clamp(min=0)
    scale = _scale(high, qmax - qmin, scale_dtype, low)
    zero_point = (qmin - low * (1 / scale.to(low.dtype))).round().clamp(qmin, qmax).to(torch.int8)
    return _round(x, parts, scale, zero_point, bits, axis, group_size)


# The 16 levels of NF4, as published; notebook 11 derives them from the quantiles of the normal distribution.
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def nf4_quantize(x: Tensor, group_size=64, scale_dtype=None) -> QuantizedTensor:
    """4-bit NormalFloat: `qdata` is the index of the level nearest to `x / amax`. Source: Dettmers et al., "QLoRA",
    2023, appendix E."""
    parts, shared = _parts(x, None, group_size)
    scale = _scale(parts.abs().amax(shared, keepdim=True), 1, scale_dtype)
    levels = torch.tensor(NF4, dtype=torch.float32, device=x.device)
    codes = torch.bucketize((parts / scale.to(parts.dtype)).float().contiguous(), (levels[1:] + levels[:-1]) / 2)
    scale = scale.reshape(()) if group_size is None else scale.squeeze(-1)
    return QuantizedTensor(codes.to(torch.int8).reshape(x.shape), scale, 0, 4, x.shape, None, group_size, levels)


SHARES = [1 - i / 20 for i in range(13)]  # of the absmax, 1 to 0.4


def clip_quantize(x: Tensor, bits=4, axis=None, group_size=None, scale_dtype=None, importance=None, shares=SHARES):
    """Absmax quantization of a range cut at a share of the absmax: the one with the least squared error, weighted by
    importance, which broadcasts over x. Source: the code of Frantar et al., "GPTQ", 2022."""
    qmin, qmax = code_range(bits)
    parts, shared = _parts(x, axis, group_size)
    weights = 1 if importance is None else importance.expand_as(x).reshape(parts.shape)
    largest, best, least = parts.abs().amax(shared, keepdim=True), None, math.inf
    for share in shares:
        scale = _scale(largest * share, qmax, scale_dtype)
        wide = scale.to(parts.dtype)
        rounded = (parts * (1 / wide)).round_().clamp_(qmin, qmax).mul_(wide)
        error = (rounded.sub_(parts).square_() * weights).sum(shared, keepdim=True)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = error.clamp(max=least)
    return _round(x, parts, best, 0, bits, axis, group_size)


def fp8_quantize(x: Tensor, axis=None) -> tuple[Tensor, int]:
    """FP8 E4M3 by absmax: `scale = amax / 448`; the rounded values, and the bits that they take with float32 scales."""
    parts, shared = _parts(x, axis, None)
    scale = _scale(parts.abs().amax(shared, keepdim=True), 448, torch.float32)
    values = (parts / scale).to(torch.float8_e4m3fn).float() * scale
    return values.reshape(x.shape), 8 * x.numel() + 32 * scale.numel()


def nvfp4_quantize(x: Tensor) -> tuple[Tensor, int]:
    """NVFP4: values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, a scale in E4M3 for each 16, and a float32 for the
    tensor: the rounded values, and their bits. Source: NVIDIA, "Introducing NVFP4", 2025."""
    groups, shared = _parts(x, None, 16)
    tensor = _scale(x.abs().max().float(), 448 * 6, torch.float32)
    scale = groups.abs().amax(shared, keepdim=True) / 6 / tensor
    scale = scale.to(torch.float8_e4m3fn).float().clamp(min=2**-9) * tensor
    ratio = groups / scale
    step = torch.exp2((torch.frexp(ratio).exponent - 2).clamp(min=-1).float())  # 0.5 up to 2, then 1, then 2
    values = ((ratio / step).round() * step).clamp(-6, 6) * scale
    return values.flatten(-2), 4 * x.numel() + 8 * scale.numel() + 32


def q4_k_quantize(x: Tensor, importance=None) -> tuple[Tensor, int]:
    """What GGUF's Q4_K does to a weight, [out, in]: the rounded values, and their bits. Blocks of 32 with a scale and a
    minimum of 6 bits each, the pair of ends with the least squared error, weighted by importance; 256 weights (a whole
    row if 256 does not divide it) share two fp16 numbers. Source: llama.cpp, ggml-quants.c."""
    groups, _ = _parts(x, None, 32)  # [out, blocks, 32]
    blocks = 8 if x.shape[-1] % 256 == 0 else groups.shape[-2]  # of a super-block
    weights = 1 if importance is None else importance.expand_as(x).reshape(groups.shape)
    lowest, highest = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    least, kept = torch.full_like(lowest, math.inf), torch.stack([lowest, lowest])
    for low, high in ((lowest * a, highest * b) for a in (1, 0.85, 0.7) for b in (1, 0.85, 0.7)):
        scale = ((high - low) / 15).clamp(min=1e-10)
        rounded = ((groups - low) / scale).round().clamp(0, 15) * scale + low
        error = ((rounded - groups).square() * weights).sum(-1, keepdim=True)
        kept = torch.where(error < least, torch.stack([scale, -low]), kept)
        least = error.minimum(least)
    kept = kept.unflatten(2, (-1, blocks))  # [2, out, super-blocks, blocks, 1]
    d = (kept.amax(3, keepdim=True) / 63).clamp(min=1e-7).half().float()
    scale, minimum = (d * (kept / d).round().clamp(0, 63)).flatten(2, 3)
    codes = ((groups + minimum) / torch.where(scale == 0, 1, scale)).round().clamp(0, 15)
    return (codes * scale - minimum).reshape(x.shape), 4 * x.numel() + 12 * scale.numel() + 16 * d.numel()


def _parts(x: Tensor, axis, group_size) -> tuple[Tensor, list[int]]:
    """Checks; then x in float32 (or 64), cut into groups, and the dimensions that share a scale."""
    _need(not x.is_meta, "x is on meta, without values: load the weights first")
    what, bad = f"x ({x.dtype}, {list(x.shape)}, {x.device}", (~x.isfinite()).sum().item()
    _need(x.is_floating_point() and x.numel() and not bad, f"{what}, {bad} NaN or infinite): give finite floats")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    _need(axis in [None, *range(-x.ndim, x.ndim)], f"{axis=}: give None, or a dimension of x, {list(x.shape)}")
    if group_size is None:
        shared = [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
        return (x, shared) if shared or not x.ndim else (x[..., None], [-1])  # a vector that keeps its axis
    last = x.shape[-1] if x.ndim else 1
    sizes = [n for n in range(1, last + 1) if last % n == 0]
    _need(group_size in sizes, f"{group_size=}: give what divides the last dimension of x, one of {sizes}")
    return x.unflatten(-1, (-1, group_size)), [-1]


def _scale(high: Tensor, steps: int, dtype, low=0) -> Tensor:
    """(high - low) / steps in `dtype`; but 1 where that is 0, so that zeros stay zeros."""
    steps = torch.full_like(high, steps)  # a tensor: divided by a plain number, CUDA rounds unlike the CPU
    scale = high / steps - low / steps  # high - low could overflow
    rounded = scale.clamp(min=torch.finfo(scale.dtype).tiny).to(dtype or scale.dtype)  # what is smaller has no inverse
    rounded = torch.where(scale == 0, 1, rounded)
    _need((rounded.isfinite() & (rounded > 0)).all(), f"scale_dtype={dtype} cannot hold the scales: give torch.float32")
    return rounded


def _round(x, parts, scale, zero_point, bits, axis, group_size) -> QuantizedTensor:
    qmin, qmax = code_range(bits, symmetric=not torch.is_tensor(zero_point))
    # Times the reciprocal, as torch.fake_quantize does: dividing would break some ties the other way.
    codes = ((parts * (1 / scale.to(parts.dtype))).round() + zero_point).clamp(qmin, qmax).to(torch.int8)
    if parts.ndim > x.ndim or axis is None:  # the dimension of a group, or all of them, have length 1 by now
        shape = scale.shape[:-1] if parts.ndim > x.ndim else ()
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape) if torch.is_tensor(zero_point) else 0
    return QuantizedTensor(codes.reshape(x.shape), scale, zero_point, int(bits), x.shape, axis, group_size)


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels, `10 log10(sum x² / sum (x - x_hat)²)`; infinity if equal. With
    6.02 dB more, the error is half."""
    _need(x.shape == x_hat.shape, f"x is {list(x.shape)} and x_hat {list(x_hat.shape)}: give tensors of one shape")
    signal, noise = x.double().square().sum(), (x.double() - x_hat.double()).square().sum()
    return 10 * torch.log10(signal / noise).item() if noise > 0 else math.inf


# --- A whole model ---
def model_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; a tied tensor counts once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


@torch.no_grad()
def fake_quantize_model(model: nn.Module, quantizer, select=None) -> nn.Module:
    """A copy of the model with rounded weights, still in float. quantizer: takes a tensor, returns a `QuantizedTensor`,
    a tensor, or a pair: a tensor and all the bits that it would take; or a dict of such results by names of parameters.
    A matrix is `[out, in]` here, also where the model stores `[in, out]` (`Conv1D`). select(name, parameter) -> bool:
    which parameters; by default all, vectors too."""
    model = _copy(model)
    model.stored_bits = dict(getattr(model, "stored_bits", {}))  # name -> what its codes would take
    transposed = {module.weight for module in model.modules() if isinstance(module, Conv1D)}
    parameters, given = dict(model.named_parameters()), isinstance(quantizer, dict)
    chosen = list(quantizer) if given else [n for n, p in parameters.items() if select is None or select(n, p)]
    _need(chosen and {*chosen} <= {*parameters}, f"chosen are {chosen[:3]}: give names of model.named_parameters()")
    for name in chosen:
        weight = parameters[name].T if parameters[name] in transposed else parameters[name]
        rounded = quantizer[name] if given else quantizer(weight)
        if isinstance(rounded, QuantizedTensor):
            rounded = rounded.dequantize(), 8 * rounded.nbytes
        if isinstance(rounded, tuple):
            rounded, model.stored_bits[name] = rounded
        fits = rounded.shape == weight.shape and torch.isfinite(rounded).all()
        _need(fits, f"{name}, {list(weight.shape)}, became {list(rounded.shape)}, or is not finite")
        weight.copy_(rounded)
    return model


def _copy(model: nn.Module, memo=None) -> nn.Module:
    with _explained("copying the model", "a model of plain weights, after torch.nn.utils.prune.remove or its like"):
        return copy.deepcopy(model, memo)


def in_block(name, parameter) -> bool:
    """A `select` for `fake_quantize_model`: the matrices in the blocks, whose names have a number (`h.0.mlp`)."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))


def bits_per_weight(model: nn.Module) -> float:
    """Bits per weight as a `quantize_model` is stored, or as another model would be: 16 for a number without codes."""
    packed, noted = {m for m in model.modules() if isinstance(m, QuantizedWeight)}, getattr(model, "stored_bits", {})
    bits = sum(noted.get(n, 8 * p.nbytes if packed else 16 * p.numel()) for n, p in model.named_parameters())
    bits += sum(8 * tensor.nbytes for weight in packed for tensor in weight.plain())
    return bits / sum(weight.shape.numel() for weight in chain(model.parameters(), packed))


# --- Real storage ---
def pack_int4(codes: Tensor, group_size: int = 2) -> Tensor:
    """Two 4-bit codes in a byte: integers -8…7, [..., n] -> uint8, [..., n / 2], each as `code + 8`. The first half of
    a group is in the low halves of its bytes, as in GGUF's Q4_0."""
    wrong = f"codes ({codes.dtype}, {list(codes.shape)}): give integers -8…7 in groups of an even {group_size}"
    _need(codes.ndim and group_size % 2 == 0 and codes.shape[-1] % group_size == 0, wrong)
    _need(not codes.is_floating_point() and ((codes >= -8) & (codes <= 7)).all(), wrong)
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, group_size // 2)).unbind(-2)  # [..., groups, half]
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: Tensor, group_size: int = 2) -> Tensor:
    """The codes that `pack_int4` packed: uint8, [..., n / 2] -> int8, [..., n]."""
    halves = packed.unflatten(-1, (-1, group_size // 2))
    return torch.stack([halves & 15, halves >> 4], dim=-2).flatten(-3).to(torch.int8) - 8


# PyTorch's 4-bit product for CPUs reads blocks of so many outputs. For each input in turn a block has a byte for each
# pair of outputs: the code of output r in its low half, that of output r + block / 2 in its high half.
CPU_BLOCK = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


class QuantizedWeight(nn.Module):
    """A weight [out, in] as codes and scales, never in float; made without storage, to be filled.
    codes: int8, [out, in]; of 4 bits uint8, [out, in / 2], packed in groups. scale: float32, [out, 1]; of 4 bits
    bfloat16, [out, in / group_size]. block: 0, or `CPU_BLOCK` where they are in its order, which `plain` undoes."""

    def __init__(self, outputs: int, inputs: int, bits: int, group_size: int | None = None):
        super().__init__()
        self.shape, self.bits, self.block = torch.Size([outputs, inputs]), bits, 0
        self.group_size = inputs if bits == 8 else group_size
        kind, scale_kind = (torch.int8, torch.float32) if bits == 8 else (torch.uint8, torch.bfloat16)
        self.register_buffer("codes", torch.empty(outputs, inputs * bits // 8, dtype=kind, device="meta"))
        self.register_buffer("scale", torch.empty(outputs, inputs // self.group_size, dtype=scale_kind, device="meta"))

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.bits}"

    def plain(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in the order of the docstring, also that of `state_dict`."""
        if not self.block:
            return self.codes, self.scale
        codes = torch.cat([self.codes & 15, self.codes >> 4], -1).transpose(1, 2).flatten(0, 1)  # [padded out, in]
        codes, scale = codes[: self.shape[0]].to(torch.int8) - 8, self.scale[..., 0].T[: self.shape[0]]
        return pack_int4(codes, self.group_size).contiguous(), scale.contiguous()  # as a kernel reads them

    def dequantize(self, dtype=torch.float32) -> Tensor:
        return self.widen(*self.plain(), dtype)

    def rows(self, index: Tensor, dtype) -> Tensor:
        """Some rows of the weight, as an embedding looks them up: integers [...] -> [..., in]."""
        if not self.block:
            return self.widen(self.codes[index], self.scale[index], dtype)
        place, half = index % self.block, self.block // 2
        pair = self.codes[index // self.block, :, place % half]  # [..., in]
        codes = torch.where((place < half)[..., None], pair & 15, pair >> 4).to(torch.int8) - 8
        return self.widen(codes, self.scale[:, index, 0].movedim(0, -1), dtype)

    def widen(self, codes: Tensor, scale: Tensor, dtype) -> Tensor:
        codes = unpack_int4(codes, self.group_size) if codes.dtype == torch.uint8 else codes
        return (codes.unflatten(-1, (-1, self.group_size)).to(dtype) * scale[..., None].to(dtype)).flatten(-2)

    def _apply(self, fn, recurse=True):
        if self.block and fn(self.codes).device.type == "cpu":  # it stays in order; a tied weight comes twice
            return self
        codes, scale = self.plain()
        self.codes, self.block = fn(codes), 0
        self.scale = scale.to(self.codes.device)  # not fn(scale): .half() must not round it
        if self.bits == 4 and self.codes.device.type == "cpu" and CPU_BLOCK and self.group_size in (32, 64, 128, 256):
            self.to_cpu_order()
        return self

    def to_cpu_order(self) -> None:
        codes, scale, missing = self.codes, self.scale, -self.shape[0] % 64
        if missing:  # pad() would copy without need
            codes, scale = (nn.functional.pad(t, (0, 0, 0, missing)) for t in (codes, scale))
        for part in codes.split(256):  # in place and in small parts, since freed memory is not always given back
            part.copy_(torch._convert_weight_to_int4pack_for_cpu((unpack_int4(part, self.group_size) + 8).int(), 1))
        self.codes, self.block = codes.view(-1, self.shape[1], CPU_BLOCK // 2), CPU_BLOCK
        self.scale = torch.stack([scale.T, torch.zeros_like(scale.T)], -1)  # that product adds an offset too, ours is 0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "codes"], destination[prefix + "scale"] = self.plain()


class QuantizedLinear(nn.Module):
    """`y = x @ weight.T + bias` with a `QuantizedWeight`; takes the place of a `Conv1D` or an `nn.Linear`."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[0])


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a `QuantizedWeight`, [vocabulary, width]; a tied head multiplies by the same object."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__()
        self.weight = weight
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)  # .half() changes it

    def forward(self, index: Tensor) -> Tensor:
        return self.weight.rows(index, self.like.dtype)


@torch.no_grad()
def quantize_model(model: nn.Module, bits: int = 8, group_size: int | None = None) -> nn.Module:
    """A copy of a network that stores its matrices as integers: every `nn.Linear` and `Conv1D`, and the token table,
    rounded by absmax. bits: 8, with a float32 scale for each output channel (each token of the table); or 4, with a
    bfloat16 scale for each group of inputs; group_size: by default the largest up to 64 that divides all widths. Tied
    matrices stay one; biases, norms, positions, and layers of other classes stay as they are."""
    fits = bits == 4 or bits == 8 and group_size is None
    _need(fits, f"{bits=}, {group_size=}: give 8 bits, or 4 bits with a group_size")
    bits, group_size = int(bits), group_size and int(group_size)  # a file does not hold numpy's numbers
    matrices = _matrices(model)
    if bits == 4 and group_size is None:
        widths = math.gcd(*(m.weight.shape[0 if isinstance(m, Conv1D) else 1] for m in matrices.values()))
        group_size = max((size for size in range(2, 65, 2) if widths % size == 0), default=64)

    def quantized(weight):
        q = absmax_quantize(weight, bits, 0, group_size, torch.float32 if bits == 8 else torch.bfloat16)
        new = QuantizedWeight(*weight.shape, bits, group_size)
        new.codes, new.scale = (q.qdata if bits == 8 else pack_int4(q.qdata, group_size)).contiguous(), q.scale
        return new

    shared = {id(module.weight): module.weight for module in matrices.values()}  # not copied, since it is replaced
    copied = _replace_matrices(_copy(model, shared), quantized)
    if isinstance(model, transformers.PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        copied.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return copied.requires_grad_(False)._apply(lambda t: t)  # brings the codes into the order of their device


def _matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, where the weight can become codes: all that share it are exactly of a class we know."""
    table = model.get_input_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    named = model.named_modules(remove_duplicate=False)
    owners = {name: module for name, module in named if isinstance(getattr(module, "weight", None), Tensor)}
    plain = not hasattr(model, "peft_config") and not any(map(nn.utils.parametrize.is_parametrized, owners.values()))
    _need(plain, "model has adapters or parametrized weights: call merge_and_unload or remove_parametrizations")
    ours = {n for n, m in owners.items() if type(m) in (nn.Linear, Conv1D) or m is table and type(m) is nn.Embedding}
    others = {module.weight for name, module in owners.items() if name not in ours}  # Gemma's table also multiplies
    return {name: module for name, module in owners.items() if module.weight not in others}


def _replace_matrices(model: nn.Module, make) -> nn.Module:
    """Put `make(weight)`, [out, in], in the place of every matrix; of a tied one, one object in all its places."""
    made = {}
    for name, module in _matrices(model).items():
        if module.weight not in made:
            try:
                made[module.weight] = make(module.weight.T if isinstance(module, Conv1D) else module.weight)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from None
        weight, lookup = made[module.weight], isinstance(module, nn.Embedding)
        new = QuantizedEmbedding(weight, module.weight.dtype) if lookup else QuantizedLinear(weight, module.bias)
        model.set_submodule(name, new.train(module.training))
    _need(made, f"model is a {type(model).__name__} without nn.Linear or Conv1D in float: nothing to quantize")
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained = _refuse  # from that folder transformers would load random weights
    return model


def _refuse(*_, **__):
    raise ValueError("save_pretrained does not know codes and scales: use save_quantized(model, path)")


def save_quantized(model: nn.Module, path) -> None:
    """Write a `quantize_model` into one safetensors file, its configuration and a checksum as metadata."""
    weight = next((module for module in model.modules() if isinstance(module, QuantizedWeight)), None)
    fits = weight and isinstance(model, transformers.PreTrainedModel)
    _need(fits, f"model is a {type(model).__name__}: give one that quantize_model made of a language model")
    about = {"bits": weight.bits, "group_size": weight.group_size, "dtype": str(model.dtype).removeprefix("torch.")}
    about["config"] = model.config.to_dict()
    about["config"].pop("_name_or_path", None)  # a folder of this machine, perhaps
    tensors = {name: tensor.detach().contiguous() for name, tensor in _stored(model).items()}
    path = os.path.expanduser(path)
    with _explained(f"{path=}", "a file in a folder that exists"):
        about["checksum"] = _checksum(about, tensors)
        safetensors.torch.save_file(tensors, path, metadata={"quantlib": json.dumps(about, default=str)})
        os.chmod(path, 0o644)  # it was the owner's alone


def load_quantized(path, device=None) -> nn.Module:
    """Load what `save_quantized` wrote, in evaluation mode; the float matrices are never built."""
    path = os.path.expanduser(path)
    with _explained(f"{path=}", "a file that save_quantized wrote; if it was copied, fetch it again"):
        with safetensors.safe_open(path, framework="pt") as file:
            about, tensors = json.loads((file.metadata() or {}).get("quantlib", "{}")), dict.fromkeys(file.keys())
        for name in tensors:  # into memory of its own; an open file's pages count as memory too, so it is closed again
            with safetensors.safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(name).clone()
        same = about.pop("checksum", None) == _checksum(about, tensors)
        _need(same, "it is not as save_quantized wrote it, its checksum is another")
        config = CONFIG_MAPPING[about["config"]["model_type"]].from_dict(about["config"])
        config._attn_implementation = None  # as in load_model
        # Parameters without storage, on "meta". Buffers stay real: rotary tables are in no file.
        with register_module_parameter_registration_hook(
            lambda module, name, p: p if p.is_meta else nn.Parameter(p.to("meta"), requires_grad=False)
        ):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(getattr(torch, about["dtype"]))
            _replace_matrices(model, lambda weight: QuantizedWeight(*weight.shape, about["bits"], about["group_size"]))
        for name, empty in _stored(model).items():
            tensor = tensors.get(name, torch.empty(0))
            fits = (tensor.dtype, tensor.shape) == (empty.dtype, empty.shape)
            _need(fits, f"{name} is missing, or is not {empty.dtype} {list(empty.shape)}")
            tensor = nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor
            torch.utils.swap_tensors(empty, tensor)  # whoever has it, under whatever name, has the tensor now
    return model.to(device or DEVICE).eval()


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds: the state_dict, of a tied tensor only the first name."""
    once = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in once}


def _checksum(about: dict, tensors: dict[str, Tensor]) -> str:
    parts = {name: zlib.crc32(t.cpu().reshape(-1).view(torch.uint8).numpy()) for name, t in tensors.items()}
    return f"{zlib.crc32(json.dumps([about, sorted(parts.items())], default=str).encode()):08x}"


# --- Real speed ---
CPU_HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # elsewhere it is emulated


def matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, [rows, in] -> [rows, out]. With few rows the time goes into reading the weight, so it is
    read as stored: by PyTorch's products for CPUs, which round x to bfloat16, by a kernel on a GPU, or by the loop that
    `torch.compile` makes of `(x * codes).sum()`. Many rows share one reading: widen the weight first."""
    (rows, inputs), dtype, cpu, compiling = x.shape, x.dtype, x.device.type == "cpu", torch.compiler.is_compiling()
    fits = weight.bits == 8 or weight.group_size in (2, 4, 8, 16, 32, 64, 128, 256)
    if x.requires_grad:  # the special products have no derivative
        y = x @ weight.dequantize(dtype).T
    elif weight.block and rows <= 128:
        codes = weight.codes.view(-1, inputs // 2)
        y = torch._weight_int4pack_mm_for_cpu(x.bfloat16().contiguous(), codes, weight.group_size, weight.scale)
        y = y[:, : weight.shape[0]].to(dtype)
    elif rows <= 4 and x.device.type == "cuda" and triton and fits:
        y, grid = x.new_empty(rows, weight.shape[0]), (rows, triton.cdiv(weight.shape[0], 2))
        sizes = (*weight.codes.shape, weight.bits, weight.group_size)
        x = x.contiguous()
        with torch.cuda.device(x.device):
            _row_kernel[grid](x, weight.codes, weight.scale, bias, y, *sizes, OUT=2, SIZE=1024, num_warps=2)
        return y
    elif rows <= 4 and weight.bits == 8 and compiling:
        y = ((x[:, None].float() * weight.codes).sum(-1) * weight.scale[:, 0]).to(dtype)
    elif rows <= 8 and weight.bits == 8 and cpu and not compiling and inputs % 32 == 0:  # other widths end the process
        ones = torch.ones(len(weight.codes), dtype=torch.bfloat16)  # it would round the real scales to bfloat16
        y = (torch._weight_int8pack_mm(x.bfloat16().contiguous(), weight.codes, ones) * weight.scale[:, 0]).to(dtype)
    else:
        wide = torch.bfloat16 if cpu and CPU_HAS_BF16 else dtype
        y = (x.to(wide) @ weight.dequantize(wide).T).to(dtype)
    return y if bias is None else y + bias


if triton is not None:

    @triton.jit
    def _row_kernel(
        x, codes, scale, bias, y, outputs, width,
        BITS: tl.constexpr, GROUP: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """One row of x times OUT rows of codes, each of `width` bytes, of which SIZE are read at once."""
        row, out, half = tl.program_id(0), tl.program_id(1) * OUT + tl.arange(0, OUT), GROUP // 2
        total = tl.zeros((OUT, SIZE if BITS == 8 else SIZE // (GROUP // 2)), tl.float32)
        for start in range(0, width, SIZE):
            i = start + tl.arange(0, SIZE)
            there = (out < outputs)[:, None] & (i < width)[None, :]
            c = tl.load(codes + out[:, None].to(tl.int64) * width + i[None, :], mask=there, other=0)
            if BITS == 8:
                a = tl.load(x + row * width + i, mask=i < width, other=0)[None, :].to(tl.float32)
                total += a * c.to(tl.float32)
            else:  # in each group, the low halves of the bytes come first, then the high ones
                first = x + row * width * 2 + i // half * GROUP + i % half
                low = tl.load(first, mask=i < width, other=0)[None, :].to(tl.float32)
                high = tl.load(first + half, mask=i < width, other=0)[None, :].to(tl.float32)
                product = low * ((c & 15).to(tl.float32) - 8) + high * ((c >> 4).to(tl.float32) - 8)
                group = start // half + tl.arange(0, SIZE // (GROUP // 2))
                inside = (out < outputs)[:, None] & (group < width // half)[None, :]
                s = tl.load(scale + out[:, None] * (width // half) + group[None, :], mask=inside, other=0)
                total += tl.sum(product.reshape(OUT, SIZE // (GROUP // 2), GROUP // 2), 2) * s.to(tl.float32)
        result = tl.sum(total, 1)
        if BITS == 8:
            result *= tl.load(scale + out, mask=out < outputs, other=0)
        if bias is not None:
            result += tl.load(bias + out, mask=out < outputs, other=0).to(tl.float32)
        tl.store(y + row * outputs + out, result.to(y.dtype.element_ty), mask=out < outputs)


def time_interleaved(functions: dict, rounds: int = 5, before: dict | None = None) -> dict[str, np.ndarray]:
    """Milliseconds that each function takes, label -> [rounds]. They take turns, so that all meet the same
    disturbances; not counted are a first round and the functions in `before`, by label too."""
    times = {label: [] for label in functions}
    for _ in range(rounds + 1):
        for label, function in functions.items():
            if before:
                before[label]()
            begin = _clock()
            function()
            times[label].append(_clock() - begin)
    return {label: np.array(ms[1:]) for label, ms in times.items()}


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


@torch.no_grad()
def benchmark_decode(model, tokens: int = 16, prompt: int = 16, rounds: int = 5):
    """Milliseconds per token of greedy decoding with a cache, after a prompt: [rounds], take the median. model: a
    model, or a dict label -> model; they take turns, and the result is a dict too."""
    models = model if isinstance(model, dict) else {"model": model}
    times = {label: [] for label in models}
    for _ in range(rounds + 1):
        for label, m in models.items():
            out = m(torch.arange(prompt, device=m.device)[None], use_cache=True)
            begin = _clock()
            for _ in range(tokens):
                out = m(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            times[label].append((_clock() - begin) / tokens)
    times = {label: np.array(ms[1:]) for label, ms in times.items()}
    return times if isinstance(model, dict) else times["model"]


# --- Text ---
def generate_text(model, tokenizer, prompt: str, max_new_tokens=50, do_sample=True, top_k=30, seed=0) -> str:
    """The prompt and its continuation. do_sample: each token is drawn from the `top_k` likeliest, else it is the
    likeliest (greedy). A checkpoint's own settings are ignored."""
    ids = _inputs(model, _encode(tokenizer, prompt))
    length, room = ids.shape[1], context_length(model) - max_new_tokens
    _need(length <= room, f"prompt has {length} tokens and {max_new_tokens=}: give at most {room} tokens")
    end = model.generation_config.eos_token_id  # Llama 3 has several
    how = {"do_sample": True, "top_k": int(top_k)} if do_sample else {"do_sample": False}
    how |= {"eos_token_id": end, "pad_token_id": end[0] if isinstance(end, list) else end}
    model = copy.copy(model)  # shallow: the same weights, with settings of its own
    model.generation_config = GenerationConfig(**how, max_new_tokens=int(max_new_tokens))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed reaches all of them
        torch.manual_seed(int(seed))
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def load_text(name="evaluation") -> str:
    """The text to measure on, "evaluation"; that for methods that look at activations, "calibration"; or a UTF-8 file
    by its path."""
    bundled = name in ("evaluation", "calibration")
    path = BUNDLED_FOLDER / f"{name}.txt" if bundled else Path(name).expanduser().absolute()
    with _explained(f"name={str(path)!r}", '"evaluation", "calibration" or the path of a text in UTF-8'):
        return path.read_text(encoding="utf-8-sig")  # without the byte-order mark that some editors write


def _encode(tokenizer, text: str, least: int = 1) -> Tensor:
    """The ids of one text, [1, tokens]."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"] if isinstance(text, str) else None
    fits = ids is not None and ids.shape[1] >= least
    _need(fits, f"text={text!r:.60}: give one text, not a list, of at least {least} tokens")
    return ids


# --- Perplexity ---
@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """Of a model on a text."""

    token_nll: Tensor = field(repr=False)  # the loss of each token in nats, float32 on the CPU, in reading order

    @property
    def nll(self) -> float:
        """Mean loss in nats per token."""
        return self.token_nll.double().mean().item()

    @property
    def ppl(self) -> float:
        """Perplexity, `exp(nll)`: how many equally likely tokens would leave the model as unsure as it was."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True, eq=False)
class Comparison:
    """How a candidate differs from a reference on the same text, in nats per token."""

    delta_nll: float  # mean loss of the candidate minus that of the reference
    ci: tuple[float, float]  # its interval
    kl: float  # mean KL(reference ‖ candidate): 0 only if all predicted distributions are the same
    kl_ci: tuple[float, float]
    top1_agreement: float  # share of tokens for which both find the same token likeliest
    verdict: str  # of the loss: "worse" or "better" if its interval leaves out 0, else "indistinguishable"
    token_kl: Tensor = field(repr=False)  # of each token, float32 on the CPU
    reference: PerplexityResult = field(repr=False)
    candidate: PerplexityResult = field(repr=False)


Paired = namedtuple("Paired", "delta_kl kl_ci delta_nll ci verdict")  # of `paired`; the verdict is by KL


def perplexity(model, tokenizer, text: str, window=None, stride=None) -> PerplexityResult:
    """Perplexity on a text, through a window of `window` tokens (default: the model's context, at most 1024) that moves
    by `stride` (default: half a window). Every token but the first is scored exactly once: in the first window all,
    later only the `stride` new ones, which see at least `window - stride` tokens before them."""
    return PerplexityResult(_score([model], tokenizer, text, window, stride)[0][0])


def compare(reference, candidate, tokenizer, text: str, window=None, stride=None):
    """Compare models token by token, over the same windows of a text as in `perplexity`. candidate: a model, for a
    `Comparison`; or a dict label -> model, for a dict of them: the reference then runs only once."""
    candidates = candidate if isinstance(candidate, dict) else {"candidate": candidate}
    (before, _, _), *scores = _score([reference, *candidates.values()], tokenizer, text, window, stride)
    results = {}
    for label, (nll, kl, agree) in zip(candidates, scores, strict=True):
        difference = nll.double() - before
        who = label if torch.isfinite(before).all() else "reference"
        finite = torch.isfinite(difference).all()
        _need(finite, f"{who}: losses are NaN or infinite, which allows no verdict: look for such weights in it")
        delta, mean_kl, top1 = (x.double().mean().item() for x in (difference, kl, agree))
        ci, kl_ci = bootstrap_interval(difference), bootstrap_interval(kl)
        both = PerplexityResult(before), PerplexityResult(nll)
        results[label] = Comparison(delta, ci, mean_kl, kl_ci, top1, _verdict(ci), kl, *both)
    return results if isinstance(candidate, dict) else results["candidate"]


def paired(a: Comparison, b: Comparison) -> Paired:
    """What `b` has more than `a` of KL and of loss, token by token: better known than either, as hard tokens cancel."""
    same = torch.equal(a.reference.token_nll, b.reference.token_nll)
    _need(same, "a and b have different references or texts: compare both with one reference")
    kl, nll = b.token_kl.double() - a.token_kl, b.candidate.token_nll.double() - a.candidate.token_nll
    kl_ci = bootstrap_interval(kl)
    return Paired(kl.mean().item(), kl_ci, nll.mean().item(), bootstrap_interval(nll), _verdict(kl_ci))


def measure(model, tokenizer, methods: dict, text: str, memory=2e9):
    """Round copies of a model, each by one method, and compare them with it on a text: `(results, table)`. methods:
    label -> quantizer of the matrices in the blocks, as in `fake_quantize_model`, or a finished model. results:
    label -> `Comparison`. The table has the true bits of a rounded weight, the mean SQNR of the tensors, KL and loss
    difference in nats per token with intervals. Windows do not overlap. memory: bytes for the copies of one run."""
    results, rows, labels = {}, [], list(methods)
    at_once, window = max(1, int(memory / model_nbytes(model))), min(context_length(model), 1024)
    for start in range(0, len(labels), at_once):
        some = {label: methods[label] for label in labels[start : start + at_once]}
        some = {n: m if isinstance(m, nn.Module) else fake_quantize_model(model, m, in_block) for n, m in some.items()}
        results |= compare(model, some, tokenizer, text, window, window)
        for label, copied in some.items():
            r, bits = results[label], getattr(copied, "stored_bits", {})  # none for values without codes
            pairs = [(model.get_parameter(name), copied.get_parameter(name)) for name in bits]
            mean_bits = sum(bits.values()) / sum(w.numel() for w, _ in pairs) if bits else math.nan
            decibels = np.mean([sqnr_db(*pair) for pair in pairs]) if bits else math.nan
            rows.append([label, mean_bits, decibels, r.kl, *r.kl_ci, r.delta_nll, *r.ci])
    columns = ["method", "bits", "SQNR (dB)", "KL", "KL low", "KL high", "Δ loss", "low", "high"]
    return results, pd.DataFrame(rows, columns=columns).set_index("method").round(4)


def large_results(*chapters: int) -> pd.DataFrame:
    """What `tests/large.py` measured for notebooks on a GPT-2 of 124 million parameters; prints on which, and how."""
    path = HERE / "tests" / "results" / "gpt2_124m.csv"
    print(*(line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# ")), sep="\n")
    return pd.read_csv(path, comment="#").query(f"chapter in {chapters}")


def bootstrap_interval(values, block=64, seed=0) -> tuple[float, float]:
    """Interval for the mean of a sequence, `(low, high)`, from 2,000 resamples of blocks, since neighbouring losses
    depend on each other; the last is a neighbour of the first. Too narrow below some hundred values. Source: Politis
    and Romano, "A circular block-resampling procedure for stationary data", 1992."""
    values = np.asarray(values, dtype=np.float64)
    block = max(1, min(block, len(values) // 16))
    total = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    block_means = (total[block:] - total[:-block]) / block
    drawn = np.random.default_rng(seed).integers(len(values), size=(2000, math.ceil(len(values) / block)))
    low, high = np.quantile(block_means[drawn].mean(axis=1), [0.025, 0.975])
    return low.item(), high.item()


def sliding_windows(predictions: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """`(begin, end, scored)`: inputs begin…end-1 go in, and what follows the last `scored` of them is scored."""
    begins = range(0, max(predictions - window, 0) + stride, stride)
    ends = [min(begin + window, predictions) for begin in begins]
    return [(begin, end, end - done) for begin, end, done in zip(begins, ends, [0, *ends], strict=False)]


@torch.no_grad()
def _score(models, tokenizer, text, window, stride) -> list[Tensor]:
    """Of each model [3, tokens], on the CPU: loss; KL and agreement with the first model."""
    ids = _encode(tokenizer, text, least=2)
    everywhere, scores = [_inputs(model, ids)[0] for model in models], [[] for _ in models]
    context = min(context_length(model) for model in models)
    window = min(context, 1024) if window is None else int(window)
    stride = max(window // 2, 1) if stride is None else int(stride)
    _need(1 <= stride <= window <= context, f"{window=}, {stride=}: give 1 <= stride <= window <= {context}")
    spans = sliding_windows(ids.shape[1] - 1, window, stride)
    quiet = len(spans) < 10 or "TQDM_DISABLE" in os.environ  # tqdm's notebook bar does not heed the variable
    for begin, end, scored in tqdm(spans, desc="windows", leave=False, disable=quiet):
        p = None
        for model, ids, rows in zip(models, everywhere, scores, strict=True):
            inputs, targets = ids[None, begin:end], ids[end - scored + 1 : end + 1]
            out = model(inputs, use_cache=False, logits_to_keep=scored)
            logits = out.logits[0, -scored:]  # [scored, vocabulary]
            q, top = logits.float().log_softmax(-1), logits.argmax(-1)
            if p is None:
                p, weights, first = q.clone(), q.exp(), top
            nll = -q.gather(-1, targets[:, None])[:, 0]
            kl = q.neg_().add_(p).mul_(weights).sum(-1).clamp(min=0)  # in place; rounding could make it -1e-8
            rows.append(torch.stack([nll, kl, top == first]).cpu())
    return [torch.cat(rows, dim=1) for rows in scores]


def _verdict(interval):
    return "worse" if interval[0] > 0 else "better" if interval[1] < 0 else "indistinguishable"


# --- Calibration ---
def calibration_tokens(model, tokenizer, sequences: int = 16, length: int | None = None) -> Tensor:
    """The first tokens of the calibration text, [sequences, length], of which nothing is in the evaluation text.
    length: by default 512, or the context if that is shorter."""
    ids = _inputs(model, _encode(tokenizer, load_text("calibration")))[0]
    length = length or min(512, context_length(model))
    _need(0 < sequences * length <= len(ids), f"{sequences=} of {length=}: the text has only {len(ids)} tokens")
    return ids[: sequences * length].view(sequences, length)


def block_layers(model) -> dict[str, nn.Module]:
    """Name -> `Conv1D` or `nn.Linear`, for all of them inside the numbered blocks."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (Conv1D, nn.Linear)) and in_block(n, m.weight)}
    _need(layers, f"model is a {type(model).__name__}: give one with nn.Linear or Conv1D in numbered blocks")
    return layers


@torch.no_grad()
def watch_inputs(model, ids: Tensor, watch) -> None:
    """Run the model over ids, [sequences, length], four at a time, and for each batch call `watch(name, x)` with what
    enters each layer of the blocks, [tokens, in]."""
    layers, ids = block_layers(model), _inputs(model, ids)
    with ExitStack() as hooks:  # removes them, whatever happens
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, x, name=name: watch(name, x[0].flatten(0, -2)))
            hooks.enter_context(hook)
        for batch in ids.split(4):
            model.base_model(batch)  # all but the head


def input_moments(model, ids: Tensor) -> dict[str, Tensor]:
    """Second moments of what enters each layer of the blocks: name -> mean of `x xᵀ` over all tokens, [in, in]."""
    moments = {}

    def watch(name, x):
        moments[name] = moments.get(name, 0) + x.float().T @ x.float() / ids.numel()

    watch_inputs(model, ids, watch)
    return moments


def round_inputs(model, activation) -> nn.Module:
    """A copy whose layers in the blocks get `activation(name, x)` in place of what enters them, x, [..., in]."""
    model = _copy(model)
    for name, layer in block_layers(model).items():
        layer.register_forward_pre_hook(lambda module, given, name=name: (activation(name, given[0]),))
    return model


def rotate(x: Tensor, back: bool = False, seed: int = 0) -> Tensor:
    """The last dimension turned by an orthogonal matrix: `x @ R`; back: `x @ R.T`, which undoes it. R flips random
    signs, then mixes each 128 neighbours (or the largest power of two that divides the width) by a Hadamard matrix, of
    which all entries are equally large. Source: Ashkboos et al., "QuaRot", 2024, section 3."""
    width, h = x.shape[-1], torch.ones(1, 1)
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    while len(h) < math.gcd(width, 128):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    h, signs = h.to(x) / len(h) ** 0.5, signs.to(x)  # h is its own transpose, and its own inverse
    mixed = ((x if back else x * signs).unflatten(-1, (-1, len(h))) @ h).flatten(-2)
    return mixed * signs if back else mixed


@torch.no_grad()
def plant_outliers(model, channels: int = 4, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy of a GPT-2 that computes the same, with outliers: in every block, some channels of both layer norms and of
    the values are scaled up, and the weights that read them down: SmoothQuant (Xiao et al., 2022) reversed."""
    block_layers(model)  # there must be some, in float
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    width = model.config.n_embd
    for block in model.transformer.h:
        attention = block.attn.c_attn
        for weight, bias, reader in (
            (block.ln_1.weight, block.ln_1.bias, attention),
            (block.ln_2.weight, block.ln_2.bias, block.mlp.c_fc),
            (attention.weight[:, -width:].T, attention.bias[-width:], block.attn.c_proj),  # the values come last
        ):
            chosen = torch.randperm(width, generator=generator)[:channels].to(model.device)
            weight[chosen] *= factor
            bias[chosen] *= factor
            reader.weight[chosen] /= factor  # a Conv1D: [in, out]
    return model


def output_error(difference: Tensor, moment: Tensor) -> float:
    """What a change d, [out, in], of a weight does to the layer's output: squared, summed over outputs, averaged over
    tokens, `tr(d H dᵀ)`, with the moment H, [in, in], of its inputs."""
    return ((difference @ moment) * difference).sum().item()


@torch.no_grad()
def gptq_quantize(weight: Tensor, moment: Tensor, bits=4, group_size=64, scale_dtype=None, clip=True, damp=0.01):
    """Round a weight, [out, in], column by column, and let the columns still in float make up for each error. moment:
    H, [in, in], from `input_moments`. group_size: None is one scale for each row. clip: search scales as
    `clip_quantize` does, errors weighted by the inputs. damp: share of the mean diagonal that is added to H, so that it
    can be inverted. Source: Frantar et al., "GPTQ", 2022, algorithm 1."""
    _parts(weight, 0, group_size)
    qmin, qmax = code_range(bits)
    inputs, importance, shares = weight.shape[1], moment.diagonal(), SHARES if clip else [1]
    size = group_size or inputs  # columns that share a scale
    block = group_size or 128  # columns whose errors are passed on to the rest all at once
    w, codes, scales = weight.float().clone(), weight.new_empty(weight.shape, dtype=torch.int8), []
    h = moment.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    # Row i of this factor, divided by its diagonal, says how much each later column must move for an error in column i.
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            if i % size == 0:
                group = slice(i, i + size)
                q = clip_quantize(w[:, group], bits, 0, None, scale_dtype, importance[group], shares)
                scales.append(q.scale)
                scale = q.scale.float()[:, 0]
            code = (w[:, i] * (1 / scale)).round().clamp(qmin, qmax)
            codes[:, i] = code.to(torch.int8)
            errors[:, i - start] = (w[:, i] - code * scale) / u[i, i]
            w[:, i + 1 : stop] -= errors[:, i - start, None] * u[i, i + 1 : stop]
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return QuantizedTensor(codes, torch.cat(scales, dim=1), 0, bits, weight.shape, 0, group_size)


@torch.no_grad()
def awq_quantize(weight: Tensor, moment: Tensor, bits=4, group_size=64, scale_dtype=None, clip=True, steps=20):
    """Scale up the input channels that carry large activations before rounding, and down again after it: by
    `a ** ratio`, a the root mean square of each channel, of the ratios 0, 1/steps, …, 1 the one with the least output
    error. Source: Lin et al., "AWQ", 2023, section 3.2."""
    activation = moment.diagonal().clamp(min=0).sqrt()
    activation = activation.clamp(min=1e-4 * activation.max().clamp(min=1e-10))
    best, least = None, math.inf
    for step in range(steps + 1):
        factors = activation ** (step / steps)
        factors = (factors / (factors.max() * factors.min()).sqrt()).to(scale_dtype or weight.dtype)
        q = absmax_quantize(weight.float() * factors.float(), bits, 0, group_size, scale_dtype)
        q = replace(q, factors=factors)
        if (error := output_error(q.dequantize() - weight, moment)) < least:
            best, least = q, error
    if clip:
        factors = best.factors.float()
        q = clip_quantize(weight.float() * factors, bits, 0, group_size, scale_dtype, moment.diagonal() / factors**2)
        best = replace(q, factors=best.factors)
    return best


# --- Pictures ---
def show(alt: str) -> None:
    """Show the current figure and close it. alt: what it shows, in a sentence or two, for readers who cannot see it."""
    png = io.BytesIO()
    plt.savefig(png, format="png", bbox_inches="tight")  # not left to the backend, which may be none for notebooks
    plt.close()
    display(Image(png.getvalue(), metadata={"alt": alt}))


def slider(draw, **ranges) -> None:
    """Call `draw`, which ends with `show`, again whenever the reader moves a slider: `bits=(2, 8)`. Not by
    `ipywidgets.interact`: its Output widget can make `jupyter execute` wait for ever (nbclient, issue 312)."""
    defaults, picture = inspect.signature(draw).parameters, ipywidgets.HTML()
    sliders = {name: ipywidgets.interactive.widget_from_abbrev(r, defaults[name].default) for name, r in ranges.items()}

    def redraw(_=None):
        with capture_output() as captured:
            draw(**{name: one.value for name, one in sliders.items()})
        png, alt = (kind["image/png"] for kind in (captured.outputs[-1].data, captured.outputs[-1].metadata))
        picture.value = f'<img src="data:image/png;base64,{png}" alt="{alt["alt"]}">'

    for name, one in sliders.items():
        one.description = name
        one.observe(redraw, "value")
    redraw()
    display(ipywidgets.VBox([*sliders.values(), picture]))


def plot_histograms(tensors: dict[str, Tensor], bins=200, log=True, limits=None, title="", xlabel="weight", ax=None):
    """Overlay the histograms of some tensors, label -> tensor, as outlines over common bins; returns the axes. log: a
    logarithmic count axis. limits: `(low, high)` of the value axis; by default the range of all together."""
    ax = ax or plt.subplots()[1]
    values = [tensor.detach().float().flatten().cpu().numpy() for tensor in tensors.values()]
    limits = limits or (min(v.min() for v in values), max(v.max() for v in values))
    for label, v, (line, colour) in zip(tensors, values, STYLES * len(values), strict=False):
        how = {"histtype": "step", "linestyle": line, "color": colour, "linewidth": 1.4}
        ax.hist(v, bins, range=limits, label=label, log=log, **how)
    ax.set(xlabel=xlabel, ylabel="count per bin", title=title)
    ax.legend()
    return ax


def draw_mapping(x: Tensor, q: QuantizedTensor, ax=None, title=""):
    """Draw how up to 40 values became the codes of q, one scale for all: floats above, codes below, idle ones light.
    Shaded is one step, half of it on each side of what a code stands for; above 5 bits magnified. Returns the axes."""
    fits = x.numel() == q.qdata.numel() <= 40 and q.scale.numel() == 1 and q.codebook is None
    _need(fits, f"x has {x.numel()} values, q {q.scale.numel()} scales: give up to 40 values, and q made of them")
    rows = sorted(zip(*(t.flatten().tolist() for t in (x, q.qdata, q.dequantize())), strict=True))
    (low, first, _), (high, last, _), scale, zero = rows[0], rows[-1], q.scale.item(), int(q.zero_point)
    symmetric, magnified = not torch.is_tensor(q.zero_point), q.bits > 5
    low, high = (-max(high, -low), max(high, -low)) if symmetric else (min(low, 0.0), max(high, 0.0))
    qmin, qmax = code_range(q.bits, symmetric)
    n, left, right, blue = qmax - qmin + 1, qmin - 0.5, qmax + 0.5, STYLES[2][1]
    ax = ax or plt.subplots(figsize=(9, 3.6 if magnified else 2.8))[1]

    def place(value):  # of a float, so that it is above its code
        return qmin + (value - low) / (high - low or 1) * (qmax - qmin)

    ax.plot([place(low), place(high)], [1, 1], "k-", [place(0), zero, zero], [1, 0, -0.5], "k:", linewidth=1, zorder=1)
    ax.barh([0, 0], [n, last - first + 1], 0.14, [left, first - 0.5], color=["0.87", "0.4"])
    ax.vlines(np.arange(qmin, qmax) + 0.5, -0.07, 0.07, color="white", linewidth=not magnified)
    names = ("-amax", "amax", "code") if symmetric else ("low", "high", "zero point")
    labels = [(left - n / 14, 1, f"floats: {names[0]}\n= {low:.3g}"), (right + n / 14, 1, f"{names[1]}\n= {high:.3g}")]
    labels += [(left - n / 14, 0, f"codes: {qmin}"), (right + n / 14, 0, qmax)]
    labels += [(place(0) - n / 80, 0.8, "0"), (zero, -0.55, f"{names[2]} {zero}")]
    for i, (value, code, _) in enumerate(rows):
        ax.plot(place(value), 1, "o", color=blue)
        ax.annotate("", (code, 0.05), (place(value), 1), arrowprops={"arrowstyle": "-|>", "color": blue, "lw": 1})
        if len(rows) <= 12:
            away = 0.37 if len(rows) > 6 and i % 2 else 0.22
            labels += [(place(value), 1 + away, f"{value:.3g}"), (code, -away, code)]
    value, code, level = max(rows, key=lambda row: abs(row[2] - row[0]))  # the step is drawn for what moves most
    height, centre, width, around = 1, place(level), place(scale) - place(0), range(qmin - code, qmax - code + 1)
    if magnified:
        height, centre, width, around = 2, min(max(place(value), left + n / 4), right - n / 4), 0.15 * n, (-1, 0, 1)
        ax.fill([centre - n / 4, centre + n / 4, place(value)], [2, 2, 1], "0.93", edgecolor="0.4", lw=1, zorder=0)
        ax.plot(centre + width * (value - level) / scale, 2, "o", color=blue)
    ax.barh(height, width, 0.26, centre - width / 2, color=STYLES[1][1], alpha=0.3)
    ax.vlines([centre + k * width for k in around], height - 0.08, height + 0.08, color="0.3", linewidth=1)
    text = f"one step = {scale:.3g}{', magnified' * magnified}\nwithin half a step of {level:.3g}: code {code}"
    style = {"ha": "center", "va": "center", "fontsize": 9, "bbox": {"color": "white", "alpha": 0.7, "pad": 0.5}}
    ax.text(min(centre, right - n / 5), height + 0.6, text, **style, color=STYLES[1][1])
    for label in labels:
        ax.text(*label, **style)
    ax.set(xlim=(left - n / 7.5, right + n / 7.5), ylim=(-0.65, height + 0.8), title=title)
    ax.axis("off")
    return ax
