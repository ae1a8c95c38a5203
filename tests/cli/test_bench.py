"""`jaxrec bench`: what it refuses to time, what it writes, and that every part of it runs."""

import contextlib
import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxrec.cli import (
    bench,
    bench_grid,
    bench_hrm,
    bench_matrix,
    bench_models,
    bench_newton,
    bench_scan,
    bench_tables,
    bench_train,
    main,
    passes,
    timing,
    torch_peer,
)
from jaxrec.ops.cells import para_gru
from jaxrec.ops.time import grid_scan, linear_scan


@pytest.fixture(autouse=True)
def _kept_programs(monkeypatch):
    """Compile times mean nothing here, so programs of earlier test runs may be used."""
    monkeypatch.setattr(timing, "without_compilation_cache", contextlib.nullcontext)


def test_compiling_compiles(monkeypatch):
    monkeypatch.undo()
    with timing.without_compilation_cache():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache


def numbers(value):
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    return [value] if isinstance(value, float) else []


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_scan_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "new" / "scan.json"
    options = ["--smoke", "--methods", "auto", "chunked", "--json", "--out", str(out)]
    assert main.main(["bench", "scan", *options]) == 0
    head, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records
    assert report["machine"] == head["machine"]
    assert {"device", "jax", "jaxlib", "cpu", "date", "load_average"} <= set(head["machine"])
    names = {record["candidate"] for record in records}
    assert {"lax.scan", "lax.associative_scan", "jaxrec auto", "jaxrec chunked"} <= names
    assert all(0 < x < math.inf for record in records for x in numbers(record))


def test_train_times_decoding(tmp_path, capsys):
    out = tmp_path / "train.json"
    options = ["--smoke", "--parts", "decode", "--json", "--out", str(out)]
    assert main.main(["bench", "train", *options]) == 0
    head, record = json_lines(capsys.readouterr().out)
    assert json.loads(out.read_text()) == head | {"results": [record]}
    assert record["part"] == "decode" and record["batch"] == 2 and record["tokens_per_s"] > 0
    has_torch = importlib.util.find_spec("torch") is not None
    assert ("torch_tokens_per_s" in record) == has_torch
    # The same report as a person reads it.
    timing.publish(head | {"results": [record]}, as_json=False, out=None)
    assert "torch / ours" in capsys.readouterr().out


@pytest.mark.slow  # seven programs of a training step to compile
def test_train_times_every_part(tmp_path, capsys):
    out = tmp_path / "train.json"
    arguments = bench.TrainArguments(smoke=True, json=True, out=out)
    assert bench.run(arguments) == 0
    head, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records
    assert head["sizes"]["graded"] == 2
    parts = ["step", *["remat"] * 4, "depth", "depth", "compile", "compile", "decode"]
    assert [record["part"] for record in records] == parts
    assert all(0 <= x < math.inf for record in records for x in numbers(record))
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "GFLOP/s of peak" in printed


def wrong_last_state(a, b, h0):
    h, last = linear_scan(a, b, h0)
    return h, 1.0001 * last


def wrong_gradient(a, b, h0):
    return linear_scan(lax.stop_gradient(a), b, h0)


def not_a_number(a, b, h0):
    h, last = linear_scan(a, b, h0)
    return h * jnp.nan, last


@pytest.mark.parametrize(
    "candidate, what", [(wrong_last_state, "last"), (wrong_gradient, "da"), (not_a_number, "h")]
)
def test_a_wrong_candidate_is_not_timed(monkeypatch, capsys, tmp_path, candidate, what):
    monkeypatch.setattr(bench_scan, "ours", lambda methods: {"jaxrec auto": candidate})
    monkeypatch.setattr(bench_scan, "measure", None)  # calling it would fail
    out = tmp_path / "scan.json"
    assert bench.run(bench.ScanArguments(smoke=True, out=out)) == 1
    printed = capsys.readouterr()
    assert f"jaxrec auto is wrong: {what} differs" in printed.err
    assert printed.out == ""
    assert not out.exists()


