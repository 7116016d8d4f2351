"""What was verified of each model family: rows for a terminal, and a page of documentation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import transformers

from mechattr.errors import UnknownNameError, nearest
from mechattr.models.architectures import VERIFIED, table
from mechattr.models.families import FAMILIES, small_configs
from mechattr.models.verify import Check, verify_family

Results = Mapping[str, Sequence[Check]]

INTRODUCTION = """# Model families

Every row was verified by running it: `mechattr models --verify --write docs/models.md` builds a small random model of
each family (large weights, non-zero biases, float64) and measures what the hooked-model layer promises. An entry is the
largest relative deviation that was found; 0 is equality of every bit. transformers {release}.

| check | what is compared |
|---|---|
| logits | without taps, with the model's own call: eager attention, and sdpa where the family has it |
| recording | each site recorded or overwritten by itself, with no tap; sums in another order may differ by 1e-5 |
| gradients | at every site, gradient · direction with a finite difference of patching there; limit 1e-2 |
| padding | rows of a padded batch with the same rows alone: activations, gradients, logits; limit 1e-5 |
| restart | a run from a cached residual stream with the whole run |
| generation | tokens under an edit of strength zero with the model's own `generate` |

transformers takes softmaxes and norms in float32 whatever the dtype, which is what `gradients` and `padding` show. The
tests hold every family to more, and to narrower limits: finite differences agree to 1e-4 where these steps are widened.
"""


def chosen(families: Sequence[str]) -> list[str]:
    """The small models of some families (by family or by name), or of all.

    Raises:
        UnknownNameError: neither a family nor a small model.
    """
    configs = small_configs()
    known = {*FAMILIES, *configs}
    for name in families:
        if name not in known:
            raise UnknownNameError(f"family {name!r}", "no such family", nearest(name, known))
    return [n for n, config in configs.items() if not families or {n, config.model_type} & {*families}]


def verified(names: Iterable[str]) -> Iterator[tuple[str, tuple[Check, ...]]]:
    """Small models one after the other, with what was measured of each."""
    for name in names:
        yield name, verify_family(name)


def rows(results: Results) -> list[dict[str, Any]]:
    """One row a small model: the largest deviation of each check, with a mark where it is over its limit."""
    columns = list(dict.fromkeys(check.name for checks in results.values() for check in checks))
    found = []
    for name, checks in results.items():
        by_name = {check.name: check for check in checks}
        found.append({"model": name} | {c: _shown(by_name[c]) if c in by_name else "–" for c in columns})
    return found


def _shown(check: Check) -> str:
    number = "0" if check.error == 0 else f"{check.error:.0e}"
    return number if check.passed else f"{number} at {check.where}, over {check.limit:.0e}"


def page(results: Results) -> str:
    """The page of documentation, as Markdown."""
    plain = [{k: v for k, v in row.items() if k != "verified"} for row in table()]
    sections = [
        INTRODUCTION.format(release=transformers.__version__),
        "## Families\n",
        _markdown(plain),
        "\n## What was measured\n",
        _markdown(rows(results)),
        "\n## What the tests prove\n",
        "\n".join(f"- {name}: {text}" for name, text in VERIFIED.items()),
    ]
    return "\n".join(sections) + "\n"


def _markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    names = list(entries[0])
    lines = [names, ["---"] * len(names), *([str(entry[name]) for name in names] for entry in entries)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
