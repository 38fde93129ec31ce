"""Tests of what people bring: every input is right, or refused in one line that says what to give instead."""

import copy

import numpy as np
import pytest
import torch
from test_storage import both
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM

import quantlib as ql

PROMPT = "The old house stood at the end of the road, and nobody had lived in it for years."


def made(seed=0, **changes):
    torch.manual_seed(seed)
    config = {"vocab_size": 8192, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**config | {"eos_token_id": 0} | changes)).eval()


@pytest.fixture
def model():
    return made()


@pytest.fixture
def tokenizer(pocket):
    return pocket[1]


def refused(call, *words):
    """One line, with all the words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def everywhere(model, tokenizer):
    """What runs a model, by name."""
    ids = torch.arange(8)[None]
    return {
        "perplexity": lambda: ql.perplexity(model, tokenizer, PROMPT),
        "compare": lambda: ql.compare(made(), model, tokenizer, PROMPT),
        "generate": lambda: ql.generate_text(model, tokenizer, PROMPT, 3),
        "moments": lambda: ql.input_moments(model, ids),
        "calibration": lambda: ql.calibration_tokens(model, tokenizer, 1),
    }


@pytest.mark.parametrize("change, words", [
    (lambda m: m.train(), ("training mode", "model.eval()")), (lambda m: m.to("meta"), ("meta", "load its weights")),
    (lambda m: nn.DataParallel(m).eval(), ("DataParallel", ".module")), (lambda m: m.transformer, ("GPT2Model",)),
    (lambda m: GPT2Model(m.config).eval(), ("GPT2Model", "language model")),
], ids=["training", "meta", "parallel", "body", "bare"])  # fmt: skip
def test_one_rule_for_all_that_run_a_model(model, tokenizer, change, words):
    for name, call in everywhere(change(model), tokenizer).items():
        if not (name == "moments" and words[0] in ("DataParallel", "GPT2Model")):  # they have no head, or another name
            refused(call, *words)


def test_a_token_that_the_model_does_not_know(model, tokenizer):
    """A pad token was added and the embedding not resized: on CUDA, looking it up would end the process."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<pad>"])
    refused(lambda: ql.perplexity(model, more, "A house.<pad>"), "token 8192", "resize_token_embeddings")
    refused(lambda: ql.generate_text(model, more, "A house.<pad>"), "token 8192", "resize_token_embeddings")


def test_a_configuration_that_returns_tuples(tokenizer):
    """Inside such a model transformers itself fails, with a word about tuples."""
    for call in everywhere(made(return_dict=False), tokenizer).values():
        refused(call, "model.config.return_dict = True")


def test_pruned_adapted_and_parametrized_models(model):
    """A pruned weight is stored as the model computes with it; where that is not clear, one is told what to call."""
    pruned, layer = copy.deepcopy(model), "transformer.h.0.mlp.c_fc"
    prune.l1_unstructured(pruned.get_submodule(layer), "weight", 0.5)
    zeros = pruned.get_submodule(layer).weight.T == 0
    codes = ql.quantize_model(pruned).get_submodule(layer).weight.codes
    assert zeros.float().mean() == 0.5 and (codes[zeros] == 0).all()
    refused(lambda: ql.fake_quantize_model(pruned, ql.absmax_quantize), "prune.remove")
    parametrize.register_parametrization(model.get_submodule(layer), "weight", nn.Identity())
    refused(lambda: ql.quantize_model(model), "parametrized", "remove_parametrizations")
    adapted = made()
    adapted.peft_config = {}
    refused(lambda: ql.quantize_model(adapted), "adapters", "merge_and_unload")
    refused(lambda: ql.quantize_model(made().to("meta")), "meta")


@both
def test_nothing_found_is_an_error(bits, model):
    stored = ql.quantize_model(model, bits)
    for call in (lambda: ql.input_moments(stored, torch.arange(8)[None]), lambda: ql.block_layers(nn.Linear(2, 2)),
                 lambda: ql.plant_outliers(stored)):  # fmt: skip
        refused(call, "nn.Linear or Conv1D in numbered blocks")
    refused(lambda: ql.quantize_model(stored), "nothing to quantize")
    refused(lambda: ql.fake_quantize_model(model, ql.absmax_quantize, lambda name, p: False), "model.named_parameters")


