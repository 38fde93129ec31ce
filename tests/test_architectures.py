"""Tests of quantlib on language models of many kinds: tiny, random, built by transformers from a configuration."""

import copy
import json
import os

import pytest
import torch
import transformers as tf
from test_storage import BOMB, both, gpt2, logits, randn
from torch import nn
from transformers.pytorch_utils import Conv1D

import quantlib as ql

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 32
KINDS = {  # name -> configuration, and what in the names of matrices says that they stay float
    "gpt2": (gpt2().config, "wpe"), "gpt2 untied": (gpt2(tie_word_embeddings=False).config, "wpe"),
    "llama": (tf.LlamaConfig(**GROUPED), "none"), "tied": (tf.LlamaConfig(**GROUPED, tie_word_embeddings=True), "none"),
    "llama3": (tf.LlamaConfig(**GROUPED, rope_scaling=ROPE), "none"), "qwen2": (tf.Qwen2Config(**GROUPED), "none"),
    "qwen3": (tf.Qwen3Config(**GROUPED, head_dim=16), "none"), "neox": (tf.GPTNeoXConfig(**SIZES), "none"),
    "opt": (tf.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=32), "embed_positions"),
    "gemma": (tf.Gemma2Config(**GROUPED, head_dim=16), "embed_tokens"),  # which scales what it looks up
    "mixtral": (tf.MixtralConfig(**GROUPED, num_local_experts=4), "mlp"),  # tensors of three dimensions
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
EVIL = {"auto_map": {name: "evil.C" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}}


def build(kind, dtype=torch.float32):
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[kind][0]), dtype=dtype).eval()
    for name, p in model.named_parameters():
        p.data = 0.2 * randn(*p.shape, seed=len(name)).to(p) if p.ndim > 1 else p.data
    return model


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def letters(text, **_):
    """Stands for a tokenizer: a token for each letter."""
    ids = torch.tensor([[3 + ord(letter) % 90 for letter in text]])
    return tf.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@kinds
@both
def test_every_matrix_becomes_codes_and_all_else_stays(kind, bits, monkeypatch):
    """Shared ones stay shared. The logits are those of fake quantization by the same rule, and the original's are."""
    model, how = build(kind), (8, 0) if bits == 8 else (4, 0, 32, torch.bfloat16)
    model.base_model.train()
    before, new = copy.deepcopy(model.state_dict()), ql.quantize_model(model, bits, *how[2:3])
    floats, originals = dict(new.named_parameters()), dict(model.named_parameters())
    codes = {name: part for name, part in new.named_modules() if isinstance(part, ql.QuantizedWeight)}
    modes = [[m.training for m in one.modules() if not isinstance(m, ql.QuantizedWeight)] for one in (model, new)]
    assert modes[0] == modes[1] and new.config is not model.config
    assert {name for name, p in originals.items() if p.ndim > 1 and KINDS[kind][1] not in name} == set(codes)
    assert set(floats) == set(originals) - set(codes) and tied(new) == tied(model) == new.config.tie_word_embeddings
    for name, p in originals.items():
        assert p.requires_grad and torch.equal(p, before[name]) and (name in codes or torch.equal(p, floats[name]))
        assert name in codes or p.data_ptr() != floats[name].data_ptr() and not floats[name].requires_grad
    for outputs, inputs, size in ((*part.shape, sum(t.nbytes for t in part.plain())) for part in codes.values()):
        assert size == outputs * inputs + 4 * outputs if bits == 8 else size == outputs * inputs * (1 / 2 + 2 / 32)
    fake = ql.fake_quantize_model(model, lambda w: ql.absmax_quantize(w, *how), lambda name, p: name in codes).eval()
    for length, tolerance in ((1, 0.02), (5, 0.02), (30, 0.02), (30, 2e-5)):
        if tolerance < 0.02:  # without what rounds to bfloat16
            monkeypatch.setattr(ql, "CPU_HAS_BF16", False)
            monkeypatch.setattr(ql, "CPU_BLOCK", 0)
            new = ql.quantize_model(model, bits, *how[2:3])
        error, rounding = (logits(one.eval(), length) - logits(fake, length) for one in (new, model))
        assert error.norm() < tolerance * logits(fake, length).norm() < 10 * rounding.norm()


