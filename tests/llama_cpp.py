"""llama.cpp beside PyTorch and quantlib: milliseconds a token of a GPT-2 124M with random weights, on a CPU.

    pip install -r requirements.txt xllamacpp gguf                 # in an environment of its own
    python tests/llama_cpp.py 1 2 > tests/results/llama_cpp.txt    # with one thread, then with two

A line: threads, candidate, MB stored (what a token reads), median of the rounds, smallest, largest. The candidates take
turns; "compiled" is the `Decoder` of notebook 9. Use no more threads than cores are idle, since those of llama.cpp spin
while they wait for each other. It is called through ctypes, in the library that comes with xllamacpp.
"""

import ctypes
import datetime
import sys
import tempfile
from ctypes import c_bool, c_char_p, c_int32, c_void_p
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from benchmark import notebook_9
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache  # noqa: F401 - the notebook's class needs it

import quantlib as ql  # benchmark.py has said where it is

PROMPT, TOKENS, ROUNDS = range(16), range(16), 11
LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
PARAMS = type("Params", (ctypes.Structure,), {"_fields_": [("opaque", ctypes.c_char * 2048)]})  # only handed on
BATCH = type("Batch", (ctypes.Structure,), {"_fields_": [("n", c_int32), ("pointers", c_void_p * 6)]})


def c(name, result, *arguments):
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = result, [kind for kind, _ in arguments]
    return function(*(value for _, value in arguments))


def write_gguf(model, path, kind):
    """Matrices [out, in] in the wanted kind; vectors and positions in float32; of the vocabulary only the size."""
    config, out = model.config, GGUFWriter(path, "gpt2")
    names = get_tensor_name_map(MODEL_ARCH.GPT2, config.n_layer)
    for add, value in (("context_length", config.n_positions), ("embedding_length", config.n_embd),
                       ("feed_forward_length", 4 * config.n_embd), ("block_count", config.n_layer),
                       ("head_count", config.n_head), ("layer_norm_eps", config.layer_norm_epsilon),
                       ("tokenizer_model", "no_vocab"), ("vocab_size", config.vocab_size)):  # fmt: skip
        getattr(out, f"add_{add}")(value)
    for name, tensor in model.transformer.named_parameters():
        tensor = (tensor.T if ".c_" in name and tensor.ndim == 2 else tensor).detach().contiguous().numpy()
        stored = GGMLQuantizationType[kind if tensor.ndim == 2 and "wpe" not in name else "F32"]
        out.add_tensor(names.get_name(name, (".weight", ".bias")), quantize(tensor, stored), raw_dtype=stored)
    for part in ("header", "kv_data", "tensors"):
        getattr(out, f"write_{part}_to_file")()
    out.close()


def llama(path, threads):
    """Two functions: read a prompt; decode some tokens, one by one."""
    defaults = c("llama_model_default_params", PARAMS)
    model = c("llama_model_load_from_file", c_void_p, (c_char_p, path.encode()), (PARAMS, defaults))
    defaults = c("llama_context_default_params", PARAMS)
    context = c("llama_init_from_model", c_void_p, (c_void_p, model), (PARAMS, defaults))
    c("llama_set_n_threads", None, (c_void_p, context), (c_int32, threads), (c_int32, threads))
    memory = c("llama_get_memory", c_void_p, (c_void_p, context))

    def run(tokens):
        ids = (c_int32 * len(tokens))(*tokens)
        batch = c("llama_batch_get_one", BATCH, (c_void_p, ctypes.addressof(ids)), (c_int32, len(ids)))
        assert c("llama_decode", c_int32, (c_void_p, context), (BATCH, batch)) == 0

    def start():
        c("llama_memory_clear", None, (c_void_p, memory), (c_bool, True))
        run(PROMPT)

    return start, lambda: [run([token]) for token in TOKENS]


def cpu():
    """What this machine is, as far as the products ask."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {'with' if ql.CPU_HAS_BF16 else 'without'} bf16"


def ours(model):
    state = {}

    @torch.no_grad()
    def run(tokens, cache=None):
        out = model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        state["cache"] = out.past_key_values

    return lambda: run(PROMPT), lambda: [run([token], state["cache"]) for token in TOKENS]


def compiled(model):
    decoder = Decoder(model, torch.tensor([list(PROMPT)]), compiled=True)  # noqa: F821 - the notebook's
    return decoder.start, lambda: [decoder.step() for _ in TOKENS]


def main():
    exec(notebook_9("decoder"), globals())
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda *_: None)
    c("llama_log_set", None, (type(quiet), quiet), (c_void_p, None))
    LIBRARY.llama_backend_init()
    torch.manual_seed(0)
    fp32 = GPT2LMHeadModel(GPT2Config()).eval()
    models = {"PyTorch fp32": fp32} | {f"quantlib int{bits}": ql.quantize_model(fp32, bits) for bits in (8, 4)}
    sizes = {label: ql.model_nbytes(model) for label, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"llama.cpp {kind}": f"{folder}/{kind}" for kind in ("F32", "Q8_0", "Q4_0")}
        for label, path in paths.items():
            write_gguf(fp32, path, label.split()[1])
            sizes[label] = Path(path).stat().st_size
        where = f"{datetime.date.today()}; {cpu()}; torch {torch.__version__}, xllamacpp {version('xllamacpp')}"
        print(f"# python tests/llama_cpp.py {' '.join(sys.argv[1:])}; {where}")
        print(f"# threads, program, MB stored, ms a token ({ROUNDS} rounds of {len(TOKENS)}: median, least, most)")
        for threads in map(int, sys.argv[1:] or ["1"]):
            torch.set_num_threads(threads)
            both = {k: ours(m) for k, m in models.items()} | {f"{k}, compiled": compiled(m) for k, m in models.items()}
            both |= {k: llama(path, threads) for k, path in paths.items()}
            starts, steps = ({label: pair[i] for label, pair in both.items()} for i in (0, 1))
            for label, ms in ql.time_interleaved(steps, ROUNDS, starts).items():
                ms /= len(TOKENS)
                numbers = f"{np.median(ms):.2f},{ms.min():.2f},{ms.max():.2f}"
                size = sizes[label.removesuffix(", compiled")]
                print(f'{threads},"{label}",{size / 1e6:.1f},{numbers}', flush=True)


if __name__ == "__main__":
    main()
