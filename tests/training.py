"""Training through the rounding, long enough to be judged: what notebook 19 shows beside its own minute.

    python tests/training.py CORPUS > tests/results/training.csv      # some minutes on a large GPU
    python tests/training.py CORPUS --try                             # the short runs that chose rates and scales

CORPUS is the folder with `train.txt` and `valid.txt` that pocket-gpt2 was trained from, as its `train.py` reads it.

A run trains the matrices in the blocks and nothing else. A float copy of them, the master, is rounded before each step;
the gradient with respect to the rounded weights moves the master by Adam, straight through. The formats are 4, 3 and 2
bits in groups of 64 with scales in fp16, and ternary with one scale for each matrix, its mean magnitude, as in BitNet
b1.58. The scales of groups `stay` those of clipping, `follow` the master, clipped anew at every step, or `learn` from
their own gradient, as in LSQ. The validation books chose rates and scales; the evaluation text is asked at the end.

Columns: run; its loss, or the method where nothing is trained; bits of a weight; steps and tokens so far; text;
measure; value; the ends of its interval.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "notebooks" / "pocket-gpt2")]
from train import encode, read_lines  # noqa: E402

import quantlib as ql  # noqa: E402

GROUP, CONTEXT, WARMUP = 64, 512, 50
TERNARY, FLOAT = 1.58, 16
RUNS = [  # run, bits, loss, learning rate, scales
    ("4 bits", 4, "distillation", 1e-4, "stay"),
    ("3 bits", 3, "distillation", 3e-4, "stay"),
    ("2 bits", 2, "distillation", 1e-3, "stay"),
    ("1.58 bits", TERNARY, "distillation", 2e-3, "follow"),
    ("4 bits", 4, "next token", 2e-5, "stay"),
    ("3 bits", 3, "next token", 1e-4, "stay"),
    ("2 bits", 2, "next token", 1e-3, "stay"),
    ("1.58 bits", TERNARY, "next token", 2e-3, "follow"),
    ("float", FLOAT, "next token", 1e-5, "stay"),
]


def logits(model, ids):
    with torch.autocast(ql.DEVICE.type, dtype=torch.bfloat16):
        return model(ids, use_cache=False).logits.float()


def distillation(student, teacher, block):
    with torch.no_grad():
        p = logits(teacher, block[:, :-1]).log_softmax(-1)
    return (p.exp() * (p - logits(student, block[:, :-1]).log_softmax(-1))).sum(-1).mean()


def next_token(student, teacher, block):
    return cross_entropy(logits(student, block[:, :-1]).flatten(0, 1), block[:, 1:].flatten())


LOSSES = {"distillation": distillation, "next token": next_token}
if ql.DEVICE.type == "cuda":
    LOSSES = {name: torch.compile(loss) for name, loss in LOSSES.items()}


@torch.no_grad()
def validate(student, teacher, blocks):
    """KL from the teacher and loss, in nats per token, in float32; all blocks are of one length."""
    sums = torch.zeros(2)
    for block in blocks.split(16):
        p, q = (m(block[:, :-1], use_cache=False).logits.log_softmax(-1) for m in (teacher, student))
        kl, nll = (p.exp() * (p - q)).sum(-1).mean(), -q.gather(-1, block[:, 1:, None]).mean()
        sums += torch.stack([kl, nll]).cpu() * len(block) / len(blocks)
    return sums.tolist()


def rows(model, what=lambda weight: weight.detach()):
    """Of all matrices in the blocks, as [out, in], rows of 64: a list of [rows, 64]."""
    layers = ql.block_layers(model).values()
    found = [what(layer.weight).T if isinstance(layer, ql.Conv1D) else what(layer.weight) for layer in layers]
    return [weight.reshape(-1, GROUP) for weight in found]


class Rounded:
    """The master, [rows, 64], its scales, and how they move."""

    def __init__(self, model, bits, rate, kind):
        self.parts = [len(part) for part in rows(model)]
        self.master, self.bits, self.kind = torch.cat(rows(model)), bits, kind
        self.top = {TERNARY: 1, FLOAT: math.inf}.get(bits) or 2 ** (bits - 1) - 1
        self.log_scale = self.scales().log()
        groups = [{"params": [self.master], "rate": rate}]
        groups += [{"params": [self.log_scale], "rate": 10 * rate}] if kind == "learn" else []
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def scales(self):
        """[rows, 1]: of each matrix the mean magnitude, or of each row a clipped absmax."""
        if self.bits == FLOAT:
            return torch.ones_like(self.master[:, :1])
        if self.bits == TERNARY:
            means = [part.abs().mean().expand(len(part), 1) for part in self.master.split(self.parts)]
            return torch.cat(means).half().float()
        return ql.clip_quantize(self.master, self.bits, 0, None, torch.float16).scale.float()

    @torch.no_grad()
    def write(self, model):
        """Give the model the rounded weights."""
        self.scale = self.scales() if self.kind == "follow" else self.log_scale.exp().half().float()
        self.ratio = self.master / self.scale
        self.codes = self.ratio if self.bits == FLOAT else self.ratio.round().clamp(-self.top, self.top)
        parts = (self.codes * self.scale).split(self.parts)
        for layer, part in zip(ql.block_layers(model).values(), parts, strict=True):
            target = layer.weight.T if isinstance(layer, ql.Conv1D) else layer.weight
            target.copy_(part.view_as(target))

    @torch.no_grad()
    def step(self, model, share):
        """Move by the gradients that the model's weights hold; share: of the learning rate."""
        gradient = torch.cat(rows(model, lambda weight: weight.grad))
        self.master.grad = gradient
        if self.kind == "learn":
            inside = self.ratio.abs() <= self.top  # what is clipped moves with its scale only
            self.master.grad = gradient * inside
            self.log_scale.grad = (gradient * (self.codes - self.ratio * inside)).sum(1, keepdim=True) * self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self.optimizer.step()