def test_every_method_passes_the_check():
    for name, scan in bench_scan.ours(["sequential", "associative", "chunked"]).items():
        bench_scan.check(name, scan)


def test_the_peers_agree_with_the_definition():
    for name, scan in bench_scan.peers().items():
        bench_scan.check(name, scan)


def test_matrix_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "matrix.json"
    assert main.main(["bench", "matrix", "--smoke", "--json", "--out", str(out)]) == 0
    _, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records
    assert [(x["rule"], x["candidate"]) for x in records] == [
        (rule, candidate)
        for rule in ("gated", "delta")
        for candidate in ("sequential", "chunks of 8")
    ]
    assert all(0 <= x < math.inf for record in records for x in numbers(record))
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    assert "Matrix scan, delta rule" in capsys.readouterr().out


@pytest.mark.slow  # twelve programs to compile
def test_a_matrix_scan_is_timed_with_every_decay(tmp_path, capsys):
    words = ["--smoke", "--rules", "gated", "--decays", "none", "head", "key"]
    out = tmp_path / "matrix.json"
    assert main.main(["bench", "matrix", *words, "--json", "--out", str(out)]) == 0
    _, *records = json_lines(capsys.readouterr().out)
    assert [x["decay"] for x in records] == ["none", "none", "head", "head", "key", "key"]
    timing.publish(json.loads(out.read_text()), as_json=False, out=None)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("no decay", "for each head", "for each key"))


def test_a_model_is_timed_against_its_figure():
    """The figure is one of the published sizes, so the small ones of a test have none."""
    report = {
        "sizes": dataclasses.asdict(bench_models.Sizes()),
        "transformers": None,
        "results": [
            {
                "system": "xlstm",
                "part": part,
                "jaxrec": {"tokens_per_s": 242.0, "median_s": 1.0, "least_s": 1.0},
            }
            | figure
            for part, figure in (("decode", {"figure_to_ours": 2.0}), ("both", {}))
        ],
    }
    ((_, columns, rows),) = bench_tables.tables(report | {"benchmark": "models"})
    column = [name.strip() for name in columns.split("|")].index("figure / ours")
    assert [row[column] for row in rows] == ["2.00", "-"]
    figure = {name: system.figure for name, system in bench_models.SYSTEMS.items()}
    assert figure["xlstm"] == {"forward": 6937, "decode": 121}


def test_a_wrong_matrix_scan_is_not_timed(monkeypatch, capsys):
    right = bench_matrix.candidates

    def wrong(rule, chunks):
        def scan(inputs):
            return right(rule, ())["sequential"](inputs | {"v": lax.stop_gradient(inputs["v"])})

        return {"chunks of 8": scan, **right(rule, ())} if chunks else right(rule, ())

    monkeypatch.setattr(bench_matrix, "candidates", wrong)
    monkeypatch.setattr(passes, "measure", None)  # calling it would fail
    assert bench.run(bench.MatrixArguments(smoke=True, rules=("gated",))) == 1
    assert (
        "gated, decay: head, chunks of 8 is wrong: the gradient of v differs"
        in capsys.readouterr().err
    )


@pytest.mark.slow  # twelve programs to compile
def test_grid_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "grid.json"
    assert main.main(["bench", "grid", "--smoke", "--json", "--out", str(out)]) == 0
    _, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records
    names = [x["candidate"] for x in records if x["part"] == "scan"]
    assert names == list(bench_grid.candidates())
    assert records[-1]["part"] == "model"
    took = [x[part] for x in records for part in ("forward", "both")]
    assert all(x["peak_mib"] > x["temp_mib"] for x in took)
    assert all(0 <= x < math.inf for record in records for x in numbers(record))
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    assert "classifier of images" in capsys.readouterr().out


def test_a_wrong_grid_scan_is_not_timed(monkeypatch, capsys):
    def wrong(inputs):
        return grid_scan(**inputs | {"k": lax.stop_gradient(inputs["k"])}, method="sequential")

    right = bench_grid.candidates()
    monkeypatch.setattr(bench_grid, "candidates", lambda: right | {"rows": wrong})
    monkeypatch.setattr(bench_grid, "measure_model", None)  # calling it would fail
    assert bench.run(bench.GridArguments(smoke=True)) == 1
    assert "rows is wrong: the gradient of k differs" in capsys.readouterr().err


