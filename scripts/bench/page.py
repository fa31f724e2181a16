"""bench.html: one page that needs no other file, with plots as inline SVG, from the dictionary of bench.json.

The colour stands for the server, the dash for the load. Each TP has its own plots, with the same scale. Heights are
logarithmic, with plain numbers. It works light and dark, wide and narrow.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import reports

# Okabe and Ito's colours, which colour-blind people can distinguish, and lighter ones for a dark page
COLOURS = {
    "Triton": ("#0072b2", "#56b4e9"),
    "OpenAI's API": ("#009e73", "#2fd6a5"),
    "engine alone": ("#7a5195", "#c79bf2"),
    "vLLM": ("#d55e00", "#ff8f45"),
    "transformers": ("#8c6d1f", "#e6c65c"),
    "ceiling": ("#777777", "#9a9a9a"),
}
DASHES = ("", "6 4", "2 3", "8 3 2 3")
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --paper: #fff; --bad: #b3261e; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa4ae; --line: #343a41; --paper: #14171a; --bad: #ff8a80; DARK } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; color: var(--ink);
background: var(--paper) }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .5rem 0; max-width: 60rem } .lead { font-size: 1.1rem } small, .soft { color: var(--soft) } code { overflow-wrap: anywhere }
.bad { color: var(--bad); font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 } figcaption { font-weight: 600; margin-bottom: .25rem } figcaption small { font-weight: 400 }
svg { width: 100%; height: auto; display: block; overflow: visible } svg text { fill: var(--ink); font: 11px system-ui, sans-serif }
svg .axis { fill: var(--soft) }
svg .value { font-size: 9.5px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px } svg .grid { stroke: var(--line) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1rem 0; padding: 0; list-style: none; font-size: .9rem }
.legend svg { width: 2.2rem; height: .8rem; display: inline-block; vertical-align: middle; margin-right: .35rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; width: 100%; white-space: nowrap }
th, td { text-align: right; padding: .2rem .55rem; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem }
tbody th { text-align: left; padding-top: .8rem }
""".strip()
WIDTH, HEIGHT = 500, 390
# Between two labels of one column
LABEL_HEIGHT = 10.5
# Beside the points of the first and the last column
LABEL_WIDTH = 48
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 16, 36

Row = Mapping[str, Any]


def read_run(path: Path) -> dict[str, Any]:
    """An earlier bench.json; a Problem if the file is not one."""
    try:
        run = json.loads(path.read_bytes())
        run["rows"][0]["side"]
    except OSError as error:
        raise reports.bench.no_bench_run(path, str(error.strerror)) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise reports.bench.no_bench_run(path, "it has no measurements in JSON") from None
    return dict(run)


def significant(value: Any) -> str:
    """A number with three significant digits and plain thousands: 13600, 0.98, 12.4."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    shown = round(value, 2 - math.floor(math.log10(abs(value))))
    return f"{shown:,.{digits}f}"


def load_of(row: Row) -> str:
    return f"{row['input_tokens']}+{row['output_tokens']}"


def kind_of(side: str) -> str:
    """The key of COLOURS that a side's name begins with."""
    return next((kind for kind in COLOURS if side.startswith(kind)), "engine alone")


def colour(side: str) -> str:
    return f"var(--c{list(COLOURS).index(kind_of(side))})"


class Names:
    """The names of the rows on this page, with TP only if there are several."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.tps: list[int] = sorted({row["tp_size"] for row in rows})
        self.loads = list(dict.fromkeys(load_of(row) for row in rows))
        self.sides = sorted(
            dict.fromkeys(str(row["side"]) for row in rows), key=lambda side: list(COLOURS).index(kind_of(side))
        )

    def tp(self, number: int) -> str:
        return f", TP={number}" if len(self.tps) > 1 else ""

    def in_table(self, row: Row) -> str:
        return f"{row['side']}{self.tp(row['tp_size'])}"

    def order(self, row: Row) -> tuple[int, int]:
        return self.sides.index(str(row["side"])), row["tp_size"]

    def dash(self, row: Row) -> str:
        return DASHES[self.loads.index(load_of(row)) % len(DASHES)]


def against(rows: Sequence[Row], side: str, other: str) -> dict[tuple[Any, ...], float]:
    """TP, load and streams -> tokens/s of one side over the other's, for loads that both have."""

    def table(kind: str) -> dict[tuple[Any, ...], float]:
        return {
            (row["tp_size"], row["input_tokens"], row["output_tokens"], row["concurrency"]): row["tokens_per_second"]
            for row in rows
            if row["side"] == kind or (kind == "Triton" and row["side"].startswith(kind))
        }

    ours, theirs = table(side), table(other)
    return {key: ours[key] / theirs[key] for key in ours if theirs.get(key)}


