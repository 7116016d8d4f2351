"""The report: one HTML file that opens offline, prints, and carries its figures and its table inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mechattr import draw
from mechattr.report import summary
from mechattr.report.record import ARTIFACTS
from mechattr.report.results import Results
from mechattr.report.tables import csv_text, html_table

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #ffffff; color: #222222; font: 15px/1.5 "DejaVu Sans", system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 48px; background: #ffffff; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 1px solid #dddddd; padding-bottom: 3px; }
p { margin: 8px 0; max-width: 80ch; } .answer { font-size: 17px; max-width: 75ch; border-left: 4px solid #2166ac; padding: 6px 14px; background: #f3f7fb; }
.note, figcaption { font-size: 13px; color: #555555; max-width: 90ch; }
figure { margin: 14px 0; } figure img { max-width: 100%; height: auto; display: block; }
.row { display: flex; flex-wrap: wrap; gap: 12px; } .row figure { flex: 1 1 380px; min-width: 0; }
table { border-collapse: collapse; font-size: 13px; } .scroll { overflow-x: auto; }
th, td { padding: 3px 9px; border-bottom: 1px solid #e6e6e6; white-space: nowrap; } th { background: #f4f4f4; font-weight: bold; }
table.sortable th { cursor: pointer; user-select: none; } table.sortable th[aria-sort]::after { content: " ▾"; }
table.sortable th[aria-sort="ascending"]::after { content: " ▴"; }
.text { text-align: left; } .number { text-align: right; font-variant-numeric: tabular-nums; } .site { color: #555555; }
table.facts th { text-align: left; vertical-align: top; background: none; font-weight: normal; color: #555555; padding-left: 0; }
table.facts td { white-space: normal; overflow-wrap: anywhere; }
.bar { position: relative; display: inline-block; width: 72px; height: 12px; margin-left: 8px; vertical-align: -1px; background: #f4f4f4; }
.bar i { position: absolute; top: 0; bottom: 0; } .up { background: #4393c3; } .down { background: #d6604d; }
.pair { font-size: 13px; margin: 10px 0; overflow-wrap: anywhere; } .pair b { font-size: 13px; color: #555555; font-weight: normal; }
code, pre { font: 13px/1.45 "DejaVu Sans Mono", Consolas, monospace; background: #f4f4f4; border-radius: 3px; } code { padding: 1px 4px; }
pre { padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; } a { color: #2166ac; }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: 10px; }
  th, td { padding: 2px 4px; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

# Sorts by the cell's data-value (a number where it is one), else by its text; a second click turns the order around.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const sort = (i) => {
    const up = heads[i].getAttribute("aria-sort") === "descending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = (a, b) => {
      const x = key(a, i), y = key(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? String(x).localeCompare(y) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, i) => {
    head.addEventListener("click", () => sort(i));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(i); });
  });
}
"""