def test_newton_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "newton.json"
    argv = ["bench", "newton", "--smoke", "--eager", "--window", "8", "--json", "--out", str(out)]
    assert main.main(argv) == 0
    _, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records
    assert [(x["cell"], x["candidate"]) for x in records] == [
        (cell, name)
        for cell in ("gru", "lstm")
        for name in bench_newton.candidates(cell, window=8, eager=True)
    ]
    assert all(0 <= x < math.inf for record in records for x in numbers(record))
    assert records[0]["both"]["to_lax_scan_median"] == 1
    assert all(2 <= x["iterations"] <= 5 for x in records)
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    assert "A ParaGRU, forward + backward" in capsys.readouterr().out


def test_accelerators_time_the_kernel_too(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # here the kernel is interpreted
    assert main.main(["bench", "newton", "--smoke", "--cells", "lstm", "--json"]) == 0
    timed = {x["candidate"] for x in json_lines(capsys.readouterr().out)[1:]}
    assert timed == bench_newton.candidates("lstm", kernel=True).keys()
    assert timed - bench_newton.candidates("lstm").keys() == {
        "jaxrec pallas",
        "jaxrec pallas, one chunk",
    }


def test_a_wrong_newton_is_not_timed(monkeypatch, capsys):
    def biased(recurrent, u, h0):
        return bench_newton.plain_scan(para_gru, lax.stop_gradient(recurrent), u, h0)

    found = {"jaxrec newton": biased}
    monkeypatch.setattr(bench_newton, "candidates", lambda *args, **options: found)
    monkeypatch.setattr(bench_newton, "measure", None)  # calling it would fail
    assert bench.run(bench.NewtonArguments(smoke=True)) == 1
    assert "jaxrec newton is wrong: drecurrent differs" in capsys.readouterr().err


def test_a_torch_program_that_differs_is_not_timed(monkeypatch, capsys):
    errors = {"the logits": 1e-7, "the gradient of transformer.adapter.weight": float("nan")}
    monkeypatch.setattr(bench_train, "load_peer", lambda: "a peer")
    monkeypatch.setattr(bench_train, "peer_differences", lambda peer: errors)
    monkeypatch.setattr(bench_train, "measure_step", None)  # calling it would fail
    assert bench.run(bench.TrainArguments(smoke=True, parts=("step",))) == 1
    assert "the gradient of transformer.adapter.weight by nan" in capsys.readouterr().err


def test_a_torch_program_that_writes_another_text_is_not_timed(monkeypatch, capsys):
    peer = bench_train.load_peer()
    if peer is None:
        return
    generate = peer.Huginn.generate
    monkeypatch.setattr(peer.Huginn, "generate", lambda self, *inputs: generate(self, *inputs) + 1)
    monkeypatch.setattr(bench_train, "load_peer", lambda: peer)
    monkeypatch.setattr(bench_train, "measure_decoding", None)  # calling it would fail
    assert bench.run(bench.TrainArguments(smoke=True, parts=("decode",))) == 1
    assert "huginn_torch.py and jaxrec write different texts" in capsys.readouterr().err


def test_the_torch_program_agrees_where_it_is_installed():
    peer = bench_train.load_peer()
    assert (peer is None) == (importlib.util.find_spec("torch") is None)
    if peer is not None:
        torch_peer.refuse_differences("PyTorch", bench_train.peer_differences(peer))


def test_models_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_models, "load_peer", lambda: None)
    out = tmp_path / "models.json"
    options = ["--smoke", "--parts", "forward", "decode", "--json", "--out", str(out)]
    options += ["--systems", "mamba", "recurrentgemma"]
    assert main.main(["bench", "models", *options]) == 0
    head, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records and head["transformers"] is None
    assert [(x["system"], x["part"]) for x in records] == [
        (system, part) for system in ("mamba", "recurrentgemma") for part in ("forward", "decode")
    ]
    assert all(0 < x["jaxrec"]["tokens_per_s"] < math.inf for x in records)
    assert all(0 < x["bound_s"] < math.inf for x in records if x["part"] == "forward")
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    assert "tokens/s" in capsys.readouterr().out


