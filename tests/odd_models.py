"""Make tiny checkpoints of the odd kinds that people bring, run notebooks on them, and print what came of it.

    python tests/odd_models.py FOLDER [NOTEBOOK ...] [--models NAME ...]
    python tests/odd_models.py /tmp/odd                     # all notebooks on all models: half an hour on one core
    python tests/odd_models.py /tmp/odd 03_ 07_             # these notebooks; NOTEBOOK is how a file name begins
    python tests/odd_models.py /tmp/odd --models untied     # all notebooks on this model

Each checkpoint is a folder in FOLDER with the bundled tokenizer and a model that was never trained: 2 blocks, 64 to 100
wide. `ODD` lists what is odd about each. A notebook runs in a fresh kernel, with QUANTLIB_MODEL set to the checkpoint.
A line for each of them: `ok`, or the last line of its error. A notebook may say "This notebook needs …", which is its
right; any other error is a fault, and then the exit status is 1. The files of the notebooks stay as they are.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import nbformat  # noqa: E402
import torch  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError  # noqa: E402
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

import quantlib as ql  # noqa: E402

SAYS_SO = "This notebook needs"
PLAIN = {"vocab_size": 8192, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 1, "bos_token_id": 0}
PLAIN |= {"eos_token_id": 0, "initializer_range": 0.05}
LLAMA = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "bos_token_id": 0}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 0}
ODD = {  # name -> in which settings it is not as PLAIN
    "plain": {},
    "untied": {"tie_word_embeddings": False},  # the head is a matrix of its own
    "n_inner": {"n_inner": 96},  # the feed-forward part is not four times as wide
    "cross-attention": {"add_cross_attention": True},  # layers that nothing runs through
    "64-positions": {"n_positions": 64},
    "128-positions": {"n_positions": 128},
    "narrow-heads": {"n_head": 4},  # 16 wide, not 64 as in all of OpenAI's
    "100-wide": {"n_embd": 100, "n_head": 5},  # which no group of 64 divides
    "no-end": {"bos_token_id": None, "eos_token_id": None},  # no end-of-text token, the tokenizer has none either
    "outliers": {},  # planted, as in the notebook on activations
    "bool-masks": {},  # causal masks are stored, as bool, as old versions of transformers did
    "llama": None,  # of another family
}


def make(name: str, folder: Path) -> None:
    """Write the checkpoint of this name."""
    torch.manual_seed(0)
    odd = ODD[name]
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)) if odd is None else GPT2LMHeadModel(GPT2Config(**(PLAIN | odd)))
    model = ql.plant_outliers(model) if name == "outliers" else model
    tokenizer = AutoTokenizer.from_pretrained(ql.BUNDLED_FOLDER)
    if name == "no-end":
        tokenizer.eos_token = tokenizer.bos_token = None
        assert model.generation_config.eos_token_id is None
    tensors = model.state_dict()
    if name == "bool-masks":
        mask = torch.ones(256, 256, dtype=torch.bool).tril()[None, None]
        tensors |= {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)}
    model.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)


def run(notebook: Path, model: Path) -> str:
    """Run a notebook on a model: "ok", or the last line of its error."""
    quiet = ["--log-level=ERROR"]  # no advice on encryption
    client = NotebookClient(nbformat.read(notebook, 4), timeout=600, kernel_name="python3", extra_arguments=quiet)
    try:
        client.execute(cwd=str(notebook.parent), env=os.environ | {"QUANTLIB_MODEL": str(model)})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-1]
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("notebooks", nargs="*", default=[""])
    parser.add_argument("--models", nargs="+", choices=ODD, default=list(ODD))
    options = parser.parse_args()
    notebooks, faults = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")), 0
    for name in options.models:
        make(name, options.folder.resolve() / name)
        for notebook in [path for path in notebooks if path.name.startswith(tuple(options.notebooks))]:
            start = time.perf_counter()
            result = run(notebook, options.folder.resolve() / name)
            print(f"{name:16s} {notebook.stem:24s} {time.perf_counter() - start:4.0f} s  {result}", flush=True)
            faults += result != "ok" and SAYS_SO not in result
    print(f"{faults} faults")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
