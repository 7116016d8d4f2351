"""The answer in one sentence, and the sentences that go with the figures."""

from __future__ import annotations

import math

from mechattr.draw import spell
from mechattr.report.results import STRONG_SHARE, Results
from mechattr.sites import Node


def sentence(results: Results) -> str:
    """The answer with its numbers: how many components move the metric, which is the strongest, what was checked."""
    n, gap = f"{results.n_components:,}", f"{results.gap:.3g} {results.unit}"
    metric = words(results.record["task"]["metric"])
    how = "corrupting" if results.key["direction"] == "noising" else "restoring"
    strong, checked = results.strong, len(results.verified)
    if not results.gap > 0:
        return (
            f"Clean and corrupt prompts have the same mean {metric}: there is nothing for the {n} components to carry."
        )
    if not strong:
        return (
            f"None of {n} components was found to move the {metric} by {percent(STRONG_SHARE)} of the gap between "
            f"clean and corrupt prompts ({gap}): of the {checked} with the largest estimates, each measured by {how} "
            f"it alone, the strongest moves it by {percent(max(map(results.share, results.verified)))}."
        )
    best = strong[0]
    many = f"{len(strong)} of {n} components each move" if len(strong) > 1 else f"One of {n} components moves"
    last = f", the last of them by {percent(results.share(strong[-1]))}" if len(strong) > 1 else ""
    return (
        f"{'At least ' if len(strong) == checked > 1 else ''}{many} the {metric} by {percent(STRONG_SHARE)} or more of "
        f"the gap between clean and corrupt prompts ({gap}): the strongest, {best.label}{_place(results, best)}, by "
        f"{results.exact.value(best, 'abs_signed'):.3g} ({percent(results.share(best))}){last}; measured by {how} one "
        f"component at a time, for the {checked} with the largest estimates."
        + (f" {capital(results.bound.summary)}" if results.bound is not None else "")
    )


def _place(results: Results, node: Node) -> str:
    """` at S2`, ` at position 9 (“,” in the first pair)`, or nothing where all positions are replaced together."""
    if node.pos is None:
        return ""
    if isinstance(node.pos, str):
        return f" at {node.pos}"
    spans = [name for name, (start, end) in results.spans.items() if start <= node.pos < end]
    if spans:
        return f" at {' and '.join(spans)}"
    return f" at position {node.pos} (“{spell(results.tokens[node.pos])}” in the first pair)"


def agreement(results: Results) -> str:
    """How far the estimates can be trusted here."""
    signed, magnitude = results.agreement
    nodes = results.whole_exact.nodes()
    if not math.isfinite(signed):
        return f"Too few of the {len(nodes)} whole heads and MLPs have an effect for a rank correlation."
    return (
        f"Over all {len(nodes)} whole heads and MLPs, Spearman's correlation between estimate and exact effect is "
        f"{signed:.3f} for contributions"
        + (f" and {magnitude:.3f} for mean |effect|." if math.isfinite(magnitude) else ".")
    )


def capital(text: str) -> str:
    """A sentence with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def percent(share: float) -> str:
    """`0.364` -> `36 %`, with a space that does not break."""
    return f"{100 * share:.0f}\u00a0%"


def words(name: str) -> str:
    """`logit_difference` -> `logit difference`."""
    return name.replace("_", " ")
