"""Readers of files meet bytes that nobody meant: they read them, or refuse them in a sentence.

Hypothesis draws the bytes, mostly small changes of good files. Any exception but UserError fails.
The quick suite draws few examples and always the same; the slow one draws many.
"""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrec.cli.train import parse
from jaxrec.config import from_dict, to_dict
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.models import hrm, huginn, sequence_classifier, universal_transformer
from jaxrec.training import metrics
from jaxrec.training.config import ClassifierConfig, PuzzleConfig, TrainConfig
from jaxrec.training.data import load_tokenizer
from jaxrec.training.data.arc import read_tasks
from jaxrec.training.data.images import ImageFolder
from jaxrec.training.data.puzzle_folders import read_split, write_split
from jaxrec.training.data.puzzles import PuzzleSet
from jaxrec.training.data.storage import read_streams
from jaxrec.training.data.tudataset import read_tudataset
from jaxrec.training.runs import read_run
from tests.training.test_data_tokenizers import train_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "data"
COMMON = {
    "deadline": None,
    "database": None,
    "report_multiple_bugs": False,
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
}
QUICK = settings(max_examples=40, derandomize=True, **COMMON)
SLOW = settings(max_examples=1000, print_blob=True, **COMMON)


def suites(function):
    """The property as two tests, a quick one and a slow one, under the names of their module."""
    module, name = globals(), function.__name__
    module[name] = QUICK(function)
    again = SLOW(given(*function.strategies)(function.plain))
    module[f"{name}_at_length"] = pytest.mark.slow(again)
    return module[name]


def fuzzed(*strategies):
    """`given` whose function can be given other settings as well."""

    def wrap(function):
        test = given(*strategies)(function)
        test.strategies, test.plain = strategies, function
        return test

    return wrap


def refused_in_a_sentence(read, *arguments):
    """Reads; whatever is wrong must be said by a UserError, in a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on sizes
            read(*arguments)
    except UserError as error:
        message = str(error)
        assert len(message.split()) > 2, message


numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0, 2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.floats(-2, 2),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damages(draw):
    """A change of a file's bytes: cut, overwritten, inserted, or other ones altogether."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "other"]))
    place = draw(st.floats(0, 1))
    junk = draw(st.binary(min_size=1, max_size=12))

    def apply(data: bytes) -> bytes:
        at = int(place * len(data))
        match kind:
            case "cut":
                return data[:at]
            case "flip":
                return data[:at] + junk + data[at + len(junk) :]
            case "insert":
                return data[:at] + junk + data[at:]
        return junk

    return apply


@st.composite
def edits(draw):
    """A change of a JSON value: some part of it replaced, taken out, or joined by another."""
    steps = draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=4))
    new, kind = draw(values), draw(st.sampled_from(["replace", "remove", "add"]))

    def apply(value, steps=tuple(steps)):
        if not steps or not isinstance(value, (dict, list)) or not value:
            return new
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = keys[int(steps[0] * len(keys))], value.copy()
        if len(steps) > 1 and isinstance(value[key], (dict, list)):
            copy[key] = apply(value[key], steps[1:])
        elif kind == "remove":
            del copy[key]
        elif kind == "add" and isinstance(value, dict):
            copy[f"{key}x"] = new
        else:
            copy[key] = new
        return copy

    return apply


# Checkpoints.

TENSORS = {"a": [2, 3], "b": [4]}


def safetensors_file() -> bytes:
    described, end = {}, 0
    for name, shape in TENSORS.items():
        size = 4 * int(np.prod(shape))
        described[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@suites
@fuzzed(damages())
def test_safetensors_bytes(tmp_path, damage):
    (tmp_path / "model.safetensors").write_bytes(damage(safetensors_file()))
    refused_in_a_sentence(engine.read_tensors, tmp_path)


@suites
@fuzzed(edits(), st.sampled_from(["F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8"]))
def test_safetensors_header(tmp_path, edit, dtype):
    data = safetensors_file()
    (length,) = struct.unpack("<Q", data[:8])
    described = json.loads(data[8 : 8 + length])
    for each in described.values():
        each["dtype"] = dtype
    text = json.dumps(edit(described)).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + length :]
    )
    refused_in_a_sentence(engine.read_tensors, tmp_path)


