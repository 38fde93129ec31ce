"""quantlib: what more than one notebook of this series needs, in one file that reads in one sitting.

Sections follow the series: the model, a tensor, a whole model, real storage, real speed, text, perplexity,
calibration, pictures.

Conventions, used everywhere (they are torchao's and quanto's):

- `x ≈ (qdata - zero_point) * scale`. The scale multiplies on the way back; it is never stored inverted.
- `axis` is the axis that keeps its own scale; `axis=None` is one scale for the whole tensor.
- `group_size` cuts the input dimension of a weight into groups that have a scale each.
- Rounding is `torch.round`: to the nearest integer, ties to the even one.
"""

from __future__ import annotations

import copy
import hashlib
import html
import inspect
import json
import math
import os
import re
import socket
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import matplotlib.pyplot as plt
import numpy as np
import safetensors
import seaborn as sns
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.pytorch_utils import Conv1D

try:  # comes with PyTorch for CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BUNDLED = "pocket-gpt2"
BUNDLED_FOLDER = Path(__file__).resolve().parent / "notebooks" / BUNDLED
BUNDLED_SHA256 = "802e2c175ce6488cfc03b061d8908b0ab9f2470affd87025c4e378b3f5357115"  # of its model.safetensors
FORMAT = "quantlib"  # the metadata key of files that save_quantized writes

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def setup(model: str = BUNDLED) -> str:
    """Check the versions, set the theme of the pictures, print where we are; every notebook begins with it.

    Returns the name of the model to load: `$QUANTLIB_MODEL` if that is set, so that a test or a classroom chooses
    once for all notebooks, else `model`. Raises `RuntimeError` where torch or transformers is too old.
    """
    for package, least in ((torch, "2.6"), (transformers, "4.57")):
        if Version(package.__version__) < Version(least):
            raise RuntimeError(
                f"{package.__name__} is {package.__version__}, the series needs {least} or newer: "
                f"pip install -U {package.__name__}, then restart the kernel"
            )
    set_theme()
    model = os.environ.get("QUANTLIB_MODEL") or model
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {default_device()}, {model}")
    return model


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name: str | None = None, device=None):
    """Load a GPT-2 in fp32 with its tokenizer: `(model, tokenizer)`, the model in evaluation mode.

    name: "pocket-gpt2" (bundled, needs no network), a hub id such as "gpt2", or a local folder. `None` means
        `$QUANTLIB_MODEL` and, if that is unset, the bundled model.
    device: anything `torch.device` takes; `None` is the GPU if there is one.

    Only safetensors weights are read, and no code that comes with a model is run. Raises `ValueError` for a name that
    cannot be loaded, for a model that is not of the GPT-2 family, for a checkpoint whose weights are not those of its
    configuration, and for bundled weights that were damaged; `MemoryError` where the model would not fit.
    """
    name = str(name or os.environ.get("QUANTLIB_MODEL") or BUNDLED)
    folder = BUNDLED_FOLDER if name == BUNDLED else Path(os.path.expanduser(name))
    local = folder.is_dir()
    source = str(folder) if local else name
    offline = local
    try:
        if not local and (name.count("/") > 1 or name[0] in "./~" or "\\" in name):
            raise ValueError("there is no such folder")
        if local and not (folder / "config.json").is_file():
            raise ValueError("there is no config.json in this folder")
        offline = local or not _hub_reachable()  # then nothing is asked of the network, at most of the cache
        safe = {"local_files_only": offline, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(source, **safe)
        if config.model_type != "gpt2":
            raise ValueError(f"it is a {config.model_type!r} model; the series works on the GPT-2 family")
        if getattr(config, "quantization_config", None):
            raise ValueError("it is quantized already; give the original")
        rows = config.n_layer * (4 * config.n_embd + 2 * (config.n_inner or 4 * config.n_embd))
        _check_memory(4 * (rows + config.vocab_size + config.n_positions) * config.n_embd)
        if local:
            _check_weights(folder, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
        if not tokenizer("The")["input_ids"]:  # what transformers makes of a folder without one
            raise ValueError("there is no tokenizer with it")
        with _quiet_loading(local):
            model, info = GPT2LMHeadModel.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, local_files_only=offline, output_loading_info=True,
                ignore_mismatched_sizes=True, attn_implementation="sdpa",  # a config may name code on the hub here
            )  # fmt: skip
        if info["missing_keys"]:
            raise ValueError(f"the checkpoint lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, …")
        for key in sorted(found if isinstance(found, str) else found[0] for found in info["mismatched_keys"]):
            shape = list(model.state_dict()[key].shape)
            raise ValueError(f"{key} is not {shape} in the checkpoint, as the configuration says")
        masks = (".attn.bias", ".attn.masked_bias")  # constants that old checkpoints hold
        if extra := [key for key in info["unexpected_keys"] if not key.endswith(masks)]:
            raise ValueError(f"the checkpoint has weights that are not a part of the model: {min(extra)}, …")
    except MemoryError:
        raise
    except Exception as error:  # the libraries below raise a dozen kinds; the reader needs one line and a remedy
        reason = _reason(error)
        if offline and not local and isinstance(error, OSError):
            reason = "the hub cannot be reached, and no such model is in the local cache"
        raise ValueError(
            f"load_model cannot load name={name!r}: {reason}.\n"
            f'Give "{BUNDLED}" (bundled, needs no network), the id of a GPT-2 on the Hugging Face hub such as "gpt2" '
            f"(check its spelling and the network), or a folder with config.json, model.safetensors and a tokenizer."
        ) from None
    return model.to(device or default_device()).eval(), tokenizer


def _reason(error: Exception) -> str:
    """The first line of what a library says; of a `KeyError` that is only the key."""
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return f"{reason} is unknown, or missing" if isinstance(error, KeyError) else reason


def _check_weights(folder: Path, config) -> None:
    """`ValueError` where a local folder has weights that are no safetensors in float; for bundled ones that changed."""
    if (folder / "adapter_config.json").exists() or getattr(config, "transformers_weights", None):
        raise ValueError("its weights lie in other files or at another place: give a folder with model.safetensors")
    files = ["model.safetensors"]
    if not os.path.lexists(folder / files[0]) and (folder / f"{files[0]}.index.json").exists():
        files = sorted(set(json.loads((folder / f"{files[0]}.index.json").read_text())["weight_map"].values()))
    count = 0
    for file in files:
        if not file.endswith(".safetensors") or Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{file} is not a safetensors file in this folder")
        with _open(folder / file) as opened:
            for name in opened.keys():
                if (dtype := opened.get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{name} in {file} is stored as {dtype}: the weights must be in float")
                count += 1
        if folder == BUNDLED_FOLDER and hashlib.sha256((folder / file).read_bytes()).hexdigest() != BUNDLED_SHA256:
            raise ValueError(f"{file} does not have the SHA-256 {BUNDLED_SHA256}: fetch the repository again")
    if config.n_layer > count:  # or it would take for ever to build them
        raise ValueError(f"the checkpoint lacks weights: there are {count} tensors for n_layer={config.n_layer}")


def _check_memory(needed: int) -> None:
    """`MemoryError` where `needed` bytes are not free: early, not when the system stops the kernel. Linux only."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # no such file, or no such line
        return
    if needed > free:
        raise MemoryError(
            f"{needed / 1e9:.1f} GB of memory are needed and {free / 1e9:.1f} GB are free: delete models that you no "
            "longer need, shut down other kernels, or take a smaller model"
        )


def _hub_reachable() -> bool:
    """Whether the hub's name resolves. Without this, a laptop in a train waits through five retries for each file."""
    if getproxies():
        return True  # the proxy resolves names
    try:
        socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


class _quiet_loading:
    """Hide the bar of loading a local file, which takes a moment; a download keeps its bars."""

    def __init__(self, quiet: bool):
        self.quiet = quiet and transformers.utils.logging.is_progress_bar_enabled()

    def __enter__(self):
        if self.quiet:
            transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *_):
        if self.quiet:
            transformers.utils.logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# A tensor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes with what is needed to turn them back into numbers: `(qdata - zero_point) * scale`.

    qdata: the codes, int8, one a byte while we compute with them, in the shape of the original.
    scale: float; a number for one scale per tensor, else shaped to broadcast over `qdata`; with groups, the shape of
        the original with the input dimension divided by `group_size`.
    zero_point: the code of 0.0: int8, shaped like `scale`; the plain int 0, which is not stored, if symmetric.
    codebook: the number that each code stands for, before it is scaled, where that is not the code itself (NF4).
    factors: what each input channel was multiplied by before rounding, [in] of a weight [out, in], if anything (AWQ).
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | int
    bits: int
    shape: torch.Size
    axis: int | None = None
    group_size: int | None = None
    codebook: Tensor | None = None
    factors: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for: float32, or float64 if `scale` is, in the original shape."""
        values = self._scaled_codes()
        return values if self.factors is None else values / self.factors.to(values.dtype)

    def _scaled_codes(self) -> Tensor:
        scale, zero_point = self.scale, self.zero_point
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        if self.codebook is not None:
            codes = self.codebook.to(scale)[self.qdata.long()]
        else:
            codes = self.qdata.to(scale.dtype)  # widen first: int8 minus int8 would wrap around
        if self.group_size is not None:
            codes = codes.unflatten(self._input_dim, (-1, self.group_size))
            scale = scale.unsqueeze(self._input_dim + 1)
            if isinstance(zero_point, Tensor):
                zero_point = zero_point.unsqueeze(self._input_dim + 1)
            return ((codes - zero_point) * scale).reshape(self.shape)
        return (codes - zero_point) * scale

    @property
    def _input_dim(self) -> int:
        return _input_dim(len(self.shape), self.axis)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and factors as stored: codes of few bits packed, without gaps.

        The codebook is the same for all tensors of a kind, and is not counted.
        """
        more = [tensor for tensor in (self.zero_point, self.factors) if isinstance(tensor, Tensor)]
        codes = math.ceil(self.qdata.numel() * self.bits / 8)
        return codes + self.scale.nbytes + sum(tensor.nbytes for tensor in more)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, scales and zero points included, divided by the number of weights."""
        return 8 * self.nbytes / self.shape.numel()


def code_range(bits: int = 8, symmetric: bool = True) -> tuple[int, int]:
    """The smallest and the largest code, `(qmin, qmax)`: -127…127 if symmetric, else -128…127, for 8 bits."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r}: give a whole number from 2 to 8")
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if symmetric else -qmax - 1), qmax


