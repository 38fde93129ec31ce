"""Tests of real storage and real speed in quantlib: each holds a property that a notebook states or relies on.

Seeded, offline, on the CPU; what needs a GPU is skipped where there is none.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache
from transformers.pytorch_utils import Conv1D

import quantlib as ql

torch.set_num_threads(1)  # what is computed here is small: two threads waiting for each other would take longer
HERE = Path(__file__).resolve().parent
PRIVATE = ("_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")
both = pytest.mark.parametrize("bits", [8, 4])
layouts = pytest.mark.parametrize("block", [64, 32, 0])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count, seed=0):
    return torch.randint(8192, (1, count), generator=torch.Generator().manual_seed(seed))


def quantize(model, bits):
    """In groups of 32, which tiny's width allows."""
    return ql.quantize_model(model, bits, 32 if bits == 4 else None)


def quantized_parts(model):
    """Name -> QuantizedWeight, a shared one once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, ql.QuantizedWeight)}


def stored(model):
    """The tensors of the state_dict, shared ones once."""
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def as_out_in(model, name):
    """The float weight of this name as [out, in], as every QuantizedWeight has it."""
    weight = model.get_parameter(name).detach().float()
    return weight.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else weight


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def greedy(model, ids, count=12):
    with torch.no_grad():
        ids = ids.to(model.device)
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def small(tiny):
    """bits -> tiny, quantized; tests must not change them."""
    return {bits: quantize(tiny, bits) for bits in (8, 4)}


@pytest.fixture(scope="module")
def pockets(pocket):
    """bits -> the bundled model, quantized; tests must not change them."""
    return {bits: ql.quantize_model(pocket[0], bits) for bits in (8, 4)}


# --- two codes in a byte ---


def test_packing_undoes_itself():
    """Every pair of codes has a byte of its own, and every byte a pair; only the last dimension shrinks."""
    codes = torch.arange(-8, 8)
    pairs = torch.cartesian_prod(codes, codes)
    packed = ql.pack_int4(pairs)
    assert packed.dtype == torch.uint8 and packed.shape == (256, 1) and len(packed.unique()) == 256
    assert ql.unpack_int4(packed).dtype == torch.int8 and torch.equal(ql.unpack_int4(packed), pairs.to(torch.int8))
    assert torch.equal(ql.unpack_int4(ql.pack_int4(pairs.view(2, 16, 16))), pairs.view(2, 16, 16).to(torch.int8))
    assert ql.pack_int4(torch.zeros(3, 0, dtype=torch.int8)).shape == (3, 0)


def test_first_code_takes_the_low_half():
    """-8 is stored as 0 and 7 as 15; files depend on it."""
    assert ql.pack_int4(torch.tensor([[-8, 7], [7, -8], [0, -7]])).tolist() == [[0xF0], [0x0F], [0x18]]
    assert ql.unpack_int4(torch.tensor([0xF0, 0x18], dtype=torch.uint8)).tolist() == [-8, 7, 0, -7]


@pytest.mark.parametrize("codes, message", [
    (torch.zeros(2, 3, dtype=torch.int8), "even"), (torch.tensor(1), "even"), (torch.tensor([0, 8]), "-8 to 7"),
    (torch.tensor([-9, 0]), "-8 to 7"), (torch.tensor([256, 0]), "-8 to 7"), (torch.zeros(2), "float32"),
], ids=str)  # fmt: skip
def test_what_cannot_be_packed(codes, message):
    """Nothing wraps around silently."""
    with pytest.raises(ValueError, match=message):
        ql.pack_int4(codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float32])
def test_only_bytes_are_unpacked(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        ql.unpack_int4(torch.zeros(4, dtype=dtype))


# --- quantizing a model ---


@both
def test_all_matrices_are_replaced(tiny, small, bits):
    """Every Conv1D, the table and the head: one shared object where they were tied, two where they were not."""
    quantized = small[bits]
    assert not [m for m in quantized.modules() if isinstance(m, (Conv1D, nn.Linear)) and not hasattr(m.weight, "codes")]
    names = {
        f"transformer.h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(quantized_parts(quantized)) == {f"{name}.weight" for name in names | {"transformer.wte"}}
    assert quantized.lm_head.weight is quantized.transformer.wte.weight
    for name, part in quantized_parts(quantized).items():
        assert part.shape == as_out_in(tiny, name).shape


@both
def test_untied_heads_stay_untied(tiny, bits, tmp_path):
    """Also in the file: the head's codes are its own."""
    config = copy.deepcopy(tiny.config)
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval()
    quantized = quantize(model, bits)
    ql.save_quantized(quantized, tmp_path / "file")
    for one in (quantized, ql.load_quantized(tmp_path / "file", "cpu")):
        table, head = one.transformer.wte.weight, one.lm_head.weight
        assert table is not head and not torch.equal(table.dequantize(), head.dequantize())
        assert (head.dequantize() - model.lm_head.weight).abs().max() < 0.1 * model.lm_head.weight.abs().max()