@suites
@fuzzed(edits())
def test_index_of_shards(tmp_path, edit):
    (tmp_path / "x.safetensors").write_bytes(safetensors_file())
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(edit(index)))
    refused_in_a_sentence(engine.read_tensors, tmp_path)


CONFIGS = [
    (system, json.loads((case / "config.json").read_text()))
    for system in engine.SYSTEMS
    for case in sorted((GOLDEN / system).glob("*"))[:1]
    if (case / "config.json").exists()
]


@suites
@fuzzed(st.sampled_from(CONFIGS), edits())
def test_config_of_a_published_checkpoint(tmp_path, case, edit):
    system, config = case
    (tmp_path / "config.json").write_text(json.dumps(edit(config)))
    refused_in_a_sentence(engine._config, engine.find(system), tmp_path)


# Configurations.

OURS = [
    TrainConfig(),
    ClassifierConfig(),
    PuzzleConfig(),
    huginn.TINY,
    hrm.SUDOKU_4X4,
    sequence_classifier.DIGITS,  # whose mixer is one of several kinds
    universal_transformer.TINY,
]


@suites
@fuzzed(st.sampled_from(OURS), edits())
def test_configuration(config, edit):
    refused_in_a_sentence(from_dict, type(config), edit(to_dict(config)))


@suites
@fuzzed(damages())
def test_json_and_yaml_files_of_options(tmp_path, damage):
    yaml = (
        b"steps: 3\nlearning_rate: 2020-01-01\noptimizer: {name: adamw}\nmodel:\n  width: [1, 2]\n"
    )
    for name, text in (("c.yaml", yaml), ("c.json", b'{"steps": 3, "model": {"width": 128}}')):
        (tmp_path / name).write_bytes(damage(text))
        refused_in_a_sentence(
            parse, ["jaxrec.models.huginn:TINY", "--config", str(tmp_path / name)]
        )


RUN = {
    "layout": 1,
    "model": "jaxrec.models.huginn:TINY",
    "model_class": "jaxrec.models.huginn:HuginnConfig",
    "model_config": to_dict(huginn.TINY),
    "train": to_dict(TrainConfig()),
    "data": {"tokenizer": "bytes"},
    "versions": {"jaxrec": "0"},
}


@suites
@fuzzed(edits())
def test_run(tmp_path, edit):
    (tmp_path / "run.json").write_text(json.dumps(edit(RUN)))
    refused_in_a_sentence(read_run, tmp_path)


