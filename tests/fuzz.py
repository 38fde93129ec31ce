"""Give load_quantized thousands of damaged files: each is refused with a ValueError, or is the model that was saved.

    python tests/fuzz.py                   # 20,000 files
    python tests/fuzz.py --count 1000 --seed 7
    python tests/fuzz.py --seed 7 --only 123    # file 123 of that run alone, with the traceback

The files are mutations of four that save_quantized wrote, of a small model in 8 and in 4 bits, with and without a tied
head. A failure is anything but the two outcomes above: another kind of error, a crash, more than 5 seconds, or a model
that is not the one saved. It is printed with its number, and the exit status is 1. Needs fork, so not Windows.

- bits: some bits flipped, of the length of the header, of the header, or of the tensors.
- length: another length of the header. bytes: some bytes cut, inserted, repeated, overwritten or exchanged.
- header: one thing in the JSON of the header replaced, renamed, removed, exchanged or doubled, at any depth; the length
  is set right.
- metadata: the same in the JSON of quantlib inside the header. text: characters of that JSON.
- signed: as metadata, or a tensor changed, and then the checksum computed anew, as somebody would who knows how. Such a
  file is not damaged: it may be loaded, and then it must be what the file says.
"""

import argparse
import copy
import json
import logging
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
import pandas as pd
import torch
import transformers
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

import quantlib as ql

SECONDS = 5
BATCH = 500  # files for each process: it may crash
DEEP = {"@deep@": 100, "@deeper@": 100_000}  # stands for that many lists in each other
VALUES = [
    None, True, False, 0, 1, 2, 3, -1, 4, 8, 32, 64, 127, 2**31, 2**63, 2**64, 10**30, 10**5000, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "8", "x" * 100_000, "\0", "\ud800", "größe 量化", "__class__", "../../etc/passwd",
    "eager", "F32", "I8", [], {}, [[]], [0, 0], [2**40], [-1], [0] * 1000, {"": None}, {"bits": 8},
    {"__metadata__": {}}, *DEEP,
]  # fmt: skip
NAMES = [
    "",
    "bits",
    "group_size",
    "config",
    "sha256",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "x" * 1000,
    "\0",
    "ä",
]


def originals() -> dict[str, bytes]:
    """Name -> a file as save_quantized writes it."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            config = transformers.GPT2Config(
                vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                initializer_range=0.2, tie_word_embeddings=tied,
            )  # fmt: skip
            torch.manual_seed(0)
            model = transformers.GPT2LMHeadModel(config).eval()
            for bits in (8, 4):
                path = Path(folder) / "file"
                ql.save_quantized(ql.quantize_model(model, bits, 32 if bits == 4 else None), path)
                files[f"{bits} bits, {'tied' if tied else 'untied'}"] = path.read_bytes()
    return files


# --- mutations: bytes -> bytes, by a random generator ---


def parts(content: bytes) -> tuple[dict, bytes]:
    """The header and the tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def written(value) -> str:
    """As JSON, with numbers longer and lists deeper than Python would read or write by itself."""
    sys.set_int_max_str_digits(0)
    text = json.dumps(value)
    sys.set_int_max_str_digits(4300)
    for name, depth in DEEP.items():
        text = text.replace(json.dumps(name), "[" * depth + "]" * depth)
    return text


