"""The report: one HTML file that opens offline, prints, and carries its figures and its table inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mechattr import draw
from mechattr.artifact import Attribution
from mechattr.report import summary
from mechattr.report.parts import document, fact_table, figure
from mechattr.report.record import artifacts
from mechattr.report.results import Results
from mechattr.report.tables import csv_text, html_table

POSITIONS = {
    "aligned": "each token by itself",
    "named": "the named spans",
    "all": "all positions replaced together",
}
TABLE_ROWS = 200  # rows in the page; the CSV has all


def page(results: Results, figures: Mapping[str, Path]) -> str:
    """The whole report.

    Args:
        results: a run.
        figures: PNG files by figure name; they are copied into the page.
    """
    key, task = results.key, results.record["task"]
    sections = {
        "The answer": _answer(results),
        "What was asked": _asked(results),
        "Where the effect is": _maps(results, figures),
        "The components": _components(results),
        "Estimate against exact": _evidence(results, figures),
    }
    if results.bound is not None:
        sections["What may have been missed"] = _bound(results, figures)
    if results.circuit is not None:
        sections["Edges and circuit"] = _circuit(results, figures)
    sections |= {"What it cost": _cost(results), "Where this comes from": _provenance(results)}
    about = f"{task['n_pairs']} prompt pairs · {key['direction']} · {summary.words(task['metric'])}"
    return document(f"Which components cause {key['task']} in {key['model']}?", about, sections)


def _answer(results: Results) -> str:
    return (
        f'<p class="answer">{escape(summary.sentence(results))}</p>'
        '<p class="note">Each component was replaced alone. Effects do not add up: components that back each other up, '
        "or that feed each other, share what they do, so that shares may sum to more or less than 100 %.</p>"
    )


def _asked(results: Results) -> str:
    key, task = results.key, results.record["task"]
    clean, corrupt = results.metrics
    low, high = task["lengths"]
    meaning = (
        "activations of the corrupt prompt are put into the clean run"
        if key["direction"] == "noising"
        else "activations of the clean prompt are put into the corrupt run"
    )
    model = results.record["model"]
    metric = f"{summary.words(task['metric'])} [{results.unit}]"
    values = f"{clean:.3f} on the clean prompts, {corrupt:.3f} on the corrupt ones".replace("-", "−")
    facts = {
        "model": f"{key['model']} ({model['n_layers']} layers × {model['n_heads']} heads)",
        "task": f"{key['task']}: {task['n_pairs']} pairs of {low if low == high else f'{low} to {high}'} tokens",
        "metric": f"{metric}: {values}",
        "direction": f"{key['direction']}: {meaning}",
        "positions": POSITIONS[key["positions"]],
        "skipped": "; ".join(f"{count} × {reason}" for reason, count in task["skipped"].items()) or "no pair",
    }
    if results.accuracy is not None:
        facts["accuracy"] = f"{summary.percent(results.accuracy)} of the clean prompts have a positive metric"
    samples = "".join(_sample(sample, number) for number, sample in enumerate(task["samples"], start=1))
    return (
        fact_table({name: escape(text) for name, text in facts.items()})
        + samples
        + '<p class="note">Tokens that differ are bold and underlined in red; named spans are tinted (hover for the '
        "name and the position).</p>"
    )


def _sample(sample: Mapping[str, Any], number: int) -> str:
    spans = {name: (start, end) for name, (start, end) in sample["spans"].items()}
    answers, foils = (
        ", ".join(f"<code>{escape(draw.spell(text))}</code>" for text in sample[side]) for side in ("answers", "foils")
    )
    lines = "".join(
        f"<b>{side}</b>{draw.tokens_html(sample[side], differs=sample['differs'], spans=spans)}"
        for side in ("clean", "corrupt")
    )
    against = f" against {foils}" if foils else ""
    return f'<div class="pair"><b>Pair {number}, answer</b> {answers}{against}<br>{lines}</div>'


def _maps(results: Results, figures: Mapping[str, Path]) -> str:
    lost = "lost when it is corrupted" if results.key["direction"] == "noising" else "regained when it is restored"
    heads = figure(
        figures["head_map"],
        "Layer by head heatmap",
        f"Exact contribution of each whole head (z) and MLP, all positions replaced together: the metric {lost}. Blue "
        "helps the answer, red works against it, white is exactly 0; the ten strongest are outlined.",
    )
    if "position_map" not in figures:
        return heads
    return heads + figure(
        figures["position_map"],
        "Layer by position heatmaps",
        "Estimated contribution by place. These are first-order estimates: coarse for the residual stream, where a "
        "patch replaces all that was computed so far, and better for single writes.",
    )


def _components(results: Results) -> str:
    data = base64.b64encode(csv_text(results).encode()).decode()
    n = len(results.verified)
    cut = f"The {TABLE_ROWS} strongest of them are shown. " if n > TABLE_ROWS else ""
    return (
        f"<p>The {n} components with the largest estimates, each measured exactly. {cut}"
        f'<a download="table.csv" href="data:text/csv;base64,{data}">Download as CSV</a></p>'
        f'<div class="scroll">{html_table(results, limit=TABLE_ROWS)}</div>'
        '<p class="note">Estimates and exact effects are contributions, positive where the component helps the answer. '
        f"Share: |exact| / |clean − corrupt metric| ({results.gap:.3g} {escape(results.unit)}). Tokens are those "
        "of the first pair. Click a column's head to sort.</p>"
    )


def _evidence(results: Results, figures: Mapping[str, Path]) -> str:
    captions = {
        "agreement": "Every head and MLP as a whole, the strong and the weak: is the ranking by estimate right?",
        "agreement_top": "The components of the table. They were chosen for large estimates, so over-estimates are "
        "over-represented.",
    }
    pictures = "".join(
        figure(figures[name], "Scatter of estimate against exact effect", caption) for name, caption in captions.items()
    )
    return f'<p>{escape(summary.agreement(results))}</p><div class="row">{pictures}</div>'


def _bound(results: Results, figures: Mapping[str, Path]) -> str:
    assert results.bound is not None
    text = f"<p>{escape(summary.capital(results.bound.summary))}</p>"
    if "bound" in figures:  # too small a budget bounds nothing
        text += figure(
            figures["bound"],
            "p value of: some unchecked component has an effect of at least theta, against theta",
            "How surprised one would be, by what random sets of unchecked components did, if one of them had an effect "
            "of at least θ. Ticks below are the exact effects of the checked components.",
        )
    return text + f'<p class="note">{escape(results.bound.covers)}</p>'


def _circuit(results: Results, figures: Mapping[str, Path]) -> str:
    circuit, kept = results.circuit, results.faithfulness
    assert circuit is not None and kept is not None
    graph = figure(
        figures["circuit"],
        "Graph of the circuit: layers upward, edges by contribution",
        f"{circuit.n_edges} edges: the best {results.key['circuit']} by estimated contribution, without those that are "
        "on no path from the input to the logits. Blue edges carry the answer, red ones work against it; width shows "
        "how much.",
    )
    curve = figure(
        figures["faithfulness"],
        "Faithfulness against circuit size",
        "Share of the gap between clean and corrupt metric that circuits of each size keep when all other edges carry "
        "corrupt values, measured exactly; the band holds random circuits of the same sizes.",
    )
    return f'<p>{escape(summary.capital(kept.summary))}</p><div class="row">{graph}{curve}</div>'


def _cost(results: Results) -> str:
    """Passes and seconds of each step, beside what measuring everything would have cost."""
    seconds = results.record["seconds"]
    steps: dict[str, tuple[str, Any]] = {
        "attribution": ("estimate of all components", results.attribution),
        "exact": (f"exact check of {len(results.verified)} components", results.exact),
        "whole_attribution": ("estimate of whole heads and MLPs", results.whole_attribution),
        "whole_exact": ("exact check of whole heads and MLPs", results.whole_exact),
        "bound": ("bound on what was not checked", results.bound),
        "edges": ("estimate of all edges", results.edges),
        "faithfulness": ("faithfulness of circuits", results.faithfulness),
    }
    lines = "".join(
        _cost_row(name, part.passes.forward, part.passes.backward, seconds.get(step))
        for step, (name, part) in steps.items()
        if part is not None
    )
    everything, measured = results.exhaustive_passes, results.exact.passes.forward
    took = seconds["exact"] / measured * everything if seconds.get("exact") and measured else None
    lines += _cost_row("exact sweep over all components (not run)", everything, 0.0, took, about="≈ ")
    return (
        '<table><thead><tr><th class="text">step</th><th class="number">forward passes</th>'
        '<th class="number">backward passes</th><th class="number">seconds</th></tr></thead>'
        f"<tbody>{lines}</tbody></table>"
        '<p class="note">Passes count prompts; a pass through some of the blocks counts as their share. The last line '
        f"is computed: {results.n_components - results.n_zero:,} of {results.n_components:,} components have an "
        "estimate that is not exactly 0, and the seconds follow the rate of the exact check.</p>"
    )


def _cost_row(name: str, forward: float, backward: float, seconds: float | None, about: str = "") -> str:
    took = "–" if seconds is None else f"{about}{seconds:,.{0 if seconds >= 100 else 1}f}"
    numbers = (f"{about}{forward:,.0f}", f"{backward:,.0f}", took)
    return (
        f'<tr><td class="text">{escape(name)}</td>' + "".join(f'<td class="number">{n}</td>' for n in numbers) + "</tr>"
    )


def _provenance(results: Results) -> str:
    key = results.key
    versions: Any = results.attribution.provenance.get("versions") or {}
    facts = {
        "weights": _code(key["weight_hash"]),
        "tokenizer": _code(key["tokenizer_hash"]),
        "pairs": _code(key["task_hash"]),
        "dtype": escape(key["dtype"]),
        "seed": str(key["seed"]),
        "versions": escape(", ".join(f"{name} {version}" for name, version in versions.items())),
        "task from": escape(results.record["task"]["citation"]),
        "ran on": escape(_spread(results.exact)),
        "files": ", ".join(map(_code, artifacts(key).values())),
    }
    command = escape(results.record["command"])
    return (
        fact_table({name: text for name, text in facts.items() if text})
        + f"<p>To make it again:</p><pre>{command}</pre>"
    )


def _spread(result: Attribution) -> str:
    """How the exact check was cut, where an executor ran it."""
    made: Any = result.settings.get("executor")
    return "" if made is None else f"executor {made['name']}, {made['blocks']} blocks of up to {made['pairs']} pairs"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