def absmax_quantize(x: Tensor, bits=8, axis: int | None = None, group_size: int | None = None, scale_dtype=None):
    """Symmetric quantization: the largest magnitude becomes the largest code, 0.0 becomes code 0.

    With 8 bits: `scale = amax / 127`, `qdata = round(x / scale)`, codes -127…127. Every element comes back within half
    a scale. torchao's symmetric mapping divides by 127.5 and uses -128…127: a hair finer, but the largest positive
    value falls outside its range and is clipped. We follow the common choice, in which x and -x have codes of one size.

    x: floating-point tensor of any shape.
    axis, group_size: which elements share a scale (see the top of this file). Groups need a vector or a matrix and run
        along its input dimension: the last one, or for `axis=1` the first one (a `Conv1D` weight is `[in, out]`).
    scale_dtype: store the scales in this dtype, such as `torch.float16`; codes are chosen for the rounded scale. The
        largest elements may then come back a little more than half a scale off.

    Returns a `QuantizedTensor`. Raises `ValueError` for a tensor that is empty, of integers, or holds NaN or infinity,
    for `bits`, `axis` or `group_size` that do not fit, and where a scale overflows `scale_dtype`. Source: Dettmers et
    al., "LLM.int8()", 2022, section 2.1.
    """
    qmin, qmax = code_range(bits)
    work, shared = _prepare(x, axis, group_size)
    amax = _reduce(torch.amax, work.abs(), shared, axis)
    scale = _scale(amax, qmax, dtype=scale_dtype)
    return _pack(x, work, scale, 0, bits, axis, group_size, qmin, qmax)


def zeropoint_quantize(x: Tensor, bits=8, axis: int | None = None, group_size: int | None = None, scale_dtype=None):
    """Asymmetric (affine) quantization: the range from the smallest to the largest value takes all the codes.

    With 8 bits: `scale = (max - min) / 255`, `zero_point = round(-128 - min / scale)`,
    `qdata = round(x / scale) + zero_point`, codes -128…127. The range is first widened to include 0.0, which then has
    a code of its own, the zero point, and comes back exactly. Every element comes back within half a scale.

    Arguments, result and errors as in `absmax_quantize`. Source: Jacob et al., "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.1.
    """
    qmin, qmax = code_range(bits, symmetric=False)
    work, shared = _prepare(x, axis, group_size)
    low = _reduce(torch.amin, work, shared, axis).clamp(max=0)
    high = _reduce(torch.amax, work, shared, axis).clamp(min=0)
    levels = qmax - qmin
    scale = _scale(high, levels, low, scale_dtype)
    zero_point = torch.clamp(torch.round(qmin - low * (1 / scale.to(low.dtype))), qmin, qmax).to(torch.int8)
    return _pack(x, work, scale, zero_point, bits, axis, group_size, qmin, qmax)


# The 16 levels of NF4, as published; notebook 11 derives them from the quantiles of the normal distribution.
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def nf4_quantize(x: Tensor, group_size: int | None = 64, scale_dtype=None) -> QuantizedTensor:
    """4-bit NormalFloat: 16 unequal levels that bell-shaped weights use about equally often, scaled by the absmax.

    `scale = amax` of a group, `qdata` the index 0…15 of the level nearest to `x / scale`. Every element comes back
    within the scale times half the gap between two levels.

    Arguments, result and errors as in `absmax_quantize`; groups run along the last dimension, None is one for the whole
    tensor. Source: Dettmers et al., "QLoRA", 2023, appendix E.
    """
    work, shared = _prepare(x, None, group_size)
    levels = torch.tensor(NF4, device=x.device)
    scale = _scale(_reduce(torch.amax, work.abs(), shared, None), 1, dtype=scale_dtype)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((work / scale.to(work.dtype)).float().contiguous(), between).to(torch.int8).reshape(x.shape)
    scale = scale if group_size is None else scale.squeeze(-1)
    return QuantizedTensor(codes, scale, 0, 4, x.shape, None, group_size, levels)


def clip_quantize(
    x: Tensor, bits=4, axis: int | None = None, group_size: int | None = None, scale_dtype=None,
    importance: Tensor | None = None, shares=tuple(1 - i / 20 for i in range(13)),
) -> QuantizedTensor:  # fmt: skip
    """Absmax quantization with the range cut at a share of the absmax, if that lowers the squared error.

    Each scale takes the share of `shares` (1, 0.95, …, 0.4) that is best for it. The few elements beyond are clipped
    to the largest code, and all others get finer steps.
    importance: weighs each element's squared error; broadcasts over x. By default all count alike.

    Other arguments, result and errors as in `absmax_quantize`. Source: the search for the scale in Frantar et al.,
    "GPTQ", 2022, and in Lin et al., "AWQ", 2023 (their code).
    """
    qmin, qmax = code_range(bits)
    work, shared = _prepare(x, axis, group_size)
    weights = torch.ones_like(x) if importance is None else importance.expand_as(x)
    weights = weights.to(work.dtype).reshape(work.shape)
    largest = _reduce(torch.amax, work.abs(), shared, axis)
    best, least = None, math.inf
    for share in shares:
        scale = _scale(largest * share, qmax, dtype=scale_dtype)
        wide = scale.to(work.dtype)
        rounded = (work * (1 / wide)).round_().clamp_(qmin, qmax).mul_(wide)
        error = _reduce(torch.sum, rounded.sub_(work).square_().mul_(weights), shared, axis)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = error.clamp(max=least)
    return _pack(x, work, best, 0, bits, axis, group_size, qmin, qmax)


def _prepare(x, axis, group_size) -> tuple[Tensor, list[int]]:
    """Check the arguments; return x in the dtype to compute in, cut into groups, and the dimensions sharing a scale."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}: give a torch tensor")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: quantization takes floating-point numbers, try x.float()")
    if x.numel() == 0:
        raise ValueError(f"x is empty, its shape is {tuple(x.shape)}: there is nothing to quantize")
    work = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(work).all():
        nans, infs = torch.isnan(work).sum().item(), torch.isinf(work).sum().item()
        raise ValueError(f"x holds {nans} NaN and {infs} infinite values: no scale fits them, mend them first")
    if axis is not None and not (isinstance(axis, int) and -x.ndim <= axis < x.ndim):
        raise ValueError(f"axis={axis!r}: give one dimension of x, whose shape is {tuple(x.shape)}, or None")
    if group_size is None:
        return work, [d for d in range(x.ndim) if axis is None or d != axis % x.ndim]
    if x.ndim not in (1, 2):
        raise ValueError(f"group_size={group_size} needs a vector or a matrix; x has shape {tuple(x.shape)}")
    dim = _input_dim(x.ndim, axis)
    if not isinstance(group_size, int) or group_size < 1 or x.shape[dim] % group_size:
        raise ValueError(f"group_size={group_size!r} does not divide the input dimension of x, {x.shape[dim]}")
    return work.unflatten(dim, (-1, group_size)), [dim + 1]


def _input_dim(ndim: int, axis: int | None) -> int:
    """The dimension that groups run along: the one that `axis` does not keep, by default the last."""
    return 0 if ndim == 2 and axis is not None and axis % 2 == 1 else ndim - 1


def _reduce(function, x: Tensor, shared: list[int], axis) -> Tensor:
    """amin, amax or sum over the dimensions that share a scale, kept with length 1; a plain number if all share one."""
    if len(shared) == x.ndim and axis is None:
        return function(x)
    return function(x, dim=shared, keepdim=True) if shared else x


def _scale(high: Tensor, steps: int, low: Tensor | None = None, dtype=None) -> Tensor:
    """(high - low) / steps; but 1 where that is 0, so that zeros stay zeros, and never too small to be inverted."""
    steps = torch.full_like(high, steps)  # a tensor: divided by a plain number, CUDA rounds unlike the CPU
    scale = high / steps if low is None else high / steps - low / steps  # high - low could overflow
    dtype = dtype or scale.dtype
    rounded = torch.where(scale == 0, 1, scale.clamp(min=torch.finfo(dtype).tiny)).to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"scale_dtype={dtype} cannot hold a scale of {scale.max().item():.3g}: give a wider one")
    return rounded


def _pack(x, work, scale, zero_point, bits, axis, group_size, qmin, qmax) -> QuantizedTensor:
    # Times the reciprocal, as torch.fake_quantize does: dividing would break some ties the other way.
    codes = torch.clamp(torch.round(work * (1 / scale.to(work.dtype))) + zero_point, qmin, qmax).to(torch.int8)
    if group_size is not None:
        dim = _input_dim(x.ndim, axis)
        scale = scale.squeeze(dim + 1)
        zero_point = zero_point.squeeze(dim + 1) if isinstance(zero_point, Tensor) else zero_point
    return QuantizedTensor(codes.reshape(x.shape), scale, zero_point, bits, x.shape, axis, group_size)


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels: `10 log10(sum x² / sum (x - x_hat)²)`.

    Every 6.02 dB is one bit: the error halved. Infinity if the two are equal. Raises `ValueError` if shapes differ.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}: compare equal shapes")
    signal = x.double().square().sum().item()
    noise = (x.double() - x_hat.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# ---------------------------------------------------------------------------------------------------------------------
# A whole model
# ---------------------------------------------------------------------------------------------------------------------


def model_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, every stored byte once: a tied tensor counts once, wherever it is used."""
    stored = {}
    for tensor in chain(model.parameters(), model.buffers()):
        key = (tensor.device, tensor.data_ptr() or id(tensor))  # tied tensors start at the same address
        stored[key] = max(tensor.nbytes, stored.get(key, 0))
    return sum(stored.values())


