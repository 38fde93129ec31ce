"""What the tools of notebook 21 make of a GPT-2 and of a Llama, and a GGUF file asked over HTTP.

    python3 -m venv peers && . peers/bin/activate
    pip install -r requirements.txt torchao bitsandbytes accelerate gguf xllamacpp
    OMP_NUM_THREADS=1 python tests/tools.py > tests/results/tools.txt

The GPT-2 is the bundled one; the Llama has random weights, rotary positions, grouped-query attention and a head of its
own, so its KL would say nothing and is left out. Times are those of decoding, in turns; of one run only their ratios
mean something. The GGUF file is written by the cell of notebook 13, and llama.cpp serves it.
"""

import json
import logging
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from libraries import audit, load, torchao_int8
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import quantlib as ql  # libraries.py has said where it is

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}
PROMPT = "The old man looked at the sea and"


def through_transformers(config):
    return lambda folder: load(folder, quantization_config=config)


def ways():
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def torchao_int4(folder):
        model = load(folder)
        quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(64)))
        return model

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {
        "quantlib, quantize_model(model)": lambda folder: ql.quantize_model(ql.load_model(folder)[0]),
        "quantlib, quantize_model(model, 4)": lambda folder: ql.quantize_model(ql.load_model(folder)[0], 4),
        "torchao, quantize_(model, Int8WeightOnlyConfig())": torchao_int8,
        "torchao, quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(64)))": torchao_int4,
        "transformers, TorchAoConfig(Int8WeightOnlyConfig())": through_transformers(
            TorchAoConfig(Int8WeightOnlyConfig())
        ),
        "transformers, BitsAndBytesConfig(load_in_8bit=True)": through_transformers(
            BitsAndBytesConfig(load_in_8bit=True)
        ),
        "transformers, BitsAndBytesConfig(load_in_4bit=True), NF4": through_transformers(nf4),
    }


def compare_tools(name, folder):
    model, tokenizer = ql.load_model(folder)
    made, refused = {}, []
    for label, make in ways().items():
        try:
            made[label] = make(folder)
        except Exception as error:  # a tool may refuse a model, and says so
            refused.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    times = {label: np.median(ms) for label, ms in ql.benchmark_decode({"float32": model} | made, rounds=7).items()}
    size = f"{ql.model_nbytes(model) / 1e6:.1f} MB and {times['float32']:.1f} ms a token"
    print(f"\n## {name}: {size} in float32", *refused, sep="\n")
    for label, candidate in made.items():
        held, stored = audit(candidate)
        line = f"{label}: {held}; {stored / ql.model_nbytes(model):.0%} of the bytes, "
        line += f"{times[label]:.1f} ms a token, {times[label] / times['float32']:.2f} of the time"
        if name == "GPT-2":
            r = ql.compare(model, candidate, tokenizer, ql.load_text(), stride=512)
            line += f"; KL {r.kl:.4f}, loss {r.delta_nll:+.4f}"
        print(line, flush=True)


def ask_llama_cpp(folder):
    """Write the GGUF as notebook 13 does, serve it, ask it over HTTP."""
    cells = json.loads((ROOT / "notebooks" / "13_gguf.ipynb").read_text(encoding="utf-8"))["cells"]
    scope = {}
    exec("import json\nfrom gguf import GGUFWriter, MODEL_ARCH, TokenType, get_tensor_name_map\n"
         "from gguf import GGMLQuantizationType as Kind\nfrom gguf.quants import quantize", scope)  # fmt: skip
    scope["model"], scope["tokenizer"] = ql.load_model(ql.BUNDLED)
    scope["weights"] = {n for n, p in scope["model"].named_parameters() if ql.in_block(n, p)}
    exec(next("".join(cell["source"]) for cell in cells if cell["id"] == "write").split("\n\n\n")[0], scope)
    path = str(folder / "model-Q8_0.gguf")
    with torch.no_grad():
        scope["write_gguf"](path, scope["Kind"].Q8_0)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, 512, 1, 0
    params.port = 8089
    server = xllamacpp.Server(params)
    print(f"\n## llama.cpp: {path.split('/')[-1]}, served at an address of this machine")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 20, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        text = json.load(answer)["choices"][0]["text"]
    ours = ql.generate_text(scope["model"], scope["tokenizer"], PROMPT, 20, do_sample=False)
    print(
        f"asked: {PROMPT!r}\nanswer: {text!r}\ngreedy text of the float model in PyTorch: {ours.removeprefix(PROMPT)!r}"
    )


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    names = "torch", "transformers", "torchao", "bitsandbytes", "accelerate", "gguf", "xllamacpp"
    print(
        f"python tests/tools.py; {', '.join(f'{n} {version(n)}' for n in names)}; {ql.DEVICE}, "
        f"{torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "llama")
        AutoTokenizer.from_pretrained(ql.BUNDLED_FOLDER).save_pretrained(folder / "llama")
        compare_tools("GPT-2", str(ql.BUNDLED_FOLDER))
        compare_tools("a Llama", str(folder / "llama"))
        ask_llama_cpp(folder)
