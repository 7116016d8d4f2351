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
        command: the command of the command line that runs it, if there is one.
        takes: `"pairs"`, a task, or `"prompts"`, texts or a batch.
    """

    name: str
    function: str
    citation: str
    cost: str
    promises: frozenset[Promise]
    page: str
    command: str | None = None
    takes: Literal["pairs", "prompts"] = "pairs"


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
                cost="2 or 3 forward and 1 to (L + 3) / 2 backward passes a pair, by variant, for all nodes together",
                promises=frozenset({"exact_if_linear", "signed", "batch_independent"}),
                page="docs/attribution_patching.md",
                command="localise",
            ),
            MethodRow(
                name="missed_effect_bound",
                function="mechattr.patching.bound:missed_effect_bound",
                citation="Kramár et al. 2024, AtP*, arXiv:2403.00745",
                cost="3 forward passes and 1 backward pass a pair, and 1 forward pass a sample, whatever the number of "
                "nodes",
                promises=frozenset(),
                page="docs/missed_effect_bound.md",
                command="localise",
            ),
            MethodRow(
                name="ablation",
                function="mechattr.patching.ablation:ablation",
                citation="Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593",
                cost="1 forward pass a pair, 1 for each reference prompt, and for each node of each pair the part of "
                "one above its layer",
                promises=frozenset({"signed"}),
                page="docs/ablation.md",
            ),
            MethodRow(
                name="causal_tracing",
                function="mechattr.patching.tracing:causal_tracing",
                citation="Meng et al. 2022, Locating and Editing Factual Associations in GPT, arXiv:2202.05262",
                cost="2 forward passes for each noise of each pair, and for each node of each of them the part of one "
                "above its window",
                promises=frozenset({"signed", "batch_independent"}),
                page="docs/causal_tracing.md",
            ),
            MethodRow(
                name="path_patching",
                function="mechattr.patching.path:path_patching",
                citation="Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593; "
                "Goldowsky-Dill et al. 2023, Localizing Model Behavior with Path Patching, arXiv:2304.05969",
                cost="2 forward passes a pair, and 2 for each sender of each pair",
                promises=frozenset({"signed", "batch_independent"}),
                page="docs/path_patching.md",
            ),
            MethodRow(
                name="edge_attribution",
                function="mechattr.patching.edges:edge_attribution",
                citation="Syed et al. 2023, arXiv:2310.10348 (EAP); Hanna et al. 2024, arXiv:2403.17806 (EAP-IG)",
                cost="2 forward passes and 1 backward pass a pair for EAP; steps + 2 and steps for EAP-IG",
                promises=frozenset({"exact_if_linear", "signed", "batch_independent"}),
                page="docs/edge_attribution.md",
                command="localise",
            ),
            MethodRow(
                name="edge_patching",
                function="mechattr.patching.edge_patching:edge_patching",
                citation="Goldowsky-Dill et al. 2023, Localizing Model Behavior with Path Patching, arXiv:2304.05969",
                cost="2 forward passes a pair, and for each edge of each pair the part of one above its reader's layer",
                promises=frozenset({"exact_if_linear", "signed", "batch_independent"}),
                page="docs/edge_attribution.md",
            ),
            MethodRow(
                name="faithfulness",
                function="mechattr.evaluation.faithfulness:faithfulness",
                citation="Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark, arXiv:2504.13151",
                cost="3 forward passes a pair, and 1 for each circuit and each complement, random ones included",
                promises=frozenset({"batch_independent"}),
                page="docs/faithfulness.md",
                command="localise",
            ),
            MethodRow(
                name="minimality",
                function="mechattr.evaluation.minimality:minimality",
                citation="Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593",
                cost="3 forward passes a pair, and 1 for the circuit and for each part that is taken out of it",
                promises=frozenset({"batch_independent"}),
                page="docs/faithfulness.md",
            ),
            MethodRow(
                name="alti",
                function="mechattr.decomposition.alti:alti",
                citation="Ferrando et al. 2022, Measuring the Mixing of Contextual Information in the Transformer, "
                "arXiv:2203.04212",
                cost="1 forward pass a prompt, and the parts of each pair of positions of each layer",
                promises=frozenset({"batch_independent"}),
                page="docs/alti.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="alti_logit",
                function="mechattr.decomposition.alti_logit:alti_logit",
                citation="Ferrando et al. 2023, Explaining How Transformers Use Context to Build Predictions, "
                "arXiv:2305.12535",
                cost="1 forward pass a prompt, and the parts of each pair of positions of each layer but the last",
                promises=frozenset({"complete", "signed", "batch_independent"}),
                page="docs/alti.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="direct_logit_attribution",
                function="mechattr.decomposition.direct:direct_logit_attribution",
                citation="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; "
                "Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593",
                cost="1 forward pass a prompt, for all components",
                promises=frozenset({"complete", "signed", "batch_independent"}),
                page="docs/direct_logit_attribution.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="logit_lens",
                function="mechattr.decomposition.logit_lens:logit_lens",
                citation="nostalgebraist 2020, interpreting GPT: the logit lens; "
                "Belrose et al. 2023, Eliciting Latent Predictions with the Tuned Lens, arXiv:2303.08112",
                cost="1 forward pass a prompt, and for each site one block and the unembedding",
                promises=frozenset({"batch_independent"}),
                page="docs/logit_lens.md",
                command="lens",
                takes="prompts",
            ),
            MethodRow(
                name="lrp",
                function="mechattr.decomposition.lrp:lrp",
                citation="Ali et al. 2022, XAI for Transformers: Better Explanations through Conservative Propagation; "
                "Achtibat et al. 2024, AttnLRP, arXiv:2402.05602",
                cost="1 forward and 1 backward pass for each prompt and target; targets of one prompt share its "
                "forward pass",
                promises=frozenset({"complete", "signed", "batch_independent"}),
                page="docs/lrp.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="information_flow_routes",
                function="mechattr.decomposition.flow:information_flow_routes",
                citation="Ferrando and Voita 2024, Information Flow Routes, arXiv:2403.00824",
                cost="1 forward pass a prompt",
                promises=frozenset({"batch_independent"}),
                page="docs/information_flow_routes.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="token_salience",
                function="mechattr.decomposition.salience:token_salience",
                citation="Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv:2005.00928; "
                "Kobayashi et al. 2020, Attention is Not Only a Weight; Modarressi et al. 2022, GlobEnc; 2023, DecompX",
                cost="1 forward pass a prompt; DecompX with a target 1 forward and 1 backward pass",
                promises=frozenset({"batch_independent"}),
                page="docs/token_salience.md",
                command="decompose",
                takes="prompts",
            ),
            MethodRow(
                name="token_lens",
                function="mechattr.decomposition.token_lens:token_lens",
                citation="Yan and Jia 2025, Promote, Suppress, Iterate, arXiv:2502.20475",
                cost="1 forward pass a prompt, and the unembedding of each source in each layer",
                promises=frozenset({"signed", "batch_independent"}),
                page="docs/token_lens.md",
                command="decompose",
                takes="prompts",
            ),
        )
    }
)
