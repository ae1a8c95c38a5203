"""Reports of benchmarks as tables of text, for a terminal and for benchmarks/README.md alike."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Report = Mapping[str, Any]
MANY_SHAPES = 4
"""From so many shapes on, a report on scans shows how time and memory grow, not who is how fast."""


class Table(NamedTuple):
    """Columns are separated by |; every row has as many texts."""

    title: str
    columns: str
    rows: list[list[str]]


def tables(report: Report) -> list[Table]:
    """The tables of a report, by the benchmark that wrote it."""
    return TABLES[report["benchmark"]](report)


def machine(report: Report) -> str:
    """One line: where and when the numbers were taken."""
    where = report["machine"]
    tunables = f", {where['environment']}" if where.get("environment") else ""
    return (
        f"{where['cpu']}, {where['cpu_threads']} threads, device {where['device']},"
        f" jax {where['jax']}, jaxlib {where['jaxlib']}{tunables}; {report['rounds']} rounds in"
        f" turns; load {where['load_average']} before and {where['load_average_after']} after;"
        f" {where['date']}"
    )


def _pair(x: Mapping[str, float], what: str, digits: int) -> str:
    """The median of something and its least value."""
    median, least = (
        (x[f"median_{what}"], x[f"least_{what}"])
        if f"median_{what}" in x
        else (x[f"{what}_median"], x[f"{what}_least"])
    )
    return f"{median:.{digits}f} ({least:.{digits}f})"


BOUND = "GFLOP | s at peak"


def _bound(x: Mapping[str, float]) -> list[str]:
    """What the matrix products would take at the machine's peak: the columns of BOUND."""
    if "gflop" not in x:  # a file from before it was measured
        return ["-", "-"]
    return [f"{x['gflop']:.0f}", f"{x['bound_s']:.2f}"]


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _scan(report: Report) -> list[Table]:
    """One table per shape; one of all lengths if there are many."""
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in report["results"]))
    if len(shapes) >= MANY_SHAPES:
        return [_scan_lengths(report)]
    found = []
    for shape in shapes:
        records = [x for x in report["results"] if tuple(x["shape"]) == shape]
        rows = []
        for record in records:
            row = [record["candidate"]]
            for x in (record["forward"], record["both"]):
                row += [
                    _pair(x, "ms", 1),
                    _pair(x, "to_best_peer", 2),
                    f"{x['gb_per_s']:.1f}",
                    f"{x['compile_s']:.1f}",
                    _mib(x["temp_mib"]),
                ]
            rows.append(row)
        copied = records[0]["copy_gb_per_s"]
        title = f"Linear scan, (b, t, d) = {shape}; a copy runs at {copied:.1f} GB/s"
        columns = (
            "candidate | forward ms | to best peer | GB/s | compile s | temp MiB"
            " | forward + backward ms | to best peer | GB/s | compile s | temp MiB"
        )
        found.append(Table(title, columns, rows))
    return found


def _scan_lengths(report: Report) -> Table:
    """One row per length of the default method, beside the plain loop."""
    by_name: dict[str, dict[int, Any]] = {}
    for record in report["results"]:
        by_name.setdefault(record["candidate"], {})[record["shape"][1]] = record
    batch, _, width = report["results"][0]["shape"]
    rows = []
    for time, record in by_name["jaxrec auto"].items():
        row = [f"{time:,}"]
        for pass_ in ("forward", "both"):
            x, plain = record[pass_], by_name["lax.scan"][time][pass_]
            per_step = 1e6 * x["least_ms"] / time
            row += [_pair(x, "ms", 1), f"{per_step:.0f}"]
            row += [_mib(x["peak_mib"]), _mib(plain["peak_mib"])]
        rows.append(row)
    return Table(
        f"Linear scan by length, method auto, (b, t, d) = ({batch}, t, {width})",
        "t | forward ms | ns per step | peak MiB | lax.scan's | forward + backward ms"
        " | ns per step | peak MiB | lax.scan's",
        rows,
    )


DECAYS = {"none": "no decay", "head": "a decay for each head", "key": "a decay for each key"}


