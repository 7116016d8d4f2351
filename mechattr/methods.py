"""The table of methods: what the command line, the documentation and the contract tests know about each.

Functions are import strings, so that reading the table loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Promise = Literal["complete", "exact_if_linear", "signed", "batch_independent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method.

    Attributes:
        name: the name under `mechattr`.
        function: the import string of the function, `"module:attribute"`.
        citation: where the method was published.
        cost: forward and backward passes, counted in prompt rows.
        promises: what the contract tests hold it to. `complete`: the scores sum to a known total.
            `exact_if_linear`: equals the measured effect on a linear network. `signed`: effects carry a sign.
            `batch_independent`: a batch gives what its prompts give one by one.
        page: the documentation page.
        command: the command of the command line that runs it.
    """

    name: str
    function: str
    citation: str
    cost: str
    promises: frozenset[Promise]
    page: str
    command: str


METHODS: Mapping[str, MethodRow] = MappingProxyType(
    {
        row.name: row
        for row in (
            MethodRow(
                name="activation_patching",
                function="mechattr.patching.activation:activation_patching",
                citation="Vig et al. 2020, Causal Mediation Analysis for Interpreting Neural NLP; "
                "Zhang and Nanda 2024, Towards Best Practices of Activation Patching, arXiv:2309.16042",
                cost="2 forward passes a pair, and for each node of each pair the part of one above its layer",
                promises=frozenset({"exact_if_linear", "signed", "batch_independent"}),
                page="docs/activation_patching.md",
                command="localise",
            ),
            MethodRow(
                name="attribution_patching",
                function="mechattr.patching.attribution:attribution_patching",
                citation="Nanda 2023, Attribution Patching; Kramár et al. 2024, AtP*, arXiv:2403.00745",
                cost="2 forward passes and 1 backward pass a pair, for all nodes together",
                promises=frozenset({"exact_if_linear", "signed", "batch_independent"}),
                page="docs/attribution_patching.md",
                command="localise",
            ),
        )
    }
)