def reached(run: Mapping[str, Any]) -> list[str]:
    """Sentences that say what was reached and what was not."""
    rows, said = run["rows"], []
    names = Names(rows)

    def shown(key: tuple[Any, ...], ratio: float) -> str:
        return f"{key[3]} x {key[1]}+{key[2]}{names.tp(key[0])} ({ratio:.2f})"

    for side, how in (("OpenAI's API", "through the same API"), ("Triton", "over gRPC, vLLM over its API")):
        ratios = against(rows, side, "vLLM")
        if ratios:
            slower = {key: ratio for key, ratio in ratios.items() if ratio < 1}
            said.append(
                f"Ahead of vLLM, {how}, at {len(ratios) - len(slower)} of {len(ratios)} loads"
                + (
                    "; slower, with ours over theirs, at " + ", ".join(shown(*one) for one in slower.items())
                    if slower
                    else ""
                )
                + "."
            )
    share = against(rows, "Triton", "ceiling")
    if one := [(key, ratio) for key, ratio in share.items() if key[3] == 1]:
        said.append(
            "One stream's share of what memory allows: "
            + "; ".join(f"{100 * ratio:.0f} % at {key[1]}+{key[2]}{names.tp(key[0])}" for key, ratio in one)
            + "."
        )
    triton = [row for row in rows if row["side"].startswith("Triton")]
    unfair = [row for row in triton if (row.get("slowest_over_median") or 0) > 1.3]
    if triton:
        where = ", ".join(
            f"{row['concurrency']} x {load_of(row)}{names.tp(row['tp_size'])} ({row['slowest_over_median']:.2f})"
            for row in unfair
        )
        said.append(
            "The slowest stream takes at most 1.3 times the median" + (f", but not at {where}" if where else "") + "."
        )
    return said


# --- plots ---


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high on a logarithmic axis."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [
            step * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for step in steps
        ]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) <= most:
            return found
    return found


def plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def plots(title: str, unit: str, rows: Sequence[Row], names: Names, middle: str, ends: tuple[str, str]) -> list[str]:
    """One figure per TP: lines of `middle` over the streams, each point labelled, with a whisker between the values
    named `ends`."""
    drawn = [row for row in rows if row.get(middle)]
    values = [row[name] for row in drawn for name in (middle, *ends) if row.get(name)]
    return [
        plot(title + names.tp(number), unit, some, names, middle, ends, values)
        for number in names.tps
        if (some := [row for row in drawn if row["tp_size"] == number])
    ]


