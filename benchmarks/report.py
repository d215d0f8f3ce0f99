"""Turns what a benchmark run saved into results/<op>.json, a table and a plot, and puts the headlines into the README.

python benchmarks/report.py SAVED.json [FOLDER]      FOLDER: instead of benchmarks/results; the README stays as it is
"""

import json
import re
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
OURS = "sslfast"
COLORS = {OURS: "#d1495b", "floor": "#8d99ae"}
PEER_COLORS = ["#30638e", "#edae49", "#3c8d5a", "#7b5ea7", "#00798c"]


def quartiles(values: list[float]) -> list[float]:
    return [float(f"{q:.4g}") for q in statistics.quantiles(values, n=4, method="inclusive")]


def results(saved: dict, benchmarks: list[dict]) -> dict:
    """What is kept of a run: quartiles of times and ratios, and where they were measured."""
    cases = []
    for bench in benchmarks:
        info, stats = bench["extra_info"], bench["stats"]
        times = {OURS: [t / info["calls"] for t in stats["data"]]} | info["others"]
        ratios = {
            name: [other / own for other, own in zip(values, times[OURS], strict=True)]
            for name, values in times.items()
            if name != OURS
        }
        cases.append(
            {
                "case": info["case"],
                "headline": info["headline"],
                "rounds": stats["rounds"],
                "seconds": {name: quartiles(values) for name, values in times.items()},
                "ratio": {name: quartiles(values) for name, values in ratios.items()},
                "ceiling_per_second": {name: float(f"{rate:.4g}") for name, rate in info.get("ceiling", {}).items()},
                "extra_bytes": info["memory"],
                "items": info.get("items"),
            }
        )
    machine, commit = saved["machine_info"], saved["commit_info"]
    versions = {}
    packages = ("torch", "torchvision", "lightly", "kornia", "albumentations", "diffusers")
    for package in (*packages, "info-nce-pytorch", "open_clip_torch", "pytorch-metric-learning"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": machine["cpu"]["brand_raw"],
        "amx": any(flag.startswith("amx") for flag in machine["cpu"].get("flags", [])),
        "threads": benchmarks[0]["extra_info"]["threads"],
        "python": machine["python_version"],
        "versions": versions,
        "date": saved["datetime"][:16],
        "commit": str(commit.get("id"))[:12] + (" with changes" if commit.get("dirty") else ""),
        "unit": "seconds and bytes; [lower quartile, median, upper quartile]; ratio: of the other's time to ours",
        "cases": cases,
    }


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def ratio(low: float, median: float, high: float) -> str:
    text = f"{median:.2g}× ({low:.2g}–{high:.2g})" if median < 10 else f"{median:.0f}× ({low:.0f}–{high:.0f})"
    return text if median >= 1 else f"**slower:** {text}"


def table(found: dict, headlines_only: bool = False) -> str:
    """Markdown: a row for each case; behind a peer's time, how many times ours it is, with the quartiles of that."""
    cases = [case for case in found["cases"] if case["headline"] or not headlines_only]
    peers = list(dict.fromkeys(name for case in cases for name in case["ratio"] if name != "floor"))
    keys = list(cases[0]["case"])
    with_floor = any("floor" in case["ratio"] for case in cases)
    with_memory = any(case["extra_bytes"] for case in cases)
    items = [case["items"][1] for case in cases if case.get("items")][:1]
    head = [*keys, OURS, *(f"{name} a second" for name in items), *peers]
    head += ["of the floor"] * with_floor + ["extra memory"] * with_memory
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case in cases:
        cells = [str(case["case"][key]) for key in keys] + [milliseconds(case["seconds"][OURS][1])]
        if items:
            time, count = case["seconds"][OURS][1], case["items"][0]
            cells.append(f"{count / time:,.0f} ({time / count * 1e6:.3g} µs each)")
        for name in peers:
            known = name in case["ratio"]
            cells.append(f"{milliseconds(case['seconds'][name][1])}, {ratio(*case['ratio'][name])}" if known else "")
        if with_floor:
            cells.append(f"{case['ratio']['floor'][1]:.0%}" if "floor" in case["ratio"] else "")
        if with_memory:
            mebibytes = {name: f"{value / 2**20:.0f}" for name, value in case["extra_bytes"].items()}
            others = ", ".join(f"{name} {value}" for name, value in mebibytes.items() if name != OURS)
            cells.append(f"{mebibytes[OURS]} MiB{f' ({others})' if others else ''}" if mebibytes else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def provenance(found: dict) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    text = f"{found['cpu']}{' with AMX' if found['amx'] else ''}, {found['threads']} threads, {packages}; "
    text += f"{found['date']}, commit {found['commit']}."
    rates = {}
    for case in found["cases"]:
        for name, rate in case["ceiling_per_second"].items():
            rates.setdefault(name, []).append(rate)
    if rates:
        ceilings = [f"{name} {statistics.median(values) / 1e9:.0f} G/s" for name, values in rates.items()]
        text += f" The floor's ceilings, measured between the rounds: {', '.join(ceilings)} (median)."
    return text


def plot(found: dict, path: Path) -> None:
    """Lines if the cases vary a number, their first key, while others stay, else bars."""
    values = [tuple(case["case"].values()) for case in found["cases"]]
    numbers = all(isinstance(first, (int, float)) for first, *_ in values)
    lines = numbers and len({tuple(others) for _, *others in values}) < len(values) / 2
    figure = plot_lines(found) if lines else plot_bars(found)
    figure.savefig(path)


def plot_bars(found: dict) -> Figure:
    """How many times the time of ours each peer takes; a group of bars for each case."""
    names = list(dict.fromkeys(name for case in found["cases"] for name in case["ratio"] if name != "floor"))
    figure = Figure(figsize=(7.5, 0.8 + 0.25 * (len(names) + 1) * len(found["cases"])), layout="constrained", dpi=130)
    ax = figure.subplots()
    for row, case in enumerate(found["cases"]):
        for lane, name in enumerate(names):
            if name in case["ratio"]:
                low, median, high = case["ratio"][name]
                y = row + (lane - (len(names) - 1) / 2) * 0.8 / len(names)
                error = [[median - low], [high - median]]
                ax.barh(y, median, 0.72 / len(names), color=PEER_COLORS[lane], xerr=error, error_kw={"lw": 0.8})
                ax.text(high * 1.04, y, f"{median:.2g}×" if median < 10 else f"{median:.0f}×", va="center", fontsize=8)
    for lane, name in enumerate(names):
        ax.barh(0, 0, color=PEER_COLORS[lane], label=name)
    ax.axvline(1, color=COLORS[OURS], lw=1.5)
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.invert_yaxis()
    ax.set_yticks(range(len(found["cases"])), [", ".join(map(str, case["case"].values())) for case in found["cases"]])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.set_xlabel(f"time of a peer over time of {OURS} (red line)", fontsize=9)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(names)), frameon=False, fontsize=8)
    return figure


