"""What the tests share: where quantlib lies, no network, no progress bars, how long to search, and two models."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # both are read when the packages are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run; two threads each would wait for each other
os.environ.pop("QUANTLIB_MODEL", None)

# How many examples Hypothesis makes up for a property: the same 50 in every run; 1,000 new ones in the profile "long".
settings.register_profile("short", max_examples=50, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=1000, deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_collection_modifyitems(items):
    """The last notebooks take longest: they come before the first, so that the two processes end together."""
    items.sort(key=lambda item: item.path, reverse=True)


@pytest.fixture(scope="session")
def pocket():
    """The bundled model with its tokenizer, `(model, tokenizer)`; tests must not change it."""
    import quantlib as ql

    return ql.load_model("pocket-gpt2", device="cpu")


@pytest.fixture(scope="session")
def tiny(pocket):
    """A GPT-2 of two small layers and 32 tokens of context, for pocket's tokenizer; tests must not change it.

    The weights are random and ten times larger than those GPT-2 starts from, so that every token of the context counts.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=pocket[0].config.vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()