def plot(
    title: str,
    unit: str,
    drawn: Sequence[Row],
    names: Names,
    middle: str,
    ends: tuple[str, str],
    values: Sequence[float],
) -> str:
    """One figure, with room for all `values`."""
    low, high = 10 ** (math.log10(min(values)) - 0.08), 10 ** (math.log10(max(values)) + 0.12)
    streams = sorted({row["concurrency"] for row in drawn})
    ahead, behind = (LABEL_WIDTH if len(names.loads) > 1 else 12), LABEL_WIDTH

    def x(count: int) -> float:  # every number of streams has the same room for its labels
        width = WIDTH - LEFT - RIGHT - ahead - behind
        return LEFT + ahead + width * streams.index(count) / max(1, len(streams) - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / value) / math.log(high / low)

    parts = []
    for tick in ticks(low, high, 8):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{plain(tick)}</text>')
    for count in streams:
        parts.append(
            f'<text class="axis" x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{count}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">streams at once</text>'
    )
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(drawn, key=lambda row: row["concurrency"]):
        lines.setdefault((row["side"], load_of(row)), []).append(row)
    # labels by place and anchor: height, colour, text. Those of the first load are right of their points,
    # the others left
    columns: dict[tuple[float, str], list[tuple[float, str, str]]] = {}
    for index, ((side, _), points) in enumerate(lines.items()):
        stroke, dash, shift = colour(side), names.dash(points[0]), 2.0 * (index - len(lines) / 2)
        path = " ".join(f"{x(row['concurrency']) + shift:.1f},{y(row[middle]):.1f}" for row in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="1.8"'
            + (f' stroke-dasharray="{dash}"' if dash else "")
            + "/>"
        )
        for row in points:
            at, height, shown = x(row["concurrency"]) + shift, y(row[middle]), significant(float(row[middle]))
            bottom, top = (row.get(name) or row[middle] for name in ends)
            parts.append(
                f'<g stroke="{stroke}" fill="{stroke}"><line x1="{at:.1f}" x2="{at:.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}"/>'
                f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3"><title>{html.escape(side)}, {load_of(row)}, {row["concurrency"]} streams:'
                f" {shown} {unit}</title></circle></g>"
            )
            away = len(lines) + 4
            side_of = (away, "start") if load_of(row) == names.loads[0] else (-away, "end")
            columns.setdefault((x(row["concurrency"]) + side_of[0], side_of[1]), []).append((height, stroke, shown))
    labels = [
        f'<text class="value" x="{at:.1f}" y="{height + 3:.1f}" text-anchor="{anchor}" style="fill:{stroke}">{shown}</text>'
        for (at, anchor), column in columns.items()
        for height, (_, stroke, shown) in zip(spread([height for height, _, _ in sorted(column)]), sorted(column))
    ]
    return (
        f'<figure><figcaption>{html.escape(title)} <small>{html.escape(unit)}</small></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' role="img" aria-label="{html.escape(title)}">{"".join(parts)}{"".join(labels)}</svg></figure>'
    )


def spread(heights: Sequence[float]) -> list[float]:
    """Heights in rising order inside the plot, moved apart just enough for the labels."""
    placed = list[float]()
    for height in heights:
        placed.append(max(height, placed[-1] + LABEL_HEIGHT) if placed else height)
    floor = float(HEIGHT - BOTTOM)
    for index in reversed(range(len(placed))):
        wanted = (heights[index] + placed[index]) / 2  # half way back, so that a crowd lies around its points
        placed[index] = min(wanted, floor)
        floor = placed[index] - LABEL_HEIGHT
    return placed


def legend(names: Names) -> str:
    def sample(stroke: str, dash: str) -> str:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        return f'<svg viewBox="0 0 36 12"><line x1="0" x2="36" y1="6" y2="6" stroke="{stroke}" stroke-width="2.5"{dashes}/></svg>'

    sides = [f"<li>{sample(colour(side), '')}{html.escape(side)}</li>" for side in names.sides]
    loads = [
        f"<li>{sample('var(--ink)', DASHES[n % len(DASHES)])}{load.replace('+', ' tokens in, ')} out</li>"
        for n, load in enumerate(names.loads)
    ]
    return f'<ul class="legend">{"".join(sides)}{"".join(loads)}</ul>'


# --- tables ---

COLUMNS = (
    ("tokens/s", "tokens_per_second"),
    ("first token p50, ms", "ttft_ms_p50"),
    ("p99", "ttft_ms_p99"),
    ("between tokens p50, ms", "itl_ms_p50"),
    ("p99", "itl_ms_p99"),
    ("slowest / median", "slowest_over_median"),
)


