"""What two libraries make of a GPT-2: what became codes, what stayed in float, bytes and KL. For notebook 8.

    python3 -m venv peers && . peers/bin/activate
    pip install -r requirements.txt torchao bitsandbytes accelerate
    python tests/libraries.py [MODEL] > tests/results/libraries.txt

An environment of its own, because torchao prints when transformers imports it. Each candidate is what a user writes:
torchao's `quantize_` on a loaded model, and `transformers`' configuration for bitsandbytes.
"""

import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantlib as ql  # noqa: E402


def inside(tensor):
    """The plain tensors in which a library's tensor keeps its codes and scales."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state = getattr(tensor, "quant_state", None)  # bitsandbytes, 4 bits; SCB: the scales of its 8 bits
    return [t for t in (tensor, getattr(tensor, "SCB", None), getattr(state, "absmax", None)) if t is not None]


def audit(candidate):
    """How many matrices of which class and type, and the bytes of all that is stored."""
    held, stored = Counter(), {}
    for module in candidate.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and len(weight.shape) == 2:
            tensors = inside(weight) if torch.is_tensor(weight) else weight.plain()
            held[f"{type(module).__name__} ({tensors[0].dtype})".replace("torch.", "")] += 1
    for tensor in [*candidate.parameters(), *candidate.buffers()]:
        stored |= {part.data_ptr(): part.nbytes for part in inside(tensor)}
    return ", ".join(f"{count} {kind}" for kind, count in held.items()), sum(stored.values())


def load(name, **how):
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, device_map={"": ql.DEVICE}, **how).eval()


def torchao_int8(name):
    model = load(name)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def main(name):
    folder = str(ql.BUNDLED_FOLDER) if name == ql.BUNDLED else name
    model, tokenizer = ql.load_model(name)
    ways = {
        "torchao: quantize_(model, Int8WeightOnlyConfig())": torchao_int8,
        "transformers: BitsAndBytesConfig(load_in_8bit=True)": lambda n: load(
            n, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        ),
        'transformers: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")': lambda n: load(
            n, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        ),
        "quantlib: quantize_model(model)": lambda n: ql.quantize_model(model),
        "quantlib: quantize_model(model, 4)": lambda n: ql.quantize_model(model, 4),
    }
    packages = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "transformers", "torchao", "bitsandbytes")
    )
    print(f"python tests/libraries.py {name}; {packages}; {ql.DEVICE}")
    for label, make in ways.items():
        candidate = make(folder)
        held, stored = audit(candidate)
        r = ql.compare(model, candidate, tokenizer, ql.load_text(), stride=ql.context_length(model))
        share = stored / ql.model_nbytes(model)
        print(
            f"\n{label}\n    {share:.0%} of the bytes of float32; KL {r.kl:.4f} nats per token, loss {r.delta_nll:+.4f}"
        )
        print(f"    matrices: {held}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ql.BUNDLED)