def _matrix(report: Report) -> list[Table]:
    """One table per rule, decay and pass: a row per candidate, a column per length."""
    sizes, found = report["sizes"], []
    lengths = list(dict.fromkeys(x["time"] for x in report["results"]))

    def kind(x: Mapping[str, str]) -> tuple[str, str]:
        return x["rule"], x.get("decay", "head")  # a file from before there was a choice

    for rule, decay in dict.fromkeys(map(kind, report["results"])):
        records = [x for x in report["results"] if kind(x) == (rule, decay)]
        for part, what in (("forward", "forward"), ("both", "forward + backward")):
            rows = []
            for name in dict.fromkeys(x["candidate"] for x in records):
                row = [name]
                for x in (x[part] for x in records if x["candidate"] == name):
                    row += [_pair(x, "ms", 1), _mib(x["temp_mib"])]
                rows.append(row)
            title = (
                f"Matrix scan, {rule} rule, {what}; b = {sizes['batch']}, h = {sizes['heads']},"
                f" k = {sizes['keys']}, v = {sizes['values']}, {DECAYS[decay]}"
            )
            columns = " | ".join(f"t = {time:,} ms | temp MiB" for time in lengths)
            found.append(Table(title, f"steps | {columns}", rows))
    return found


def _grid(report: Report) -> list[Table]:
    """A table of methods, a row per method and grid, and one of the model."""
    sizes, found = report["sizes"], []
    columns = "ms | compile s | temp MiB | forward + backward ms | compile s | temp MiB"
    scans = [x for x in report["results"] if x["part"] == "scan"]
    rows = [
        [f"{x['side']} x {x['side']}", x["candidate"], *_pass(x["forward"]), *_pass(x["both"])]
        for x in scans
    ]
    title = (
        f"Grid scan, one orientation; b = {sizes['batch']}, h = {sizes['heads']}, k = v ="
        f" {sizes['width'] // sizes['heads']}"
    )
    found.append(Table(title, f"grid | method | forward {columns}", rows))
    rows = []
    for x in report["results"]:
        if x["part"] == "model":
            for part, what in (("forward", "forward"), ("both", "forward + backward")):
                took, figures = x[part], ["-", "-", "-"]
                if "figure_s" in took:
                    ratio = 1e3 * took["figure_s"] / took["median_ms"]
                    figures = [f"{took['figure_s']:.2f}", f"{ratio:.1f}"]
                    figures.append(f"{took['figure_compile_s']:.0f}")
                size, peak = f"{x['side']} x {x['side']}", _mib(took.get("peak_mib"))
                rows.append([size, what, *_pass(took), peak, *figures])
    title = (
        f"pLSTM's classifier of images, batch {sizes['batch']}, width {sizes['width']},"
        f" {sizes['layers']} blocks of two halves, patches of {sizes['patch']}; the figures are"
        " those of the authors' JAX code on a machine of this kind"
    )
    columns = "images | what | ms | compile s | temp MiB | peak MiB | figure s | figure / ours"
    found.append(Table(title, f"{columns} | figure compile s", rows))
    return found


def _pass(took: Mapping[str, Any]) -> list[str]:
    return [_pair(took, "ms", 1), f"{took['compile_s']:.1f}", _mib(took["temp_mib"])]


def _newton(report: Report) -> list[Table]:
    """One table per width and pass: a row per candidate, two columns per length."""
    found = []
    lengths = list(dict.fromkeys(x["time"] for x in report["results"]))
    kinds = [(x.get("cell", "gru"), x["width"]) for x in report["results"]]
    for cell, width in dict.fromkeys(kinds):
        both = zip(kinds, report["results"], strict=True)
        records = [x for kind, x in both if kind == (cell, width)]
        floor = " | to floor" if "floor_ms" in records[0]["forward"] else ""
        for part, what in (("forward", "forward"), ("both", "forward + backward")):
            rows = []
            for name in dict.fromkeys(x["candidate"] for x in records):
                row = [name]
                for x in (x[part] for x in records if x["candidate"] == name):
                    ratio = _pair(x, "to_lax_scan", 2)
                    row += [_pair(x, "ms", 1), ratio, f"{x['gb_per_s']:.1f}"]
                    row += [f"{x['to_floor']:.1f}"] if floor else []
                    row += [_mib(x["temp_mib"])]
                rows.append(row)
            iterations = ", ".join(
                f"{x['iterations']} at t = {x['time']:,}"
                for x in records
                if x["candidate"] == "jaxrec newton"
            )
            title = (
                f"A Para{cell.upper()}, {what}; b = {report['batch']}, d = {width};"
                f" Newton takes {iterations}"
            )
            columns = " | ".join(
                f"t = {time:,} ms | to lax.scan | GB/s{floor} | temp MiB" for time in lengths
            )
            found.append(Table(title, f"candidate | {columns}", rows))
    return found


def _train(report: Report) -> list[Table]:
    """One table per part that was timed."""
    found = []
    for part, build in TRAIN_PARTS.items():
        records = [record for record in report["results"] if record["part"] == part]
        if records:
            found.append(build(records, report))
    return found


