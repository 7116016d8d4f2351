"""The answer in one sentence, and the sentences that go with the figures."""

from __future__ import annotations

import math

from mechattr.report.results import STRONG_SHARE, Results


def sentence(results: Results) -> str:
    """The answer with its numbers: how many components move the metric, which is the strongest, what was checked."""
    n = f"{results.n_components:,}"
    verb = "corrupting" if results.key["direction"] == "noising" else "restoring"
    if not results.verified:
        return f"None of the {n} components was checked, so nothing is claimed."
    if not results.gap > 0:
        return f"Clean and corrupt prompts have the same mean metric, so there is no effect for the {n} components to carry."
    strong, checked = results.strong, len(results.verified)
    if not strong:
        return (
            f"None of the {checked} strongest of {n} components (by estimate) moves the {results.record['task']['metric']} by "
            f"{STRONG_SHARE:.0%} of the gap between clean and corrupt prompts ({results.gap:.3g} {results.unit}) when it is "
            f"{'corrupted' if verb == 'corrupting' else 'restored'} alone."
        )
    best = strong[0]
    where = "" if best.pos is None else f" at {results.position(best.pos)}"
    least = results.share(strong[-1])
    bound = "At least " if len(strong) == checked else ""
    return (
        f"{bound}{len(strong)} of {n} components each move the {_words(results.record['task']['metric'])} by {STRONG_SHARE:.0%} or more "
        f"of the gap between clean and corrupt prompts ({results.gap:.3g} {results.unit}): the strongest, {best.label}{where}, by "
        f"{abs(results.exact.value(best, 'signed')):.3g} ({results.share(best):.0%}), the last of them by {least:.0%}; measured by {verb} one component at a time, "
        f"for the {checked} with the largest estimates."
    )


def agreement(results: Results) -> str:
    """How far the estimates can be trusted here."""
    signed, magnitude = results.agreement
    nodes = results.whole_exact.nodes()
    if not math.isfinite(signed):
        return f"Too few of the {len(nodes)} whole heads and MLPs have an effect for a rank correlation."
    return (
        f"Over all {len(nodes)} whole heads and MLPs, Spearman's correlation between estimate and exact effect is {signed:.3f} "
        f"for mean effects" + (f" and {magnitude:.3f} for mean |effect|." if math.isfinite(magnitude) else ".")
    )


def _words(name: str) -> str:
    """`logit_difference` -> `logit difference`."""
    return name.replace("_", " ")
