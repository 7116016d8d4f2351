"""Task generators: grammars drawn until there are `n` pairs that fit the model's own tokenizer.

Prompts, splits and spans of each are in its grammar file, which needs no model.
"""

from __future__ import annotations

import random

from mechattr.models.base import HookedModel
from mechattr.tasks.drawing import check_index, check_option, check_split, draw_task
from mechattr.tasks.grammar import gendered_pronoun as pronoun_grammar
from mechattr.tasks.grammar import greater_than as greater_than_grammar
from mechattr.tasks.grammar import ioi as ioi_grammar
from mechattr.tasks.grammar import subject_verb as agreement_grammar
from mechattr.tasks.metrics import Metric
from mechattr.tasks.pairtext import PairText, Split
from mechattr.tasks.task import Task

CITATIONS = {
    "ioi": "Wang et al. 2022, Interpretability in the Wild, arXiv:2211.00593",
    "greater_than": "Hanna et al. 2023, How does GPT-2 compute greater-than?, arXiv:2305.00586",
    "subject_verb": "Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies",
    "gendered_pronoun": "Mathwin et al. 2023, Identifying a Preliminary Circuit for Predicting Gendered Pronouns",
}


def ioi(
    model: HookedModel,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    corruption: ioi_grammar.Corruption = "abc",
    order: ioi_grammar.Order | None = None,
    template: int | None = None,
    metric: str | Metric = "logit_difference",
) -> Task:
    """Indirect object identification: "When A and B came to the river, B gave a book to" -> " A", not " B".

    Spans: IO, S1, S1+1 (the word after S1), S2, END. Both orders of mention are drawn equally often.

    Args:
        model: the model whose tokenizer the pairs must fit.
        n: number of pairs.
        seed: seed of the draws.
        split: "train" or "test"; templates, names, places and objects are disjoint.
        corruption: "abc": a third name in place of S2; "s2_flip": the indirect object there, so the right answer flips.
        order: "ABBA" (indirect object first), "BABA" (subject first) or None for both.
        template: index of one template; with one `order`, positions are comparable. None for all.
        metric: name of a metric, or a `Metric`.

    Raises:
        EmptyTaskError: no pair fits this tokenizer.
        AlignmentError: fewer than `n` pairs fit.

    Cost: no forward pass.

    References:
        Wang et al. 2022, Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small.
    """
    check_option("corruption", corruption, ioi_grammar.CORRUPTIONS)
    check_option("order", order, (*ioi_grammar.ORDERS, None))
    check_index("template", template, len(ioi_grammar.TEMPLATES[check_split(split)]))
    orders = (order,) if order else ioi_grammar.ORDERS

    def draw(rng: random.Random, slot: int) -> PairText:
        return ioi_grammar.draw(rng, split, order=orders[slot % len(orders)], corruption=corruption, template=template)

    settings = {"seed": seed, "split": split, "corruption": corruption, "order": order, "template": template}
    return draw_task("ioi", model, draw, n=n, settings=settings, metric=metric, citation=CITATIONS["ioi"])


def greater_than(
    model: HookedModel,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    template: int | None = None,
    metric: str | Metric = "probability_difference",
) -> Task:
    """Greater-than: "The strike lasted from the year 1732 to the year 17" -> any of 33 ... 99, and none of 00 ... 32.

    The corrupt prompt has the year 01 of the same century, after which every later year is as good. Spans: XX (the
    century), YY (the year within it), END. A tokenizer that does not cut the year into century and year makes no pair.
    Two-digit numbers that are not one token after the prompt are left out of the sets, and counted.

    Args:
        model: the model whose tokenizer the pairs must fit.
        n: number of pairs.
        seed: seed of the draws.
        split: "train" or "test"; templates and events are disjoint, years are shared.
        template: index of one template, so that positions are comparable; None for all.
        metric: "probability_difference" or "kl_divergence", or a `Metric`.

    Raises:
        EmptyTaskError: no pair fits this tokenizer.
        AlignmentError: fewer than `n` pairs fit.

    Cost: no forward pass.

    References:
        Hanna et al. 2023, How does GPT-2 compute greater-than?
    """
    check_index("template", template, len(greater_than_grammar.TEMPLATES[check_split(split)]))

    def draw(rng: random.Random, _slot: int) -> PairText:
        return greater_than_grammar.draw(rng, split, template=template)

    settings = {"seed": seed, "split": split, "template": template}
    return draw_task(
        "greater_than", model, draw, n=n, settings=settings, metric=metric, citation=CITATIONS["greater_than"]
    )