def page(results: Results, figures: Mapping[str, Path]) -> str:
    """The whole report.

    Args:
        results: a run.
        figures: PNG files by figure name; they are copied into the page.
    """
    key, task = results.key, results.record["task"]
    sections = [
        ("What was asked", _asked(results)),
        ("Where the effect is", _maps(results, figures)),
        ("The components", _components(results)),
        ("Estimate against exact, and what it cost", _evidence(results, figures)),
        ("Where this comes from", _provenance(results)),
    ]
    body = "".join(f"<h2>{number}. {title}</h2>{text}" for number, (title, text) in enumerate(sections, start=2))
    title = f"{key['task']} in {key['model']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Which components cause {escape(title)}?</h1>"
        f'<p class="note">{task["n_pairs"]} prompt pairs · {escape(key["direction"])} · {escape(summary.words(task["metric"]))}</p>'
        f'<h2>1. The answer</h2><p class="answer">{escape(summary.sentence(results))}</p>'
        '<p class="note">Each component was replaced alone. Effects do not add up: components that back each other up, or that feed each '
        "other, share what they do, so that shares may sum to more or less than 100 %.</p>"
        f"{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _asked(results: Results) -> str:
    key, task = results.key, results.record["task"]
    clean, corrupt = results.metrics
    low, high = task["lengths"]
    unit = escape(results.unit)
    meaning = (
        "activations of the corrupt prompt are put into the clean run"
        if key["direction"] == "noising"
        else "activations of the clean prompt are put into the corrupt run"
    )
    facts = {
        "model": f"{escape(key['model'])} ({results.record['model']['n_layers']} layers × {results.record['model']['n_heads']} heads)",
        "task": f"{escape(key['task'])}: {task['n_pairs']} pairs of {low if low == high else f'{low} to {high}'} tokens",
        "metric": f"{escape(summary.words(task['metric']))} [{unit}]: {clean:.3f} on the clean prompts, {corrupt:.3f} on the corrupt ones".replace(
            "-", "−"
        ),
        "direction": f"{escape(key['direction'])}: {meaning}",
        "positions": {
            "each": "each token by itself",
            "named": "named spans",
            "all": "all positions replaced together",
        }.get(str(key["positions"]), escape(str(key["positions"]))),
        "skipped": escape("; ".join(f"{count} × {reason}" for reason, count in task["skipped"].items())) or "no pair",
    }
    if results.accuracy is not None:
        facts["accuracy"] = f"{results.accuracy:.0%} of the clean prompts have a positive metric"
    samples = "".join(_sample(sample, number) for number, sample in enumerate(task["samples"], start=1))
    note = '<p class="note">Tokens that differ are bold and underlined in red; named spans are tinted (hover for the name and position).</p>'
    return _facts(facts) + samples + note


def _sample(sample: Mapping[str, Any], number: int) -> str:
    spans = {name: (start, end) for name, (start, end) in sample["spans"].items()}
    answers = ", ".join(f"<code>{escape(draw.spell(text))}</code>" for text in sample["answers"])
    foils = ", ".join(f"<code>{escape(draw.spell(text))}</code>" for text in sample["foils"])
    lines = "".join(
        f"<b>{side}</b>{draw.tokens_html(sample[side], differs=sample['differs'], spans=spans)}"
        for side in ("clean", "corrupt")
    )
    against = f" against {foils}" if foils else ""
    return f'<div class="pair"><b>Pair {number}, answer</b> {answers}{against}<br>{lines}</div>'


def _maps(results: Results, figures: Mapping[str, Path]) -> str:
    lost = "lost when it is corrupted" if results.key["direction"] == "noising" else "regained when it is restored"
    text = _figure(
        figures["head_map"],
        "Layer by head heatmap",
        f"Exact contribution of each whole head (z) and MLP, all positions replaced together: the metric {lost}. "
        "Blue helps the answer, red works against it, white is exactly 0; the ten strongest are outlined.",
    )
    if "position_map" in figures:
        text += _figure(
            figures["position_map"],
            "Layer by position heatmaps",
            "Estimated contribution by place. These are first-order estimates: coarse for the residual stream, where a patch replaces all "
            "that was computed so far, and better for single writes.",
        )
    return text


def _components(results: Results) -> str:
    data = base64.b64encode(csv_text(results).encode()).decode()
    n_shown, n = min(len(results.verified), 200), len(results.verified)
    cut = f"The {n_shown} strongest of {n} are shown. " if n_shown < n else ""
    return (
        f"<p>The {n} components with the largest estimates, each measured exactly. {cut}"
        f'<a download="table.csv" href="data:text/csv;base64,{data}">Download as CSV</a></p>'
        f'<div class="scroll">{html_table(results)}</div>'
        f'<p class="note">Share: |exact effect| / |clean − corrupt metric| ({results.gap:.3g} {escape(results.unit)}). '
        "Estimates and exact effects are contributions, positive where the component helps the answer. Click a column's head to sort.</p>"
    )


