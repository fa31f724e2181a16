"""bench.html: one page that needs nothing else, with plots as inline SVG (matplotlib), from the dictionary that bench.json holds."""

import html
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from scripts import reports

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .9em } th, td { text-align: left; padding: .25rem .5rem;
border-bottom: 1px solid #ddd } td.n { text-align: right; font-variant-numeric: tabular-nums }
.bad { color: #b3261e; font-weight: 600 }
figure { display: inline-block; width: 49%; margin: 0; vertical-align: top } figure svg { width: 100%; height: auto } small { color: #666 }
@media (max-width: 50rem) { figure { width: 100% } }
""".strip()
COLUMNS = [
    "side", "tp_size", "input_tokens", "output_tokens", "concurrency", "tokens_per_second", "ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50",
    "itl_ms_p99", "slowest_over_median",
]  # fmt: skip


def read_run(path: Path) -> Dict[str, Any]:
    """An earlier bench.json; a Problem when it is none."""
    try:
        run = json.loads(path.read_bytes())
        run["rows"][0]["side"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise reports.bench.no_bench_run(path, f"{type(error).__name__}: {error}") from None
    return dict(run)


def series(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Dict[str, List[Tuple[float, float]]]:
    """Lines of a plot: side, TP and lengths -> points."""
    lines: Dict[str, List[Tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            name = f"{row['side']}, TP={row['tp_size']}, {row['input_tokens']}+{row['output_tokens']}"
            lines.setdefault(name, []).append((row[x], row[y]))
    return {name: sorted(points) for name, points in lines.items()}


def plot(
    title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Tuple[float, float]]], log: bool = True
) -> str:
    """An inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    # without it two runs of the same numbers give two files
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in lines.items():
        style = "--" if name.startswith("ceiling") else "-"
        axes.plot(*zip(*points), style, marker="o", markersize=3, linewidth=1.2, label=name)
    if log and any(min(value for point in points for value in point) > 0 for points in lines.values()):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(True, which="major", alpha=0.3)
    if lines:
        axes.legend(fontsize=6)
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return f"<figure>{out.getvalue().split('?>', 1)[1].split('>', 1)[1]}</figure>"


def page(run: Mapping[str, Any]) -> str:
    rows, host, model = run["rows"], run["host"], run["model"]
    streams = [row for row in rows if row.get("ttft_ms_p50") is not None]
    scaling = [row for row in rows if row["concurrency"] in (1, 32) and row["side"] != "transformers generate"]
    through = sum(row["side"].startswith("Triton") for row in rows)
    alone = sum(row["side"].startswith("engine") for row in rows)
    copy = run["ceilings"]["copy_bytes_per_second"] / 1e12
    reduced = ", ".join(
        f"{int(size) >> 10} KiB {1e6 * s:.0f} us" for size, s in run["ceilings"]["all_reduce_seconds"].items()
    )
    by_tp: Dict[str, List[Tuple[float, float]]] = {}
    for row in scaling:
        name = f"{row['side']}, {row['concurrency']} streams, {row['input_tokens']}+{row['output_tokens']}"
        by_tp.setdefault(name, []).append((row["tp_size"], row["tokens_per_second"]))
    text = html.escape
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>bench: {text(model['name'])}</title><style>{STYLE}</style></head><body>",
            f"<h1>{text(model['name'])}, {text(model['dtype'])}, TP={model['tp_size']}</h1>",
            f"<p>{text(', '.join(host['gpus']) or 'no GPU')}; {text(host['machine'])}; {text(host['system'])}; "
            + f"driver {text(str(host['driver']))}; "
            + text(", ".join(f"{name} {version}" for name, version in host["versions"].items()))
            + f".<br>Command: <code>{text(run['command'])}</code>. Ready {run['ready_seconds']} s after the start.</p>",
            f"<p>Ceilings of this host: memory {copy:.2f} TB/s (a copy on the device, bytes read plus bytes written)"
            + (f"; all-reduce of the ranks' library: {reduced}" if reduced else "")
            + ". A decode step reads every weight once, and every key and value of its streams: that time alone is the line"
            + " &ldquo;ceiling&rdquo;.</p>",
            plot(
                "Throughput against inter-token latency",
                "inter-token latency, ms (median)",
                "tokens/s",
                series(streams, "itl_ms_p50", "tokens_per_second"),
            ),
            plot(
                "Throughput against streams",
                "streams at once",
                "tokens/s",
                series(rows, "concurrency", "tokens_per_second"),
            ),
            plot(
                "Time to first token", "streams at once", "ms (median)", series(streams, "concurrency", "ttft_ms_p50")
            ),
            plot("Inter-token latency", "streams at once", "ms (median)", series(streams, "concurrency", "itl_ms_p50")),
            plot(
                "Scaling over TP",
                "ranks",
                "tokens/s",
                {name: sorted(points) for name, points in by_tp.items() if len(points) > 1},
                log=False,
            )
            if any(len(points) > 1 for points in by_tp.values())
            else "",
            "<h2>Numbers</h2>",
            table(COLUMNS, [[row.get(name) for name in COLUMNS] for row in rows]),
            f"<p>Not run: {text('; '.join(f'{name}: {why}' for name, why in run['not_run'].items()) or 'nothing')}.</p>",
            f'<p class="bad">Failed: {text("; ".join(f"{name}: {why}" for name, why in run["failed"].items()))}.</p>'
            if run["failed"]
            else "",
            comparison(run.get("compared")),
            f"<p><small>{through} loads through Triton, {alone} of the engine alone.</small></p></body></html>\n",
        ]
    )


def comparison(lines: Any) -> str:
    if not lines:
        return ""
    names = ["what", "old", "new", "change", "worse"]
    shown = [
        [
            " ".join(map(str, line["what"])),
            line["old"],
            line["new"],
            f"{100 * line['change']:+.1f} %",
            "worse" if line["worse"] else "",
        ]
        for line in lines
    ]
    return "<h2>Against the baseline</h2>" + table(names, shown)


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = ' class="n"' if isinstance(value, (int, float)) else ' class="bad"' if value == "worse" else ""
        return f"<td{kind}>{html.escape('' if value is None else f'{value:g}' if isinstance(value, float) else str(value))}</td>"

    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"
