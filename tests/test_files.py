"""Tests of files and interruptions: whatever is in a file, wherever it is to go, and whenever a reader presses stop.

A file is loaded whole, or refused with one clear error, and no code that comes with it runs. A file is written whole,
or not at all. An interrupted call leaves the models as they were. `test_storage_speed.py` and `test_quantlib.py` test
the plain cases, `fuzz.py` thousands of mutations.
"""

import contextlib
import copy
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import tempfile
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quantlib as ql

torch.set_num_threads(1)
NORM, MATRIX = "transformer.ln_f.weight", "transformer.h.1.mlp.c_fc.weight"
HEADER = {  # the first 8 bytes: the header's length
    "zero": 0, "too short": 100, "too long": 2**20, "above the limit": 2**27, "terabyte": 2**40, "largest": 2**64 - 1,
}  # fmt: skip
on_linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="a device or a limit of Linux")


def tokens(count, vocabulary=8192):
    return torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(tokens(9)).logits


@pytest.fixture(scope="module")
def small(tiny):
    """bits -> tiny, quantized; tests must not change them."""
    return {bits: ql.quantize_model(tiny, bits, 32 if bits == 4 else None) for bits in (8, 4)}


@pytest.fixture(params=[8, 4])
def file(small, request, tmp_path):
    """tiny in 8 or 4 bits, alone in a folder, as save_quantized leaves it."""
    (tmp_path / "saved").mkdir()
    ql.save_quantized(small[request.param], tmp_path / "saved" / "tiny.safetensors")
    return tmp_path / "saved" / "tiny.safetensors"


@pytest.fixture(scope="module")
def original(tiny, pocket, tmp_path_factory):
    """tiny and its tokenizer as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("original")
    tiny.save_pretrained(folder)
    pocket[1].save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # the tokenizer again, from versions of transformers before 5
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of that, to be damaged."""
    return shutil.copytree(original, tmp_path / "folder")


def listing(folder):
    """What is in a folder, with the bytes of each file."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


def refused(load, path, reason=""):
    """One clear error: it names the path, a reason and a remedy; it adds and changes nothing, also in the folder."""
    folder = path if path.is_dir() else path.parent
    before = listing(folder)
    with pytest.raises(ValueError, match=f"^{load.__name__} cannot load .*{reason}") as caught:
        load(path, "cpu")
    told, _, remedy = str(caught.value).partition("\n")
    assert repr(str(path)) in told and remedy.startswith("Give ") and caught.value.__suppress_context__
    assert len(told.replace(str(path), "")) < 400 and listing(folder) == before
    return told


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def change_byte(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def header_size(path):
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


# --- damaged files ---


@pytest.mark.parametrize("kept", [0, 7, 8, 1000, 0.5, 0.99, -1])
def test_checkpoints_cut_short(folder, kept):
    """Within the header, within the tensors, by a byte."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(ql.load_model, folder, "header")


@pytest.mark.parametrize("size", HEADER.values(), ids=HEADER)
def test_headers_of_impossible_size(file, folder, size):
    """Nothing of that size is allocated or waited for."""
    for load, path, damaged in (
        (ql.load_quantized, file, file), (ql.load_model, folder, folder / "model.safetensors"),
    ):  # fmt: skip
        damaged.write_bytes(struct.pack("<Q", size) + damaged.read_bytes()[8:])
        refused(load, path, "header")


def test_every_changed_bit_is_noticed(file):
    """In the length, in the header, in the tensors, in the last byte: whatever bit it is, nothing is loaded."""
    size = header_size(file)
    draw = torch.Generator().manual_seed(0)
    end = file.stat().st_size
    inside = torch.randint(8, 8 + size, (24,), generator=draw).tolist()
    data = torch.randint(8 + size, end, (24,), generator=draw).tolist()
    for i, position in enumerate([0, 3, 7, 8, *inside, 8 + size, *data, end - 1]):
        change_byte(file, position, i % 8)
        refused(ql.load_quantized, file)
        change_byte(file, position, i % 8)
    assert ql.load_quantized(file, "cpu")