def subject_verb(
    model: HookedModel,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    attractors: int | None = None,
    construction: agreement_grammar.Construction | None = None,
    attractor_number: agreement_grammar.AttractorNumber | None = None,
    verb: agreement_grammar.Verb | None = None,
    metric: str | Metric = "logit_difference",
) -> Task:
    """Subject-verb agreement: "The clerk that the officers near the mills call" -> " is", not " are".

    The corrupt prompt has the subject in the other number. Spans: SUBJECT, ATTRACTOR1 ..., CLAUSE_VERB (in relative
    clauses; in "rc_subject" it agrees with the subject, so it is secondary evidence and changes with it), END.
    Number, construction, attractor number and count of attractors are drawn in turn.

    Args:
        model: the model whose tokenizer the pairs must fit.
        n: number of pairs.
        seed: seed of the draws.
        split: "train" or "test"; nouns, inner verbs, prepositions, adjectives, adverbs and leads are disjoint; the
            verbs that are asked for are a closed class and are shared.
        attractors: nouns between subject and verb, 0 to 4; None for all of these.
        construction: "pp", "rc_subject", "rc_object" or "rc_object_no_that"; None for all.
        attractor_number: "same" or "opposite" to the clean subject's; None for both.
        verb: "present", "past", "have" or "regular"; None for all.
        metric: name of a metric, or a `Metric`.

    Raises:
        EmptyTaskError: no pair fits this tokenizer.
        AlignmentError: fewer than `n` pairs fit.

    Cost: no forward pass.

    References:
        Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies.
    """
    check_split(split)
    check_index("attractors", attractors, 5)
    check_option("construction", construction, (*agreement_grammar.CONSTRUCTIONS, None))
    check_option("attractor_number", attractor_number, ("same", "opposite", None))
    check_option("verb", verb, (*agreement_grammar.VERBS, None))

    def draw(rng: random.Random, slot: int) -> PairText:
        # Strides 2, 2, 4 and 5 (coprime with 16): all combinations come up within 80 slots.
        return agreement_grammar.draw(
            rng,
            split,
            number=("singular", "plural")[slot % 2],
            attractor_number=attractor_number or ("opposite", "same")[slot // 2 % 2],
            construction=construction or agreement_grammar.CONSTRUCTIONS[slot // 4 % 4],
            attractors=slot % 5 if attractors is None else attractors,
            verb=verb,
        )

    settings = {
        "seed": seed,
        "split": split,
        "attractors": attractors,
        "construction": construction,
        "attractor_number": attractor_number,
        "verb": verb,
    }
    return draw_task(
        "subject_verb", model, draw, n=n, settings=settings, metric=metric, citation=CITATIONS["subject_verb"]
    )


def gendered_pronoun(
    model: HookedModel,
    *,
    n: int,
    seed: int = 0,
    split: Split = "test",
    kind: pronoun_grammar.Kind | None = None,
    template: int | None = None,
    metric: str | Metric = "logit_difference",
) -> Task:
    """Gendered pronoun: "Long ago the duchess laughed aloud because" -> " she", not " he".

    The corrupt subject has the other gender. Spans: SUBJECT, END. Both genders and all kinds are drawn in turn.

    Args:
        model: the model whose tokenizer the pairs must fit.
        n: number of pairs.
        seed: seed of the draws.
        split: "train" or "test"; templates, leads, nouns, names and professions are disjoint.
        kind: "noun" (the duke), "name" (Tom), "profession" (the uncle who had become a clerk); None for all.
        template: index of one template; with one `kind`, positions are comparable. None for all.
        metric: name of a metric, or a `Metric`.

    Raises:
        EmptyTaskError: no pair fits this tokenizer.
        AlignmentError: fewer than `n` pairs fit.

    Cost: no forward pass.

    References:
        Mathwin et al. 2023, Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small.
    """
    kinds = pronoun_grammar.KINDS
    check_option("kind", kind, (*kinds, None))
    check_index("template", template, len(pronoun_grammar.TEMPLATES[check_split(split)]))

    def draw(rng: random.Random, slot: int) -> PairText:
        return pronoun_grammar.draw(
            rng, split, gender=pronoun_grammar.GENDERS[slot % 2], kind=kind or kinds[slot % 3], template=template
        )

    settings = {"seed": seed, "split": split, "kind": kind, "template": template}
    return draw_task(
        "gendered_pronoun", model, draw, n=n, settings=settings, metric=metric, citation=CITATIONS["gendered_pronoun"]
    )