@torch.no_grad()
def fake_quantize_model(model: nn.Module, quantizer, select=None) -> nn.Module:
    """A copy of the model whose weights went through the quantizer and back: rounded values, still in fp32.

    quantizer: takes a tensor, returns a `QuantizedTensor` or a tensor of the same shape. A matrix is handed over as
        `[out, in]`, also where the model stores `[in, out]` (`Conv1D`), so `axis=0` is the output channel everywhere.
        Or a dict of such results, by the names of the parameters to replace.
    select(name, parameter) -> bool: which parameters; by default all. A tied tensor comes once, by its first name.
        A vector (bias, layer norm) has no channels: with `axis=0` each element would get a scale of its own.

    The original is not touched, ties stay tied, and the bytes stay the same: this shows what quantization does to the
    results, not what it saves. What the codes would take is noted for `bits_per_weight`. Raises `TypeError` for
    something that is not a model, `ValueError` for a quantizer that changes a shape, for a name in the dict that the
    model does not have, or when nothing is selected, `MemoryError` where a copy would not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    _check_memory(sum(p.nbytes for p in model.parameters() if p.device.type == "cpu"))
    model = copy.deepcopy(model)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    model.stored_bits = dict(getattr(model, "stored_bits", {}))  # of a parameter's codes, scales and zero points
    given = quantizer if isinstance(quantizer, dict) else None
    if given and (unknown := set(given) - {name for name, _ in model.named_parameters()}):
        raise ValueError(f"quantizer has {min(unknown)!r}, which is not a parameter of the model")
    done = 0
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (select is not None and not select(name, parameter)):
            continue
        if given is not None and name not in given:
            continue
        weight = parameter.T if id(parameter) in transposed else parameter
        try:
            rounded = quantizer(weight) if given is None else given[name]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if isinstance(rounded, QuantizedTensor):
            model.stored_bits[name] = 8 * rounded.nbytes
            rounded = rounded.dequantize()
        if rounded.shape != weight.shape:
            raise ValueError(f"quantizer turned {name} from shape {tuple(weight.shape)} into {tuple(rounded.shape)}")
        weight.copy_(rounded)
        done += 1
    if not done:
        raise ValueError("nothing was quantized: select chose no parameter, or the model has none in float")
    return model


def in_block(name: str, parameter: Tensor) -> bool:
    """A `select` for `fake_quantize_model`: the matrices inside the transformer blocks, all that GPTQ and AWQ touch."""
    return ".h." in f".{name}" and parameter.ndim == 2


def bits_per_weight(model: nn.Module) -> float:
    """Bits per parameter of a `fake_quantize_model`, if it were stored: codes, scales and zero points packed.

    Whatever was not quantized counts 16 bits, since a model is stored in half precision.
    """
    stored = getattr(model, "stored_bits", {})
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(stored.get(name, 16 * size) for name, size in sizes.items()) / sum(sizes.values())


# ---------------------------------------------------------------------------------------------------------------------
# Real storage
# ---------------------------------------------------------------------------------------------------------------------


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte: integers -8…7, [..., n] with n even -> uint8, [..., n / 2].

    A code is stored as `code + 8`; the first of a pair takes the low half of the byte. `unpack_int4` undoes it.
    Raises `ValueError` for an odd n, for codes out of range and for floating-point numbers.
    """
    if codes.is_floating_point() or codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"codes ({codes.dtype}) must be integers from -8 to 7")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes has shape {tuple(codes.shape)}: packing pairs needs an even last dimension")
    nibbles = (codes.to(torch.int8) + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The codes that `pack_int4` packed: uint8, [..., n / 2] -> int8, [..., n]. `ValueError` for another dtype."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed has dtype {packed.dtype}: give the uint8 that pack_int4 returned")
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


