"""The JSON of benchmark results → Markdown tables, put between two comment markers of a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def summary(results: dict, adaptation: dict, jobs: dict) -> str:
    """The README's table of six: how many times faster than the fastest of all others, or than by hand.

    results, adaptation, jobs: those of `benchmarks`, `benchmarks.adaptation` and `benchmarks.end_to_end`.
    """
    rows = []
    for name, record, _, peers in _compared(results):
        if name in "ABC":
            peer = _fastest(peers)
            rows.append((f"a meta-gradient of {record['title']}", peer, peers[peer]["ratio"]))
    for network in ("MLP 784-256-10", "Conv4"):
        compiled = adaptation["networks"][network]["evaluation"]["fomaml compiled"]
        what = f"evaluation of 32 tasks in 10 inner steps, {network}"
        rows.append((what, "`deepcopy` and SGD", compiled["faster"]))
    for job in jobs["jobs"].values():
        seconds = [job[side]["seconds"] for side in ("plain", "fomaml")]
        if job["title"].startswith("MNIST"):
            rows.append((f"`fomaml train`: {job['title']}", "a plain script", median_ratio(*seconds)))
    lines = [f"| {what} | {peer} | **{times:.1f}** |" for what, peer, times in rows]
    return "\n".join(["| what | beside | times faster here |", "|---|---|---|", *lines])


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Of the two in the same round."""
    return median(one / other for one, other in zip(ones, others, strict=True))


def overview(results: dict) -> str:
    """One row a workload: this project's fastest against the fastest of all others, and what else was aimed at."""
    lines = [
        "| workload | fastest here | fastest peer | times faster | target | `auto` / best engine "
        "| of GEMM peak | peak memory / plain loop's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record, ours, peers in _compared(results):
        best, peer = _fastest(ours), _fastest(peers)
        cells = [
            f"{name} {record['title']}",
            _short(best),
            peer,
            f"**{peers[peer]['ratio']:.2f}**",
            f"{record['target']:g}" if record["target"] else "",
            _auto(ours),
            f"{ours[best]['of_gemm_peak']:.0%}",
            _times(ours[best]["memory"], peers.get("plain loop", {}).get("memory")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processors(records: list[dict]) -> str:
    """One row a workload and processor: the best here beside the fastest of all others, each of one run."""
    lines = [
        "| workload | processor | fastest here | ms | fastest peer | ms | times faster | target | compiling, s | run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [(name, record, *rest) for results in records for name, record, *rest in _compared(results)]
    for name, record, ours, peers in sorted(rows, key=lambda row: row[0]):
        best, peer, run = _fastest(ours), _fastest(peers), record["run"]
        times = f"**{peers[peer]['ratio']:.2f}**", f"{record['target']:g}" if record["target"] else ""
        own = _short(best), f"{ours[best]['milliseconds']:.3g}"
        facts = f"{ours[best].get('compile_seconds', 0):.1f}", f"{run['commit']}, {run['date']}"
        cells = name, run["machine"], *own, peer, f"{peers[peer]['milliseconds']:.3g}", *times, *facts
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: dict) -> str:
    """What stands in docs/benchmarks.md: the overview, then every workload."""
    return f"{overview(results)}\n\n{details(results)}"


def details(results: dict) -> str:
    """One table a workload with every contestant, fastest first, then those that could not take part and why."""
    parts = []
    for name, record in sorted(results["workloads"].items()):
        rows = record["contestants"]
        timed = sorted((k for k, r in rows.items() if "ratio" in r), key=lambda k: rows[k]["milliseconds"])
        run = record["run"]
        lines = [
            f"### {name}: {record['title']}",
            "",
            f"{run['cores']} cores of {run['machine']}, {run['threads']} threads, torch {run['torch']}, commit "
            f"{run['commit']}, {run['date']}, seed {run['seed']}, {record['rounds']} rounds; GEMM peak "
            f"{record['gemm_gflops']:.0f} GFLOP/s, {record['flops'] / 1e9:.3g} GFLOP a meta-gradient.",
            "",
            "| | time / fastest here | of GEMM peak | compile | peak memory | error in float64 |",
            "|---|---|---|---|---|---|",
        ]
        for key in timed:
            row = rows[key]
            chosen = f" ({row['engine']})" if " auto" in key and "engine" in row else ""
            compiled = f"{row['compile_seconds']:.0f} s" if "compile_seconds" in row else ""
            lines.append(
                f"| {key}{chosen} | {row['ratio']:.2f} | {row['of_gemm_peak']:.0%} | {compiled} "
                f"| {row['memory'] / 2**20:.0f} MB | {row['error_float64']:.0e} |"
            )
        reasons = [f"- {key}: {row['reason']}" for key, row in rows.items() if "reason" in row]
        if reasons:
            lines += ["", "Not in the table:", "", *reasons]
        parts.append("\n".join(lines))
    for name, record in sorted(results.get("memory", {}).items()):
        parts.append(_memory(name, record))
    return "\n\n".join(parts)


def origin(run: dict, seed: int) -> str:
    """Where, by what and when a table was measured."""
    machine = run["machine"] if "machine" in run else run["processor"]
    return f"{machine}, {run['cores']} cores, torch {run['torch']}, commit {run['commit']}, {run['date']}, seed {seed}"


def put(text: str, document: Path, name: str = "benchmarks") -> None:
    """Replace what stands between the two markers of this name in a document.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = document.read_text(encoding="utf-8")
    if begin not in whole or end not in whole.split(begin, 1)[1]:
        raise ValueError(
            f"{document} has no place for the table: put {begin} and {end} on lines of their own"
        )
    before, rest = whole.split(begin, 1)
    document.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def _compared(results: dict) -> Iterator[tuple[str, dict, dict, dict]]:
    """(name, record, rows of this project, rows of all others) of each workload that has both."""
    for name, record in sorted(results["workloads"].items()):
        rows = {key: row for key, row in record["contestants"].items() if "ratio" in row}
        ours = {key: row for key, row in rows.items() if row["ours"]}
        peers = {key: row for key, row in rows.items() if not row["ours"]}
        if ours and peers:
            yield name, record, ours, peers


def _fastest(rows: dict) -> str:
    return min(rows, key=lambda key: rows[key]["milliseconds"])


def _memory(name: str, record: dict) -> str:
    lines = [
        f"### Peak memory over inner steps, workload {name}",
        "",
        "Medians over processes, each with a seed of its own.",
        "",
        "| | 1 step | 20 steps | ratio |",
        "|---|---|---|---|",
    ]
    reasons = []
    for key, row in record["contestants"].items():
        if "reason" in row:
            reasons.append(f"- {key}: {row['reason']}")
            continue
        megabytes = [f"{bytes_ / 2**20:.0f} MB" for bytes_ in row["memory"].values()]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append(f"| {key} | {' | '.join(megabytes)} | {ratio} |")
    return "\n".join(lines + (["", "Not in the table:", "", *reasons] if reasons else []))


def _auto(ours: dict) -> str:
    """How `auto` compares with the best engine on the same network, compiled or not alike; the worst of these."""
    ratios = []
    for key, row in ours.items():
        if " auto" not in key:
            continue
        alike = [
            other["milliseconds"]
            for name, other in ours.items()
            if " auto" not in name and all(other[k] == row[k] for k in ("own_net", "compiled"))
        ]
        if alike:
            ratios.append(row["milliseconds"] / min(alike))
    return f"{max(ratios):.2f}" if ratios else ""


def _short(name: str) -> str:
    return name.removeprefix("fomaml ")


def _times(ours: int, other: int | None) -> str:
    return f"{ours / other:.2f}" if other else ""