@suites
@fuzzed(damages())
def test_metrics_at_resume(tmp_path, damage):
    lines = [{"step": i, "kind": "train", "time": 1.0, "loss": "nan"} for i in range(1, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_bytes(damage(text.encode()))
    refused_in_a_sentence(metrics.read, tmp_path / "metrics.jsonl")
    refused_in_a_sentence(metrics.truncate_after, tmp_path / "metrics.jsonl", 2)


@suites
@fuzzed(st.lists(values, max_size=3))
def test_metrics_of_any_json(tmp_path, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    refused_in_a_sentence(metrics.read, tmp_path / "metrics.jsonl")
    refused_in_a_sentence(metrics.truncate_after, tmp_path / "metrics.jsonl", 2)


# Data.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return json.loads(path.read_text())


@suites
@fuzzed(edits(), st.one_of(st.none(), edits()))
def test_tokenizer(tmp_path, tokenizer, edit, of_config):
    (tmp_path / "tokenizer.json").write_text(json.dumps(edit(tokenizer)))
    if of_config is not None:
        config = of_config({"bos_token": {"content": "<s>"}})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def read():
        made = load_tokenizer(tmp_path)
        made.decode(made.encode("def f(x): return 'é'").tolist())

    refused_in_a_sentence(read)


@suites
@fuzzed(damages())
def test_tokenizer_bytes(tmp_path, tokenizer, damage):
    (tmp_path / "tokenizer.json").write_bytes(damage(json.dumps(tokenizer).encode()))
    refused_in_a_sentence(load_tokenizer, tmp_path)


STREAMS = {
    "format": "jaxrec-tokens",
    "version": 2,
    "crc32": {},
    "tokenizer": "bytes",
    "vocab_size": 257,
    "dtype": "uint16",
    "tokens": {"train": 4, "valid": 4},
    "documents": {"train": 2, "valid": 2},
    "bytes": {"train": 4, "valid": 4},
    "provenance": {},
}


@suites
@fuzzed(
    edits(), damages(), st.sampled_from(["meta.json", "bytes", "train.bin", "valid.starts.npy"])
)
def test_token_folder(tmp_path, edit, damage, which):
    files = {"meta.json": json.dumps(STREAMS).encode()}
    np.save(tmp_path / "starts.npy", np.array([0, 2]))
    for side in ("train", "valid"):
        files[f"{side}.bin"] = np.array([256, 1, 256, 2], "<u2").tobytes()
        files[f"{side}.starts.npy"] = (tmp_path / "starts.npy").read_bytes()
    if which == "meta.json":
        files[which] = json.dumps(edit(STREAMS)).encode()
    else:
        which = "meta.json" if which == "bytes" else which
        files[which] = damage(files[which])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    refused_in_a_sentence(read_streams, tmp_path)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    rows = np.array([[1, 2], [2, 1]], np.int32)
    one = np.zeros(1, np.int32)
    ends = {"puzzle_indices": np.array([0, 2]), "group_indices": np.array([0, 1])}
    folder = tmp_path_factory.mktemp("puzzles") / "train"
    puzzles = PuzzleSet(inputs=rows, labels=rows, puzzle_identifiers=one, **ends)
    write_split(folder, {"all": puzzles}, vocabulary=3)
    read_split(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@suites
@fuzzed(edits(), damages(), st.integers(0, 6))
def test_puzzle_folder(tmp_path, split, edit, damage, which):
    for name, data in split.items():
        (tmp_path / name).write_bytes(data)
    if which == 6:
        changed = edit(json.loads(split["dataset.json"]))
        (tmp_path / "dataset.json").write_text(json.dumps(changed))
    else:
        name = sorted(split)[which]
        (tmp_path / name).write_bytes(damage(split[name]))
    refused_in_a_sentence(read_split, tmp_path)


@suites
@fuzzed(edits())
def test_arc_task(tmp_path, edit):
    pair = {"input": [[1, 2]], "output": [[3], [4]]}
    (tmp_path / "a.json").write_text(json.dumps(edit({"train": [pair], "test": [pair]})))
    refused_in_a_sentence(read_tasks, tmp_path)


GRAPHS = {
    "A": "1, 2\n2, 1\n3, 4\n",
    "graph_indicator": "1\n1\n2\n2\n",
    "graph_labels": "-1\n1\n",
    "node_labels": "0\n1\n1\n0\n",
    "edge_attributes": "0.5, 1\n0.5, 1\n2, 1\n",
}


@suites
@fuzzed(
    st.sampled_from(list(GRAPHS)),
    damages(),
    st.sampled_from(["", "9" * 30, "1_0", "\u0661", "1e400", "nan", "0x1", "-9223372036854775808"]),
)
def test_graph_folder(tmp_path, which, damage, number):
    for name, text in GRAPHS.items():
        (tmp_path / f"X_{name}.txt").write_text(text)
    data = GRAPHS[which]
    changed = data.replace("1", number, 1).encode() if number else damage(data.encode())
    (tmp_path / f"X_{which}.txt").write_bytes(changed)
    refused_in_a_sentence(read_tudataset, tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    image = pytest.importorskip("PIL.Image").new("RGB", (5, 4), (200, 10, 30))
    folder = tmp_path_factory.mktemp("pictures")
    for suffix in ("png", "jpg", "webp", "bmp"):
        image.save(folder / f"a.{suffix}")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@suites
@fuzzed(st.integers(0, 3), damages())
def test_image_folder(tmp_path, pictures, which, damage):
    name = sorted(pictures)[which]
    folder = tmp_path / "class"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / name).write_bytes(damage(pictures[name]))
    refused_in_a_sentence(lambda: ImageFolder(tmp_path, 4, workers=1).read([0]))


@pytest.mark.parametrize("size", [10**9, 2**62])
@pytest.mark.parametrize(
    "system, field", [("recurrentgemma", "num_hidden_layers"), ("s5", "P"), ("huginn", "n_embd")]
)
def test_sizes_beyond_all_memory(tmp_path, system, field, size):
    (config,) = [config for name, config in CONFIGS if name == system]
    assert field in config
    (tmp_path / "config.json").write_text(json.dumps(config | {field: size}))
    (tmp_path / "model.safetensors").write_bytes(safetensors_file())
    with pytest.raises(UserError):
        engine.load(system, tmp_path)