def test_bits_of_the_bundled_weights(pocket, tmp_path, monkeypatch):
    """A single changed bit in a weight is noticed, by the SHA-256; the copy without it is loaded."""
    bundled = shutil.copytree(ql.BUNDLED_FOLDER, tmp_path / "bundled")
    monkeypatch.setattr(ql, "BUNDLED_FOLDER", bundled)
    weight = ql.load_model("pocket-gpt2", "cpu")[0].transformer.wte.weight
    assert torch.equal(weight, pocket[0].transformer.wte.weight)
    for position in (-1, 20_000_000):
        change_byte(bundled / "model.safetensors", position)
        with pytest.raises(ValueError, match="'pocket-gpt2': model.safetensors does not have the SHA-256 802e2c17"):
            ql.load_model("pocket-gpt2", "cpu")
        change_byte(bundled / "model.safetensors", position)


@pytest.mark.parametrize("change, reason", [
    ({NORM: torch.ones(32, dtype=torch.int8)}, f"{NORM} in model.safetensors is stored as I8"),
    ({NORM: torch.ones(32, dtype=torch.bool)}, "stored as BOOL"),
    ({NORM: torch.ones(32).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
    ({NORM: torch.ones(31)}, rf"{NORM} is not \[32\] in the checkpoint, as the configuration"),
    ({MATRIX: torch.ones(128, 32)}, rf"{MATRIX} is not \[32, 128\]"),
    ({NORM: torch.ones(())}, rf"{NORM} is not \[32\]"),
    ({NORM: None}, f"lacks weights: {NORM}"), ({MATRIX: None}, f"lacks weights: {MATRIX}"),
    ({"extra": torch.ones(3)}, "weights that are not a part of the model: extra"),
    ({"transformer.h.2.ln_1.weight": torch.ones(32)}, r"not a part of the model: transformer\.h\.2\.ln_1"),
], ids=["int8", "bool", "float8", "shorter", "transposed", "number", "norm", "matrix", "extra", "layer"])  # fmt: skip
def test_checkpoints_of_another_model(folder, change, reason):
    """The first tensor that does not fit is named."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
    refused(ql.load_model, folder, reason)


def test_constants_of_old_checkpoints(folder, tiny):
    """The causal masks that those of GPT-2 hold are no weights, and weights in half precision are widened."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, path, {"format": "pt"})
    model, _ = ql.load_model(folder, "cpu")
    expected = copy.deepcopy(tiny).half().float()
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in expected.named_parameters())


@pytest.mark.parametrize("change, reason", [
    ({"n_layer": 100_000}, "28 tensors for n_layer=100000"), ({"n_layer": 3}, r"h\.2\..*"),
    ({"n_layer": 1}, "not a part"), ({"n_embd": 64}, r"is not \[192\] in the checkpoint"), ({"n_embd": "32"}, ""),
    ({"n_embd": -32}, "negative"), ({"n_head": 0}, ""), ({"n_head": 5}, ""), ({"vocab_size": 8000}, "8000"),
    ({"n_positions": 64}, r"wpe.weight is not \[64, 32\]"), ({"n_inner": 5}, r"is not \[5\]"),
    ({"tie_word_embeddings": False}, "lm_head.weight"), ({"activation_function": "no such"}, "no such"),
    ({"model_type": "llama"}, "'llama' model"), ({"quantization_config": {"bits": 4}}, "quantized already"),
    ({"dtype": "os.system", "torch_dtype": "os.system"}, ""),
], ids=str)  # fmt: skip
def test_configurations_that_contradict_the_weights(folder, change, reason):
    """Told at once: no model of a hundred thousand layers is built first."""
    edit(folder / "config.json", **change)
    refused(ql.load_model, folder, reason)


@pytest.mark.parametrize("name, content", [
    ("config.json", b""), ("config.json", b"{"), ("config.json", b"[]"), ("config.json", b"\xff\xfe\0"),
    ("config.json", b"[" * 100_000), ("tokenizer.json", b"{"), ("tokenizer.json", b""), ("tokenizer.json", b"{}"),
    ("model.safetensors", b"PK\3\4"), ("config.json", None), ("tokenizer.json", None), ("model.safetensors", None),
], ids=lambda value: repr(value)[:20])  # fmt: skip
def test_other_files_of_a_folder(folder, name, content):
    """Empty, cut, of another kind, nested without end, absent."""
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    refused(ql.load_model, folder)


def stored(path):
    """The tensors and the metadata of a quantized file."""
    with safetensors.safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()[ql.FORMAT])