def plot_lines(found: dict) -> Figure:
    """Time against the first key of the cases, both logarithmic; a panel for each combination of the other keys."""
    x_key, *panel_keys = found["cases"][0]["case"]
    drawn = [case for case in found["cases"] if len(case["ratio"]) > ("floor" in case["ratio"])]  # with a peer
    panels = list(dict.fromkeys(tuple(case["case"][key] for key in panel_keys) for case in drawn))
    rows_of = list(dict.fromkeys(panel[-1:] for panel in panels))  # the last key makes the rows
    panels.sort(key=lambda panel: (rows_of.index(panel[-1:]), panel))
    rows = len(rows_of)
    columns = -(-len(panels) // rows)
    if columns == 1:
        rows, columns = columns, rows
    names = [OURS, *dict.fromkeys(name for case in drawn for name in case["ratio"] if name != "floor"), "floor"]
    colors = COLORS | dict(zip(names[1:-1], PEER_COLORS, strict=False))
    figure = Figure(figsize=(1.2 + 3.1 * columns, 0.9 + 2.7 * rows), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        chosen = [case for case in drawn if tuple(case["case"][key] for key in panel_keys) == panel]
        chosen.sort(key=lambda case: case["case"][x_key])
        for name in names:
            points = [(case["case"][x_key], *case["seconds"][name]) for case in chosen if name in case["seconds"]]
            if not points:
                continue
            x, low, middle, high = zip(*points, strict=True)
            style = {"linestyle": "--", "linewidth": 1.3} if name == "floor" else {"marker": "o", "markersize": 3.5}
            ax.plot(x, [t * 1e3 for t in middle], color=colors[name], label=name, **style)
            ax.fill_between(x, [t * 1e3 for t in low], [t * 1e3 for t in high], color=colors[name], alpha=0.15, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_title(", ".join(f"{key} {value}" for key, value in zip(panel_keys, panel, strict=True)), fontsize=10)
        ax.set_xticks(sorted({case["case"][x_key] for case in drawn}))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x_key, fontsize=10)
    figure.supylabel("milliseconds", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def replace_between(text: str, name: str, new: str) -> str:
    """`text` with what stands between the HTML comments `name` and `end of name` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{new}\n{end}", text, flags=re.DOTALL)


def main(saved: str, folder: str = "") -> None:
    run = json.loads(Path(saved).read_text())
    out = Path(folder) if folder else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    for file, benchmarks in groupby(run["benchmarks"], key=lambda bench: bench["fullname"].split("::")[0]):
        op = Path(file).stem.removeprefix("bench_")
        found = results(run, list(benchmarks))
        text = f"{table(found)}\n{provenance(found)}\n"
        (out / f"{op}.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / f"{op}.md").write_text(f"# {op}\n\n![{op}]({op}.png)\n\n{text}")
        plot(found, out / f"{op}.png")
        print(f"\n{op}\n\n{text}")
        if not folder:
            readme = ROOT / "README.md"
            place = f"benchmarks/results/{op}"
            headlines = f"{table(found, headlines_only=True)}\n{provenance(found)} [All cases]({place}.md)."
            text = replace_between(readme.read_text(), f"table {op}", f"{headlines}\n\n![{op}]({place}.png)")
            readme.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