def _step(records: list[Any], report: Report) -> Table:
    sizes, rows = report["sizes"], []
    for record in records:
        for what in ("forward", "step"):
            x = record[what]
            theirs = ["-", "-"]
            if "torch_median_s" in x:
                median, least = x["torch_median_s"], x["torch_least_s"]
                theirs = [f"{median:.2f} ({least:.2f})", _pair(x, "torch_to_ours", 2)]
            rows.append(
                [
                    str(record["mlp_width"]),
                    what,
                    _pair(x, "s", 2),
                    *theirs,
                    f"{x['figure_to_ours']:.2f}",
                    f"{x['gflop']:.0f}",
                    f"{x['gflop_per_s']:.0f} of {record['peak_gflop_per_s']:.0f}",
                    f"{x['bound_s']:.2f}",
                    f"{x['compile_s']:.0f}",
                ]
            )
    title = (
        f"Huginn, width {sizes['width']}, {'+'.join(map(str, sizes['layers']))} blocks, batch"
        f" {sizes['batch']} x {sizes['time']} tokens, {sizes['depth'] - sizes['graded']} ungraded +"
        f" {sizes['graded']} graded loops; torch {report['torch'] or 'not installed'}"
    )
    columns = (
        "MLP | what | s | torch s | torch / ours | figure / ours | GFLOP | GFLOP/s of peak"
        " | s at peak | compile s"
    )
    return Table(title, columns, rows)


def _remat(records: list[Any], report: Report) -> Table:
    rows = [
        [x["remat"], _pair(x, "s", 2), _mib(x["temp_mib"]), f"{x['compile_s']:.0f}"]
        for x in records
    ]
    title = (
        f"A training step by what its backward pass computes again, MLP {records[0]['mlp_width']}"
    )
    return Table(title, "remat | s | temp MiB | compile s", rows)


def _depth(records: list[Any], report: Report) -> Table:
    rows = [
        [str(x["depth"]), _pair(x, "s", 2), f"{x['gflop']:.0f}", f"{x['gflop_per_s']:.0f}"]
        for x in records
    ]
    first = records[0]
    title = (
        f"A training step by depth, MLP {first['mlp_width']}: one program, compiled in"
        f" {first['compile_s']:.0f} s"
    )
    return Table(title, "loops | s | GFLOP | GFLOP/s", rows)


def _compile(records: list[Any], report: Report) -> Table:
    rows = [[str(x["depth"]), f"{x['compile_s']:.0f}", _mib(x["temp_mib"])] for x in records]
    title = "The gradient through all loops, their number fixed in the program"
    return Table(title, "loops | compile s | temp MiB", rows)


def _decode(records: list[Any], report: Report) -> Table:
    sizes = report["sizes"]
    rows = []
    for x in records:
        theirs = ["-", "-"]
        if "torch_median_s" in x:
            theirs = [f"{x['torch_tokens_per_s']:,.0f}", _pair(x, "torch_to_ours", 2)]
        speed = f"{x['tokens_per_s']:,.0f}"
        rows.append([str(x["depth"]), str(x["batch"]), speed, _pair(x, "s", 2), *theirs])
    title = (
        f"Cached greedy decoding, {sizes['new_tokens']} tokens after a prompt of"
        f" {sizes['prompt']}, MLP {records[0]['mlp_width']}"
    )
    return Table(title, "loops | batch | tokens/s | s | torch tokens/s | torch / ours", rows)


def _models(report: Report) -> list[Table]:
    """One table."""
    sizes, rows = report["sizes"], []
    has_figures = any("figure_to_ours" in x for x in report["results"])
    for x in report["results"]:
        theirs = ["-", "-", "-"]
        if "transformers" in x:
            theirs = [
                f"{x['transformers']['tokens_per_s']:,.0f}",
                _pair(x["transformers"], "s", 3),
                _pair(x, "to_ours", 2),
            ]
        compiled = ["-", "-", "-", "-"]
        if "compile_s" in x:
            compiled = [*_bound(x), f"{x['compile_s']:.0f}", _mib(x["temp_mib"])]
        rows.append(
            [
                x["system"],
                "forward + backward" if x["part"] == "both" else x["part"],
                f"{x['jaxrec']['tokens_per_s']:,.0f}",
                _pair(x["jaxrec"], "s", 3),
                *theirs,
                *([_figure(x)] if has_figures else []),
                *compiled,
            ]
        )
    title = (
        f"Recurrent language models, width {sizes['width']}, {sizes['layers']} layers, vocabulary"
        f" {sizes['vocab_size']}, batch {sizes['batch']} x {sizes['time']} tokens, RecurrentGemma's"
        f" MLP {sizes['mlp_width']}; decoding {sizes['new_tokens']} tokens after a prompt of"
        f" {sizes['prompt']} at batch 1; transformers {report['transformers'] or 'not installed'}"
    )
    columns = (
        "model | what | tokens/s | s | transformers tokens/s | transformers s"
        f" | transformers / ours |{' figure / ours |' if has_figures else ''} {BOUND} | compile s"
        " | temp MiB"
    )
    return [Table(title, columns, rows)]