class QuantizedWeight(nn.Module):
    """A weight [out, in] as codes and scales; it never holds the weight in float.

    codes: int8, [out, in]; with 4 bits uint8, [out, in / 2], see `pack_int4`.
    scale: float32, [out]; with 4 bits bfloat16, [out, in / group_size].

    On a CPU for which PyTorch has a 4-bit product, 4-bit weights are kept in the order in which that product reads
    them (see `_int4_block`), and `block` is not 0. `state_dict` and files always have the order above.
    """

    def __init__(self, out_features: int, in_features: int, bits: int, group_size: int | None):
        super().__init__()
        self.shape, self.bits, self.group_size = torch.Size([out_features, in_features]), bits, group_size
        self.block = 0
        if bits == 8:
            codes, scale = torch.empty(out_features, in_features, dtype=torch.int8), torch.empty(out_features)
        else:
            codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
            scale = torch.empty(out_features, in_features // group_size, dtype=torch.bfloat16)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.bits}" + (f", group_size={self.group_size}" if self.group_size else "")

    def dequantize(self, dtype=torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start…stop-1 of the weight, [rows, in], in `dtype`; start is a multiple of 64."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        if not self.block:
            return self._widen(self.codes[start:stop], self.scale[start:stop], dtype)
        first, last = start // self.block, -(-stop // self.block)
        packed = self.codes[first:last]  # [blocks, in, block / 2]
        codes = torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8
        codes = codes.movedim(0, 1).reshape(len(self.scale), self.group_size, -1)  # [groups, group_size, rows]
        scale = self.scale[:, first * self.block : last * self.block, :1].movedim(1, 2)
        return (codes.to(dtype) * scale.to(dtype)).flatten(0, 1).T[: stop - start]

    def rows(self, index: Tensor, dtype) -> Tensor:
        """Some rows of the weight, which is what an embedding looks up: integers [...] -> [..., in]."""
        if not self.block:
            return self._widen(self.codes[index], self.scale[index], dtype)
        half = self.block // 2
        packed = self.codes[index // self.block, :, index % half]  # [..., in]
        codes = torch.where((index % self.block < half)[..., None], packed & 15, packed >> 4)
        return self._widen(pack_int4(codes.to(torch.int8) - 8), self.scale[:, index, 0].movedim(0, -1), dtype)

    def _widen(self, codes, scale, dtype) -> Tensor:
        if self.bits == 8:
            return codes.to(dtype) * scale[..., None].to(dtype)
        codes = unpack_int4(codes).unflatten(-1, (-1, self.group_size)).to(dtype)
        return (codes * scale[..., None].to(dtype)).flatten(-2)

    def _plain(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in the order of the docstring."""
        if not self.block:
            return self.codes, self.scale
        codes = torch.cat([self.codes & 15, self.codes >> 4], dim=-1).transpose(1, 2).flatten(0, 1)
        scale = self.scale[..., 0].T[: self.shape[0]].contiguous()
        return pack_int4(codes[: self.shape[0]].to(torch.int8) - 8).contiguous(), scale

    def _reorder(self) -> None:
        """From the plain order into the one of the CPU's 4-bit product, if there is one for this device and group."""
        block = _int4_block() if self.bits == 4 and self.codes.device.type == "cpu" else 0
        if not block or self.group_size not in (32, 64, 128, 256):
            return
        outputs, inputs = self.shape
        padding = -outputs % 64
        codes = torch.empty((outputs + padding) // block, inputs, block // 2, dtype=torch.uint8)
        for start in range(0, outputs, 2048):  # in parts, so that little memory is needed beside the result
            nibbles = (unpack_int4(self.codes[start : start + 2048]) + 8).to(torch.uint8)
            nibbles = nn.functional.pad(nibbles, (0, 0, 0, -len(nibbles) % 64), value=8)
            low, high = nibbles.unflatten(0, (-1, block)).transpose(1, 2).chunk(2, dim=2)
            codes[start // block : (start + len(nibbles)) // block] = low | high << 4
        scale = nn.functional.pad(self.scale, (0, 0, 0, padding), value=1.0).T
        self.codes = codes
        self.scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1)  # that product also adds an offset: 0
        self.block = block

    def _apply(self, fn, recurse=True):
        if self.block and fn(self.codes.new_empty(0)).device == self.codes.device:
            return self  # .half() and the like: they change what is in float, neither codes nor scales
        (codes, scale), self.block = self._plain(), 0
        self.codes = fn(codes)
        device = self.codes.device
        self.scale = torch.empty_like(scale, device=device) if scale.is_meta else scale.to(device)
        self._reorder()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "codes"], destination[prefix + "scale"] = self._plain()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "codes" not in state_dict:
            args[2].extend((prefix + "codes", prefix + "scale"))  # the list of what is missing
            return
        (self.codes, self.scale), self.block = self._plain(), 0
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.codes.is_meta:
            self._reorder()


class QuantizedLinear(nn.Module):
    """`y = x @ weight.T + bias` with a `QuantizedWeight`; takes the place of a `Conv1D` or an `nn.Linear`."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = matmul(x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)  # y is ours: fresh memory would take time


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a `QuantizedWeight`, [vocabulary, width]; a tied head multiplies by the same object."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.weight = weight
        self.register_buffer("like", torch.empty(0), persistent=False)  # no bytes: it carries the model's float dtype

    def forward(self, index: Tensor) -> Tensor:
        return self.weight.rows(index, self.like.dtype)


@torch.no_grad()
def quantize_model(model: nn.Module, bits: int = 8, group_size: int | None = None) -> nn.Module:
    """A copy of a GPT-2 that stores its matrices as integers: every `Conv1D` and `nn.Linear`, and the token table.

    bits: 8 stores a byte for each weight and a float32 scale for each output channel (each token of the table);
        4 packs two weights into a byte and stores a bfloat16 scale for each group.
    group_size: with 4 bits; even, and a divisor of every input dimension; by default 64.

    A head tied to the token table stays one tensor with it. Biases, layer norms and positions stay as they are.
    Rounding is absmax. The copy is for inference: its parameters take no gradient. Raises `ValueError` for other
    `bits`, for a group size that does not fit, and for a model that is not a `GPT2LMHeadModel` with float weights;
    `MemoryError` where the copy would not fit.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(f"model is a {type(model).__name__}: quantize_model takes a GPT2LMHeadModel")
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        raise ValueError("model is quantized already: give quantize_model the original")
    group_size = 64 if bits == 4 and group_size is None else group_size
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = model.lm_head.weight is model.transformer.wte.weight
    copied = _skeleton(config, bits, group_size)
    _check_memory(sum(p.numel() for p in model.parameters() if p.device.type == "cpu") * bits // 8)
    weights = {name for name, part in copied.named_modules() if isinstance(part, QuantizedWeight)}  # shared ones once
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if name not in weights}
    for name in weights:
        weight = model.get_parameter(name)
        weight = weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight
        try:
            scale_dtype = torch.float32 if bits == 8 else torch.bfloat16
            quantized = absmax_quantize(weight, bits, 0, group_size, scale_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        codes, scale = quantized.qdata, quantized.scale
        tensors[f"{name}.codes"] = (codes if bits == 8 else pack_int4(codes)).contiguous()
        tensors[f"{name}.scale"] = scale[:, 0] if bits == 8 else scale
    copied = _fill(copied, tensors)
    copied.generation_config = copy.deepcopy(model.generation_config)
    return copied.train(model.training)


def _skeleton(config, bits: int, group_size: int | None) -> nn.Module:
    """A GPT-2 of this configuration with quantized matrices and no storage: its tensors are on the device "meta"."""
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: a model is stored in 8 or 4 bits")
    if bits == 8 and group_size is not None:
        raise ValueError(f"group_size={group_size!r} goes with bits=4; 8 bits have a scale for each output channel")
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).requires_grad_(False)
        shared = {}  # id of a float weight -> its quantized one, the same for tied weights
        for name, module in list(model.named_modules()):
            if not isinstance(module, (Conv1D, nn.Linear)) and module is not model.transformer.wte:
                continue
            shape = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            out_features, in_features = shape
            fits = isinstance(group_size, int) and group_size > 0 and not (group_size % 2 or in_features % group_size)
            if bits == 4 and not fits:
                raise ValueError(
                    f"group_size={group_size!r} must be even and divide every input dimension; {name} has {in_features}"
                )
            if id(module.weight) not in shared:
                shared[id(module.weight)] = QuantizedWeight(out_features, in_features, bits, group_size)
            weight = shared[id(module.weight)]
            lookup = isinstance(module, nn.Embedding)
            model.set_submodule(name, QuantizedEmbedding(weight) if lookup else QuantizedLinear(weight, module.bias))
    return model.eval()


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Put tensors into a skeleton: each that it needs, in its shape; `ValueError` names the first that does not fit."""
    stored = model.state_dict()
    needed = {name: t for name, t in chain(model.named_parameters(), model.named_buffers()) if name in stored}
    for name in [*needed, *tensors]:
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if name not in needed:
            raise ValueError(f"{name} is not a part of the model")
        got, want = tensors[name], needed[name]
        of_kind = got.dtype == want.dtype if name.endswith((".codes", ".scale")) else got.is_floating_point()
        if got.shape != want.shape or not of_kind:
            raise ValueError(f"{name} is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
    model.load_state_dict(tensors, strict=False, assign=True)  # not strict: shared parts come by their first name
    model.transformer.wte.like = torch.empty(0, dtype=model.transformer.wpe.weight.dtype)
    if any(buffer.is_meta for buffer in model.buffers()):  # transformers before version 5 keeps causal masks in them
        attention = model.transformer.h[0].attn
        for name, mask in type(attention)(model.config).named_buffers(recurse=False):
            for block in model.transformer.h:
                setattr(block.attn, name, mask)
    return model


def save_quantized(model: nn.Module, path) -> None:
    """Write a model of `quantize_model` into one safetensors file: its tensors, and the configuration as metadata.

    A checksum of both goes with them, so that `load_quantized` notices when a bit has changed. The file appears whole
    or not at all. Raises `ValueError` for a model that is not quantized, `OSError` where the file cannot be written.
    """
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    if not weights:
        raise ValueError(f"model is a {type(model).__name__} without codes: give the result of quantize_model")
    about = {"bits": weights[0].bits, "group_size": weights[0].group_size, "config": model.config.to_dict()}
    names = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}  # shared parts once
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}
    path = Path(path)
    about["sha256"] = _sha256(about, tensors)
    try:
        if path.exists() and not path.is_file():
            raise OSError("there is something of this name that is not a file")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            mode = temporary.stat().st_mode  # who may read new files here; some versions of safetensors ask nobody
            save_file(tensors, temporary, metadata={FORMAT: json.dumps(about, default=str)})
            temporary.chmod(mode)
            os.replace(temporary, path)
    except (safetensors.SafetensorError, OSError) as error:  # a full disk, a folder that is not there, …
        raise OSError(f"save_quantized cannot write path={str(path)!r}: {error}") from None


def _sha256(about: dict, tensors: dict[str, Tensor]) -> str:
    """A checksum of the metadata and of all tensors with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_quantized(path, device=None) -> nn.Module:
    """Load what `save_quantized` wrote, in evaluation mode; the float matrices are never built.

    device: as in `load_model`. Raises `ValueError` for a file that is missing, cut short, foreign, damaged, or does not
    fit the configuration in it; then nothing is loaded. Raises `MemoryError` where it would not fit.
    """
    try:
        with _open(path) as file:
            about, names = json.loads((file.metadata() or {}).get(FORMAT, "null")), list(file.keys())
        if about is None:
            raise ValueError("it is a safetensors file, but not one of save_quantized")
        checksum = about.pop("sha256", None)
        config = GPT2Config.from_dict(copy.deepcopy(about["config"]))
        config._attn_implementation = None  # the default, whatever the file says: it may name code on the hub
        if config.n_layer > len(names):  # or it would take for ever to build them
            raise ValueError(f"n_layer={config.n_layer}, but there are {len(names)} tensors")
        model = _skeleton(config, about["bits"], about["group_size"])
        _check_memory(os.path.getsize(path))
        tensors = {name: _read(path, name) for name in names}
        intact = _sha256(about, tensors) == checksum
        _fill(model, tensors)
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            raise ValueError("its parameters are of several dtypes, with which it would not run")
        if not intact:
            raise ValueError("its content does not have the SHA-256 that it was saved with: it was changed or damaged")
    except MemoryError:
        raise
    except Exception as error:  # the file system, safetensors, json, torch: the reader needs one line and a remedy
        raise ValueError(
            f"load_quantized cannot load path={str(path)!r}: {_reason(error)}.\n"
            "Give a file that save_quantized wrote; if it was copied or downloaded, fetch it again."
        ) from None
    return model.to(device or default_device())


def _open(path):
    """A safetensors file to read from; with a clear error where that is not one that we may read."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")  # a folder, or a pipe, which would let us wait for ever
    open(path, "rb").close()  # safetensors says of any file that it cannot open that there is none
    return safetensors.safe_open(path, framework="pt")


def _read(path, name: str) -> Tensor:
    """One tensor of a file, in memory of its own; the file stays mapped no longer, or its pages would count as well."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


# ---------------------------------------------------------------------------------------------------------------------
# Real speed
# ---------------------------------------------------------------------------------------------------------------------


def matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """`x @ weight.T`, [rows, in] -> [rows, out], by the fastest way that this device has for so many rows.

    With one row, the time goes into reading the weight, so it must be read as it is stored. Many rows share one
    reading; then arithmetic decides, and it pays to widen the weight first. The operations of PyTorch that begin with
    an underscore are private: each is used only where it exists and was seen to give the right result.
    """
    rows, inputs = x.shape
    x = x.contiguous()
    if x.requires_grad:
        return x @ weight.dequantize(x.dtype).T
    if weight.block and (rows <= 256 or torch.compiler.is_compiling()):
        codes = weight.codes.view(-1, inputs // 2)
        product = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), codes, weight.group_size, weight.scale)
        return product[:, : weight.shape[0]].to(x.dtype)
    few = rows <= 4
    whole_words = inputs % 8 == 0 and (weight.group_size or 8) % 8 == 0  # which the CUDA kernel reads
    if x.device.type == "cuda" and few and whole_words and triton is not None:
        return _cuda_matmul(x, weight)
    if torch.compiler.is_compiling():  # the compiler makes one kernel of it, which reads the codes once
        return _multiply_and_sum(x, weight) if few else x @ weight.dequantize(x.dtype).T
    if x.device.type != "cpu":
        return x @ weight.dequantize(x.dtype).T
    if weight.bits == 8 and x.dtype == torch.float32 and rows > 4 and _int_mm_is_exact():
        return _two_limbs(x, weight)
    suits = inputs % 32 == 0 and weight.codes.data_ptr() % 64 == 0  # anything else can crash the next operation
    if weight.bits == 8 and rows <= 8 and suits and hasattr(torch, "_weight_int8pack_mm"):
        product = torch._weight_int8pack_mm(x.bfloat16(), weight.codes, _ones(weight.shape[0]))
        return (product * weight.scale).to(x.dtype)
    dtype = torch.bfloat16 if weight.bits == 4 and rows > 4 and _cpu_has_bf16() else x.dtype
    if dtype == torch.float32 and not weight.block:
        return _by_public_operations(x, weight)
    y = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    for start in range(0, weight.shape[0], 256):  # block by block, so that what was widened stays in the cache
        y[:, start : start + 256] = x.to(dtype) @ weight.dequantize(dtype, start, start + 256).T
    return y


def _by_public_operations(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The product on a CPU that has none of the private operations: codes are widened in blocks that stay in the cache.

    A block has as many parts as there are threads, so that each thread multiplies what it widened itself: where two
    cores share no cache, handing it over takes longer than the product. With 4 bits, every pass over a block counts. So
    a low code stays where its shift left it, 16 times too large, and x makes up for it; and the 8 that packing added to
    each code is taken away from the product, where there are fewer numbers.
    """
    (rows, inputs), outputs, parts = x.shape, weight.shape[0], torch.get_num_threads()
    each = max(1, 2**19 // inputs)  # the same for all weights, or the parts would change hands between them
    y, scale = torch.empty(rows, outputs), weight.scale.float()
    wide, products = torch.empty(parts, each, inputs), torch.empty(parts * each, rows)
    if weight.bits == 4:
        words = torch.empty(parts, each, inputs // 2, dtype=torch.int16)
        sums = x.unflatten(1, (-1, weight.group_size)).sum(-1)
        x = x.clone()
        x[:, ::2] /= 16
    start = 0
    while start < outputs:
        parts = parts if parts <= outputs - start else 1  # the last few outputs
        count = min(each, (outputs - start) // parts)
        here, sizes = slice(start, start + parts * count), (parts, count)
        codes, block = weight.codes[here].unflatten(0, sizes), wide[:parts, :count]
        if weight.bits == 8:
            block.copy_(codes)
        else:  # 0x00hl becomes 0x0hl0: two bytes, the low one first
            block.copy_(words[:parts, :count].copy_(codes).mul_(16).view(torch.uint8))
            block.unflatten(2, (-1, weight.group_size)).mul_(scale[here].unflatten(0, sizes)[..., None])
        product = products[: parts * count]
        torch.bmm(block, x.T.expand(parts, -1, -1), out=product.unflatten(0, sizes))
        y[:, here] = product.T
        start = here.stop
    return y.mul_(scale) if weight.bits == 8 else y.addmm_(sums, scale.T, alpha=-8)


def _multiply_and_sum(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The product written so that `torch.compile` fuses it: widening, multiplying and summing in one pass."""
    dtype, x = x.dtype, x[:, None].float()
    if weight.bits == 8:
        return ((x * weight.codes).sum(-1) * weight.scale).to(dtype)
    low, high = (weight.codes & 15).float() - 8, (weight.codes >> 4).float() - 8
    scale = weight.scale.float().repeat_interleave(weight.group_size // 2, dim=1)
    return ((low * x[..., 0::2] + high * x[..., 1::2]) * scale).sum(-1).to(dtype)


def _limbs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in two int8 parts, `x ≈ (high + low / 254) * step`, with a float32 step for each row.

    Both parts are in -127…127, which keeps about 15 bits of x, relative to the largest value of its row: more than
    bfloat16 does, and products with int8 codes can be summed exactly in int32.
    """
    x = x.float()
    step = x.abs().amax(-1, keepdim=True) / 127
    step = torch.where(step <= 1e-30, 1, step)  # NaN stays NaN
    x = x * (1 / step)
    high = x.round()
    low = x.sub_(high).mul_(254).round_()  # in place: x is ours by now, and fresh memory takes time
    return high.to(torch.int8), low.to(torch.int8), step


def _two_limbs(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The product on a CPU with exact int8 matrix multiplication, for 8 bits and many rows."""
    rows = len(x)
    high, low, step = _limbs(x)
    limbs = torch.cat([high, low])
    y = torch.empty(rows, weight.shape[0])
    for start in range(0, weight.shape[0], 512):  # block by block, so that the sums stay in the cache
        sums = torch._int_mm(limbs, weight.codes[start : start + 512].T)
        product = torch.add(sums[:rows].float(), sums[rows:], alpha=1 / 254).mul_(step)
        y[:, start : start + 512] = product.mul_(weight.scale[start : start + 512])
    return y


@cache
def _ones(length: int) -> Tensor:
    """Scales for an operation that would round them to bfloat16: we multiply by the real ones afterwards."""
    return torch.ones(length, dtype=torch.bfloat16)


@cache
def _int_mm_is_exact() -> bool:
    """Whether this CPU multiplies int8 matrices exactly: without VNNI, sums of large products saturate."""
    try:
        a, b = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), -127, dtype=torch.int8)
        return torch.cpu._is_vnni_supported() and bool((torch._int_mm(a, b) == -127 * 127 * 64).all())
    except (AttributeError, RuntimeError):
        return False


@cache
def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; emulated, they are slower than float32."""
    supported = (getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile"))
    return any(is_supported() for is_supported in supported)


@cache
def _int4_block() -> int:
    """How the CPU's 4-bit product wants its codes: rows in a block; 0 if there is no such product, or another order.

    In a block of 64 rows (AVX-512) or 32 (AVX2), a byte holds for one input the code of row r in its low half and
    that of row r + block / 2 in its high half; inputs follow each other.
    """
    codes = torch.randint(16, (64, 32), generator=torch.Generator().manual_seed(0))
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1).flatten()
        scale = torch.stack([torch.ones(1, 64), torch.zeros(1, 64)], dim=-1).bfloat16()
        product = torch._weight_int4pack_mm_for_cpu(torch.eye(32).bfloat16(), packed.view(64, 16), 32, scale)
    except (AttributeError, RuntimeError):
        return 0
    for block in (64, 32):
        low, high = codes.unflatten(0, (-1, block)).chunk(2, dim=1)
        ours = (low | high << 4).transpose(1, 2).flatten()
        if torch.equal(packed, ours.to(torch.uint8)) and torch.equal(product.T.float(), codes - 8.0):
            return block
    return 0


if triton is not None:

    @triton.jit
    def _limbs_kernel(x_ptr, limbs_ptr, step_ptr, inputs, BITS: tl.constexpr, SIZE: tl.constexpr):
        """`_limbs` for one row of x; for 4 bits the even values of each limb come first, then the odd ones."""
        row, i = tl.program_id(0), tl.arange(0, SIZE)
        there = i < inputs
        x = tl.load(x_ptr + row * inputs + i, mask=there, other=0.0).to(tl.float32)
        step = tl.max(tl.abs(x)) / 127
        step = tl.where(step <= 1e-30, 1.0, step)
        tl.store(step_ptr + row, step)
        x = x * (1 / step)
        high = tl.floor(x + 0.5)
        low = tl.floor((x - high) * 254 + 0.5)
        if BITS == 4:
            i = i % 2 * (inputs // 2) + i // 2
        tl.store(limbs_ptr + row * 2 * inputs + i, high.to(tl.int8), mask=there)
        tl.store(limbs_ptr + (row * 2 + 1) * inputs + i, low.to(tl.int8), mask=there)

    @triton.jit
    def _dot(codes, x, total):
        """total + the sum of four int8 products: `dp4a` does it in one instruction, on 4 codes in an int32."""
        x = tl.broadcast_to(x[None, :], total.shape)
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def _signed(nibbles):
        """Four codes 0…15 in the bytes of an int32, each minus 8; the high bits stop a byte borrowing from the next."""
        return (((nibbles & 0x0F0F0F0F) | -0x7F7F7F80) - 0x08080808) ^ -0x7F7F7F80

    @triton.jit
    def _product_kernel(
        limbs_ptr, step_ptr, codes_ptr, scale_ptr, y_ptr, outputs, words,
        GROUP: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """One row of x times OUT rows of the weight; reads SIZE int32 words of codes at once. GROUP=0: 8 bits."""
        row = tl.program_id(0)
        out = tl.program_id(1) * OUT + tl.arange(0, OUT)
        limbs_ptr += row * 2 * words * (2 if GROUP else 1)  # a word holds 4 or 8 codes, and 4 of a limb's values
        high = tl.zeros((OUT, SIZE), dtype=tl.int32)
        low = tl.zeros((OUT, SIZE), dtype=tl.int32)
        total = tl.zeros((OUT, SIZE), dtype=tl.float32)
        for start in range(0, words, SIZE):
            word = start + tl.arange(0, SIZE)
            inside = word < words
            there = (out < outputs)[:, None] & inside[None, :]
            codes = tl.load(codes_ptr + out[:, None].to(tl.int64) * words + word[None, :], mask=there, other=0)
            if GROUP == 0:
                high = _dot(codes, tl.load(limbs_ptr + word, mask=inside, other=0), high)
                low = _dot(codes, tl.load(limbs_ptr + words + word, mask=inside, other=0), low)
            else:
                even, odd, none = _signed(codes), _signed(codes >> 4), tl.zeros((OUT, SIZE), dtype=tl.int32)
                high = _dot(even, tl.load(limbs_ptr + word, mask=inside, other=0), none)
                high = _dot(odd, tl.load(limbs_ptr + words + word, mask=inside, other=0), high)
                low = _dot(even, tl.load(limbs_ptr + 2 * words + word, mask=inside, other=0), none)
                low = _dot(odd, tl.load(limbs_ptr + 3 * words + word, mask=inside, other=0), low)
                group = out[:, None] * (words * 8 // GROUP) + (word * 8 // GROUP)[None, :]
                scale = tl.load(scale_ptr + group, mask=there, other=0).to(tl.int32) << 16  # bfloat16 -> float32
                total += (high.to(tl.float32) + low.to(tl.float32) / 254) * scale.to(tl.float32, bitcast=True)
        if GROUP == 0:
            y = tl.sum(high, axis=1).to(tl.float32) + tl.sum(low, axis=1).to(tl.float32) / 254
            y *= tl.load(scale_ptr + out, mask=out < outputs, other=0.0)
        else:
            y = tl.sum(total, axis=1)
        y *= tl.load(step_ptr + row)
        tl.store(y_ptr + row * outputs + out, y.to(y_ptr.dtype.element_ty), mask=out < outputs)


def _cuda_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The product on a GPU, for a few rows: codes are read once, as they are stored, and multiplied as integers."""
    rows, (outputs, inputs) = len(x), weight.shape
    with torch.cuda.device(x.device):
        if torch.compiler.is_compiling() and weight.bits == 8 and inputs <= 2048:  # fused with what made x
            high, low, step = _limbs(x)
            limbs = torch.stack([high, low], dim=1).view(rows, 2 * inputs)
        else:
            limbs = torch.empty(rows, 2 * inputs, dtype=torch.int8, device=x.device)
            step = torch.empty(rows, device=x.device)
            size = triton.next_power_of_2(inputs)
            _limbs_kernel[(rows,)](x.contiguous(), limbs, step, inputs, BITS=weight.bits, SIZE=size, num_warps=16)
        y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        scale = weight.scale if weight.bits == 8 else weight.scale.view(torch.int16)
        words = inputs * weight.bits // 32
        # the fastest of some shapes on an H200: many rows, long rows, others
        many, long = outputs > 8192, inputs > 2 * outputs
        out, size, warps = (4, 128, 1) if many else (2, 128 * weight.bits, 4) if long else (2, 32 * weight.bits, 1)
        _product_kernel[rows, triton.cdiv(outputs, out)](
            limbs.view(torch.int32), step, weight.codes.view(torch.int32), scale, y, outputs, words,
            GROUP=weight.group_size or 0, OUT=out, SIZE=size, num_warps=warps,
        )  # fmt: skip
    return y


class Decoder:
    """Greedy decoding, one token after the other: `start` reads a prompt, `steps` goes on from it.

    length: tokens of prompt and continuation together, at most.
    captured: record one step as a CUDA graph and replay it, one launch in place of hundreds; by default on a GPU.
    compiled: let `torch.compile` fuse the step, before it is captured if it is.

    Captured and compiled steps need tensors that stay where they are, hence a `StaticCache`; else the cache is the one
    of `generate`. The tokens are those of `model.generate(ids, do_sample=False)`. Source: "CUDA Graphs", the
    documentation of PyTorch.
    """

    def __init__(self, model, length: int, captured: bool | None = None, compiled: bool = False):
        self.captured = model.device.type == "cuda" if captured is None else captured
        if not isinstance(length, int) or not 2 <= length <= model.config.n_positions:
            raise ValueError(f"length={length!r}: give 2 to {model.config.n_positions} tokens, the model's context")
        if self.captured and model.device.type != "cuda":
            raise ValueError("captured=True: a CUDA graph needs a model on a GPU")
        self.model, self.length, self.graph = model, length, None
        self.cache = StaticCache(config=model.config, max_cache_len=length) if self.captured or compiled else None
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        self.token, self.position = torch.zeros(2, 1, 1, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def start(self, ids: Tensor) -> None:
        """Read the prompt, [1, tokens]; `self.token` is what follows it."""
        if self.captured and self.graph is None:
            self._capture(ids)
        if isinstance(self.cache, StaticCache):
            self.cache.reset()
        else:
            self.cache = DynamicCache(config=self.model.config)
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits.argmax(-1))
        self.position.fill_(ids.shape[1])
        self.room = self.length - ids.shape[1]

    def _capture(self, ids) -> None:
        self.captured = False  # first an ordinary start, which makes the cache
        self.start(ids)
        self.captured = True
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # nothing may be compiled or allocated for the first time in a recording
            for _ in range(3):
                self.cache.reset()
                self.position.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        out = self.forward(self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True)
        self.token.copy_(out.logits.argmax(-1))
        self.position.add_(1)

    @torch.no_grad()
    def steps(self, count: int) -> Tensor:
        """Decode `count` tokens, [count]: the one after the prompt, or after the last step, and those that follow."""
        if count > self.room:
            raise ValueError(f"count={count}: there is room for {self.room} more, make the Decoder's length larger")
        self.room -= count
        tokens = torch.empty(count, dtype=torch.long, device=self.token.device)
        for i in range(count):
            tokens[i] = self.token[0, 0]
            self.graph.replay() if self.graph else self._step()
        return tokens


def time_interleaved(functions: dict, rounds: int = 5, before: dict | None = None) -> dict[str, np.ndarray]:
    """Milliseconds that each function takes, label -> [rounds]; after an unmeasured round, all of them take turns.

    A machine is not equally fast for long. Taking turns lets all candidates meet the same disturbances: the ratio of
    two medians is worth more than either time. before: label -> function that runs first, unmeasured.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {label: [] for label in functions}
    for turn in range(rounds + 1):
        for label, function in functions.items():
            if before:
                before[label]()
            wait()
            begin = time.perf_counter()
            function()
            wait()
            if turn:
                times[label].append(1e3 * (time.perf_counter() - begin))
    return {label: np.array(ms) for label, ms in times.items()}


def benchmark_decode(model, tokens: int = 16, prompt: int = 16, rounds: int = 5, **how):
    """Milliseconds per token of greedy decoding, [rounds]: take the median.

    model: a model or a `Decoder`, or a dict label -> one of these; they take turns, and the result is a dict too.
    prompt: random tokens that are read before the clock starts. how: as in `Decoder`, for all that are models.

    Raises `ValueError` where prompt and tokens together exceed the context of a model.
    """
    models = model if isinstance(model, dict) else {"model": model}
    decoders = {k: m if isinstance(m, Decoder) else Decoder(m, prompt + tokens, **how) for k, m in models.items()}
    vocabulary = min(decoder.model.config.vocab_size for decoder in decoders.values())
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    before = {label: partial(d.start, ids.to(d.model.device)) for label, d in decoders.items()}
    times = time_interleaved({label: partial(d.steps, tokens) for label, d in decoders.items()}, rounds, before)
    times = {label: ms / tokens for label, ms in times.items()}
    return times if isinstance(model, dict) else times["model"]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_text(model, tokenizer, prompt: str, max_new_tokens=50, do_sample=True, top_k=30, seed=0) -> str:
    """Continue the prompt; returns prompt and continuation.

    do_sample=True draws every token from the `top_k` likeliest ones, from a seed, so the same call gives the same text;
    False takes the likeliest token each time (greedy). The global random state is left as it was. Raises `ValueError`
    for an empty prompt and for more tokens than the model's context holds.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length, context = inputs["input_ids"].shape[1], model.config.n_positions
    if length == 0:
        raise ValueError("prompt is empty: give the model at least one token to go on from")
    if length + max_new_tokens > context:
        raise ValueError(
            f"prompt ({length} tokens) and max_new_tokens={max_new_tokens} exceed the context of {context} tokens"
        )
    sampling = {"do_sample": True, "top_k": top_k} if do_sample else {"do_sample": False}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed reaches all of them
        torch.manual_seed(seed)
        tokens = model.generate(
            **inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def load_text(name: str = "evaluation") -> str:
    """A text to measure on.

    "evaluation": the prose that comes with the series. "wikitext-2": the raw test split of WikiText-2, through the
    `datasets` package and the network. Else the path of a text file. Raises `ValueError` if there is no such text.
    """
    if name == "evaluation":
        return (BUNDLED_FOLDER / "evaluation.txt").read_text(encoding="utf-8")
    if name == "wikitext-2":
        try:
            from datasets import load_dataset

            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f'load_text cannot fetch "wikitext-2": {reason}\nIt needs the network and `pip install datasets`; '
                'load_text("evaluation") needs neither.'
            ) from None
        return "\n\n".join(rows["text"])
    if Path(name).expanduser().is_file():
        return Path(name).expanduser().read_text(encoding="utf-8")
    raise ValueError(f'name={name!r}: give "evaluation", "wikitext-2" or the path of a text file')


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """nll: mean loss in nats per token. token_nll: the loss of each token, float32 on the CPU, in reading order."""

    nll: float
    token_nll: Tensor = field(repr=False)

    @property
    def ppl(self) -> float:
        """Perplexity, `exp(nll)`: how many equally likely tokens would leave the model as unsure as it was."""
        return math.exp(self.nll)


@dataclass(frozen=True, eq=False)
class Comparison:
    """How a candidate differs from a reference, token by token on the same text.

    delta_nll: mean loss difference, candidate minus reference, in nats per token; above 0 the candidate is worse.
    ci: its 95 % interval from a block bootstrap, `(low, high)`.
    kl: mean KL(reference ‖ candidate) in nats per token; 0 only if all predicted distributions are the same.
    top1_agreement: the share of tokens for which both find the same token likeliest.
    """

    delta_nll: float
    ci: tuple[float, float]
    kl: float
    top1_agreement: float
    reference: PerplexityResult = field(repr=False)
    candidate: PerplexityResult = field(repr=False)

    @property
    def verdict(self) -> str:
        """ "worse" or "better" if the interval leaves out 0, else "indistinguishable"."""
        return "worse" if self.ci[0] > 0 else "better" if self.ci[1] < 0 else "indistinguishable"


def perplexity(model, tokenizer, text: str, window=None, stride=None, batch_size=None) -> PerplexityResult:
    """Perplexity of the model on a text, through a window that slides over it.

    A window holds `window` tokens (default: the model's context) and moves by `stride` (default: half a window). Every
    token but the first is scored exactly once: in the first window all of them, later only the `stride` new ones, which
    therefore see at least `window - stride` tokens before them. `batch_size` windows go through the model together
    (default: 8 on a GPU, 1 on a CPU, which batching makes no faster).

    Raises `ValueError` for a text of fewer than two tokens, a window or stride that does not fit, and for a model in
    training mode. Source: "Perplexity of fixed-length models", the documentation of transformers.
    """
    losses = [nll for ((_, nll),) in _score([model], tokenizer, text, window, stride, batch_size)]
    return _result(losses)


def compare(reference, candidate, tokenizer, text: str, window=None, stride=None, batch_size=None):
    """Run models over the same windows of a text and compare them token by token; see `Comparison`.

    candidate: a model, or a dict label -> model; the result is then a dict label -> Comparison, and the reference runs
        only once for all of them.

    Windows, arguments and errors as in `perplexity`; also raises `ValueError` if the vocabularies differ.
    """
    candidates = candidate if isinstance(candidate, dict) else {"candidate": candidate}
    losses = [[] for _ in range(1 + len(candidates))]
    kl, agree = ([[] for _ in candidates] for _ in range(2))
    for (p, p_nll), *others in _score([reference, *candidates.values()], tokenizer, text, window, stride, batch_size):
        losses[0].append(p_nll)
        probability, favourite = p.exp(), p.argmax(-1)
        for i, (q, q_nll) in enumerate(others):
            losses[1 + i].append(q_nll)
            kl[i].append((probability * (p - q)).sum(-1).flatten().cpu())
            agree[i].append((favourite == q.argmax(-1)).flatten().cpu())
    results = {}
    before = _result(losses[0])
    for i, label in enumerate(candidates):
        after = _result(losses[1 + i])
        difference = (after.token_nll - before.token_nll).double().numpy()
        results[label] = Comparison(
            delta_nll=difference.mean().item(),
            ci=bootstrap_interval(difference),
            kl=torch.cat(kl[i]).double().mean().item(),
            top1_agreement=torch.cat(agree[i]).double().mean().item(),
            reference=before,
            candidate=after,
        )
    return results if isinstance(candidate, dict) else results["candidate"]


def bootstrap_interval(values, block=64, resamples=2000, level=0.95, seed=0) -> tuple[float, float]:
    """Interval for the mean of a sequence of dependent numbers, `(low, high)`.

    Losses of neighbouring tokens depend on each other, so whole blocks of `block` neighbours are drawn with
    replacement, round the end to the beginning, and the middle `level` of the resampled means is the interval. A short
    sequence is cut into shorter blocks, at least 16 of them; below some hundred values the interval is too narrow.
    Source: Politis and Romano, "A circular block-resampling procedure for stationary data", 1992.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0 or block < 1:
        raise ValueError(f"values has {len(values)} entries and block={block}: give at least one of each")
    block = max(1, min(block, len(values) // 16))
    total = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    block_means = (total[block:] - total[:-block]) / block
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, math.ceil(len(values) / block)))
    tail = (1 - level) / 2
    low, high = np.quantile(block_means[drawn].mean(axis=1), [tail, 1 - tail])
    return low.item(), high.item()


def sliding_windows(predictions: int, window: int, stride: int):
    """Yield `(begin, end, scored)`: inputs begin…end-1 go in, and what follows the last `scored` of them is scored."""
    done = 0
    for begin in range(0, predictions, stride):
        end = min(begin + window, predictions)
        yield begin, end, end - done
        done = end
        if end == predictions:
            return


@torch.no_grad()
def _score(models, tokenizer, text, window, stride, batch_size):
    """Slide over the text; yield for each batch of windows and each model `(log_probs, nll)` of the scored tokens.

    log_probs: [batch, scored, vocabulary] on the model's device; nll: [batch * scored] on the CPU.
    """
    context = min(model.config.n_positions for model in models)
    window = context if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    batch_size = (8 if models[0].device.type == "cuda" else 1) if batch_size is None else batch_size
    limits = {"window": (window, context), "stride": (stride, window), "batch_size": (batch_size, 1024)}
    for name, (value, most) in limits.items():
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name}={value!r}: give a whole number from 1 to {most}")
    if len({model.config.vocab_size for model in models}) > 1:
        raise ValueError("the models have vocabularies of different sizes: their tokens cannot be compared")
    for model in models:
        if model.training:
            raise ValueError("the model is in training mode, where dropout makes it random: call model.eval() first")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < 2:
        raise ValueError(f"text has {len(ids)} tokens: nothing to predict, give at least 2")
    spans = list(sliding_windows(len(ids) - 1, window, stride))
    quiet = len(spans) < 10 or "TQDM_DISABLE" in os.environ  # tqdm's notebook bar does not heed the variable
    with tqdm(total=len(spans), desc="windows", leave=False, disable=quiet) as bar:
        for (_, scored), alike in groupby(spans, key=lambda span: (span[1] - span[0], span[2])):
            alike = list(alike)
            for i in range(0, len(alike), batch_size):
                batch = alike[i : i + batch_size]
                inputs = torch.stack([ids[begin:end] for begin, end, _ in batch])
                targets = torch.stack([ids[end - scored + 1 : end + 1] for _, end, _ in batch])
                yield [_log_probs(model, inputs, targets) for model in models]
                bar.update(len(batch))


def _log_probs(model, inputs, targets):
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    logits = model(inputs, use_cache=False, logits_to_keep=targets.shape[1]).logits  # the head only where we score
    log_probs = log_softmax(logits.float(), dim=-1)
    return log_probs, -log_probs.gather(-1, targets[..., None]).flatten().cpu()


def _result(losses) -> PerplexityResult:
    token_nll = torch.cat(losses)
    return PerplexityResult(token_nll.double().mean().item(), token_nll)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def calibration_tokens(model, sequences: int = 16, length: int | None = None, seed: int = 0) -> Tensor:
    """Text that the model samples from itself, [sequences, length], to calibrate on: no evaluation text is touched.

    length: by default 512, or the context if that is shorter. Every sequence begins with the end-of-text token. The
    global random state is left as it was. Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", 2023.
    """
    length = min(512, model.config.n_positions) if length is None else length
    if not 2 <= length <= model.config.n_positions:
        raise ValueError(f"length={length}: give 2 to {model.config.n_positions} tokens, the model's context")
    begin = torch.full((sequences, 1), model.config.eos_token_id, device=model.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return model.generate(
            begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, min_new_tokens=length - 1,
            max_new_tokens=length - 1, pad_token_id=model.config.eos_token_id,
        )  # fmt: skip


def block_layers(model) -> dict[str, nn.Module]:
    """Name -> `Conv1D` or `nn.Linear`, for all of them inside the transformer blocks."""
    kinds = (Conv1D, nn.Linear)
    return {name: module for name, module in model.named_modules() if ".h." in f".{name}" and isinstance(module, kinds)}


@torch.no_grad()
def watch_inputs(model, ids: Tensor, watch, batch_size: int = 4) -> None:
    """Run the model over ids, [sequences, length], and call `watch(name, x)` with what enters each layer of the blocks.

    x: [tokens, in], of one batch; `watch` sees every layer once for each batch.
    """

    def hook(name):
        return lambda module, arguments: watch(name, arguments[0].detach().flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in block_layers(model).items()]
    try:
        for batch in ids.split(batch_size):
            model(batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in hooks:
            handle.remove()


def input_moments(model, ids: Tensor) -> dict[str, Tensor]:
    """Second moments of what enters each layer: name -> mean of `x xᵀ` over all tokens, [in, in], float32.

    It is all that calibration needs to know of the data. If rounding changes a weight by `d`, the layer's output
    changes by `tr(d H dᵀ)`: squared, summed over outputs, averaged over tokens.
    """
    moments, count = {}, ids.numel()

    def watch(name, x):
        x = x.float()
        moments[name] = moments.get(name, 0) + x.T @ x / count

    watch_inputs(model, ids, watch)
    return moments


@torch.no_grad()
def plant_outliers(model, channels: int = 4, factor: float = 30.0, seed: int = 0) -> nn.Module:
    """A copy that computes the same function with outliers in it, as trained models of some billion parameters have.

    In every block, some channels of both layer norms and of the values are scaled up by `factor`, and the weights that
    read them down: an equivalent transformation, that of SmoothQuant (Xiao et al., 2022) turned round.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
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
    """Mean squared change of a layer's output, summed over outputs: `tr(d H dᵀ)`; d is [out, in], H is [in, in]."""
    return ((difference @ moment) * difference).sum().item()


@torch.no_grad()
def gptq_quantize(weight: Tensor, moment: Tensor, bits=4, group_size=64, scale_dtype=None, clip=True, damp=0.01):
    """Round a weight column by column, and let the columns still in float make up for each error.

    weight: [out, in]. moment: H, [in, in], from `input_moments`. group_size: None is one scale for each row.
    clip: search each scale as `clip_quantize` does, the error of a column weighed by how large its input is.
    damp: share of the mean diagonal of H that is added to it, so that it can be inverted.
    Symmetric; a group gets its scale when its turn comes, and the columns keep their order.

    Returns a `QuantizedTensor`; errors as in `absmax_quantize`, and `ValueError` where H does not fit the weight.
    Source: Frantar et al., "GPTQ", 2022, algorithm 1.
    """
    _check_moment(weight, moment, group_size)
    outputs, inputs = weight.shape
    qmin, qmax = code_range(bits)
    size = group_size or inputs
    # Columns whose errors are passed on to the rest all at once; a group begins where a block does.
    block = size if size <= 256 else math.gcd(size, 128) if group_size else 128
    w, codes = weight.float().clone(), torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    h = moment.double() + damp * moment.diagonal().double().mean() * torch.eye(inputs, device=moment.device)
    # Row i of this factor, divided by its diagonal, says how much each later column must move for an error in column i.
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    scales = []
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty(outputs, stop - start, device=w.device)
        for i in range(start, stop):
            if i % size == 0:
                columns, importance = w[:, i : i + size], moment.diagonal()[i : i + size]
                if clip:
                    group = clip_quantize(columns, bits, 0, None, scale_dtype, importance)
                else:
                    group = absmax_quantize(columns, bits, 0, None, scale_dtype)
                scales.append(group.scale)
                scale = group.scale.float()[:, 0]
            code = (w[:, i] * (1 / scale)).round().clamp(qmin, qmax)
            codes[:, i] = code.to(torch.int8)
            errors[:, i - start] = (w[:, i] - code * scale) / u[i, i]
            w[:, i + 1 : stop] -= errors[:, i - start, None] * u[i, i + 1 : stop]
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return QuantizedTensor(codes, torch.cat(scales, dim=1), 0, bits, weight.shape, 0, group_size)


@torch.no_grad()
def awq_quantize(weight: Tensor, moment: Tensor, bits=4, group_size=64, scale_dtype=None, clip=True, steps=20):
    """Scale up the input channels that carry large activations before rounding, and down again after it.

    weight, moment, group_size, scale_dtype, clip: as in `gptq_quantize`. The factors are `a ** ratio`, a being the root
    mean square of each channel; the ratio is the one of 0, 1/steps, …, 1 with the least error of the layer's output.

    Returns a `QuantizedTensor` with `factors`, which are stored like the scales. A deployed model can divide them out
    of what makes the input (a layer norm, the values) instead, and then they cost nothing. Errors as in
    `gptq_quantize`. Source: Lin et al., "AWQ", 2023, section 3.2.
    """
    _check_moment(weight, moment, group_size)
    activation = moment.diagonal().clamp(min=0).sqrt()
    activation = activation.clamp(min=1e-4 * activation.max().clamp(min=1e-10))
    best = None
    for step in range(steps + 1):
        factors = activation ** (step / steps)
        factors = (factors / (factors.max() * factors.min()).sqrt()).to(scale_dtype or weight.dtype)
        quantized = replace(
            absmax_quantize(weight.float() * factors.float(), bits, 0, group_size, scale_dtype), factors=factors
        )
        error = output_error(quantized.dequantize() - weight, moment)
        if best is None or error < best[0]:
            best = error, quantized
    _, quantized = best
    if not clip:
        return quantized
    factors = quantized.factors.float()
    importance = moment.diagonal() / factors**2
    clipped = clip_quantize(weight.float() * factors, bits, 0, group_size, scale_dtype, importance)
    return replace(clipped, factors=quantized.factors)


def _check_moment(weight: Tensor, moment: Tensor, group_size) -> None:
    _prepare(weight, 0, group_size)
    if weight.ndim != 2 or moment.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"moment has shape {tuple(moment.shape)}: a weight {tuple(weight.shape)} needs [in, in]")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

# (line style, colour) of the first, second, … curve
STYLES = [
    ("-", "#1b1b1b"), ("--", "#d55e00"), ("-.", "#0072b2"), (":", "#009e73"),
    ((0, (5, 1, 1, 1, 1, 1)), "#cc79a7"), ((0, (1, 3)), "#7f4f24"),
]  # fmt: skip


def set_theme() -> None:
    """One look for all pictures: a white ground, also in a dark notebook, and the colours of `STYLES`.

    The colours are safe for the colour-blind (Okabe and Ito, 2008); line styles make a picture readable in grey.
    """
    sns.set_theme(context="notebook", style="whitegrid", palette=[colour for _, colour in STYLES])
    plt.rcParams.update({
        "figure.figsize": (8, 4), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "figure.facecolor": "white", "savefig.facecolor": "white",
        "axes.titlesize": 12, "axes.titlelocation": "left", "patch.linewidth": 0, "patch.force_edgecolor": False,
    })  # fmt: skip


def show(alt: str) -> None:
    """Show the current figure and close it. alt: what it shows, in a sentence or two, for readers who cannot see it."""
    from IPython.display import display  # only notebooks draw

    figure = plt.gcf()
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def slider(draw, **ranges) -> None:
    """Call `draw` again whenever the reader moves a slider; ranges as in `ipywidgets.interact`: `bits=(2, 8)`.

    draw: a function that ends with `show`. Where ipywidgets is not installed, nothing happens, so a static picture of
    the same should follow.
    """
    try:
        import ipywidgets
    except ImportError:
        return
    from IPython.display import display
    from IPython.utils.capture import capture_output

    # Not `interact`, which draws into an Output widget: then `jupyter execute` may wait for ever (nbclient, issue 312).
    arguments, picture = inspect.signature(draw).parameters, ipywidgets.HTML()
    make = ipywidgets.interactive.widget_from_abbrev
    sliders = {name: make(limits, arguments[name].default) for name, limits in ranges.items()}

    def redraw(moved=None):
        try:
            with capture_output() as captured:
                draw(**{name: one.value for name, one in sliders.items()})
        except Exception as error:
            if moved is None:
                raise
            picture.value = f"<pre>{html.escape(repr(error))}</pre>"  # nobody would see it otherwise
            return
        png, alt = captured.outputs[-1].data["image/png"], captured.outputs[-1].metadata["image/png"]["alt"]
        picture.value = f'<img src="data:image/png;base64,{png}" alt="{html.escape(alt)}">'

    for name, one in sliders.items():
        one.description = name
        one.observe(redraw, "value")
    display(ipywidgets.VBox([*sliders.values(), picture]))
    redraw()


def plot_histograms(tensors: dict[str, Tensor], bins=200, log=True, limits=None, title=None, xlabel="weight", ax=None):
    """Overlay the histograms of some tensors, as outlines over common bins; returns the axes.

    tensors: label -> tensor of any shape. log: a logarithmic count axis, on which the tails can be seen.
    limits: `(low, high)` of the value axis; by default the range of all tensors together.
    """
    ax = ax or plt.subplots()[1]
    if limits is None:
        limits = min(t.min().item() for t in tensors.values()), max(t.max().item() for t in tensors.values())
    low, high = limits
    if low == high:  # a constant: give its bin some width
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    for (label, tensor), (line, colour) in zip(tensors.items(), STYLES * len(tensors), strict=False):
        counts = torch.histc(tensor.detach().float(), bins=bins, min=low, max=high).cpu().numpy()
        ax.stairs(counts, edges, label=label, linestyle=line, color=colour, linewidth=1.4)
    if log:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel="count per bin")
    if title:
        ax.set_title(title)
    ax.legend()
    return ax