def sign(path, tensors, about):
    """Write them with the right checksum, as nobody but save_quantized should."""
    about.pop("sha256", None)
    about["sha256"] = ql._sha256(about, tensors)
    save_file(tensors, path, {ql.FORMAT: json.dumps(about)})


def test_the_checksum_covers_all(file):
    """What save_quantized wrote can be signed again; without a checksum, or with another content's, it is refused."""
    tensors, about = stored(file)
    sign(file, tensors, about)
    assert ql.load_quantized(file, "cpu")
    for change in ({"sha256": None}, {"sha256": "0" * 64}, {"more": 1}, {"config": about["config"] | {"n_ctx": 32}}):
        save_file(tensors, file, {ql.FORMAT: json.dumps(about | change)})
        refused(ql.load_quantized, file, "does not have the SHA-256")
    first, second = (f"transformer.h.{i}.ln_1.weight" for i in (0, 1))
    for changed in ({first: tensors[first] + 1}, {first: tensors[second] + 1, second: tensors[first] + 1}):
        save_file(tensors | changed, file, {ql.FORMAT: json.dumps(about)})
        refused(ql.load_quantized, file, "does not have the SHA-256")


@pytest.mark.parametrize("name, change, reason", [
    ("tensors", {NORM: torch.ones(32, dtype=torch.float64)}, "several dtypes"), ("about", {"bits": 5}, "bits=5"),
    ("about", {"bits": 8.0}, "bits=8.0"), ("about", {"bits": True}, "bits=True"),
    ("about", {"group_size": [32]}, "group_size="), ("about", {"group_size": 2**70}, "group_size="),
    ("config", {"n_layer": 10**9}, "n_layer=1000000000"), ("config", {"n_head": 0}, ""),
    ("config", {"n_embd": -32}, ""), ("config", {"vocab_size": 2**62}, ""),
    ("config", {"activation_function": "no such"}, "no such"),
], ids=str)  # fmt: skip
def test_signed_files_are_not_trusted(file, name, change, reason):
    """A right checksum does not make sense of nonsense: the file says what could not be a model."""
    tensors, about = stored(file)
    {"tensors": tensors, "about": about, "config": about["config"]}[name].update(change)
    sign(file, tensors, about)
    refused(ql.load_quantized, file, reason)


# --- files elsewhere ---


def test_links(file, folder, tiny, small, tmp_path):
    """A link to a file is that file, as in the hub's cache; a link to nothing, or to itself, is told."""
    link = tmp_path / "link"
    link.symlink_to(file)
    assert torch.equal(logits(ql.load_quantized(link, "cpu")), logits(ql.load_quantized(file, "cpu")))
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert torch.equal(logits(ql.load_model(folder, "cpu")[0]), logits(tiny))
    for target in (tmp_path / "nowhere", weights, tmp_path):
        weights.unlink()
        weights.symlink_to(target)
        refused(ql.load_model, folder, "model.safetensors is not a safetensors file in this folder")
    for target in (tmp_path / "nowhere", link):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(ValueError, match="^load_quantized cannot load .*(No such file|symbolic link)"):
            ql.load_quantized(link, "cpu")


def test_saving_over_a_link(file, small, tmp_path):
    """The link becomes a file; what it pointed to stays as it was."""
    before, link = file.read_bytes(), tmp_path / "link"
    link.symlink_to(file)
    ql.save_quantized(small[8], link)
    assert not link.is_symlink() and file.read_bytes() == before and ql.load_quantized(link, "cpu")


@on_linux
def test_pipes_and_devices(small, tmp_path):
    """Reading a pipe would wait for ever; a device must not be replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="^load_quantized cannot load path=.*it is not a file"):
            ql.load_quantized(path, "cpu")
    with pytest.raises(OSError, match="^save_quantized cannot write path=.*not a file"):
        ql.save_quantized(small[8], tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


@contextlib.contextmanager
def without_rights():
    """As a user who may write only where all may: root may everywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@on_linux
