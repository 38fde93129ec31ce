"""Train pocket-gpt2: a byte-level BPE tokenizer and a small GPT-2, from a folder of text.

    python train.py CORPUS                  # tokenizer, then model; writes into this folder
    python train.py CORPUS --tokenizer      # only the tokenizer (CPU, about two minutes on 2 cores)
    python train.py CORPUS --evaluate       # validation loss of the committed files, no training

CORPUS holds `train.txt` and `valid.txt`, plain or `.xz`: one paragraph a line, a line `<|endoftext|>`
after every book. Training wants a CUDA GPU; evaluation runs anywhere. Needs torch, transformers and numpy.
"""

import argparse
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
CONTEXT = 512


def read_lines(corpus, name):
    """The lines of CORPUS/name.txt or CORPUS/name.txt.xz, each with its newline."""
    plain, packed = corpus / f"{name}.txt", corpus / f"{name}.txt.xz"
    if not plain.exists() and not packed.exists():
        raise SystemExit(f"{corpus} holds neither {plain.name} nor {packed.name}")
    with open(plain, encoding="utf-8") if plain.exists() else lzma.open(packed, "rt", encoding="utf-8") as f:
        return f.readlines()


def train_tokenizer(lines, out):
    """Byte-level BPE as in GPT-2, with a vocabulary of 8192 instead of 50257."""
    bpe = ByteLevelBPETokenizer()
    text = (line for line in lines if line.strip() != END)
    bpe.train_from_iterator(text, vocab_size=8192, min_frequency=2, special_tokens=[END])
    bpe.save(str(out / "tokenizer.json"), pretty=False)


def load_tokenizer(out):
    return PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), eos_token=END, bos_token=END)


def encode(tokenizer, lines):
    """All lines as one int64 tensor of token ids. Books stay apart: END is one token, its newline is dropped."""
    lines = [END if line.strip() == END else line for line in lines]
    ids = []
    for start in range(0, len(lines), 20_000):  # in parts, for memory; the tokenizer uses every core
        for encoding in tokenizer.backend_tokenizer.encode_batch(lines[start : start + 20_000]):
            ids.append(np.array(encoding.ids, dtype=np.int32))
    return torch.from_numpy(np.concatenate(ids)).long()


@torch.no_grad()
def validation_loss(model, ids, batch=32):
    """Mean nats per token over non-overlapping windows of CONTEXT tokens, in fp32.

    Every token but the first is scored once; the first ones of a window see little of what came before,
    so a sliding window would give a lower number.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, len(ids) - 1
    full = count // CONTEXT * CONTEXT
    inputs, targets = (part.view(-1, CONTEXT).split(batch) for part in (ids[:full], ids[1 : full + 1]))
    pairs = list(zip(inputs, targets, strict=True))
    if full < count:
        pairs.append((ids[full:-1][None], ids[full + 1 :][None]))
    for inputs, targets in pairs:
        logits = model(inputs.to(device), use_cache=False).logits.float()
        total += cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), reduction="sum").item()
    return total / count


def report(model, tokenizer, lines):
    """Print the validation loss in nats per token and, so that tokenizers compare, in bits per character."""
    ids = encode(tokenizer, lines)
    characters = sum(len(line) for line in lines if line.strip() != END)
    loss = validation_loss(model, ids)
    bits = loss * (len(ids) - 1) / characters / math.log(2)
    print(f"validation: {loss:.4f} nats per token (perplexity {math.exp(loss):.2f}), {bits:.4f} bits per character,")
    print(f"            {len(ids):,} tokens, {characters:,} characters, {characters / len(ids):.3f} per token")


def sample(model, tokenizer, prompt, seed=0):
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=80, do_sample=True, top_k=30, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0])


def train(ids, tokenizer, args):
    """AdamW at a linearly falling learning rate, over windows whose borders move from epoch to epoch."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=args.width, n_layer=args.layers, n_head=args.width // 64,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel: the same function, faster on a CPU
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    print(f"{model.num_parameters():,} parameters, {len(ids):,} training tokens, {args.epochs} epochs")

    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": args.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def loss_of(inputs, targets):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of)
    ids = ids.to(device)
    windows = (len(ids) - 1) // CONTEXT - 1
    per_epoch = windows // args.batch
    steps, warmup, step = args.epochs * per_epoch, 300, 0
    shuffle = torch.Generator().manual_seed(args.seed)
    begin = time.time()
    model.train()
    for _ in range(args.epochs):
        offset = torch.randint(CONTEXT, (1,), generator=shuffle).item()
        starts = torch.randperm(windows, generator=shuffle) * CONTEXT + offset
        for rows in starts[: per_epoch * args.batch].view(per_epoch, args.batch).to(device):
            block = ids[rows[:, None] + torch.arange(CONTEXT + 1, device=device)]
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min((step + 1) / warmup, (steps - step) / (steps - warmup))
            loss = step_loss(block[:, :-1], block[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 500 == 0 or step == args.max_steps:
                spent = time.time() - begin
                rate = step * args.batch * CONTEXT / spent / 1e6
                print(
                    f"step {step:6d}/{steps}  loss {loss.item():.3f}  {spent:5.0f} s  {rate:.2f} M tokens/s", flush=True
                )
            if step == args.max_steps:
                return model
    print(f"trained in {time.time() - begin:.0f} s on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with train.txt and valid.txt, plain or .xz")
    parser.add_argument("--tokenizer", action="store_true", help="train only the tokenizer")
    parser.add_argument("--evaluate", action="store_true", help="evaluate what is in the output folder")
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go (default: this folder)")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=128, help="windows of 512 tokens a step")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early, to try things out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    if not args.evaluate:
        lines = read_lines(args.corpus, "train")
        if args.tokenizer or not (args.out / "tokenizer.json").exists():
            train_tokenizer(lines, args.out)
        if args.tokenizer:
            return
        tokenizer = load_tokenizer(args.out)
        begin = time.time()
        ids = encode(tokenizer, lines)
        print(f"tokenized in {time.time() - begin:.0f} s")
        model = train(ids, tokenizer, args)
        model.half().save_pretrained(args.out)  # fp16: half the bytes in the repository
        (args.out / "generation_config.json").unlink(missing_ok=True)  # says nothing config.json does not

    tokenizer = load_tokenizer(args.out)
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    report(model, tokenizer, read_lines(args.corpus, "valid"))
    for seed, prompt in enumerate(["The old man looked at the sea and", "It was a dark", '"I cannot tell you,"']):
        print(f"[{seed}] {sample(model, tokenizer, prompt, seed)}\n")


if __name__ == "__main__":
    main()