def joined(header, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else written(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def places(value, found=None) -> list:
    """All `(container, key)` in a tree of dicts and lists."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def change(draw: random.Random, tree):
    """One or two things in it replaced, renamed, removed, exchanged or doubled."""
    for _ in range(draw.choice((1, 1, 2))):
        container, key = draw.choice(places(tree) or [([None], 0)])
        other_container, other = draw.choice(places(tree) or [([None], 0)])
        kind = draw.choice(("replace", "replace", "number", "rename", "remove", "exchange", "double"))
        if kind == "replace":
            container[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == "number" and type(container[key]) in (int, float):
            container[key] += draw.choice((-1, 1, 7, 0.5, 2**16, -(2**40)))
        elif kind == "rename" and isinstance(container, dict):
            container[draw.choice([*NAMES, key + " ", key[1:], key.upper()])] = container.pop(key)
        elif kind == "remove":
            del container[key]
        elif kind == "exchange":
            first, second = copy.deepcopy(container[key]), copy.deepcopy(other_container[other])
            container[key] = second
            if not inside(other_container, container):
                other_container[other] = first
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key + "2"] = copy.deepcopy(container[key])
    return tree


def inside(container, root) -> bool:
    return container is root or any(value is container for value in (c for c, _ in places(root)))


def bits(draw, content):
    content = bytearray(content)
    size = 8 + struct.unpack("<Q", content[:8])[0]
    low, high = draw.choice(((0, 8), (8, size), (8, size), (size, len(content))))
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        content[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
    return bytes(content)


def length(draw, content):
    size = struct.unpack("<Q", content[:8])[0]
    near = [size + draw.randint(-9, 9), draw.randrange(len(content)), len(content) - 8, size + draw.randint(10, 10_000)]
    far = [0, 1, 2, 10**8, 10**8 + 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, draw.getrandbits(64)]
    size = draw.choice((draw.choice(near), draw.choice(far)))
    padding = b" " * draw.choice((0, 0, 1, 8, 1000))
    return struct.pack("<Q", size) + content[8:] + padding


def several_bytes(draw, content):
    for _ in range(draw.choice((1, 1, 2))):
        start = draw.randrange(len(content) + 1) if draw.random() < 0.5 else draw.randrange(min(len(content), 3000) + 1)
        stop = min(len(content), start + draw.choice((0, 1, 2, 8, 100, 10_000)))
        piece, noise = content[start:stop], draw.randbytes(draw.choice((1, 2, 8, 100)))
        place = draw.randrange(len(content) + 1)
        content = draw.choice((
            content[:start], content[:start] + content[stop:], content[:start] + noise + content[start:],
            content[:start] + piece + content[start:], content[:start] + noise + content[start + len(noise) :],
            content[:place] + piece + content[place:], noise, content + noise,
        ))  # fmt: skip
    return content


def header(draw, content):
    tree, data = parts(content)
    return joined(change(draw, tree), data)


def metadata(draw, content):
    tree, data = parts(content)
    tree["__metadata__"][ql.FORMAT] = written(change(draw, json.loads(tree["__metadata__"][ql.FORMAT])))
    return joined(tree, data)


def text(draw, content):
    tree, data = parts(content)
    about = tree["__metadata__"][ql.FORMAT]
    for _ in range(draw.choice((1, 2, 5))):
        at, end = draw.randrange(len(about)), draw.randrange(1, 30)
        new = draw.choice((
            "", '"', "{", "}", "[", "]", ",", ":", "\\", "\\u", "\\ud800", "\0", " ", "\n", "\ufeff", "NaN",
            "-Infinity", "1e999", "0x10", "9" * 5000, "[" * 50_000, '{"a":' * 50_000, "null", "true", '"bits": 4,',
            chr(draw.randrange(32, 0xD800)),
        ))  # fmt: skip
        about = about[:at] + new + about[at + draw.choice((0, 1, end)) :] or " "
    tree["__metadata__"][ql.FORMAT] = about
    return joined(tree, data)


def signed(draw, content):
    tree, _ = parts(content)
    about, tensors = json.loads(tree["__metadata__"][ql.FORMAT]), load_bytes(content)
    del about["sha256"]
    if draw.random() < 0.7:
        about = change(draw, about)
    else:
        name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
        tensor = tensors[name]
        dtypes = (torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64, torch.bfloat16)
        tensors[name] = draw.choice((
            tensor.to(draw.choice(dtypes)), tensor[:-1], tensor[None], tensor.flatten(), tensor.T.contiguous(),
            tensor[:0], tensors[other].clone(), torch.zeros(()), tensor.roll(1), torch.full_like(tensor, 100),
            torch.zeros(2**20),
        ))  # fmt: skip
        if draw.random() < 0.3:
            tensors[draw.choice(NAMES) or "x"] = tensors.pop(other)
    about["sha256"] = ql._sha256(about, tensors)
    return save_bytes(tensors, {ql.FORMAT: written(about)})


MUTATIONS = {
    "bits": bits, "length": length, "bytes": several_bytes, "header": header, "metadata": metadata, "text": text,
    "signed": signed,
}  # fmt: skip


def make(seed: int, number: int, files: dict) -> tuple[str, str, bytes]:
    """The kind of the mutation, the name of the original, and the mutated file."""
    draw = random.Random(f"{seed} {number}")
    while True:
        name, kind = draw.choice(list(files)), draw.choice(list(MUTATIONS))
        try:
            content = MUTATIONS[kind](draw, files[name])
        except (RecursionError, TypeError, ValueError, AttributeError, OverflowError):
            continue  # two changes that do not go together, or a text that cannot be written
        if content != files[name]:
            return kind, name, content


# --- outcomes ---


@torch.no_grad()
def outcome(path: Path, kind: str, expected) -> str:
    """ "refused", "loaded equal" or "loaded as signed"; everything else raises."""
    try:
        model = ql.load_quantized(path, "cpu")
    except ValueError as error:
        message = str(error)
        assert message.startswith("load_quantized cannot load path=") and message.count("\n") == 1, message
        return "refused"
    state, saved = model.state_dict(), expected.state_dict()
    same = state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    if same and model.config.to_dict() == expected.config.to_dict():
        ids = torch.arange(16)[None]
        assert torch.equal(model(ids).logits, expected(ids).logits), "the logits are others"
        return "loaded equal"
    assert kind == "signed", "another model was loaded"
    stored = load_bytes(path.read_bytes())
    same = all(torch.equal(tensor, state[name]) for name, tensor in stored.items() if not tensor.isnan().any())
    assert same and stored.keys() <= state.keys(), "the model is not what the file says"
    return "loaded as signed"


def run(numbers, seed: int, files: dict, folder: Path):
    """Yield `(number, kind, outcome)`, from processes of their own, which may crash or be killed after some seconds."""
    numbers = list(numbers)
    while numbers:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as answers:
                examine(numbers[:BATCH], seed, files, folder, answers)
            os._exit(0)
        os.close(writing)
        started = None
        with os.fdopen(reading) as answers:
            for line in answers:
                number, kind, what = line.rstrip("\n").split("\t")
                started = int(number), kind
                if what:
                    yield *started, what
                    numbers.remove(int(number))
                    started = None
        status = os.waitpid(child, 0)[1]
        if status:
            killer = signal.Signals(status & 127).name if status & 127 else f"exit {status >> 8}"
            number, kind = started or (numbers[0], "?")
            yield number, kind, f"FAILED: {f'more than {SECONDS} seconds' if killer == 'SIGALRM' else killer}"
            numbers.remove(number)


def examine(numbers, seed: int, files: dict, folder: Path, answers) -> None:
    expected = {}
    for name, content in files.items():
        (folder / "file").write_bytes(content)
        expected[name] = ql.load_quantized(folder / "file", "cpu")
    for number in numbers:
        kind, name, content = make(seed, number, files)
        (folder / "file").write_bytes(content)
        print(number, kind, "", sep="\t", file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles the signal: it ends the process
        try:
            what = outcome(folder / "file", kind, expected[name])
        except BaseException as error:  # also what is no Exception, such as a panic of a Rust library
            what = f"FAILED: {type(error).__name__}: {str(error)[:200]!r}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(number, kind, what, sep="\t", file=answers, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one file, in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    files, begin = originals(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.only is not None:
            kind, name, content = make(arguments.seed, arguments.only, files)
            (folder / "file").write_bytes(files[name])
            expected = ql.load_quantized(folder / "file", "cpu")
            (folder / "file").write_bytes(content)
            print(f"{kind} of {name}: {len(content)} bytes, {content[:400]!r} …")
            try:
                print(outcome(folder / "file", kind, expected))
            except BaseException:
                traceback.print_exc()
            return 0
        rows, failed = [], 0
        for number, kind, what in run(range(arguments.count), arguments.seed, files, folder):
            rows.append((kind, what.split(":")[0]))
            if what.startswith("FAILED"):
                failed += 1
                print(f"--seed {arguments.seed} --only {number} ({kind}) {what}", flush=True)
    kinds, outcomes = zip(*rows, strict=True)
    table = pd.crosstab(pd.Series(kinds, name=""), pd.Series(outcomes, name=""), margins=True, margins_name="all")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, seed {arguments.seed}")
    print(table.to_string())
    print(f"{failed} failures, {time.perf_counter() - begin:.0f} seconds")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