def test_folders_that_cannot_be_written(small, original):
    """Loading needs no right to write, and leaves nothing; saving says what is wrong and leaves nothing."""
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to others
        folder = shutil.copytree(original, Path(parent) / "model")
        ql.save_quantized(small[4], folder / "quantized")
        before = listing(folder)
        for path in (*folder.iterdir(), folder, Path(parent)):
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert ql.load_model(folder, "cpu") and ql.load_quantized(folder / "quantized", "cpu")  # imports what they need
        try:
            with without_rights():
                listing(folder)
        except PermissionError:
            pytest.skip("the folder for temporary files is closed to others")
        with without_rights():
            assert torch.equal(logits(ql.load_quantized(folder / "quantized", "cpu")), logits(small[4]))
            assert ql.load_model(folder, "cpu")
            for name in ("quantized", "new"):
                with pytest.raises(OSError, match="^save_quantized cannot write path=.*Permission denied"):
                    ql.save_quantized(small[8], folder / name)
        assert listing(folder) == before
        for name, load, path in (
            ("quantized", ql.load_quantized, folder / "quantized"), ("model.safetensors", ql.load_model, folder),
        ):  # fmt: skip
            (folder / name).chmod(0)
            with without_rights(), pytest.raises(ValueError, match=f"^{load.__name__} cannot load .*denied"):
                load(path, "cpu")
        for path in (Path(parent), folder):
            path.chmod(0o755)


# --- code that comes with a model ---


class Bomb:
    """When it is unpickled, it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    """What code makes if it runs."""
    return tmp_path / "code ran"


@pytest.fixture(params=["torch.save", "pickle"])
def bomb(request, trace):
    """Write a pickle that makes `trace`, as torch.save does and plainly."""

    def write(path):
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(Bomb(trace)))
        else:
            torch.save({NORM: Bomb(trace)}, path)

    return write


def test_the_bomb_works(bomb, trace, tmp_path):
    """Else the tests below would prove nothing."""
    bomb(tmp_path / "file")
    if (tmp_path / "file").read_bytes()[:2] == b"PK":
        torch.load(tmp_path / "file", weights_only=False)
    else:
        pickle.loads((tmp_path / "file").read_bytes())
    assert trace.exists()


def test_pickles_are_never_read(folder, bomb, trace, monkeypatch):
    """Alone, beside good weights, named by an index, under the name of a safetensors file: torch.load is not called."""

    def load(*_, **__):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)
    bomb(folder / "pytorch_model.bin")
    assert ql.load_model(folder, "cpu")
    weights = {name: "pytorch_model.bin" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors").unlink()
    assert "AssertionError" not in refused(ql.load_model, folder, "safetensors")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
        refused(ql.load_model, folder, "is not a safetensors file in this folder")
        (folder / index).unlink()
    bomb(folder / "model.safetensors")
    refused(ql.load_model, folder, "header")
    refused(ql.load_quantized, folder / "pytorch_model.bin", "header")
    assert not trace.exists()


def test_code_beside_a_model_is_not_run(folder, file, trace):
    """Whatever names it: the model is loaded without it, or refused."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass C: pass\n")
    automatic = {"auto_map": {name: "evil.C" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}}
    evil = {"trust_remote_code": True, **automatic}
    edit(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    for attention in ("eager", "kernels-community/evil", "evil.C"):
        edit(folder / "config.json", **evil, attn_implementation=attention, _attn_implementation=attention)
        model, tokenizer = ql.load_model(folder, "cpu")
        assert model.config._attn_implementation == "sdpa" and tokenizer("The")["input_ids"]
        assert ql.generate_text(model, tokenizer, "The", 3)
    edit(folder / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})
    with contextlib.suppress(ValueError):  # some versions of transformers refuse it, some take their own class
        assert ql.load_model(folder, "cpu")[1]("The")["input_ids"]
    edit(folder / "config.json", **evil, model_type="evil")
    refused(ql.load_model, folder)
    tensors, about = stored(file)
    about["config"] |= {**evil, "_attn_implementation": "kernels-community/evil", "_name_or_path": str(folder)}
    sign(file, tensors, about)
    assert ql.load_quantized(file, "cpu").config._attn_implementation == "sdpa" and not trace.exists()


