"""Nothing of a file is run, nothing absurd is allocated, no name leaves its folder, no network."""

import ast
import json
import shutil
import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxrec
from jaxrec.cli.main import main
from jaxrec.config import beside
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.training.data import ByteTokenizer, load_tokenizer
from jaxrec.training.data.images import ImageFolder
from jaxrec.training.data.puzzle_folders import read_split
from jaxrec.training.data.storage import read_streams
from jaxrec.training.data.tudataset import read_tudataset
from jaxrec.training.runs import read_run
from tests.hostile import object_array, pickled

ROOT = Path(jaxrec.__file__).parent
HUGINN = sorted((Path(__file__).parent / "golden" / "data" / "huginn").iterdir())[0]
SOURCES = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
RUNS_CODE = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("code", "runpy"),
}
NETWORK = {
    *("socket", "ssl", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "urllib3"),
    *("huggingface_hub", "datasets", "gdown", "boto3", "fsspec"),
}
ARCHIVES = {"zipfile", "tarfile", "gzip", "lzma", "bz2"}
UNPACKS_NOTHING = {
    "analysis/text_baselines.py",  # measures how well gzip does, and reads nothing
    "training/data/examples.py",  # names the error of a damaged .npz, which NumPy reads
}


def name_of(node: ast.AST) -> str:
    """`a.b.c` of such an expression, else ''."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> set[str]:
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_a_file_open_an_archive_or_reach_the_network(path):
    tree = SOURCES[path]
    assert not imported(tree) & (RUNS_CODE | NETWORK)
    if str(path.relative_to(ROOT)) not in UNPACKS_NOTHING:
        assert not imported(tree) & ARCHIVES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        options = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
        assert name not in {"eval", "exec", "compile", "__import__", "os.system"}, name
        assert not name.startswith("yaml.") or name in {"yaml.safe_load", "yaml.safe_dump"}, name
        assert name not in {"torch.load", "np.fromfile", "numpy.load"}, name
        if name in {"np.load", "np.save"}:
            assert options.get("allow_pickle") is False, f"{path}, line {node.lineno}"
        if name.startswith("subprocess."):
            assert not options.get("shell")


def put_array(folder, mark):
    """A data folder whose starts are objects."""
    meta = {
        "format": "jaxrec-tokens",
        "version": 2,
        "crc32": {},
        "tokenizer": "bytes",
        "vocab_size": ByteTokenizer.vocab_size,
        "dtype": "uint16",
        "tokens": {"train": 1, "valid": 1},
        "documents": {"train": 1, "valid": 1},
        "bytes": {"train": 1, "valid": 1},
        "provenance": {},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    for side in ("train", "valid"):
        (folder / f"{side}.bin").write_bytes(b"ab")
        (folder / f"{side}.starts.npy").write_bytes(object_array(mark))
    read_streams(folder)


def split_of(folder, **changes):
    description = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": 3,
        "seq_len": 2,
        "num_puzzle_identifiers": 1,
        "total_groups": 1,
        "mean_puzzle_examples": 1.0,
        "sets": ["all"],
    } | changes
    (folder / "dataset.json").write_text(json.dumps(description))


def put_puzzles(folder, mark):
    split_of(folder)
    for field in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
        (folder / f"all__{field}.npy").write_bytes(object_array(mark))
    read_split(folder)


def put_pickle(name):
    def put(folder, mark):
        (folder / name).write_bytes(pickled(mark))
        engine.read_tensors(folder)

    return put


def put_config(folder, mark):
    (folder / "config.json").write_bytes(pickled(mark))
    engine.load("huginn", folder)


def put_run(folder, mark):
    (folder / "run.json").write_bytes(pickled(mark))
    read_run(folder)


def put_tokenizer(folder, mark):
    (folder / "tokenizer.json").write_bytes(pickled(mark))
    load_tokenizer(folder)


def put_image(folder, mark):
    (folder / "class").mkdir()
    (folder / "class" / "a.png").write_bytes(pickled(mark))
    ImageFolder(folder, 4).read([0])


def put_graphs(folder, mark):
    (folder / "X_A.txt").write_bytes(pickled(mark))
    read_tudataset(folder)


def put_yaml(folder, mark):
    file = folder / "config.yaml"
    file.write_text(f"steps: !!python/object/apply:os.mkdir ['{mark}']\n")
    from jaxrec.cli.train import parse

    parse(["jaxrec.models.huginn:TINY", "--config", str(file)])


READERS = {
    "starts": put_array,
    "puzzles": put_puzzles,
    "safetensors": put_pickle("model.safetensors"),
    "pytorch_model.bin": put_pickle("pytorch_model.bin"),
    "checkpoint.pt": put_pickle("checkpoint.pt"),
    "checkpoint.pth": put_pickle("checkpoint.pth"),
    "config.json": put_config,
    "run.json": put_run,
    "tokenizer.json": put_tokenizer,
    "image": put_image,
    "graphs": put_graphs,
    "yaml": put_yaml,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_malicious_file_is_refused_in_one_line_and_not_run(reader, tmp_path):
    folder, mark = tmp_path / "there", tmp_path / "mark"
    folder.mkdir()
    with pytest.raises(UserError) as error:
        READERS[reader](folder, mark)
    assert not mark.exists(), "it was run"
    assert len(str(error.value)) > 20


def test_the_bombs_are_real(tmp_path):
    """Else the test above would pass for nothing."""
    import pickle

    pickle.loads(pickled(tmp_path / "mark"))
    assert (tmp_path / "mark").is_dir()
    (tmp_path / "a.npy").write_bytes(object_array(tmp_path / "other"))
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "other").is_dir()


def a_run(folder, **changes):
    content = {
        "layout": 1,
        "model": "jaxrec.models.huginn:TINY",
        "model_class": "jaxrec.models.huginn:HuginnConfig",
        "model_config": {},
        "train": {},
        "data": {},
        "versions": {},
    } | changes
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def test_a_run_cannot_have_modules_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('mark').mkdir()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = a_run(tmp_path / "run", model_class="evil:Config")
    with pytest.raises(UserError, match=r"the module 'evil'.*JAXREC_TRUSTED_MODULES=evil"):
        read_run(run)
    assert not (tmp_path / "mark").exists()
    monkeypatch.setenv("JAXREC_TRUSTED_MODULES", "other,evil")
    with pytest.raises(UserError, match="evil has no Config"):
        read_run(run)
    assert (tmp_path / "mark").exists()
    sys.modules.pop("evil")


@pytest.mark.parametrize("path", ["os:system", "jaxrec.models.huginn:Huginn", "json:loads", ""])
def test_a_run_names_a_configuration_and_nothing_else(tmp_path, path):
    with pytest.raises(UserError):
        read_run(a_run(tmp_path / "run", model_class=path))


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "length of exabytes": struct.pack("<Q", 2**63) + b"{}",
    "length beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "length of 100 MB": struct.pack("<Q", 2 * 10**8) + b"{",
    "a petabyte": header(x=tensor([2**50], 0, 2**52)),
    "a petabyte in four bytes": header(x=tensor([2**50], 0, 4)) + b"\0" * 4,
    "a product that overflows": header(x=tensor([2**40, 2**40], 0, 0)),
    "a negative side": header(x=tensor([-1], 0, 4)) + b"\0" * 4,
    "offsets in reverse": header(x=tensor([1], 4, 0)) + b"\0" * 4,
    "overlapping tensors": header(x=tensor([1], 0, 4), y=tensor([1], 0, 4)) + b"\0" * 4,
    "a hole": header(x=tensor([1], 4, 8)) + b"\0" * 8,
    "an unknown type": header(x=tensor([1], 0, 4, "OBJECT")) + b"\0" * 4,
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "nested without end": struct.pack("<Q", 10**5) + b"[" * 10**5,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_headers_are_refused_before_anything_is_allocated(name, tmp_path):
    import resource

    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"Cannot read .*model\.safetensors"):
        engine.read_tensors(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_an_array_is_not_allocated_by_what_its_header_says(tmp_path):
    from jaxrec.training.data.arrays import read_array

    good = np.arange(6, dtype=np.int32)
    np.save(tmp_path / "a.npy", good)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), good)
    data = (tmp_path / "a.npy").read_bytes().replace(b"(6,)" + b" " * 12, b"(10000000000000,")[:-1]
    (tmp_path / "a.npy").write_bytes(data.replace(b"(10000000000000,", b"(10000000000000,)"))
    with pytest.raises(UserError, match="Cannot read"):
        read_array(tmp_path / "a.npy")
    np.save(tmp_path / "empty.npy", np.zeros((0, 3), np.int32))
    assert read_array(tmp_path / "empty.npy").shape == (0, 3)


NAMES = ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 3]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_an_index_leaves_the_folder(name, tmp_path):
    shutil.copy(HUGINN / "weights.safetensors", tmp_path / "x.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = {"weight_map": {"w": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"must lie in that folder|must map names"):
        engine.read_tensors(folder)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "..", ""])
def test_no_name_of_a_puzzle_set_leaves_the_folder(name, tmp_path):
    split_of(tmp_path, sets=[name])
    with pytest.raises(UserError, match="must lie in that folder"):
        read_split(tmp_path)


def test_links_may_not_leave_the_folder_but_for_the_cache_that_is_made_of_them(tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    for each in (folder, blobs):
        each.mkdir(parents=True)
    (blobs / "123").write_text("x")
    (tmp_path / "secret").write_text("x")
    (folder / "inside").write_text("x")
    for name, target in {"a": "inside", "b": "../../blobs/123", "c": "../../../secret"}.items():
        (folder / name).symlink_to(target)
    assert beside(folder, "a").read_text() == beside(folder, "b").read_text() == "x"
    with pytest.raises(UserError, match="is a link that leaves"):
        beside(folder, "c")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link that leaves"):
        engine.read_tensors(folder)


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks for a connection or a name fails the test."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


def test_the_guard_of_the_network_works(offline):
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 1))


def test_data_and_convert_ask_for_no_network(offline, tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"some text, {i}\n" * 20)
    assert main(["data", str(tmp_path / "*.txt"), str(tmp_path / "tokens")]) == 0
    source = tmp_path / "source"
    source.mkdir()
    for file in HUGINN.glob("*.safetensors"):
        shutil.copy(file, source / "model.safetensors")
    shutil.copy(HUGINN / "config.json", source)
    # The toy has fewer tokens than there are bytes, of which it is told behind all reading.
    assert main(["convert", "huginn", str(source), str(tmp_path / "run")]) == 2
    assert "has 257 tokens, the model" in capsys.readouterr().err


@pytest.mark.slow
def test_train_evaluate_and_generate_ask_for_no_network(offline, tmp_path):
    from jaxrec.models import huginn
    from tests.training.small import HUGINN as SMALL
    from tests.training.small import model_options, write_text

    text = write_text(tmp_path / "text")
    runs = ["--runs", str(tmp_path)]
    sizes = ["--steps", "2", "--batch", "2", "--time", "16", "--eval-batches", "1"]
    model = model_options(SMALL, huginn.TINY)
    command = ["train", "jaxrec.models.huginn:TINY", "--data", str(text), "--name", "run"]
    assert main([*command, *runs, *sizes, *model]) == 0
    run = str(tmp_path / "run")
    assert main(["eval", run, "--depths", "1", "--batches", "1"]) == 0
    assert main(["generate", run, "--prompt", "a", "--tokens", "2"]) == 0