def test_a_quantizer_that_makes_nan(model):
    """Zero over zero, on a bias of a fresh model; or in one element of many."""
    refused(lambda: ql.fake_quantize_model(model, lambda w: w / w.abs().max() * 127), "transformer.h.0", "not finite")
    refused(lambda: ql.fake_quantize_model(model, lambda w: w / torch.arange(w.numel()).view(w.shape)), "not finite")


def test_weights_that_are_not_loaded(model):
    refused(
        lambda: ql.fake_quantize_model(copy.deepcopy(model).to("meta"), ql.absmax_quantize), "load the weights first"
    )


def test_group_sizes_that_do_not_fit():
    """The sizes that do are listed; a default is never what does not fit."""
    refused(lambda: ql.absmax_quantize(torch.ones(2, 100), 4, 0, 64), "group_size=64", "50, 100")
    model = made(n_embd=100, n_head=2)
    assert ql.quantize_model(model, 4).lm_head.weight.group_size == 50
    refused(lambda: ql.quantize_model(model, 4, 64), "transformer.", "group_size=64", "50, 100")
    refused(lambda: ql.quantize_model(nn.Linear(25, 4), 4), "group_size=64", "5, 25")
    assert ql.absmax_quantize(torch.ones(2, 3), 4, 0, 1).scale.shape == (2, 3)


def test_numbers_of_numpy(model, tokenizer, tmp_path):
    """Where a whole number is asked for, one of numpy does as well; a file keeps it."""
    four, size = np.int64(4), np.int32(32)
    stored = ql.quantize_model(model, four, size)
    ql.save_quantized(stored, tmp_path / "file")
    again = ql.load_quantized(tmp_path / "file", "cpu")
    assert torch.equal(again(torch.arange(5)[None]).logits, stored(torch.arange(5)[None]).logits)
    for quantizer in (ql.absmax_quantize, ql.zeropoint_quantize, ql.clip_quantize):
        assert quantizer(torch.randn(4, 64), four, np.int64(0), size).bits == 4
    assert ql.nf4_quantize(torch.randn(4, 64), size).nbytes == ql.nf4_quantize(torch.randn(4, 64), 32).nbytes
    assert ql.calibration_tokens(model, tokenizer, np.int64(2), four).shape == (2, 4)
    assert ql.generate_text(model, tokenizer, PROMPT, np.int64(3), top_k=np.int64(5), seed=np.int64(1))
    assert ql.perplexity(model, tokenizer, PROMPT, np.int64(8), four).ppl > 0


def test_what_just_fits(model, tokenizer):
    """The prompt and the new tokens fill the context; a long context is not all used to calibrate."""
    room = 64 - len(tokenizer(PROMPT)["input_ids"])
    assert ql.generate_text(model, tokenizer, PROMPT, room)
    refused(lambda: ql.generate_text(model, tokenizer, PROMPT, room + 1), f"max_new_tokens={room + 1}")
    assert ql.calibration_tokens(made(n_positions=600), tokenizer, 1).shape == (1, 512)