@pytest.mark.parametrize("names", ["../weights.safetensors", "/etc/hostname", "weights.bin", "missing.safetensors"])
def test_an_index_names_files_of_its_folder(folder, names, tmp_path):
    """Large checkpoints come in parts that an index lists; each is checked as a single file is."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    shutil.copy(folder / "part.safetensors", tmp_path / "weights.safetensors")
    index = folder / "model.safetensors.index.json"

    def write(file):
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, file)}))

    write("part.safetensors")
    assert ql.load_model(folder, "cpu")
    save_file(tensors | {NORM: torch.ones(32, dtype=torch.int8)}, folder / "part.safetensors", {"format": "pt"})
    refused(ql.load_model, folder, f"{NORM} in part.safetensors is stored as I8")
    write(names)
    refused(ql.load_model, folder, f"{names} is not a safetensors file in this folder")


def test_weights_at_another_place(folder):
    """An adapter is a change to another model, which would be looked for on the hub."""
    edit(folder / "config.json", transformers_weights="other.safetensors")
    refused(ql.load_model, folder, "at another place")
    edit(folder / "config.json", transformers_weights=None)
    assert ql.load_model(folder, "cpu")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    refused(ql.load_model, folder, "at another place")


# --- saving ---


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@on_linux
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_full_disk(small, file, share):
    """The error says so, the old file is intact, nothing is left behind; afterwards it works."""
    before, size = listing(file.parent), int(share * file.stat().st_size)
    for path in (file, file.with_name("new")):
        with full_disk(size), pytest.raises(OSError, match="^save_quantized cannot write path=.*large"):
            ql.save_quantized(small[8], path)
        assert listing(file.parent) == before
    ql.save_quantized(small[8], file)
    assert torch.equal(logits(ql.load_quantized(file, "cpu")), logits(small[8]))


@on_linux
def test_no_space_left(small, file, monkeypatch):
    """As the system says it: /dev/full takes nothing."""

    def write(tensors, path, metadata):
        with open("/dev/full", "wb") as device:
            device.write(b"x" * 100_000)

    before = listing(file.parent)
    monkeypatch.setattr(ql, "save_file", write)
    with pytest.raises(OSError, match="^save_quantized cannot write path=.*No space left on device"):
        ql.save_quantized(small[8], file)
    assert listing(file.parent) == before


@pytest.mark.parametrize("step", ["touch", "stat", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=repr)
def test_saving_fails_at_any_step(small, file, step, error, monkeypatch):
    """The old file is intact, and nothing is beside it."""

    def fail(*_, **__):
        raise error

    before, target = listing(file.parent), (os, "replace") if step == "replace" else (Path, step)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(*target, fail)
        ql.save_quantized(small[8], file)
    assert listing(file.parent) == before


@on_linux
def test_killed_while_saving(small, file, monkeypatch):
    """Not even then is the old file touched."""
    before = file.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(before[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ql, "save_file", half)
    child = os.fork()
    if child == 0:
        try:
            ql.save_quantized(small[8], file)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert file.read_bytes() == before and ql.load_quantized(file, "cpu")


@pytest.mark.skipif(os.name == "nt", reason="needs permissions of Unix")
def test_new_files_have_the_usual_permissions(small, tmp_path):
    """A class can read what the teacher saved, as it can any new file."""
    (tmp_path / "usual").touch()
    ql.save_quantized(small[8], tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_names_of_any_kind(small, tmp_path, monkeypatch):
    """Spaces, letters of other scripts, a leading dot, the longest that file systems take; a relative path."""
    monkeypatch.chdir(tmp_path)
    for name in ("two words", "größe 量化.safetensors", ".hidden", "x" * 200):
        ql.save_quantized(small[8], name)
        assert ql.load_quantized(name, "cpu") and os.listdir() == [name]
        os.unlink(name)


# --- memory ---


class Meminfo:
    """Stands for `Path`: what /proc/meminfo says."""

    def __init__(self, text):
        self.text = text

    def __call__(self, path):
        assert path == "/proc/meminfo"
        return self

    def read_text(self):
        if self.text is None:
            raise FileNotFoundError("no such file")
        return self.text


def free(kilobytes):
    return Meminfo(
        f"MemTotal:       99999999 kB\nMemFree:             1 kB\nMemAvailable:   {kilobytes} kB\nBuffers: 3 kB\n"
    )


def test_memory_is_checked(monkeypatch):
    """Against what is available, to the byte; where the system does not say what is, nothing is refused."""
    monkeypatch.setattr(ql, "Path", free(1000))
    ql._check_memory(1024 * 1000)
    with pytest.raises(MemoryError, match=r"^0\.0 GB of memory are needed and 0\.0 GB are free: delete models"):
        ql._check_memory(1024 * 1000 + 1)
    monkeypatch.setattr(ql, "Path", free(2_500_000))
    with pytest.raises(MemoryError, match=r"^7\.0 GB of memory are needed and 2\.6 GB are free: .*smaller model$"):
        ql._check_memory(7 * 10**9)
    for unknown in (None, "", "MemTotal: 5 kB\n"):
        monkeypatch.setattr(ql, "Path", Meminfo(unknown))
        ql._check_memory(10**18)


@pytest.mark.parametrize("call, needed", [
    (lambda tiny, folder, file: ql.load_model(folder, "cpu"), lambda tiny, file: tiny),
    (lambda tiny, folder, file: ql.fake_quantize_model(tiny, ql.absmax_quantize), lambda tiny, file: tiny),
    (lambda tiny, folder, file: ql.quantize_model(tiny, 8), lambda tiny, file: tiny // 4),
    (lambda tiny, folder, file: ql.quantize_model(tiny, 4, 32), lambda tiny, file: tiny // 8),
    (lambda tiny, folder, file: ql.load_quantized(file, "cpu"), lambda tiny, file: file),
], ids=["load_model", "fake_quantize_model", "quantize_model 8", "quantize_model 4", "load_quantized"])  # fmt: skip
def test_models_too_large_fail_early(tiny, folder, file, call, needed, monkeypatch):
    """Before any weight is read or rounded; they ask for about the bytes that the result takes, and no more."""
    asked, check = [], ql._check_memory

    def early(*_, **__):
        raise AssertionError("too late")

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="smaller model"):
        patch.setattr(ql, "_read", early)
        patch.setattr(ql, "absmax_quantize", early)
        patch.setattr(ql.GPT2LMHeadModel, "from_pretrained", early)
        patch.setattr(ql, "_check_memory", lambda count: (asked.append(count), check(10**18 + count)))
        call(tiny, folder, file)
    expected = needed(sum(p.nbytes for p in tiny.parameters()), file.stat().st_size)
    assert len(asked) == 1 and 0.95 * expected <= asked[0] <= 1.01 * expected


@pytest.mark.parametrize("change", [
    {}, {"n_layer": 50}, {"n_layer": 9, "n_embd": 320}, {"n_layer": 40, "n_inner": 1000}, {"n_positions": 100_000},
    {"vocab_size": 300}, {"n_layer": 1, "n_embd": 2048},
], ids=str)  # fmt: skip
def test_memory_that_a_configuration_needs(folder, change, monkeypatch):
    """That of all weights in float32, to a few hundredths: biases and norms are left out."""
    edit(folder / "config.json", **change)

    def check(count):
        asked.append(count)
        raise MemoryError

    asked = []
    monkeypatch.setattr(ql, "_check_memory", check)
    with pytest.raises(MemoryError):
        ql.load_model(folder, "cpu")
    with torch.device("meta"):
        model = ql.GPT2LMHeadModel(ql.GPT2Config.from_pretrained(folder))
    expected = 4 * sum(p.numel() for p in model.parameters())
    assert 0.96 * expected <= asked[0] <= expected


def test_only_memory_of_the_cpu_is_counted(tiny, monkeypatch):
    """A GPU's, here that of no device at all, is another matter."""
    with torch.device("meta"):
        elsewhere = ql.GPT2LMHeadModel(tiny.config)
    asked = []

    def check(count):
        asked.append(count)
        raise MemoryError

    monkeypatch.setattr(ql, "_check_memory", check)
    for make in (partial(ql.fake_quantize_model, quantizer=ql.absmax_quantize), ql.quantize_model):
        with pytest.raises(MemoryError):
            make(elsewhere)
    assert asked == [0, 0]