def _evidence(results: Results, figures: Mapping[str, Path]) -> str:
    pictures = "".join(
        _figure(figures[name], "Scatter of estimate against exact effect", caption)
        for name, caption in (
            ("agreement", "Every head and MLP as a whole, the strong and the weak: is the ranking by estimate right?"),
            (
                "agreement_top",
                "The components of the table: chosen for large estimates, so over-estimates are over-represented.",
            ),
        )
    )
    return f'<p>{escape(summary.agreement(results))}</p><div class="row">{pictures}</div>{_cost(results)}'


def _cost(results: Results) -> str:
    """Passes and seconds of each step, beside what measuring everything would have cost."""
    seconds = results.record["seconds"]
    steps = (
        ("estimate of all components", results.attribution, seconds.get("attribution")),
        (f"exact check of {len(results.verified)} components", results.exact, seconds.get("exact")),
        ("estimate of whole heads and MLPs", results.whole_attribution, seconds.get("whole_attribution")),
        ("exact check of whole heads and MLPs", results.whole_exact, seconds.get("whole_exact")),
    )
    lines = "".join(_cost_row(name, part.passes.forward, part.passes.backward, took) for name, part, took in steps)
    measured = results.exact.passes.forward
    rate = seconds["exact"] / measured if seconds.get("exact") and measured else None
    exhaustive = results.exhaustive_passes
    lines += _cost_row(
        "exact sweep over all components (not run)", exhaustive, 0.0, rate * exhaustive if rate else None, about="≈ "
    )
    return (
        '<table><thead><tr><th class="text">step</th><th class="number">forward passes</th><th class="number">backward passes</th>'
        f'<th class="number">seconds</th></tr></thead><tbody>{lines}</tbody></table>'
        '<p class="note">Passes count prompts; a pass through some of the blocks counts as their share. The last line is computed: '
        f"{results.n_components - results.n_zero:,} of {results.n_components:,} components have an estimate that is not exactly 0, and its "
        "seconds take the rate of the exact check.</p>"
    )


def _cost_row(name: str, forward: float, backward: float, seconds: float | None, about: str = "") -> str:
    took = "–" if seconds is None else f"{about}{seconds:,.{0 if seconds >= 100 else 1}f}"
    return (
        f'<tr><td class="text">{escape(name)}</td><td class="number">{about}{forward:,.0f}</td><td class="number">{backward:,.0f}</td>'
        f'<td class="number">{took}</td></tr>'
    )


def _provenance(results: Results) -> str:
    made = results.attribution.provenance
    versions = made.get("versions")
    facts = {
        "weights": f"<code>{escape(str(results.key.get('weight_hash', '')))}</code>",
        "tokenizer": f"<code>{escape(str(results.key.get('tokenizer_hash', '')))}</code>",
        "pairs": f"<code>{escape(results.key['task_hash'])}</code>",
        "dtype": escape(str(results.key["dtype"])),
        "seed": escape(str(results.key["seed"])),
        "versions": escape(", ".join(f"{name} {version}" for name, version in versions.items()))
        if isinstance(versions, dict)
        else "",
        "task from": escape(str(results.record["task"]["citation"])),
        "files": ", ".join(f"<code>{name}</code>" for name in ARTIFACTS.values()),
    }
    return (
        _facts({name: text for name, text in facts.items() if text})
        + f"<p>To make it again:</p><pre>{escape(results.record['command'])}</pre>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    return (
        '<table class="facts">'
        + "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in facts.items())
        + "</table>"
    )


def _figure(path: Path, alt: str, caption: str) -> str:
    width = int.from_bytes(path.read_bytes()[16:20], "big")  # of the PNG, in pixels, from its header
    data = base64.b64encode(path.read_bytes()).decode()
    shown = round(width * 96 / draw.DPI)
    return f'<figure><img alt="{escape(alt)}" width="{shown}" src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
