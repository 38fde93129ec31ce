"""The same on a GPT-2 of full size: the table that notebooks show beside what they measure on pocket-gpt2.

    python tests/large.py MODEL > tests/results/gpt2_124m.csv     # MODEL: "gpt2", or a folder

It takes some minutes on a GPU, and about an hour on two cores. The stored table comes from a model that this project
trained, since no released checkpoint could be had: GPT-2's architecture and tokenizer, 12 blocks of width 768, the
corpus and the script of pocket-gpt2. With `tokenizer.json` of GPT-2 in FOLDER, it is made by

    python notebooks/pocket-gpt2/train.py CORPUS --out FOLDER --width 768 --layers 12 --batch 64 --lr 1e-3 --epochs 5

Columns: chapter, candidate, bits of a quantized weight, measure, value, and the ends of its interval.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import quantlib as ql  # noqa: E402


def to_100(x):
    """The recipe of notebook 2 that stops at code 100."""
    scale = x.abs().max() / 100
    return (x / scale).round() * scale


def to_200(x):
    """The recipe of notebook 3 that uses 200 of 255 steps."""
    scale = (x.max() - x.min()) / 200
    zero_point = (-100 - x.min() / scale).round()
    return ((x / scale + zero_point).round() - zero_point) * scale


int4, groups = partial(ql.absmax_quantize, bits=4), {"group_size": 64, "scale_dtype": torch.float16}
WHOLE = {"absmax": ql.absmax_quantize, "zero-point": ql.zeropoint_quantize}
WHOLE |= {"absmax to 100": to_100, "zero-point to 200": to_200}
BLOCKS = {
    10: {
        "8 bits, per tensor": ql.absmax_quantize,
        "8 bits, per output channel": partial(ql.absmax_quantize, axis=0, scale_dtype=torch.float16),
        "8 bits, groups of 64": partial(ql.absmax_quantize, **groups),
        "4 bits, per tensor": int4,
        "4 bits, per output channel": partial(int4, axis=0, scale_dtype=torch.float16),
        "4 bits, groups of 128": partial(int4, group_size=128, scale_dtype=torch.float16),
        "4 bits, groups of 64": partial(int4, **groups),
        "4 bits, groups of 32": partial(int4, group_size=32, scale_dtype=torch.float16),
    },
    11: {
        "int4": partial(int4, **groups),
        "int4, zero point": partial(ql.zeropoint_quantize, bits=4, **groups),
        "int4, clipped": partial(ql.clip_quantize, bits=4, **groups),
        "NF4": partial(ql.nf4_quantize, **groups),
        "int3": partial(ql.absmax_quantize, bits=3, **groups),
        "int2": partial(ql.absmax_quantize, bits=2, **groups),
    },
}


def bits_of(candidate):
    """Bits of a weight among those that were quantized, scales included; 8 for the two recipes without codes."""
    sizes = {name: parameter.numel() for name, parameter in candidate.named_parameters()}
    noted = candidate.stored_bits
    return sum(noted.values()) / sum(sizes[name] for name in noted) if noted else 8


def line(chapter, candidate, bits, measure, value, interval=("", "")):
    ends = [f"{end:.5g}" if end != "" else "" for end in interval]
    print(f'{chapter},"{candidate}",{bits:.3f},"{measure}",{value:.5g},{ends[0]},{ends[1]}', flush=True)


def report(chapter, model, tokenizer, candidates):
    """A line for each measure of each candidate, all compared with the model on the whole evaluation text."""
    for label, result in ql.compare(model, candidates, tokenizer, ql.load_text()).items():
        bits = bits_of(candidates[label])
        line(chapter, label, bits, "perplexity", result.candidate.ppl)
        line(chapter, label, bits, "loss difference (nats)", result.delta_nll, result.ci)
        line(chapter, label, bits, "KL (nats)", result.kl, result.kl_ci)
        line(chapter, label, bits, "top-1 agreement", result.top1_agreement)
    return result.reference


@torch.no_grad()
def logits_sqnr(model, tokenizer, candidates):
    """How far the rounding of a whole model moves its logits, with and without the offset that softmax ignores."""
    ids = tokenizer(ql.load_text()[:4000], return_tensors="pt")["input_ids"][:, :512].to(model.device)
    before = model(ids).logits
    for label, candidate in candidates.items():
        after = candidate(ids).logits
        centred = [x - x.mean(-1, keepdim=True) for x in (before, after)]
        agree = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
        bits = bits_of(candidate)
        line(4, label, bits, "size ratio to fp32 if stored", bits / 32)
        line(4, label, bits, "SQNR of logits, raw (dB)", ql.sqnr_db(before, after))
        line(4, label, bits, "SQNR of logits, centred (dB)", ql.sqnr_db(*centred))
        line(4, label, bits, "top-1 agreement", agree)


def with_data(model, tokenizer):
    """GPTQ and AWQ on every matrix of the blocks, with the calibration text."""
    moments = ql.input_moments(model, ql.calibration_tokens(model, tokenizer))
    for chapter, label, method in ((17, "GPTQ", ql.gptq_quantize), (18, "AWQ", ql.awq_quantize)):
        results = {}
        for name, layer in ql.block_layers(model).items():
            weight = layer.weight.T if isinstance(layer, ql.Conv1D) else layer.weight
            results[f"{name}.weight"] = method(weight.detach(), moments[name], **groups)
        report(chapter, model, tokenizer, {label: ql.fake_quantize_model(model, results)})


def main():
    name = sys.argv[1]
    model, tokenizer = ql.load_model(name)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"# python tests/large.py {name.rstrip('/').split('/')[-1]}; {model.num_parameters():,} parameters; {card};")
    print(f"# torch {torch.__version__}, the evaluation text, windows of {ql.context_length(model)} tokens at most")
    print("chapter,candidate,bits,measure,value,low,high")
    whole = {label: ql.fake_quantize_model(model, method) for label, method in WHOLE.items()}
    logits_sqnr(model, tokenizer, {label: whole[label] for label in ("absmax", "zero-point")})
    before = report(7, model, tokenizer, whole)
    line(7, "fp32", 32, "perplexity", before.ppl)
    for chapter, methods in BLOCKS.items():
        made = {n: ql.fake_quantize_model(model, method, select=ql.in_block) for n, method in methods.items()}
        report(chapter, model, tokenizer, made)
    with_data(model, tokenizer)


if __name__ == "__main__":
    main()