@pytest.mark.parametrize(
    "change", [{"n_embd": 10**9}, {"vocab_size": 10**12}, {"n_positions": 10**9}, {"n_inner": 10**9}]
)
def test_configurations_of_impossible_size(folder, change):
    """Nothing of that size is allocated."""
    edit(folder / "config.json", **change)
    with pytest.raises(MemoryError, match="smaller model"):
        ql.load_model(folder, "cpu")


# --- interruptions ---

TEXT = " ".join(map(str, range(150)))


def numbers(text, **_):
    """A tokenizer for texts of numbers."""
    return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


class Interrupting:
    """Raises KeyboardInterrupt in the middle of something: at the nth call of any module, while it is entered."""

    def __init__(self, at):
        self.left = at

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted(at):
    """Whatever model runs is interrupted at the nth call of a module; yields what counts them."""
    interrupting = Interrupting(at)
    hook = nn.modules.module.register_module_forward_pre_hook(interrupting)
    try:
        yield interrupting
    finally:
        hook.remove()


def hooks(model):
    return [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


RUNS = {
    "compare": lambda model, pocket: ql.compare(model, {"a": model, "b": model}, numbers, TEXT),
    "perplexity": lambda model, pocket: ql.perplexity(model, numbers, TEXT),
    "watch_inputs": lambda model, pocket: ql.watch_inputs(model, tokens(64).view(8, 8), lambda name, x: None, 2),
    "input_moments": lambda model, pocket: ql.input_moments(model, tokens(64).view(8, 8)),
    "calibration_tokens": lambda model, pocket: ql.calibration_tokens(model, 2, 5),
    "generate_text": lambda model, pocket: ql.generate_text(model, pocket[1], "The old house", 4),
    "benchmark_decode": lambda model, pocket: ql.benchmark_decode(model, 2, 3, rounds=1),
}


@pytest.mark.parametrize("kind", ["float", 8, 4])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_interrupted_runs(tiny, small, pocket, run, kind):
    """At any module: the same logits bit for bit afterwards, no hook, the same random state, and the call can be
    repeated."""
    model = tiny if kind == "float" else small[kind]
    expected, state, training = logits(model), torch.random.get_rng_state(), model.training
    with interrupted(at=0) as counting:
        run(model, pocket)
    calls = -counting.left
    assert calls > 40
    for at in {1, 2, 7, calls // 3, calls // 2, calls - 1, calls}:
        with interrupted(at), pytest.raises(KeyboardInterrupt):
            run(model, pocket)
        assert not hooks(model) and model.training == training and torch.is_grad_enabled()
        assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(logits(model), expected)
    run(model, pocket)


def test_interrupted_decoder(tiny):
    """It begins anew with the next prompt, as if nothing had happened."""
    expected = ql.Decoder(tiny, 20)
    expected.start(tokens(5))
    expected = expected.steps(8).tolist()
    decoder = ql.Decoder(tiny, 20)
    for at in (3, 30, 100):
        with interrupted(at), pytest.raises(KeyboardInterrupt):
            decoder.start(tokens(7))
            decoder.steps(10)
        decoder.start(tokens(5))
        assert decoder.steps(8).tolist() == expected


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_interrupted_quantization(tiny, at, monkeypatch):
    """While a copy is half made: the original is untouched, and the next copy is whole."""
    expected, whole = logits(tiny), logits(ql.quantize_model(tiny, 8))
    state = copy.deepcopy(tiny.state_dict())
    quantizer, interrupting = ql.absmax_quantize, Interrupting(at)

    def interrupted_quantizer(*arguments, **more):
        interrupting()
        return quantizer(*arguments, **more)

    for make in (lambda: ql.fake_quantize_model(tiny, interrupted_quantizer), lambda: ql.quantize_model(tiny, 8)):
        interrupting.left = at
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ql, "absmax_quantize", interrupted_quantizer)
            make()
        assert not hasattr(tiny, "stored_bits") and not hooks(tiny) and torch.is_grad_enabled()
        assert all(torch.equal(tensor, state[name]) for name, tensor in tiny.state_dict().items())
        assert torch.equal(logits(tiny), expected) and torch.equal(logits(ql.quantize_model(tiny, 8)), whole)


def test_interrupted_loading(folder, file, monkeypatch):
    """Loading can be repeated; what was hidden meanwhile is shown again."""
    from transformers.utils import logging

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        for load, path, owner, name in (
            (ql.load_model, folder, ql.GPT2LMHeadModel, "from_pretrained"),
            (ql.load_quantized, file, ql, "_read"), (ql.load_quantized, file, ql, "_fill"),
        ):  # fmt: skip
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, interrupt)
                load(path, "cpu")
            assert logging.is_progress_bar_enabled() and torch.empty(1).device.type == "cpu"
            assert load(path, "cpu")
    finally:
        if not shown:
            logging.disable_progress_bar()
