"""A benchmark's report: one HTML file with its images embedded, for light and dark mode and any width."""

import base64
from html import escape
from pathlib import Path
from string import Template

from runtime.bench import plots, results
from runtime.bench.metrics_table import METRICS, Metric, number
from runtime.bench.plots import Plot
from runtime.bench.results import Point, Spread, Summary

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --best: #00857055; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { opacity: .65; } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td small { display: block; opacity: .65; } td.best { background: var(--best); }
tr.limit { font-style: italic; opacity: .8; }
img { width: 100%; max-width: 60rem; background: #fff; border-radius: .4rem; }
code { font-size: .9em; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$emulation
$about
$tables
$plots
$notes
</body>
</html>
""")


def write(folder: Path) -> Path:
    """Draw the plots and write `report.html` into a benchmark's folder. Return its path.

    Raises InputError if the folder holds no benchmark.
    """
    summary = results.read_summary(folder)
    page = _PAGE.substitute(
        title=escape(f"{summary.workload}: {len(summary.policies)} policies"),
        emulation=f"<p><strong>{escape(summary.emulation)}</strong></p>" if summary.emulation else "",
        about=_about(summary),
        tables="\n".join(_table(summary, load) for load in summary.loads),
        plots="\n".join(_figure(plot) for plot in plots.draw(folder)),
        notes="".join(f"<p>{escape(note)}</p>" for note in summary.notes),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _about(summary: Summary) -> str:
    slo = ", ".join(
        f"{name} at most {limit:g} s"
        for name, limit in (("JCT", summary.slo.jct_s), ("TTFT", summary.slo.ttft_s), ("TPOT", summary.slo.tpot_s))
        if limit is not None
    )
    entries = {
        "engines": "real" if summary.kind == "engines" else "modelled, in virtual time",
        "configuration": summary.config,
        "repeats": f"{summary.repeats}; policies take turns, with the same jobs at the same times",
        "goodput": f"jobs a second that are not known to be wrong{f' and meet the SLO: {slo}' if slo else ''}",
        "calls": _calls(summary.stream_interval),
        "machine": ", ".join(f"{key} {value}" for key, value in summary.machine.items()),
        "started": f"{summary.started}, {summary.seconds:.0f} s",
    }
    shown = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f"<dl>{shown}<dt>command</dt><dd><code>{escape(summary.command)}</code></dd></dl>"


def _calls(stream_interval: int) -> str:
    if stream_interval > 1:
        return f"{stream_interval} tokens arrive together; ITL is a mean over them and hides stalls within them"
    return "every token is streamed; TTFT, TPOT, ITL and E2EL are as vllm bench serve defines them"


def _table(summary: Summary, load: float) -> str:
    points = [summary.point(policy, load) for policy in summary.policies]
    names = [name for name, metric in METRICS.items() if metric.main and any(name in p.metrics for p in points)]
    heads = "".join(f"<th>{escape(_head(METRICS[name]))}</th>" for name in names)
    rows = "".join(_row(summary, point, points, names) for point in points)
    return (
        f"<h2>At load {load:g}</h2><div class=wide><table><thead><tr><th>policy</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>Medians over the repeats, with ranges below. The best policy is marked."
        f"{' The limit has memory for all engines and is no policy.' if summary.limit else ''}</p>"
    )


def _row(summary: Summary, point: Point, points: list[Point], names: list[str]) -> str:
    rivals = [p for p in points if p.policy != summary.limit]
    cells = "".join(
        f"<td{' class=best' if point.policy in best(name, rivals) else ''}>{_cell(name, point.metrics.get(name))}</td>"
        for name in names
    )
    kind = " class=limit" if point.policy == summary.limit else ""
    return f"<tr{kind}><td>{escape(point.policy)}</td>{cells}</tr>"


def best(name: str, points: list[Point]) -> set[str]:
    """Return the policies with the best median of a metric.

    Return none if all are equal, or if neither direction is better.
    """
    better = METRICS[name].better
    values = {point.policy: point.metrics[name].median for point in points if name in point.metrics}
    if better is None or len(set(values.values())) < 2:
        return set()
    best_value = min(values.values()) if better == "lower" else max(values.values())
    return {policy for policy, value in values.items() if value == best_value}


def _cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.least == spread.most:
        return number(name, spread.median)
    return f"{number(name, spread.median)}<small>{number(name, spread.least)} to {number(name, spread.most)}</small>"


def _head(metric: Metric) -> str:
    return f"{metric.title} {metric.unit}".strip()


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode()
    return (
        f"<h2>{escape(plot.title)}</h2><p>{escape(plot.explanation)}</p>"
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
    )