def train(student, teacher, ids, held_out, args, bits, loss, rate, kind, report=None):
    """Train the student from the teacher's weights; returns KL and loss on the validation books at the end."""
    rounded, generator = Rounded(teacher, bits, rate, kind), torch.Generator().manual_seed(0)
    window = torch.arange(CONTEXT + 1, device=ids.device)
    marks = {round(args.steps * (i / 12) ** 2) for i in range(12)}  # more of them at the beginning
    for step in range(args.steps):
        rounded.write(student)
        if report and step in marks:
            report(step, validate(student, teacher, held_out))
        starts = torch.randint(len(ids) - CONTEXT - 1, (args.batch, 1), generator=generator).to(ids.device)
        student.zero_grad(set_to_none=True)
        LOSSES[loss](student, teacher, ids[starts + window]).backward()
        rounded.step(student, min((step + 1) / WARMUP, 1 - step / args.steps))
    rounded.write(student)
    result = validate(student, teacher, held_out)
    if report:
        report(args.steps, result)
    return result


def untrained(teacher, tokenizer):
    """Where training begins, and what rounding alone can do: (run, method, bits) -> model."""
    made, moments = {}, ql.input_moments(teacher, ql.calibration_tokens(teacher, tokenizer))
    layers = {f"{name}.weight": layer for name, layer in ql.block_layers(teacher).items()}
    for bits in (4, 3, 2):
        how = {"bits": bits, "group_size": GROUP, "scale_dtype": torch.float16}
        gptq = {}
        for name, layer in layers.items():
            weight = layer.weight.T if isinstance(layer, ql.Conv1D) else layer.weight
            gptq[name] = ql.gptq_quantize(weight.detach(), moments[name.removesuffix(".weight")], **how)
        ways = {"rounded": lambda w, how=how: ql.absmax_quantize(w, axis=0, **how)}
        ways |= {"clipped": lambda w, how=how: ql.clip_quantize(w, axis=0, **how), "GPTQ": gptq}
        for method, way in ways.items():
            made[f"{bits} bits", method, bits + 16 / GROUP] = ql.fake_quantize_model(teacher, way, ql.in_block)
    made["1.58 bits", "rounded", math.log2(3)] = student = ql.fake_quantize_model(teacher, lambda w: w, ql.in_block)
    Rounded(teacher, TERNARY, 0, "stay").write(student)
    return made