def _figure(x: Mapping[str, float]) -> str:
    return f"{x['figure_to_ours']:.2f}" if "figure_to_ours" in x else "-"


def _selective_memory(report: Report) -> list[Table]:
    sizes = report["sizes"]
    rows = [
        [
            f"{x['time']:,}",
            f"{x['input_mib']:.0f}",
            f"{x['selective_scan_mib']:.1f}",
            f"{x['all_states_mib']:.0f}",
        ]
        for x in report["results"]
    ]
    title = (
        f"Temporary memory of the gradient, b = {sizes['batch']}, e = {sizes['inner']},"
        f" n = {sizes['states']}, as the compiler plans it; nothing is run"
    )
    return [Table(title, "t | x MiB | selective_scan MiB | all states kept MiB", rows)]


def _grid_memory(report: Report) -> list[Table]:
    """A row for each size of the scan and of the model."""
    sizes, rows = report["sizes"], []
    for x in report["results"]:
        what = "scan, four orientations" if x["part"] == "scan" else "classifier, images"
        row = [f"{what}, {x['side']} x {x['side']}"]
        for part in ("forward", "both"):
            ours, theirs = x["jaxrec"][part], x["published"][part]
            row += [_mib(ours["temp_mib"]), _mib(theirs["temp_mib"])]
            row += [_mib(ours["peak_mib"]), _mib(theirs["peak_mib"])]
            row += [f"{theirs['peak_mib'] / ours['peak_mib']:.1f}"]
        rows.append(row)
    title = (
        f"Memory of grids in MiB, ours beside the published scheme (peers/grid_published.py), batch"
        f" {sizes['batch']}, {sizes['heads']} heads, width {sizes['width']}, as the compiler plans"
        " it; nothing is run"
    )
    columns = "temp | published temp | peak | published peak | published / ours"
    return [Table(title, f"what | forward {columns} | forward + backward {columns}", rows)]


def _hrm(report: Report) -> list[Table]:
    """A segment, and memory by cycles."""
    sizes = report["sizes"]
    segments = [x for x in report["results"] if x["part"] == "segment"]
    rows = []
    for x in segments:
        theirs = ["-", "-"]
        if "torch" in x:
            theirs = [_pair(x["torch"], "s", 3), _pair(x, "to_ours", 2)]
        ours = [_pair(x, "s", 3), *theirs, f"{x['figure_to_ours']:.2f}", *_bound(x)]
        rows.append([*ours, f"{x['compile_s']:.0f}", _mib(x["temp_mib"])])
    title = (
        f"A training segment of HRM, width {sizes['width']}, {sizes['high_layers']} +"
        f" {sizes['low_layers']} layers, {sizes['high_cycles']} x {sizes['low_cycles']} cycles,"
        f" batch {sizes['batch']} x {sizes['length']} tokens; torch"
        f" {report['torch'] or 'not installed'}"
    )
    columns = (
        f"s | torch s | torch / ours | {report['figure_s']} s / ours | {BOUND} | compile s"
        " | temp MiB"
    )
    planned = [x for x in report["results"] if x["part"] == "memory"]
    cycles = [[f"{x['cycles']} x {x['cycles']}", f"{x['temp_mib']:.1f}"] for x in planned]
    return [
        Table(title, columns, rows),
        Table(
            "Memory of the step by cycles, as the compiler plans it", "cycles | temp MiB", cycles
        ),
    ]


TABLES: dict[str, Callable[[Report], list[Table]]] = {
    "grid": _grid,
    "grid_memory": _grid_memory,
    "hrm": _hrm,
    "matrix": _matrix,
    "newton": _newton,
    "models": _models,
    "scan": _scan,
    "selective_memory": _selective_memory,
    "train": _train,
}
TRAIN_PARTS: dict[str, Callable[[list[Any], Report], Table]] = {
    "step": _step,
    "remat": _remat,
    "depth": _depth,
    "compile": _compile,
    "decode": _decode,
}