def test_paths_from_home(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ql.save_quantized(ql.quantize_model(model), "~/file")
    assert (tmp_path / "file").exists() and ql.load_quantized("~/file", "cpu")
    (tmp_path / "text").write_text("A text.")
    assert ql.load_text("~/text") == "A text."
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, _ = ql.load_model("~/model", "cpu")
    assert torch.equal(loaded(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_is_no_wrong_name(error, model, tokenizer, tmp_path, monkeypatch):
    """It comes through as it is: no other name or path would help."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ql.save_quantized(ql.quantize_model(model), tmp_path / "file")

    def full(*_, **__):
        raise error("full")

    monkeypatch.setattr(GPT2LMHeadModel, "__init__", full)
    for call in (lambda: ql.load_model(tmp_path), lambda: ql.load_quantized(tmp_path / "file")):
        with pytest.raises(error, match="^full$"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_under_another_default_dtype(dtype, model, tmp_path):
    """Every constant has a dtype of its own: codes, files and outputs are the same."""
    x, ids = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(6)[None]
    quantizers = ql.absmax_quantize, ql.zeropoint_quantize, ql.nf4_quantize, ql.clip_quantize
    before, stored = [q(x) for q in quantizers], [ql.quantize_model(model, bits) for bits in (8, 4)]
    values = (
        lambda x: ql.rotate(x.flatten()),
        lambda x: ql.fp8_quantize(x)[0],
        lambda x: ql.nvfp4_quantize(x)[0],
        lambda x: ql.q4_k_quantize(x)[0],
    )
    expected = [f(x) for f in values]
    logits, moments = [m(ids).logits for m in stored], ql.input_moments(model, ids)
    ql.save_quantized(stored[0], tmp_path / "file")
    torch.set_default_dtype(dtype)
    try:
        for was, quantizer in zip(before, quantizers, strict=True):
            now = quantizer(x)
            assert torch.equal(now.qdata, was.qdata) and torch.equal(now.dequantize(), was.dequantize())
        assert all(torch.equal(f(x), was) for f, was in zip(values, expected, strict=True))
        again = [ql.quantize_model(model, bits)(ids).logits for bits in (8, 4)]
        loaded = ql.load_quantized(tmp_path / "file", "cpu")(ids).logits
        found = ql.input_moments(model, ids)
        ql.gptq_quantize(x, x.T @ x), ql.awq_quantize(x, x.T @ x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, [*again, loaded], [*logits, logits[0]]))
    assert all(torch.equal(moments[name], found[name]) for name in moments)


def test_small_weights_with_scales_of_16_bits():
    """Scales below the smallest normal half are subnormal, not lifted; what is lost beyond them is refused."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    full = ql.sqnr_db(x, ql.absmax_quantize(x, 8, 0, None, torch.float16).dequantize())
    small = 1e-3 * x
    assert ql.sqnr_db(small, ql.absmax_quantize(small, 8, 0, None, torch.float16).dequantize()) > full - 0.5
    tiny = 1e-6 * x
    assert ql.sqnr_db(tiny, ql.absmax_quantize(tiny, 4, None, None, torch.float16).dequantize()) > 3
    refused(lambda: ql.absmax_quantize(1e-8 * x, 8, 0, None, torch.float16), "torch.float16", "cannot hold")


def test_what_save_pretrained_would_write(model, tmp_path):
    """A folder from which transformers later loads random weights: it is refused at once."""
    stored = ql.quantize_model(model)
    ql.save_quantized(stored, tmp_path / "file")
    for one in (stored, ql.load_quantized(tmp_path / "file", "cpu"), copy.deepcopy(stored)):
        refused(lambda m=one: m.save_pretrained(tmp_path / "folder"), "save_quantized")
    assert not (tmp_path / "folder").exists()
    model.save_pretrained(tmp_path / "folder")  # the original still does


def test_half_against_float_is_no_negative_divergence(model, tokenizer):
    found = ql.compare(model, copy.deepcopy(model).bfloat16(), tokenizer, PROMPT)
    assert found.kl >= 0 and found.kl_ci[0] >= 0


def test_masks_in_a_checkpoint(model, tokenizer, tmp_path):
    """Old files hold the causal mask of each block, as floats or bools."""
    for dtype in (torch.bool, torch.float32):
        state = model.state_dict()
        for i in range(2):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(dtype)
        model.save_pretrained(tmp_path, state_dict=state)
        tokenizer.save_pretrained(tmp_path)
        loaded, _ = ql.load_model(tmp_path, "cpu")
        assert torch.equal(loaded(torch.arange(5)[None]).logits, model(torch.arange(5)[None]).logits)


def test_a_model_of_another_family(tokenizer):
    """Named like no GPT-2, with no bias anywhere: the same functions."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=[0, 1], pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert all(call() is not None for call in everywhere(model, tokenizer).values() if call)
