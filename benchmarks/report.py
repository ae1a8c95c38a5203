"""Writes the tables of benchmarks/README.md from benchmarks/results/*.json.

    python benchmarks/report.py

No number of the README is written by hand.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
MARK = "<!-- Below this line everything is written by benchmarks/report.py. -->"


def table(columns: str, rows: list[list[str]]) -> list[str]:
    names = [name.strip() for name in columns.split("|")]
    return [
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def heading(path: Path, report: dict) -> list[str]:
    where = report["machine"]
    load = f"load {where['load_average']} before and {where['load_average_after']} after"
    tunables = f", {where['environment']}" if where.get("environment") else ""
    return [
        f"`results/{path.name}`: {where['cpu']}, {where['cpu_threads']} threads, device"
        f" {where['device']}, jax {where['jax']}, jaxlib {where['jaxlib']}{tunables};"
        f" {report['rounds']} rounds in turns; {load}; {where['date']}.",
        "",
    ]


def pair(median: float, least: float, digits: int) -> str:
    return f"{median:.{digits}f} ({least:.{digits}f})"


SHAPES = 4
"""From so many shapes on a report shows how time and memory grow, not who is how fast."""


def scan_lengths(report: dict) -> list[str]:
    """One row per length of the default method, beside the plain loop."""
    by_name: dict[str, dict[int, dict]] = {}
    for record in report["results"]:
        by_name.setdefault(record["candidate"], {})[record["shape"][1]] = record
    batch, _, width = report["results"][0]["shape"]
    rows = []
    for time, record in by_name["jaxrec auto"].items():
        row = [f"{time:,}"]
        for pass_ in ("forward", "both"):
            x, plain = record[pass_], by_name["lax.scan"][time][pass_]
            row += [
                pair(x["median_ms"], x["least_ms"], 1),
                f"{1e6 * x['least_ms'] / time:.0f}",
                f"{x['temp_mib']:.1f}",
                f"{plain['temp_mib']:.1f}",
            ]
        rows.append(row)
    lines = [f"Linear scan by length, method auto, (b, t, d) = ({batch}, t, {width}).", ""]
    return lines + table(
        "t | forward ms | ns per step | temp MiB | lax.scan's | forward + backward ms"
        " | ns per step | temp MiB | lax.scan's",
        rows,
    )


def scan(report: dict) -> list[str]:
    if len({tuple(record["shape"]) for record in report["results"]}) >= SHAPES:
        return scan_lengths(report)
    lines = []
    for shape in dict.fromkeys(tuple(record["shape"]) for record in report["results"]):
        records = [x for x in report["results"] if tuple(x["shape"]) == shape]
        rows = []
        for record in records:
            row = [record["candidate"]]
            for x in (record["forward"], record["both"]):
                row += [
                    pair(x["median_ms"], x["least_ms"], 1),
                    pair(x["to_best_peer_median"], x["to_best_peer_least"], 2),
                    f"{x['compile_s']:.1f}",
                    f"{x['temp_mib']:.0f}",
                ]
            rows.append(row)
        copied = records[0]["copy_gb_per_s"]
        lines += [f"Linear scan, (b, t, d) = {shape}; a copy runs at {copied:.1f} GB/s.", ""]
        lines += table(
            "candidate | forward ms | to best peer | compile s | temp MiB"
            " | forward + backward ms | to best peer | compile s | temp MiB",
            rows,
        )
    return lines


def train(report: dict) -> list[str]:
    def of(part: str) -> list[dict]:
        return [record for record in report["results"] if record["part"] == part]

    lines, sizes = [], report["sizes"]
    if of("step"):
        rows = []
        for record in of("step"):
            for what in ("forward", "step"):
                x = record[what]
                theirs = ["-", "-"]
                if "torch_median_s" in x:
                    theirs = [
                        pair(x["torch_median_s"], x["torch_least_s"], 2),
                        pair(x["torch_to_ours_median"], x["torch_to_ours_least"], 2),
                    ]
                rows.append(
                    [
                        str(record["mlp_width"]),
                        what,
                        pair(x["median_s"], x["least_s"], 2),
                        *theirs,
                        f"{x['figure_to_ours']:.2f}",
                        f"{x['gflop']:.0f}",
                        f"{x['gflop_per_s']:.0f} of {record['peak_gflop_per_s']:.0f}",
                        f"{x['bound_s']:.2f}",
                        f"{x['compile_s']:.0f}",
                    ]
                )
        lines += [
            f"Huginn, width {sizes['width']}, {'+'.join(map(str, sizes['layers']))} blocks, batch"
            f" {sizes['batch']} x {sizes['time']} tokens,"
            f" {sizes['depth'] - sizes['graded']} ungraded + {sizes['graded']} graded loops; torch"
            f" {report['torch'] or 'not installed'}.",
            "",
        ]
        lines += table(
            "MLP | what | s | torch s | torch / ours | figure / ours | GFLOP | GFLOP/s of peak"
            " | s at peak | compile s",
            rows,
        )
    if of("remat"):
        lines += [
            f"A training step by what its backward pass computes again, MLP"
            f" {of('remat')[0]['mlp_width']}.",
            "",
        ]
        rows = [
            [
                x["remat"],
                pair(x["median_s"], x["least_s"], 2),
                f"{x['temp_mib']:.0f}",
                f"{x['compile_s']:.0f}",
            ]
            for x in of("remat")
        ]
        lines += table("remat | s | temp MiB | compile s", rows)
    if of("depth"):
        first = of("depth")[0]
        lines += [
            f"A training step by depth, MLP {first['mlp_width']}: one program, compiled in"
            f" {first['compile_s']:.0f} s.",
            "",
        ]
        rows = [
            [
                str(x["depth"]),
                pair(x["median_s"], x["least_s"], 2),
                f"{x['gflop']:.0f}",
                f"{x['gflop_per_s']:.0f}",
            ]
            for x in of("depth")
        ]
        lines += table("loops | s | GFLOP | GFLOP/s", rows)
    if of("compile"):
        lines += ["The gradient through all loops, their number fixed in the program.", ""]
        rows = [
            [str(x["depth"]), f"{x['compile_s']:.0f}", f"{x['temp_mib']:.0f}"]
            for x in of("compile")
        ]
        lines += table("loops | compile s | temp MiB", rows)
    if of("decode"):
        lines += [
            f"Cached greedy decoding, {sizes['new_tokens']} tokens after a prompt of"
            f" {sizes['prompt']}, batch 1.",
            "",
        ]
        rows = [
            [str(x["depth"]), f"{x['tokens_per_s']:.0f}", pair(x["median_s"], x["least_s"], 2)]
            for x in of("decode")
        ]
        lines += table("loops | tokens/s | s", rows)
    return lines


def models(report: dict) -> list[str]:
    sizes = report["sizes"]
    rows = []
    for x in report["results"]:
        theirs = ["-", "-", "-"]
        if "transformers" in x:
            theirs = [
                f"{x['transformers']['tokens_per_s']:,.0f}",
                pair(x["transformers"]["median_s"], x["transformers"]["least_s"], 3),
                pair(x["to_ours_median"], x["to_ours_least"], 2),
            ]
        compiled = ["-", "-"]
        if "compile_s" in x:
            compiled = [f"{x['compile_s']:.0f}", f"{x['temp_mib']:.0f}"]
        rows.append(
            [
                x["system"],
                "forward + backward" if x["part"] == "both" else x["part"],
                f"{x['jaxrec']['tokens_per_s']:,.0f}",
                pair(x["jaxrec"]["median_s"], x["jaxrec"]["least_s"], 3),
                *theirs,
                *compiled,
            ]
        )
    return [
        f"Recurrent language models, width {sizes['width']}, {sizes['layers']} layers, vocabulary"
        f" {sizes['vocab_size']}, batch {sizes['batch']} x {sizes['time']} tokens, RecurrentGemma's"
        f" MLP {sizes['mlp_width']}; decoding {sizes['new_tokens']} tokens after a prompt of"
        f" {sizes['prompt']} at batch 1; transformers {report['transformers'] or 'not installed'}.",
        "",
        *table(
            "model | what | tokens/s | s | transformers tokens/s | transformers s"
            " | transformers / ours | compile s | temp MiB",
            rows,
        ),
    ]


def selective_memory(report: dict) -> list[str]:
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
    lines = [
        f"Temporary memory of the gradient, b = {sizes['batch']}, e = {sizes['inner']},"
        f" n = {sizes['states']}, as the compiler plans it; nothing is run.",
        "",
    ]
    return lines + table("t | x MiB | selective_scan MiB | all states kept MiB", rows)


def main() -> None:
    readme = HERE / "README.md"
    lines = [readme.read_text().partition(MARK)[0] + MARK, ""]
    for path in sorted((HERE / "results").glob("*.json")):
        report = json.loads(path.read_text())
        lines += heading(path, report)
        tables = {
            "models": models,
            "scan": scan,
            "selective_memory": selective_memory,
            "train": train,
        }
        lines += tables[report["benchmark"]](report)
    readme.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