def test_a_model_of_transformers_that_differs_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "load_peer", lambda: "a peer")
    monkeypatch.setattr(bench_models, "peer_differences", lambda *_: {"the logits": float("nan")})
    monkeypatch.setattr(bench_models, "measure", None)  # calling it would fail
    assert bench.run(bench.ModelsArguments(smoke=True)) == 1
    assert "Mamba of transformers and jaxrec differ: the logits by nan" in capsys.readouterr().err


@pytest.mark.slow  # importing transformers alone takes longer than a few seconds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", bench_models.SYSTEMS)
def test_transformers_agrees_where_it_is_installed(system):
    peer = bench_models.load_peer()
    if peer is not None:
        torch_peer.refuse_differences("PyTorch", bench_models.peer_differences(peer, system))


@pytest.mark.slow  # a step of training for every number of cycles
def test_hrm_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_hrm, "load_peer", lambda: None)
    out = tmp_path / "hrm.json"
    options = ["--smoke", "--cycles", "1", "3", "--json", "--out", str(out)]
    assert main.main(["bench", "hrm", *options]) == 0
    head, *records = json_lines(capsys.readouterr().out)
    report = json.loads(out.read_text())
    assert report["results"] == records and head["torch"] is None
    assert [x["part"] for x in records] == ["segment", "memory", "memory"]
    assert all(0 < x < math.inf for record in records for x in numbers(record))
    few, many = (x["temp_mib"] for x in records[1:])
    assert many <= 1.1 * few
    # The same report as a person reads it.
    timing.publish(report, as_json=False, out=None)
    assert "A training segment of HRM" in capsys.readouterr().out


def test_the_torch_program_of_hrm_agrees_where_it_is_installed():
    peer = bench_hrm.load_peer()
    assert (peer is None) == (importlib.util.find_spec("torch") is None)
    if peer is not None:
        torch_peer.refuse_differences("PyTorch", bench_hrm.peer_differences(peer))


def test_a_torch_program_of_hrm_that_differs_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_hrm, "load_peer", lambda: "a peer")
    monkeypatch.setattr(bench_hrm, "peer_differences", lambda peer: {"the loss": float("nan")})
    monkeypatch.setattr(bench_hrm, "measure", None)  # calling it would fail
    assert bench.run(bench.HRMArguments(smoke=True)) == 1
    assert "the loss by nan" in capsys.readouterr().err


def test_candidates_run_in_turns():
    order = []
    times = timing.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 8)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert len(rounds) == 9
    assert set(rounds[1:]) == {("a", "b"), ("b", "a")}
    assert times["a"].rounds == 8 and 0 <= times["a"].least <= times["a"].median


@pytest.mark.parametrize(
    "argv, words",
    [
        (["scam"], "no benchmark 'scam'. Did you mean scan?"),
        (["scan", "--shapes", "8,4096"], "'8,4096' is not a shape; expected b,t,d"),
        (["scan", "--methods", "magic"], "linear_scan has no method 'magic'"),
        (["scan", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["scan", "--round", "3"], "--round"),
        (["matrix", "--chunks", "0"], "--chunks: expected numbers >= 1, got (0,)"),
        (["matrix", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["grid", "--images", "10"], "--images: sides must be multiples of 4, got 10"),
        (["grid", "--sides", "0"], "--sides: expected numbers >= 1, got (0,)"),
        (["newton", "--widths", "0"], "--widths: expected numbers >= 1, got (0,)"),
        (["newton", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["train", "--depths", "0"], "--depths: expected numbers >= 1"),
        (["train", "--decode-batches", "0"], "--decode-batches: expected numbers >= 1"),
        (["train", "--out", "."], "is a folder"),
        (["models", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["hrm", "--cycles", "0"], "--cycles: expected numbers >= 1, got (0,)"),
        (["models", "--mlp-width", "0"], "--mlp-width must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert main.main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