@both
def test_the_model_and_not_its_configuration_says_what_is_tied(tiny, bits, tmp_path):
    """A head that was given weights of its own keeps them, whatever the configuration still says."""
    model = copy.deepcopy(tiny)
    model.lm_head.weight = nn.Parameter(randn(*tiny.lm_head.weight.shape))
    quantized = quantize(model, bits)
    ql.save_quantized(quantized, tmp_path / "file")
    for one in (quantized, ql.load_quantized(tmp_path / "file", "cpu")):
        assert (one.lm_head.weight.dequantize() - model.lm_head.weight).abs().max() < 0.5


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rest_stays_float(tiny, bits, dtype):
    """Biases, layer norms and positions are those of the original, in its dtype, also where that is half precision."""
    model = copy.deepcopy(tiny).to(dtype)
    quantized = quantize(model, bits)
    rest = dict(quantized.named_parameters())
    assert set(rest) == {n for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("wpe.weight")}
    for name, parameter in rest.items():
        assert parameter.dtype == dtype and torch.equal(parameter, model.get_parameter(name)), name
        assert not parameter.requires_grad and parameter.data_ptr() != model.get_parameter(name).data_ptr()
    assert logits(quantized, tokens(5)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_of_8_bits(tiny, dtype):
    """They are absmax codes with a float32 scale for each output channel, which a Conv1D has in its columns."""
    model = copy.deepcopy(tiny).to(dtype)
    for name, part in quantized_parts(quantize(model, 8)).items():
        expected = ql.absmax_quantize(as_out_in(model, name), axis=0)
        assert part.codes.dtype == torch.int8 and torch.equal(part.codes, expected.qdata), name
        assert part.scale.dtype == torch.float32 and torch.equal(part.scale, expected.scale[:, 0]), name


@pytest.mark.parametrize("group_size", [32, 16, 2])
def test_codes_of_4_bits(tiny, group_size):
    """The codes fit the scale that is stored, amax / 7 in bfloat16: no weight is off by more than half of it."""
    quantized = ql.quantize_model(tiny, 4, group_size)
    for name, part in quantized_parts(quantized).items():
        weight, scale = as_out_in(tiny, name).unflatten(1, (-1, group_size)), quantized.state_dict()[f"{name}.scale"]
        assert scale.dtype == torch.bfloat16 and torch.equal(scale, (weight.abs().amax(-1) / 7).bfloat16()), name
        error = (part.dequantize().view_as(weight) - weight).abs() / scale.float()[..., None]
        assert error.max() <= 0.5 + 1e-4, name


def test_groups_are_of_64_by_default(pockets):
    assert {part.group_size for part in quantized_parts(pockets[4]).values()} == {64}
    assert {part.group_size for part in quantized_parts(pockets[8]).values()} == {None}


@both
def test_original_is_untouched(tiny, bits):
    """And what the copy has beside weights is the original's: its mode, its configuration, how it generates."""
    model = copy.deepcopy(tiny)
    model.generation_config.max_length = 29
    before = copy.deepcopy(model.state_dict())
    for training in (True, False):
        quantized = quantize(model.train(training), bits)
        assert all(module.training == training for module in [*quantized.modules(), *model.modules()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert quantized.config.to_dict() == model.config.to_dict() and quantized.config is not model.config
    assert quantized.generation_config.to_dict() == model.generation_config.to_dict()
    assert quantized.generation_config is not model.generation_config


@pytest.mark.parametrize("arguments, message", [
    ({"bits": 5}, "bits=5:"), ({"bits": True}, "bits=True:"), ({"bits": "8"}, "bits='8':"),
    ({"bits": 8, "group_size": 32}, "group_size=32 goes with bits=4"),
    *(({"bits": 4, "group_size": g}, f"group_size={g!r} must be even") for g in (7, 0, -2, 3, 1, True, "64", 24, 32.0)),
    ({"bits": 4}, "group_size=64 must be even and divide every input dimension"),
], ids=str)  # fmt: skip
def test_arguments_that_do_not_fit(tiny, arguments, message):
    """tiny is 32 wide, so the usual groups of 64 do not fit it."""
    with pytest.raises(ValueError, match=f"^{message}"):
        ql.quantize_model(tiny, **arguments)


@pytest.mark.parametrize("build", [
    lambda tiny: nn.Linear(4, 4), lambda tiny: "gpt2", lambda tiny: GPT2Model(tiny.config),
    lambda tiny: GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)),
], ids=["Linear", "str", "GPT2Model", "GPTNeoX"])  # fmt: skip
def test_models_of_another_kind(tiny, build):
    with pytest.raises(ValueError, match="^model is a .*: quantize_model takes a GPT2LMHeadModel"):
        ql.quantize_model(build(tiny))


@both
def test_models_that_cannot_be_quantized(tiny, small, bits):
    """What is quantized already; a weight that no scale fits, which is named."""
    with pytest.raises(ValueError, match="quantized already"):
        quantize(small[bits], bits)
    model = copy.deepcopy(tiny)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^transformer\.h\.1\.mlp\.c_fc\.weight: .*1 NaN"):
        quantize(model, bits)


# --- what it saves ---


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A random GPT-2 of full size in files: folder with float32, and file of each kind -> path; its bytes -> number."""
    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    model.save_pretrained(folder)
    nbytes = {"float": 4 * model.num_parameters()}  # some versions of transformers keep masks in buffers besides
    for bits in (8, 4):
        quantized = ql.quantize_model(model, bits)
        ql.save_quantized(quantized, folder / str(bits))
        nbytes[bits] = sum(tensor.nbytes for tensor in stored(quantized).values())
        nbytes[bits, "half"] = sum(tensor.nbytes for tensor in stored(quantized.half()).values())
    yield folder, nbytes
    shutil.rmtree(folder)


def test_stored_bytes(full):
    """A quarter for 8 bits, less than 0.15 for 4 bits and their scales; a file holds nothing else."""
    folder, nbytes = full
    assert nbytes["float"] == 4 * 124_439_808
    for kind, most in ((8, 0.258), ((8, "half"), 0.254), (4, 0.15), ((4, "half"), 0.146)):
        assert most - 0.02 < nbytes[kind] / nbytes["float"] <= most, kind
    for bits in (8, 4):
        assert 0 < (folder / str(bits)).stat().st_size - nbytes[bits] < 50_000


PEAK = """
import sys
import quantlib as ql

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

before = peak()
path, is_float = sys.argv[1], sys.argv[2] == "float"
model = ql.GPT2LMHeadModel.from_pretrained(path, dtype=ql.torch.float32) if is_float else ql.load_quantized(path, "cpu")
with ql.torch.no_grad():
    model(ql.torch.tensor([[1]]))  # what is mapped from a file takes memory only when it is read
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_of_loading(full):
    """Loading 8 or 4 bits and predicting a token never holds half of what that takes with float32."""
    folder, nbytes = full
    peaks = {
        kind: 1024 * int(in_subprocess(PEAK, folder / path, kind))
        for kind, path in (("float", "."), (8, "8"), (4, "4"))
    }
    assert peaks["float"] > 0.9 * nbytes["float"]
    assert peaks[8] <= 0.45 * peaks["float"] and peaks[4] <= 0.45 * peaks["float"], peaks


def in_subprocess(code, *arguments, **environment):
    """What a fresh interpreter prints that can import quantlib and this file."""
    paths = os.pathsep.join(str(path) for path in (HERE.parent, HERE))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- files ---


@pytest.fixture
def file(small, tmp_path):
    """tiny in 4 bits, as save_quantized leaves it."""
    ql.save_quantized(small[4], tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def read(path):
    with safetensors.safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()[ql.FORMAT])


@both
@pytest.mark.parametrize("half", [False, True])
def test_what_is_loaded_is_what_was_saved(pockets, bits, half, tmp_path):
    """Bit for bit, for a prompt of any length; in evaluation mode, which the model was not in when it was saved."""
    model = copy.deepcopy(pockets[bits])
    model = model.half() if half else model
    ql.save_quantized(model.train(), tmp_path / "file")
    loaded = ql.load_quantized(tmp_path / "file", "cpu")
    assert not any(module.training for module in loaded.modules())
    assert loaded.config.to_dict() == model.config.to_dict() and loaded.lm_head.weight is loaded.transformer.wte.weight
    for length in (1, 7, 40):
        assert torch.equal(logits(loaded, tokens(length)), logits(model.eval(), tokens(length)))


@both
def test_one_file_without_a_trace(tiny, small, bits, tmp_path):
    """Tensors as state_dict has them, shared ones once; bits, groups and configuration under the key of quantlib."""
    ql.save_quantized(small[bits], str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    tensors, about = read(tmp_path / "file")
    state = stored(small[bits])
    assert set(tensors) == set(state) and all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert (about["bits"], about["group_size"]) == (bits, 32 if bits == 4 else None)
    assert GPT2Config.from_dict(about["config"]).to_dict() == tiny.config.to_dict()


@layouts
def test_files_do_not_depend_on_the_cpu(tiny, file, block, monkeypatch, tmp_path):
    """However a CPU orders the codes in memory, the file it writes is the same, and it reads that of any other."""
    monkeypatch.setattr(ql, "_int4_block", lambda: block)
    model = quantize(tiny, 4)
    assert {part.block for part in quantized_parts(model).values()} == {block}
    ql.save_quantized(model, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == file.read_bytes()
    loaded = ql.load_quantized(file, "cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("error", [OSError("disk full"), safetensors.SafetensorError("disk full"), KeyboardInterrupt()])
def test_failed_saving_leaves_the_old_file(small, file, error, monkeypatch):
    """Whole, and nothing beside it, although a part was written already."""

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of a file")
        raise error

    before = file.read_bytes()
    monkeypatch.setattr(ql, "save_file", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        ql.save_quantized(small[8], file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_saving_over_a_file(small, file):
    """The new one takes its name; who reads the old one reads it to the end."""
    before = file.read_bytes()
    with open(file, "rb") as opened:
        ql.save_quantized(small[8], file)
        assert opened.read() == before
    assert read(file)[1]["bits"] == 8 and list(file.parent.iterdir()) == [file]


def test_what_cannot_be_saved(tiny, small, tmp_path):
    """A model in float; a folder that is not there, which the message names."""
    with pytest.raises(ValueError, match="GPT2LMHeadModel without codes: give the result of quantize_model"):
        ql.save_quantized(tiny, tmp_path / "file")
    with pytest.raises((OSError, ValueError), match="missing-folder"):
        ql.save_quantized(small[8], tmp_path / "missing-folder" / "file")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        ql.save_quantized(small[8], tmp_path)  # a folder
    assert not list(tmp_path.iterdir())


def assert_not_loaded(path, reason):
    """One clear error: the path, the reason, a remedy, and no traceback of the libraries below."""
    with pytest.raises(ValueError, match=f"^load_quantized cannot load path=.*{reason}") as caught:
        ql.load_quantized(path, "cpu")
    assert repr(str(path)) in str(caught.value) and "save_quantized wrote" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.1, 0.5, 0.99, -1])
def test_files_cut_short(file, kept):
    """Within the header, within the tensors, by a byte."""
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_not_loaded(file, "[a-z]{4}")


def test_foreign_files(file, tmp_path):
    """No file, a folder, a text, bytes too many, the float weights of the same model."""
    assert_not_loaded(tmp_path / "missing", "No such file")
    assert_not_loaded(tmp_path, "[a-z]{4}")
    (tmp_path / "text").write_text("This is no model. " * 20)
    assert_not_loaded(tmp_path / "text", "header")
    file.write_bytes(file.read_bytes() + b"\0")
    assert_not_loaded(file, "[a-z]{4}")
    assert_not_loaded(ql.BUNDLED_FOLDER / "model.safetensors", "not one of save_quantized")


NORM, TABLE = "transformer.ln_f.weight", "transformer.wte.weight"


@pytest.mark.parametrize("change, reason", [
    (lambda tensors, about: tensors.update({NORM: torch.ones(31)}), rf"{NORM} is torch.float32 \[31\]"),
    (lambda tensors, about: tensors.update({NORM: tensors[NORM].int()}), f"{NORM} is torch.int32"),
    (lambda tensors, about: tensors.update({f"{TABLE}.codes": tensors[f"{TABLE}.codes"].to(torch.int8)}),
     f"{TABLE}.codes is torch.int8"),
    (lambda tensors, about: tensors.update({f"{TABLE}.scale": tensors[f"{TABLE}.scale"].float()}),
     f"{TABLE}.scale is torch.float32"),
    (lambda tensors, about: tensors.pop(NORM), f"{NORM} is missing"),
    (lambda tensors, about: tensors.pop(f"{TABLE}.codes"), f"{TABLE}.codes is missing"),
    (lambda tensors, about: tensors.update(more=torch.ones(1)), "more is not a part"),
    (lambda tensors, about: about["config"].update(n_layer=3), r"h\.2\..* is missing"),
    (lambda tensors, about: about["config"].update(n_layer=1), r"h\.1\..* is not a part"),
    (lambda tensors, about: about["config"].update(n_embd=64), "is torch"),
    (lambda tensors, about: about["config"].update(tie_word_embeddings=False), "lm_head.* is missing"),
    (lambda tensors, about: about.update(bits=5), "bits"), (lambda tensors, about: about.update(bits="4"), "bits"),
    (lambda tensors, about: about.update(bits=8, group_size=None), "codes is torch.uint8"),
    (lambda tensors, about: about.update(group_size=7), "group_size=7"),
    (lambda tensors, about: about.update(group_size=16), "scale is torch"),
    (lambda tensors, about: about.update(group_size=None), "group_size=None"),
    (lambda tensors, about: about.pop("config"), "config"), (lambda tensors, about: about.pop("bits"), "bits"),
], ids=[
    "shape", "integers", "codes of int8", "scale of float32", "norm missing", "codes missing", "one too many",
    "more layers", "fewer layers", "wider", "untied", "5 bits", "bits as text", "8 bits", "groups of 7", "groups of 16",
    "no groups", "no config", "no bits",
])  # fmt: skip
def test_files_that_contradict_themselves(file, change, reason):
    """Tensors, or what the metadata says about them, are not those of one model: the first misfit is told."""
    tensors, about = read(file)
    change(tensors, about)
    save_file(tensors, file, metadata={ql.FORMAT: json.dumps(about)})
    assert_not_loaded(file, reason)


@pytest.mark.parametrize("text", ["no json {", "", "[]", "7", '"text"'])
def test_metadata_that_cannot_be_read(file, text):
    save_file(read(file)[0], file, metadata={ql.FORMAT: text})
    assert_not_loaded(file, "[a-z]{4}")


# --- it keeps working ---


@both
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_weights(pocket, pockets, bits):
    """The oracle: the float model with every matrix replaced by what the codes stand for."""
    oracle = copy.deepcopy(pocket[0])
    for name, part in quantized_parts(pockets[bits]).items():
        as_out_in(oracle, name).copy_(part.dequantize())
    for length in (1, 7, 40):
        got, expected = logits(pockets[bits], tokens(length)), logits(oracle, tokens(length))
        assert (got - expected).norm() < 0.015 * expected.norm()
        assert (expected - logits(pocket[0], tokens(length))).norm() > 0.001 * expected.norm()  # it was quantized


@both
def test_copies_generate_the_same(tiny, pocket, pockets, bits, tmp_path):
    """deepcopy, a state_dict into another quantized model, a file."""
    model, ids = pockets[bits], tokens(9)
    ql.save_quantized(model, tmp_path / "file")
    filled = ql.quantize_model(GPT2LMHeadModel(pocket[0].config).eval(), bits)
    assert greedy(filled, ids) != greedy(model, ids)
    filled.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), filled, ql.load_quantized(tmp_path / "file", "cpu")):
        assert greedy(other, ids) == greedy(model, ids)
        assert torch.equal(logits(other, ids), logits(model, ids))


@both
@pytest.mark.parametrize("name", ["codes", "scale"])
def test_state_dicts_are_complete(small, bits, name):
    """A matrix that a state_dict lacks is told, as in any PyTorch model, and nothing changes."""
    state, model = small[bits].state_dict(), copy.deepcopy(small[bits])
    del state[f"transformer.h.1.mlp.c_fc.weight.{name}"]
    with pytest.raises(RuntimeError, match=rf"Missing key.*transformer\.h\.1\.mlp\.c_fc\.weight\.{name}"):
        model.load_state_dict(state)
    assert torch.equal(logits(model, tokens(3)), logits(small[bits], tokens(3)))


@both
def test_generation_in_batches(tiny, small, bits):
    """Each prompt of a batch goes on as it does alone; the last hidden states do not lie side by side in memory."""
    ids = torch.cat([tokens(6, seed=seed) for seed in range(3)])
    for model in (small[bits], copy.deepcopy(small[bits]).bfloat16()):
        with torch.no_grad():
            last = model(ids, logits_to_keep=1).logits[:, 0]
            alone = torch.cat([model(ids[i : i + 1], logits_to_keep=1).logits[:, 0] for i in range(3)])
        assert (last - alone).norm() < 0.02 * alone.norm()


@both
def test_measuring(pocket, pockets, bits):
    """perplexity and compare take it as they take any model."""
    text = ql.load_text()[:1500]
    result = ql.compare(pocket[0], pockets[bits], pocket[1], text)
    assert ql.perplexity(pockets[bits], pocket[1], text).nll == result.candidate.nll
    assert 0 < result.kl < (0.2 if bits == 4 else 0.002)


def test_quality_of_8_bits(pocket, pockets):
    """On the evaluation text the model with 8 bits is as good as the original, and nearly always agrees with it."""
    result = ql.compare(pocket[0], pockets[8], pocket[1], ql.load_text()[:12_000])
    assert result.verdict != "worse" or result.delta_nll <= 0.001
    assert result.top1_agreement >= 0.98


@layouts
@both
def test_conversions_keep_codes_and_scales(tiny, bits, block, monkeypatch):
    """.half() and the like change what is in float, and the dtype of the logits; never a code or a scale."""
    monkeypatch.setattr(ql, "_int4_block", lambda: 0)  # the private operation need not be there for another block
    model = quantize(tiny, bits)
    before = {name: t.clone() for name, t in model.state_dict().items() if name.endswith((".codes", ".scale"))}
    expected = logits(model, tokens(9))
    for convert, dtype in (
        (lambda m: m.half(), torch.float16), (lambda m: m.bfloat16(), torch.bfloat16), (lambda m: m.to("cpu"), None),
        (lambda m: m.float(), torch.float32), (lambda m: m.to(torch.float16), torch.float16),
    ):  # fmt: skip
        monkeypatch.setattr(ql, "_int4_block", lambda: block)
        converted = convert(copy.deepcopy(model))
        assert {part.block for part in quantized_parts(converted).values()} == {block if bits == 4 else 0}
        state = converted.state_dict()
        assert all(state[name].dtype == t.dtype and torch.equal(state[name], t) for name, t in before.items())
        if not block:
            assert (logits(converted, tokens(9)) - expected).norm() < 0.03 * expected.norm()
            assert logits(converted, tokens(9)).dtype == (dtype or torch.float32)
            assert {p.dtype for p in converted.parameters()} == {dtype or torch.float32}
        monkeypatch.setattr(ql, "_int4_block", lambda: 0)
        again = converted.float().state_dict()
        assert all(torch.equal(again[name], t) for name, t in before.items())


@both
def test_gradients_pass_through(small, bits):
    """An input that asks for it gets the gradient of the dequantized product; the fast operations have none."""
    layer = small[bits].transformer.h[0].mlp.c_fc
    for rows in (1, 8, 40):
        x, upstream = randn(rows, 32).requires_grad_(), randn(rows, 128, seed=1)
        (gradient,) = torch.autograd.grad(layer(x), x, upstream)
        assert torch.allclose(gradient, upstream @ layer.weight.dequantize(), rtol=1e-5, atol=1e-5)
    embedded = randn(1, 6, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(small[bits](inputs_embeds=embedded).logits.square().sum(), embedded)
    assert torch.isfinite(gradient).all() and gradient.any()


@pytest.fixture
def fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


@needs_compiler
@torch.no_grad()
def test_compiled_model(tiny, fresh_compiler):
    """torch.compile changes the order of sums, not the logits."""
    config = copy.deepcopy(tiny.config)
    config.n_layer, config.vocab_size = 1, 256
    torch.manual_seed(0)
    model, ids = quantize(GPT2LMHeadModel(config).eval(), 8), tokens(1) % 256
    expected = logits(model, ids)
    got = torch.compile(model, dynamic=False)(ids, use_cache=False).logits
    assert (got - expected).norm() < 0.01 * expected.norm()


@needs_compiler
def test_compiled_products(fresh_compiler, monkeypatch):
    """For few rows and for many; of 8 bits, and of 4 bits in the plain order and in that of this CPU."""
    weights = [quantized_weight(96, 64, 8), quantized_weight(96, 64, 4)]
    monkeypatch.setattr(ql, "_int4_block", lambda: 0)
    weights.append(quantized_weight(96, 64, 4))
    x = {rows: inputs(rows, 64) for rows in (1, 4, 6)}
    products = torch.compile(lambda: [ql.matmul(x[rows], w) for w in weights for rows in x], dynamic=False)()
    for product, (weight, rows) in zip(products, [(w, rows) for w in weights for rows in x], strict=True):
        assert_near(product, x[rows], weight, 8e-3)


# --- the product ---


def quantized_weight(out_features, in_features, bits, group_size=32, seed=0):
    """A random one, rows and groups of different size; group_size is for 4 bits."""
    group_size = group_size if bits == 4 else None
    weight = randn(out_features, in_features, seed=seed) * (0.5 * randn(out_features, 1, seed=seed + 1)).exp() / 20
    q = ql.absmax_quantize(weight, bits, axis=0, group_size=group_size)
    part = ql.QuantizedWeight(out_features, in_features, bits, group_size)
    codes, scale = (ql.pack_int4(q.qdata), q.scale.bfloat16()) if bits == 4 else (q.qdata, q.scale[:, 0])
    part.load_state_dict({"codes": codes, "scale": scale})
    return part


def inputs(rows, width, dtype=torch.float32):
    """Rows of very different size; one of zeros and one with a huge element where there are enough."""
    x = randn(rows, width, seed=rows) * torch.logspace(-1, 2, rows)[:, None]
    if rows > 2:
        x[1], x[2, 3] = 0, 1e4
    return x.to(dtype)


def assert_near(y, x, weight, tolerance):
    """Relative to the length of each row, or to what it would be if its products had random signs and none cancelled.

    All rows together are within the tolerance, none by itself is out of twice that.
    """
    x, w = x.double(), weight.dequantize(torch.float64).T
    length = torch.maximum((x @ w).square(), x.square() @ w.square()).sum(dim=1).sqrt()
    error = (y.double() - x @ w).norm(dim=1)
    assert not error[length == 0].any()
    error = error[length > 0] / length[length > 0]
    assert error.square().mean().sqrt() <= tolerance and error.max() <= 2 * tolerance, error.tolist()


def assert_product(x, weight, tolerance):
    """Right in dtype, shape and number."""
    y = ql.matmul(x, weight)
    assert y.dtype == x.dtype and y.shape == (len(x), weight.shape[0]) and torch.isfinite(y).all()
    assert_near(y, x, weight, tolerance)


ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 100, 257)
SHAPES = [(96, 64, 32), (100, 64, 64), (64, 32, 32), (257, 96, 32), (600, 64, 32), (40, 36, 12)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@both
@all_shapes
@dtypes
def test_product(bits, shape, dtype):
    """By whichever way this machine takes: at worst rounded to bfloat16."""
    weight = quantized_weight(*shape[:2], bits, shape[2])
    for rows in ROWS:
        assert_product(inputs(rows, shape[1], dtype), weight, 8e-3)


@all_shapes
def test_product_in_int8_keeps_15_bits(shape):
    """float32 times 8 bits: where rows are many, x is not rounded to bfloat16, nor to 8 bits, on any machine."""
    weight = quantized_weight(*shape[:2], 8)
    for rows in ROWS:
        if rows > 8 or rows > 4 and ql._int_mm_is_exact():
            assert_product(randn(rows, shape[1], seed=rows), weight, 4e-5)
            assert_product(inputs(rows, shape[1]), weight, 2e-4)  # one huge element takes digits from its row


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_limbs(rows, monkeypatch):
    """Two int8 numbers hold x to half a 254th of a step; what is computed with them is the product of that, exactly."""
    x, weight = inputs(rows, 64), quantized_weight(600, 64, 8)
    high, low, step = ql._limbs(x)
    assert high.dtype == low.dtype == torch.int8 and step.shape == (rows, 1) and step.dtype == torch.float32
    assert high.abs().max() <= 127 and low.abs().max() <= 127 and (high.abs().amax(1)[x.any(1)] == 127).all()
    assert torch.equal(step[x.any(1)], x.abs().amax(1, keepdim=True)[x.any(1)] / 127) and (step[~x.any(1)] == 1).all()
    held = (high.double() + low.double() / 254) * step.double()
    assert ((held - x.double()).abs() <= step / 254 * 0.51).all()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int(), raising=False)
    y = ql._two_limbs(x, weight)
    assert y.dtype == torch.float32
    expected = held @ weight.dequantize(torch.float64).T
    assert ((y - expected).norm(dim=1) <= 1e-6 * held.norm(dim=1) * weight.dequantize().norm()).all()


@pytest.mark.parametrize("smallest, step", [(0.0, 1.0), (1e-29, 1e-29), (1e-31, 1.0), (torch.nan, torch.nan)])
def test_steps_of_small_rows(smallest, step):
    """Too small to divide by counts as zero, so that nothing becomes infinite; NaN stays NaN."""
    high, low, got = ql._limbs(torch.tensor([[127 * smallest, 0.0]]))
    assert torch.allclose(got, torch.tensor([[step]]), rtol=1e-5, atol=0, equal_nan=True)
    assert high[0, 1] == low[0, 1] == 0


@pytest.fixture
def plain_pytorch(monkeypatch):
    """A PyTorch without the private operations, and a CPU without bfloat16."""
    for name in PRIVATE:
        monkeypatch.delattr(torch, name, raising=False)
    monkeypatch.setattr(ql, "_cpu_has_bf16", lambda: False)
    cached = ql._int4_block, ql._int_mm_is_exact
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@both
@all_shapes
@dtypes
def test_product_of_plain_pytorch(plain_pytorch, bits, shape, dtype):
    """Without private operations everything still works, in the precision of x."""
    assert ql._int4_block() == 0 and not ql._int_mm_is_exact()
    weight = quantized_weight(*shape[:2], bits, shape[2])
    for rows in ROWS:
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
        assert_product(inputs(rows, shape[1], dtype), weight, tolerance)


@both
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "shape", [(5, 2**18, 64), (7, 2**17 + 64, 32), (2, 2**19 + 64, 32), (1301, 2**11 - 32, 32)], ids=str
)
def test_product_of_plain_pytorch_in_blocks(plain_pytorch, bits, shape, threads, monkeypatch):
    """Rows so long, or so many, that they take several blocks; the last has fewer, or fewer than there are threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, x = quantized_weight(*shape[:2], bits, shape[2]), randn(2, shape[1])
    assert_near(ql._by_public_operations(x, weight), x, weight, 1e-4)  # float32, and half a million to add


@both
@pytest.mark.parametrize("patches", [
    {"_int_mm_is_exact": False}, {"_cpu_has_bf16": False}, {"_cpu_has_bf16": True}, {"_int4_block": 0},
    {"_int4_block": 0, "_cpu_has_bf16": False}, {"_int4_block": 0, "_cpu_has_bf16": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("int8pack", [True, False])
def test_product_on_other_machines(bits, patches, int8pack, monkeypatch):
    """Each of the private operations may be missing while the others are there."""
    for name, value in patches.items():
        monkeypatch.setattr(ql, name, lambda value=value: value)
    if not int8pack:
        monkeypatch.delattr(torch, "_weight_int8pack_mm", raising=False)
    weight = quantized_weight(257, 96, bits)
    for rows in ROWS:
        exact = bits == 4 and patches.get("_int4_block") == 0 and not ql._cpu_has_bf16()
        exact |= bits == 8 and not int8pack and not ql._int_mm_is_exact()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert_product(inputs(rows, 96, dtype), weight, 1e-6 if exact and dtype == torch.float32 else 8e-3)


def assert_products_of_large_sums():
    """Codes and x at the ends of their ranges: sums that saturate in 16 bits are off by half."""
    for bits in (8, 4):
        weight, largest = quantized_weight(768, 768, bits, 64), quantized_weight(768, 768, bits, 64)
        largest.load_state_dict({
            "codes": torch.full_like(weight.state_dict()["codes"], 127 if bits == 8 else 0xFF),
            "scale": weight.state_dict()["scale"],
        })  # fmt: skip
        for rows in (1, 8, 100):
            for x in (100 * randn(rows, 768, seed=rows), torch.full((rows, 768), 1000.0)):
                for dtype in (torch.float32, torch.bfloat16):
                    assert_product(x.to(dtype), weight, 8e-3)
                    assert_product(x.to(dtype), largest, 8e-3)


@pytest.mark.parametrize("cpu, onednn", [("default", "SSE41"), ("avx2", "AVX2")])
def test_product_on_other_cpus(cpu, onednn):
    """In PyTorch as older CPUs have it: there int8 products saturate, and 4-bit weights lie in another order."""
    code = "import test_storage_speed as t; t.assert_products_of_large_sums(); print(t.ql._int4_block())"
    block = in_subprocess(code, ATEN_CPU_CAPABILITY=cpu, ONEDNN_MAX_CPU_ISA=onednn)
    assert cpu != "avx2" or int(block) in (0, 32)


def test_product_of_large_sums():
    assert_products_of_large_sums()


@pytest.fixture
def asked_anew():
    """What was found out about this CPU is forgotten, before and after."""
    functions = ql._int4_block, ql._int_mm_is_exact, ql._cpu_has_bf16
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.mark.parametrize("vnni, wrong, exact", [(True, 0, True), (True, 1, False), (False, 0, False), (None, 0, False)])
def test_int8_products_are_tried_out(asked_anew, vnni, wrong, exact, monkeypatch):
    """A single wrong sum is enough to do without; so is a CPU, or a PyTorch, that does not say what it can."""

    def product(a, b):
        assert a.dtype == b.dtype == torch.int8 and a.shape[0] > 16  # fewer rows are not supported on a GPU
        assert {*a.flatten().tolist(), *b.flatten().tolist()} == {127, -127}  # the largest sums
        sums = a.int() @ b.int()
        sums[-1, -1] += wrong
        return sums

    monkeypatch.setattr(torch, "_int_mm", product, raising=False)
    if vnni is None:
        monkeypatch.delattr(torch.cpu, "_is_vnni_supported", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    assert ql._int_mm_is_exact() is exact
    monkeypatch.delattr(torch, "_int_mm")
    assert ql._int_mm_is_exact() is exact  # asked once
    ql._int_mm_is_exact.cache_clear()
    assert ql._int_mm_is_exact() is False


@pytest.mark.parametrize("avx512, amx", [(True, True), (True, False), (False, True), (False, False), (None, None)])
def test_bfloat16_is_looked_for(asked_anew, avx512, amx, monkeypatch):
    """Either unit will do; a PyTorch that knows neither has none."""
    for name, there in (("avx512_bf16", avx512), ("amx_tile", amx)):
        if there is None:
            monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda there=there: there, raising=False)
    assert ql._cpu_has_bf16() is bool(avx512 or amx)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: not (avx512 or amx), raising=False)
    assert ql._cpu_has_bf16() is bool(avx512 or amx)  # asked once


@pytest.mark.parametrize(
    "order, wrong, block", [(64, 0, 64), (32, 0, 32), (16, 0, 0), (64, 1, 0), (32, 1, 0), (0, 0, 0)]
)
def test_int4_products_are_tried_out(asked_anew, order, wrong, block, monkeypatch):
    """Both orders of codes are known by what they pack; another order, or a wrong product, is done without."""
    given = {}

    def convert(codes, inner):
        assert codes.dtype == torch.int32 and 0 <= codes.min() and codes.max() == 15 and len(codes.unique()) == 16
        if not order:
            raise RuntimeError("not supported")
        low, high = codes.unflatten(0, (-1, order)).chunk(2, dim=1)
        given["codes"] = codes
        return (low | high << 4).transpose(1, 2).to(torch.uint8).reshape(len(codes), -1)

    def product(x, packed, group_size, scale):
        codes = given["codes"]
        assert x.dtype == scale.dtype == torch.bfloat16 and scale.shape == (codes.shape[1] // group_size, len(codes), 2)
        y = x.float() @ (codes.float() - 8).T * scale[0, :, 0] + scale[0, :, 1]
        y[-1, -1] += wrong
        return y.bfloat16()

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", convert, raising=False)
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", product, raising=False)
    assert ql._int4_block() == block
    for name in ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"):
        monkeypatch.delattr(torch, name)
        assert ql._int4_block() == block  # asked once
    ql._int4_block.cache_clear()
    assert ql._int4_block() == 0


def test_printed_models_say_how_they_are_stored(small):
    assert repr(quantized_weight(100, 64, 4)) == "QuantizedWeight([100, 64], bits=4, group_size=32)"
    assert repr(quantized_weight(100, 64, 8)) == "QuantizedWeight([100, 64], bits=8)"
    assert "QuantizedWeight([96, 32], bits=8)" in repr(small[8])


def test_ones_are_made_once():
    assert ql._ones(7) is ql._ones(7) and torch.equal(ql._ones(7), torch.ones(7, dtype=torch.bfloat16))


def test_groups_that_the_product_of_the_cpu_knows(monkeypatch):
    """Those of its documentation; others stay in the plain order, and so do 8 bits."""
    monkeypatch.setattr(ql, "_int4_block", lambda: 64)
    for group_size in (2, 16, 30, 32, 34, 62, 64, 66, 126, 128, 130, 254, 256, 258, 512):
        weight = quantized_weight(3, group_size, 4, group_size)
        assert weight.block == (64 if group_size in (32, 64, 128, 256) else 0), group_size
    assert quantized_weight(64, 64, 8).block == 0


@pytest.fixture
def ways(monkeypatch):
    """What matmul takes, noted, and not computed; as on a machine that has all the operations."""
    taken = []

    def note(owner, name, way, product):
        monkeypatch.setattr(owner, name, lambda *arguments: (taken.append(way), product(*arguments))[1], raising=False)

    note(torch, "_weight_int8pack_mm", "int8pack", lambda x, codes, ones: x.new_zeros(len(x), len(codes)))
    note(torch, "_weight_int4pack_mm_for_cpu", "int4pack", lambda x, *_: x.new_zeros(len(x), 128))
    for name, way in {"_two_limbs": "limbs", "_by_public_operations": "public", "_multiply_and_sum": "fused"}.items():
        note(ql, name, way, lambda x, weight: x.new_zeros(len(x), weight.shape[0]))
    dequantize = ql.QuantizedWeight.dequantize
    monkeypatch.setattr(
        ql.QuantizedWeight,
        "dequantize",
        lambda self, dtype, *part: (taken.append(dtype), dequantize(self, dtype, *part))[1],
    )
    return taken


@pytest.mark.parametrize("bits, dtype, rows, inputs, machine, way", [
    (8, "float32", 4, 64, "", "int8pack"), (8, "float32", 5, 64, "", "limbs"), (8, "float32", 9, 64, "", "limbs"),
    (8, "float32", 5, 64, "inexact", "int8pack"), (8, "float32", 8, 64, "inexact", "int8pack"),
    (8, "float32", 9, 64, "inexact", "public"), (8, "float32", 4, 36, "", "public"), (8, "float32", 5, 36, "", "limbs"),
    (8, "bfloat16", 8, 64, "", "int8pack"), (8, "bfloat16", 9, 64, "", "bfloat16"),
    (8, "float16", 9, 64, "", "float16"), (4, "float32", 1, 64, "block", "int4pack"),
    (4, "float32", 256, 64, "block", "int4pack"),
    (4, "float32", 257, 64, "block bf16", "bfloat16"), (4, "float32", 257, 64, "block", "float32"),
    (4, "float32", 4, 64, "bf16", "public"), (4, "float32", 1, 64, "bf16", "public"),
    (4, "float32", 5, 64, "bf16", "bfloat16"),
    (4, "float32", 40, 64, "", "public"), (4, "float16", 5, 64, "bf16", "bfloat16"),
    (4, "float16", 5, 64, "", "float16"), (4, "float16", 4, 64, "bf16", "float16"),
    (8, "float32", 4, 64, "compiling", "fused"), (4, "float32", 4, 64, "compiling", "fused"),
    (8, "float32", 5, 64, "compiling", "float32"), (4, "float16", 5, 64, "compiling", "float16"),
    (4, "float32", 257, 64, "block compiling", "int4pack"),
])  # fmt: skip
def test_which_way_a_product_takes(ways, bits, dtype, rows, inputs, machine, way, monkeypatch):
    """Any of them is right; this is about time: what was measured to be the fastest for so many rows on a machine."""
    monkeypatch.setattr(ql, "_int_mm_is_exact", lambda: "inexact" not in machine)
    monkeypatch.setattr(ql, "_cpu_has_bf16", lambda: "bf16" in machine)
    monkeypatch.setattr(ql, "_int4_block", lambda: 64 if "block" in machine else 0)
    weight = quantized_weight(100, inputs, bits, 32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: "compiling" in machine)
    y = ql.matmul(torch.zeros(rows, inputs, dtype=getattr(torch, dtype)), weight)
    assert y.shape == (rows, 100) and str(y.dtype) == f"torch.{dtype}"
    assert {str(one).removeprefix("torch.") for one in ways} == {way}


@both
def test_product_for_the_compiler(bits, monkeypatch):
    """What torch.compile would make one kernel of, as it is."""
    monkeypatch.setattr(ql, "_int4_block", lambda: 0)
    weight = quantized_weight(100, 64, bits)
    for rows in (1, 3):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            y = ql._multiply_and_sum(inputs(rows, 64, dtype), weight)
            assert y.dtype == dtype
            assert_near(y, inputs(rows, 64, dtype), weight, tolerance)


@both
@dtypes
def test_product_of_no_rows(bits, dtype):
    assert ql.matmul(torch.zeros(0, 64, dtype=dtype), quantized_weight(96, 64, bits)).shape == (0, 96)


@both
@dtypes
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_product_of_rows_that_are_apart(bits, dtype, rows):
    """x as a part of something larger, or transposed: the same numbers as if it lay in one piece."""
    weight, whole = quantized_weight(96, 64, bits), randn(rows, 3, 128).to(dtype)
    for x in (whole[:, -1, :64], whole[:, 0, ::2], whole[:, 1, 64:].T.contiguous().T):
        assert_product(x, weight, 8e-3)


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_product_does_not_hide_nan(bits, value):
    """A broken activation gives a broken row, as in float, and not a plausible number."""
    weight = quantized_weight(96, 64, bits)
    for rows in (1, 8, 40):
        x = randn(rows, 64)
        x[0, 5] = value
        y = ql.matmul(x, weight)
        assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1:]).all(), rows


@layouts
@pytest.mark.parametrize("shape", [(64, 32, 32), (100, 64, 32), (257, 256, 128), (32, 64, 64), (130, 64, 16)], ids=str)
def test_layouts_hold_the_same_weight(block, shape, monkeypatch):
    """Any slice and any rows of it, in every dtype, exactly; groups that the CPU's product does not know stay plain."""
    out, width, group_size = shape
    monkeypatch.setattr(ql, "_int4_block", lambda: 0)
    plain = quantized_weight(out, width, 4, group_size)
    monkeypatch.setattr(ql, "_int4_block", lambda: block)
    other = quantized_weight(out, width, 4, group_size)
    assert (plain.block, other.block) == (0, block if group_size >= 32 else 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for start in range(0, out, 64):
            for stop in (None, start + 1, start + 33, start + 64, start + 256):
                expected = plain.dequantize(dtype)[start:stop]
                assert torch.equal(plain.dequantize(dtype, start, stop), expected)
                assert torch.equal(other.dequantize(dtype, start, stop), expected)
        for index in (torch.arange(out), torch.tensor([[out - 1, 0, 31], [1, 17, out - 1]]), torch.tensor(out - 1)):
            assert torch.equal(plain.rows(index, dtype), plain.dequantize(dtype)[index])
            assert torch.equal(other.rows(index, dtype), plain.dequantize(dtype)[index])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor) and other.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(copy.deepcopy(other).dequantize(), plain.dequantize())


def test_rows_of_8_bits():
    weight = quantized_weight(100, 64, 8)
    index = torch.tensor([[99, 0, 31], [1, 17, 99]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.rows(index, dtype), weight.dequantize(dtype)[index])
        assert torch.equal(weight.dequantize(dtype, 64, 300), weight.dequantize(dtype)[64:])


# --- decoding ---


def decoders(model, length, monkeypatch):
    """One with the cache of generate, one with a cache that does not move, one that is compiled, as far as it knows."""
    static = ql.Decoder(model, length)
    static.cache = StaticCache(config=model.config, max_cache_len=length)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, **_: model)
        return ql.Decoder(model, length), static, ql.Decoder(model, length, compiled=True)


@pytest.mark.parametrize("kind", ["float", 8, 4])
def test_decoder_emits_the_tokens_of_generate(pocket, pockets, kind, monkeypatch):
    """Also after it was started anew, and in several parts; the last token that there is room for included."""
    model = pocket[0] if kind == "float" else pockets[kind]
    ids, others = pocket[1]("The old house on the hill", return_tensors="pt")["input_ids"], tokens(5)
    expected = greedy(model, ids, 16)
    assert len(set(expected)) > 4
    for decoder in decoders(model, ids.shape[1] + 16, monkeypatch):
        for prompt in (ids, others, ids):
            decoder.start(prompt)
            emitted = [*decoder.steps(3).tolist(), *decoder.steps(1).tolist(), *decoder.steps(12).tolist()]
            assert emitted == greedy(model, prompt, 16)
        assert emitted == expected


def test_decoder_refuses(tiny):
    """More than the context holds, fewer than a prompt and a token, a CUDA graph on the CPU, more steps than room."""
    for length in (33, 1, 0, 8.0, "8"):
        with pytest.raises(ValueError, match=f"^length={length!r}: give 2 to 32"):
            ql.Decoder(tiny, length)
    with pytest.raises(ValueError, match="^captured=True: .*GPU"):
        ql.Decoder(tiny, 32, captured=True)
    decoder = ql.Decoder(tiny, 32)
    decoder.start(tokens(20))
    assert len(decoder.steps(7)) == 7
    with pytest.raises(ValueError, match="^count=6: there is room for 5 more"):
        decoder.steps(6)
    assert len(decoder.steps(5)) == 5


# --- timing ---


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.append(seconds)`."""
    passed = []
    monkeypatch.setattr(ql.time, "perf_counter", lambda: float(sum(passed)))
    return passed


def test_functions_take_turns(clock):
    """One of each in every round; neither the first round counts, nor what runs before; the result is in ms."""
    log = []

    def logged(label, seconds):
        def function():
            log.append(label)
            clock.append(seconds * (100 if log.count(label) == 1 else log.count(label)))

        return function

    functions = {"a": logged("a", 0.002), "b": logged("b", 0.5)}
    before = {"a": logged("before a", 8), "b": logged("before b", 16)}
    times = ql.time_interleaved(functions, rounds=3, before=before)
    assert log == ["before a", "a", "before b", "b"] * 4
    assert list(times) == ["a", "b"] and all(isinstance(ms, np.ndarray) for ms in times.values())
    assert times["a"] == pytest.approx([4, 6, 8]) and times["b"] == pytest.approx([1000, 1500, 2000])
    log.clear()
    ql.time_interleaved(functions, rounds=1)
    assert log == ["a", "b"] * 2


def test_decoding_is_timed_per_token(tiny, small, clock, monkeypatch):
    """Only the steps, not the prompt; and what is timed are as many tokens as were asked for."""
    start, prompts = ql.Decoder.start, []
    monkeypatch.setattr(
        ql.Decoder, "start", lambda self, ids: (clock.append(100), prompts.append(ids), start(self, ids))
    )
    monkeypatch.setattr(ql.Decoder, "steps", lambda self, count: clock.append(0.003 * count))
    assert ql.benchmark_decode(tiny, tokens=5, prompt=4, rounds=3) == pytest.approx([3, 3, 3])
    assert {ids.shape for ids in prompts} == {(1, 4)} and all(torch.equal(ids, prompts[0]) for ids in prompts)
    assert len(prompts) == 4 and prompts[0].unique().numel() > 1 and prompts[0].max() < tiny.config.vocab_size


def test_benchmark(tiny, small):
    """A number for each round; a dict gives a dict, and may hold decoders."""
    times = ql.benchmark_decode(small[8], tokens=2, prompt=3, rounds=4)
    assert times.shape == (4,) and (times > 0).all()
    times = ql.benchmark_decode({"float": tiny, "int4": small[4], "own": ql.Decoder(tiny, 10)}, 2, 3, rounds=2)
    assert list(times) == ["float", "int4", "own"]
    assert all(ms.shape == (2,) and (ms > 0).all() for ms in times.values())
    with pytest.raises(ValueError, match="give 2 to 32"):
        ql.benchmark_decode(tiny, tokens=20, prompt=13)
    with pytest.raises(ValueError, match="room for"):
        ql.benchmark_decode(ql.Decoder(tiny, 10), tokens=8, prompt=3)


def test_codes_lie_in_order_after_leaving_the_layout_of_the_cpu():
    """A kernel reads four bytes as one word: the codes of 32 rows in one group once came back transposed in memory."""
    weight = quantized_weight(64, 32, 4)
    codes, scale = weight._plain()
    assert codes.is_contiguous() and scale.is_contiguous()


# --- on a GPU ---


@on_gpu
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (768, 3072, 64), (8200, 768, 64)], ids=str)
def test_product_on_gpu(bits, shape, dtype):
    """By the kernel for few rows, by the widened weight for many, also for widths and rows that fill no block."""
    weight = quantized_weight(*shape[:2], bits, shape[2]).cuda()
    # beside one huge element, the limbs round all others to 1 / 64516 of it: the longer the row, the more they add up
    tolerance = max(2e-4, 1e-5 * shape[1] ** 0.5) if dtype == torch.float32 else 3e-3
    for rows in (1, 2, 3, 4, 5, 100):
        assert_product(inputs(rows, shape[1], dtype).cuda(), weight, tolerance)
    apart = randn(3, 2, shape[1]).to(dtype).cuda()[:, 1]
    assert_product(apart, weight, tolerance)


@on_gpu
@pytest.mark.parametrize("kind", ["float", 8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_captured_decoder_emits_the_tokens_of_generate(pocket, pockets, kind, dtype):
    """Replaying a graph is the same computation; also from another prompt than that it was captured with."""
    model = copy.deepcopy(pocket[0] if kind == "float" else pockets[kind]).to("cuda", dtype)
    ids = pocket[1]("The old house on the hill", return_tensors="pt")["input_ids"].cuda()
    decoder = ql.Decoder(model, 40)
    assert decoder.captured
    for prompt in (ids, tokens(11).cuda(), ids):
        decoder.start(prompt)
        assert [*decoder.steps(4).tolist(), *decoder.steps(12).tolist()] == greedy(model, prompt, 16)


@on_gpu
@both
def test_models_move_to_the_gpu_and_back(small, bits, tmp_path):
    """Codes and scales arrive as they were; a file saved from the GPU is that saved from the CPU."""
    model = copy.deepcopy(small[bits]).cuda()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = logits(small[bits], tokens(9))
    assert (logits(model, tokens(9).cuda()).cpu() - expected).norm() < 0.02 * expected.norm()
    for label, one in (("cpu", small[bits]), ("gpu", model)):
        ql.save_quantized(one, tmp_path / label)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "gpu").read_bytes()
    back = model.cpu().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in small[bits].state_dict().items())
