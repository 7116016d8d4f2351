"""Layer-wise relevance propagation: a logit handed back to the input in one backward pass, and an account of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mechattr.decomposition.account import check_account, tables
from mechattr.decomposition.prompt import Prompt, prompt_of
from mechattr.decomposition.relevance import Plan, Relevance, plan_of
from mechattr.decomposition.result import Decomposition
from mechattr.decomposition.target import BEFORE_CAP, Target, Token, target_of
from mechattr.errors import SettingError, UnknownNameError, UnsupportedFeatureError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.models.rules import Rules
from mechattr.sites import expand, parse, site_spec

RULES = {"cp": Rules.cp_lrp, "attn": Rules.attn_lrp}


def lrp(
    model: HookedModel,
    prompt: str | Sequence[str] | Batch,
    *,
    target: Token | Sequence[Token] | Tensor,
    foil: Token | Sequence[Token] | Tensor | None = None,
    position: int = -1,
    variant: Literal["cp", "attn"] = "cp",
    sites: str | Sequence[str] = (),
    epsilon: float = 0.0,
    gamma: float = 0.0,
    checkpoint: bool = False,
    targets_at_once: int = 16,
) -> Decomposition:
    """Relevance of tokens, positions, biases and any sites for a logit or a difference of two, by backward rules.

    Relevance is activation times gradient, R = x . dx, under rules that make the network linear at its values (see
    `Rules.cp_lrp` and `Rules.attn_lrp`). Read at the stream that enters the first block it belongs to tokens; where a
    bias enters, to the bias. With all of them,

        logit = sum R(tokens) + sum R(positions) + sum b . db + softmax leak,

    where AttnLRP leaks sum(z dz) - sum(v dv) - sum(q dq) - sum(k dk) in each attention block, and CP-LRP nothing.

    Args:
        model: a hooked model.
        prompt: a text, texts, or a batch.
        target: the explained token, an id or the text of one token; a list has one for each prompt. Of one prompt it
            may have several: results then begin with the axis `target`, and one batched backward pass explains them.
        foil: a token whose logit is subtracted; one for all, or one for each target.
        position: the position whose prediction is explained, counted from 0 or, if negative, from the row's end.
        variant: `"cp"` holds attention patterns and gates at their values and conserves relevance exactly; `"attn"`
            propagates through them, by halves, and leaks at each softmax.
        sites: sites whose relevance is wanted from the same backward pass, such as `"z"`, `"mlp_post"`, `"resid_pre"`.
        epsilon, gamma: strengths of the rules of those names at the linear layers of the blocks (see `Rules`); what
            they take goes to the entry `linear`. Without them a linear layer passes its gradient.
        checkpoint: compute blocks again in the backward pass instead of keeping them.
        targets_at_once: how many targets of one prompt share a backward pass; bounds memory.

    Returns:
        `tokens` [pos], token and position embedding together; `score/embed` and `score/pos_embed` [pos] apart, where
        the model has such embeddings; `score/SITE` for each of `sites`, [layer, pos, head, kv_head or neuron], signed,
        summed over the entries of a vector; `components` [component], all that the logit went to, by name; `ledger`
        [entry]: tokens, positions, biases, softmax_leak, experts (in mixtures of experts), linear (with `epsilon` or
        `gamma`), logit, residual (what is missing: rounding); `conservation` [cut, side]: relevance of the residual
        stream before each block and behind the last, beside the logit less all that was taken above. All in units of
        the logit.

        What is explained is the logit before a cap of logits, where a model has one.

    Raises:
        AnswerError, SettingError: a target, foil or position that does not fit; a site without relevance.
        UnknownNameError: no such variant.
        UnknownSiteError: a site that the model does not have.
        UnsupportedFeatureError: float16, an encoder-decoder model, or rules that a model or backend does not support.
        SelfCheckError: the account does not close: the rules miss a part of this model.

    Cost:
        1 forward and 1 backward pass for each prompt and target; several targets of one prompt share its forward pass,
        unless blocks are computed again or the model is an encoder. With `checkpoint` a second forward pass.

    References:
        Ali et al. (2022), XAI for Transformers: Better Explanations through Conservative Propagation.
        Achtibat et al. (2024), AttnLRP: Attention-Aware Layer-Wise Relevance Propagation, arXiv 2402.05602.
    """
    if variant not in RULES:
        raise UnknownNameError(f"variant {variant!r}", "no such variant", nearest(str(variant), RULES))
    _check_dtype(model)
    given = prompt_of(model, prompt)
    kept = _kept(model, sites)
    count = _targets(given, target, foil)
    rows = given if count is None else _repeated(given, count)
    aim = target_of(model, rows, target, foil, position)
    rules = replace(RULES[variant](), linear_epsilon=epsilon, linear_gamma=gamma)
    plan = plan_of(model, kept=kept, leaks=rules.pattern == "full")
    shared = count is not None and not checkpoint and not model.info.encoder
    if shared:
        found, logit = _together(model, given, aim, plan, rules, targets_at_once)
    else:
        found, logit = _rowwise(model, rows, aim, plan, rules, checkpoint=checkpoint)
    components = found.components(absorbed=rules.in_linear)
    if model.info.encoder:  # the head has a dense layer and a norm of its own
        components["head"] = logit - found.total(plan.end)
    else:
        components["unembed.b_U"] = aim.bias(model)
    check_account(model, found, components, logit)
    tensors = tables(model, rows, found, components, logit)
    if count is not None:
        tensors = {name: Labelled(t.values, ("target", *t.axes[1:]), t.explicit_coords) for name, t in tensors.items()}
    forward = len(given) if shared else len(rows) * (1 + checkpoint)
    settings = given.settings(
        method="lrp",
        passes=(float(forward), float(len(rows))),
        main="tokens",
        variant=variant,
        rules=rules.to_json(),
        sites=list(dict.fromkeys(parse(site)[0] for site in kept)),
        logit=logit.tolist(),
        explains="the logit" if model.info.encoder else BEFORE_CAP,
        notes=["bfloat16: good for rankings; the account closes to two digits"] * (model.info.dtype == "bfloat16"),
        **aim.settings(),
    )
    return Decomposition(tensors, settings=settings, provenance=given.provenance(model))


def _check_dtype(model: HookedModel) -> None:
    if model.info.dtype == "float16":
        raise UnsupportedFeatureError(
            "LRP in float16",
            "gradients overflow, and quotients a(z)/z of small z are lost below 6e-8",
            "load the model in bfloat16, whose range is that of float32, or in float32",
        )


def _kept(model: HookedModel, sites: str | Sequence[str]) -> list[str]:
    """The full names of sites whose relevance is wanted."""
    kept = expand(sites, model.sites())
    for site in kept:
        axes = site_spec(site).axes
        if "key" in axes or len(axes) == 2:
            raise SettingError(
                f"relevance of {site}",
                "patterns pass on what values and scores share, and scales of norms are held: neither has a share",
                "ask for sites of the stream, heads or neurons, such as z, v, rot_q, mlp_post or resid_pre",
            )
    return kept


def _targets(given: Prompt, *tokens: Any) -> int | None:
    """How many targets one prompt is asked about, or `None` where each prompt has its own."""
    given_lists = (x for x in tokens if isinstance(x, Sequence | Tensor) and not isinstance(x, str))
    lists = [len(x) for x in given_lists if not (isinstance(x, Tensor) and x.ndim == 0)]
    if len(given) != 1 or not any(lists) or (max(lists) == 1 and not given.single):
        return None
    return max(lists)


def _repeated(given: Prompt, count: int) -> Prompt:
    """The one prompt, as a row for each target."""
    batch = given.batch.rows([0] * count)
    return Prompt(replace(batch, example=torch.arange(count, device=batch.device)), False, given.strings * count)


def _rowwise(
    model: HookedModel, rows: Prompt, aim: Target, plan: Plan, rules: Rules, *, checkpoint: bool
) -> tuple[Relevance, Tensor]:
    """One backward pass, each row with a target of its own."""
    found, wanted = Relevance(plan), plan.sites(model)
    tape = model.tape(rows.batch, metric=aim.metric, gradients=wanted, rules=rules, checkpoint=checkpoint)
    if model.info.encoder:
        tape.pull_back(found.visit, last=True)
        assert tape.metric is not None
        return found, tape.metric.to(found.total(plan.end).dtype)
    seed = _seed(aim.direction(model).to(tape.logits.dtype), aim.columns, rows.batch.tokens.shape[1])
    tape.pull_back(found.visit, {plan.end: seed}, last=True)
    return found, found.total(plan.end) + aim.bias(model)


def _together(
    model: HookedModel, given: Prompt, aim: Target, plan: Plan, rules: Rules, at_once: int
) -> tuple[Relevance, Tensor]:
    """Several targets of one prompt: one forward pass, and backward passes from all of them at once."""
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
        raise SettingError(f"targets_at_once={at_once!r}", "no count", "give a whole number from 1")
    wanted = plan.sites(model)
    tape = model.tape(given.batch, metric=aim.metric, gradients=wanted, record=wanted, rules=rules)
    seeds = _seed(aim.direction(model).to(tape.logits.dtype), aim.columns, given.batch.tokens.shape[1])[:, None]
    chunks = seeds.split(at_once)
    parts = []
    for i, chunk in enumerate(chunks):
        found = Relevance(plan)
        for site, gradient in tape.pull_backs({plan.end: chunk}, last=i == len(chunks) - 1).items():
            found.visit(site, tape.activations[site], gradient[:, 0])
        parts.append(found)

    def joined(name: str) -> dict[str, Tensor]:
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    found = Relevance(plan, joined("tables"), joined("totals"), joined("biases"))
    return found, found.total(plan.end) + aim.bias(model)


def _seed(direction: Tensor, columns: Tensor, length: int) -> Tensor:
    """[row, pos, d_model]: the direction of each row at its explained position."""
    seed = direction.new_zeros(len(direction), length, direction.shape[-1])
    seed[torch.arange(len(direction), device=seed.device), columns] = direction
    return seed