@kinds
@both
@pytest.mark.parametrize("half", [False, True])
def test_what_is_loaded_is_what_was_saved(kind, bits, half, tmp_path):
    """Bit for bit, for a prompt of any length; in evaluation mode, and tied as it was."""
    model = ql.quantize_model(build(kind), bits, 32 if bits == 4 else None).train()
    ql.save_quantized(model := model.half() if half else model, tmp_path / "file")
    loaded = ql.load_quantized(str(tmp_path / "file"), "cpu")
    assert not any(m.training for m in loaded.modules()) and loaded.config.to_dict() == model.config.to_dict()
    for one in (loaded, copy.deepcopy(loaded)):
        for length in (1, 7, 30):
            assert torch.equal(logits(one, length), logits(model.eval(), length))
    assert loaded.dtype == model.dtype and tied(loaded) == tied(model)
    assert not any(p.requires_grad for p in loaded.parameters())


@kinds
def test_everything_else_works_too(kind):
    """Measuring, calibration, rounding what is in the blocks, generating, timing: layers are found by type."""
    model, text, letters.decode = build(kind), ql.load_text()[:150], lambda ids, **_: str(ids.tolist())
    ids, int4 = ql.calibration_tokens(model, letters, 3, 40), ql.quantize_model(model, 4, 32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".1." in name}
    moments, rounded = ql.input_moments(model, ids), {}
    assert len(layers) > 3 and {name for name in moments if ".1." in name} == set(layers) and ids.shape == (3, 40)
    for name, layer in layers.items():
        weight = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
        assert moments[name].shape == (weight.shape[1],) * 2 and moments[name].diagonal().min() > 0
        rounded[f"{name}.weight"] = ql.gptq_quantize(weight, moments[name], 4, 32)
    absmax = ql.fake_quantize_model(model, lambda w: ql.absmax_quantize(w, 4, 0, 32), lambda name, p: name in rounded)
    others = {"same": model, "int4": int4, "gptq": ql.fake_quantize_model(model, rounded), "absmax": absmax}
    found = ql.compare(model, others, letters, text)
    assert (found["same"].delta_nll, found["same"].kl, found["same"].top1_agreement) == (0, 0, 1)
    assert 0 < found["gptq"].kl < found["absmax"].kl < 1 and 0 < found["int4"].kl < 1
    for one in (model, int4):
        one.generation_config.eos_token_id = [1, 2]
        assert ql.generate_text(one, letters, "Call me", 5).startswith("[70, ")
        assert (ql.benchmark_decode(one, 2, 3, rounds=2) > 0).all()


@pytest.fixture
def folder(pocket, tmp_path, monkeypatch):
    """A tiny Llama with the tokenizer of the bundled model, as save_pretrained leaves them."""
    monkeypatch.chdir(tmp_path)
    tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED | {"vocab_size": 8192})).half().save_pretrained("folder")
    pocket[1].save_pretrained("folder")
    return tmp_path / "folder"


def edit(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_load_model_takes_a_folder(folder, monkeypatch):
    """In float32 and evaluation mode; whatever code a file names is not run; by default on the module's device."""
    expected = logits(tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))
    (folder / "evil.py").write_text("import os\nos.mkdir('trace')\nclass C: pass\n")
    for attention in ("eager", "kernels-community/evil", "evil.C"):
        edit(folder, **EVIL, attn_implementation=attention, _attn_implementation=attention)
        model, tokenizer = ql.load_model(folder, "cpu")
        assert model.config._attn_implementation == "sdpa" and not model.training and not os.path.exists("trace")
        assert model.dtype == torch.float32 and torch.equal(logits(model), expected)
    assert ql.generate_text(model, tokenizer, "The old house", 5).startswith("The old house")
    assert ql.perplexity(model, tokenizer, "The old house on the hill").ppl < 1e5
    monkeypatch.setattr(ql, "DEVICE", torch.device("meta"))
    assert ql.load_model(folder)[0].device.type == "meta"


@pytest.mark.parametrize("damage", [
    lambda folder, weights: weights.write_bytes(weights.read_bytes()[:-1]),
    lambda folder, weights: weights.write_bytes(BOMB),
    lambda folder, weights: (weights.unlink(), (folder / "pytorch_model.bin").write_bytes(BOMB)),
    *(lambda folder, weights, more=more: edit(folder, **more) for more in (
        {"num_hidden_layers": 3}, {"intermediate_size": 64}, {"model_type": "t5"}, {"hidden_act": "no such"},
        {"model_type": "evil"} | EVIL,
    )),
    *(lambda folder, weights, file=file: (folder / file).write_text("{") for file in ("config.json", "tokenizer.json")),
    lambda folder, weights: folder.rename(folder.with_name("elsewhere")),
])  # fmt: skip
def test_load_model_refuses(damage, folder):
    """With one error that names the folder and what to give; no pickle is read."""
    damage(folder, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"name='{folder}'.*Give .*{ql.BUNDLED}") as caught:
        ql.load_model(folder, "cpu")
    assert caught.value.__suppress_context__ and not os.path.exists("trace")