def numbers(rows: Sequence[Row], names: Names) -> str:
    """One group of lines per load, one line per side, compared with the ceiling and with vLLM."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["input_tokens"], row["output_tokens"], row["concurrency"]), []).append(row)
    head = "".join(f"<th>{name}</th>" for name, _ in COLUMNS)
    body = []
    for (given, wanted, streams), members in sorted(groups.items()):
        word = "stream" if streams == 1 else "streams"
        body.append(f'<tr><th colspan="{len(COLUMNS) + 4}">{streams} {word} of {given} + {wanted} tokens</th></tr>')
        for row in sorted(members, key=names.order):
            found = [significant(None if row.get(key) is None else float(row[key])) for _, key in COLUMNS]
            low, high = row.get("rounds_low"), row.get("rounds_high")
            found.insert(1, f"{significant(float(low))} to {significant(float(high))}" if low and high else "")
            for other in ("ceiling", "vLLM"):
                base = next(
                    (o["tokens_per_second"] for o in members if o["side"] == other and o["tp_size"] == row["tp_size"]),
                    None,
                )
                found.append("" if not base or row["side"] == other else f"{row['tokens_per_second'] / base:.2f}")
            cells = "".join(f"<td>{cell}</td>" for cell in found)
            body.append(
                f'<tr><td><span style="color:{colour(row["side"])}">&#9632;</span> {html.escape(names.in_table(row))}</td>{cells}</tr>'
            )
    head = head.replace("</th>", "</th><th>rounds</th>", 1)
    head = f"<tr><th></th>{head}<th>of ceiling</th><th>of vLLM</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def page(run: Mapping[str, Any], source: str | None = None) -> str:
    """The whole page. source: the name of the JSON file beside it."""
    rows, host, model, text = run["rows"], run["host"], run["model"], html.escape
    names = Names(rows)
    streams = [row for row in rows if row.get("ttft_ms_p50") is not None]
    copy = run["ceilings"]["copy_bytes_per_second"] / 1e12
    reduced = ", ".join(
        f"{int(size) >> 10} KiB {1e6 * s:.0f} us" for size, s in run["ceilings"]["all_reduce_seconds"].items()
    )
    ready = run.get("ready_seconds")
    palette = [" ".join(f"--c{n}: {pair[dark]};" for n, pair in enumerate(COLOURS.values())) for dark in (0, 1)]
    made = " ".join(
        f"{word} {text(str(run[key]))}," for word, key in (("commit", "commit"), ("made", "date")) if run.get(key)
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>bench: {text(model['name'])}</title>",
            f"<style>{STYLE.replace('LIGHT', palette[0]).replace('DARK', palette[1])}</style></head><body>",
            f"<h1>{text(model['name'])}, {text(model['dtype'])}, TP={' and '.join(map(str, names.tps))}</h1>",
            *(f'<p class="lead">{text(sentence)}</p>' for sentence in reached(run)),
            f'<p class="soft">{text(", ".join(host["gpus"]) or "no GPU")}; {text(host["machine"])}; {text(host["system"])}; '
            + f"driver {text(str(host['driver']))}; "
            + text(", ".join(f"{name} {version}" for name, version in host["versions"].items()))
            + f".<br>{made} <code>{text(run['command'])}</code>"
            + (f'; all numbers: <a href="{text(source)}">{text(source)}</a>' if source else "")
            + (f". Ready {ready} s after the start" if ready else "")
            + ".</p>",
            legend(names),
            '<div class="plots">',
            *plots("Throughput", "tokens/s", rows, names, "tokens_per_second", ("rounds_low", "rounds_high")),
            *plots(
                "First token, median and 99th percentile",
                "ms",
                streams,
                names,
                "ttft_ms_p50",
                ("ttft_ms_p50", "ttft_ms_p99"),
            ),
            *plots(
                "Between tokens, median and 99th percentile",
                "ms",
                streams,
                names,
                "itl_ms_p50",
                ("itl_ms_p50", "itl_ms_p99"),
            ),
            "</div>",
            f"<p>Ceiling: memory moves {copy:.2f} TB/s (a copy on the device, bytes read plus bytes written)"
            + (f"; the ranks' library adds up {reduced}" if reduced else "")
            + ". A decode step reads every weight once, and every key and value of its streams: that time alone is the ceiling. Prompts are"
            " not in it. Whiskers: the slowest and the fastest round, or the 99th percentile.</p>",
            "<h2>Numbers</h2>",
            numbers(rows, names),
            f"<p>Not run: {text('; '.join(f'{name}: {why}' for name, why in run['not_run'].items()) or 'nothing')}.</p>",
            f'<p class="bad">Failed: {text("; ".join(f"{name}: {why}" for name, why in run["failed"].items()))}.</p>'
            if run["failed"]
            else "",
            comparison(run.get("compared")),
            "</body></html>\n",
        ]
    )


def comparison(lines: Any) -> str:
    """Every number, compared with the baseline's."""
    if not lines:
        return ""
    body = "".join(
        f"<tr><td>{html.escape(' '.join(map(str, line['what'])))}</td><td>{significant(float(line['old']))}</td>"
        f"<td>{significant(float(line['new']))}</td><td>{100 * line['change']:+.1f} %</td>"
        + ('<td class="bad">worse</td>' if line["worse"] else "<td></td>")
        + "</tr>"
        for line in lines
    )
    head = "<tr><th></th><th>old</th><th>new</th><th>change</th><th></th></tr>"
    return f'<h2>Against the baseline</h2><div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