def line(run, loss, bits, steps, tokens, text, measure, value, interval=("", "")):
    ends = [f"{end:.5g}" if end != "" else "" for end in interval]
    print(f"{run},{loss},{bits:.4g},{steps},{tokens},{text},{measure},{value:.5g},{ends[0]},{ends[1]}", flush=True)


def try_out(student, teacher, ids, held_out, args):
    """Short runs over rates and scales; the validation books choose."""
    print("steps,bits,loss,scales,rate,KL,nll")
    grid = [(b, "distillation", kind) for b in (2, 3, 4) for kind in ("learn", "follow", "stay")]
    grid += [(TERNARY, "distillation", "follow"), (TERNARY, "next token", "follow"), (2, "next token", "learn")]
    grid += [(4, "next token", "learn"), (FLOAT, "next token", "stay")]
    for bits, loss, kind in grid:
        for rate in args.rates:
            kl, nll = train(student, teacher, ids, held_out, args, bits, loss, rate, kind)
            print(f"{args.steps},{bits},{loss},{kind},{rate},{kl:.4f},{nll:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--try", action="store_true", dest="tries")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32, help="windows of 512 tokens a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="to try")
    args = parser.parse_args()

    teacher, tokenizer = ql.load_model(ql.BUNDLED)
    teacher.requires_grad_(False)
    student, tokenizer = ql.load_model(ql.BUNDLED)
    student.requires_grad_(False)
    for layer in ql.block_layers(student).values():
        layer.weight.requires_grad_(True)
    ids = encode(tokenizer, read_lines(args.corpus, "train")).to(ql.DEVICE)
    held_out = encode(tokenizer, read_lines(args.corpus, "valid")).to(ql.DEVICE)
    held_out = held_out[: len(held_out) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[::17]
    print(f"{len(ids):,} tokens, {len(held_out)} windows to validate", file=sys.stderr)
    if args.tries:
        return try_out(student, teacher, ids, held_out, args)

    card, tokens = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", args.batch * CONTEXT
    print(f"# python tests/training.py CORPUS; {args.steps} steps of {args.batch} × {CONTEXT} tokens; {card};")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"# {versions}, bf16 autocast; rates chosen on the validation books")
    print("run,loss,bits,steps,tokens,text,measure,value,low,high")
    candidates = untrained(teacher, tokenizer)
    ends = {key: 0 for key in candidates}
    for run, bits, loss, rate, kind in RUNS:
        true_bits = math.log2(3) if bits == TERNARY else bits + 16 / GROUP if bits < FLOAT else FLOAT

        def report(step, result, run=run, loss=loss, true_bits=true_bits):
            for measure, value in zip(("KL", "loss"), result, strict=True):
                line(run, loss, true_bits, step, step * tokens, "validation", measure, value)

        begin = time.time()
        train(student, teacher, ids, held_out, args, bits, loss, rate, kind, report)
        print(f"{run}, {loss}: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
        candidates[run, loss, true_bits] = ql.fake_quantize_model(student, lambda w: w, ql.in_block)
        ends[run, loss, true_bits] = args.steps
    for (run, loss, bits), result in ql.compare(teacher, candidates, tokenizer, ql.load_text()).items():
        at = (run, loss, bits, ends[run, loss, bits], ends[run, loss, bits] * tokens, "evaluation")
        line(*at, "KL", result.kl, result.kl_ci)
        line(*at, "loss difference", result.delta_nll, result.ci)


if __name__ == "__main__":
    main()
