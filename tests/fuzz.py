"""Damaged files by the hundred: each must be refused with the documented error, or give a model that runs.

    python tests/fuzz.py             # 300 quantized files and 100 checkpoints, from seed 0
    python tests/fuzz.py --cases 5000 --seed 7

A case is a small file with some damage: bytes changed, cut out, repeated or inserted, the header's JSON rewritten, or
tensors dropped, renamed, resized or cast. `load_quantized` has a checksum and must refuse all but changes that leave
the content as it was; `load_model` may also load what is still a model. Anything else (another exception, a crash, ten
seconds) is printed with its seed, and the exit status is 1. Nothing here signs its files: see the design of the format.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantlib as ql  # noqa: E402

LEAVES = [None, True, -1, 0, 3, 2**40, 1e308, "x", "F32", [], {}, [0, 5]]


def bytes_damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated or inserted; half of the time in the header."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        end = min(len(content), 3000) if chance.random() < 0.5 else len(content)
        place, length = chance.randrange(max(end, 1)), chance.choice([1, 1, 4, 100])
        piece = bytes(content[place : place + length])
        new = {"flip": bytes(b ^ 1 << chance.randrange(8) for b in piece), "cut": b"", "repeat": 2 * piece,
               "insert": chance.randbytes(length) + piece}  # fmt: skip
        content[place : place + length] = chance.choice(list(new.values()))
    return bytes(content)


def header_damaged(content: bytes, chance: random.Random) -> bytes:
    """One value of the header's JSON, or of the configuration in it, is another, or is gone."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    holder = header
    if "quantlib" in header.get("__metadata__", {}) and chance.random() < 0.6:
        about = holder = json.loads(header["__metadata__"]["quantlib"])
    while True:
        key = chance.choice(list(holder))
        if isinstance(holder[key], dict) and holder[key] and chance.random() < 0.8:
            holder = holder[key]
            continue
        holder.pop(key) if chance.random() < 0.3 else holder.update({key: chance.choice(LEAVES)})
        break
    if "about" in locals():
        header["__metadata__"]["quantlib"] = json.dumps(about)
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def attempt(load) -> str:
    """What came of it: refused, loaded, or the failure."""
    signal.alarm(10)
    try:
        model = load()
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
        return "loaded"
    except ValueError as error:
        return "refused" if " failed: " in str(error) and ". Give " in str(error) else f"ValueError: {error}"
    except BaseException as error:  # also the alarm
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300, help="of quantized files; a third as many checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds")))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=8192, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model, counts = transformers.GPT2LMHeadModel(config).eval(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ql.load_model(device="cpu")[1].save_pretrained(folder)
        model.save_pretrained(folder)
        ql.save_quantized(ql.quantize_model(model, 4, 32), folder / "quantized")
        whole = {name: (folder / name).read_bytes() for name in ("quantized", "model.safetensors", "config.json")}
        for case in range(options.cases + options.cases // 3):
            chance = random.Random(f"{options.seed} {case}")
            name = "quantized" if case < options.cases else chance.choice(["model.safetensors", "config.json"])
            damage = bytes_damaged if name == "config.json" else chance.choice([bytes_damaged, header_damaged])
            (folder / name).write_bytes(damage(whole[name], chance))
            load = ql.load_quantized if name == "quantized" else lambda path, device: ql.load_model(folder, device)[0]
            found = attempt(lambda load=load, name=name: load(folder / name, "cpu"))
            (folder / name).write_bytes(whole[name])
            counts[name, found if found in ("refused", "loaded") else "WRONG"] += 1
            if found not in ("refused", "loaded"):
                print(f"seed {options.seed}, case {case}, {name}, {damage.__name__}: {found[:300]}")
    for (name, found), count in sorted(counts.items()):
        print(f"{name:18s} {found:8s} {count}")
    return int(any(found == "WRONG" for _, found in counts))


if __name__ == "__main__":
    sys.exit(main())
