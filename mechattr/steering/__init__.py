"""Steering: vectors that change what a model does, built from contrasts and applied where they should act."""

from __future__ import annotations

from mechattr.steering.builders import mass_mean, mean_difference, pca
from mechattr.steering.choice_scores import MultipleChoice
from mechattr.steering.choices import Question, multiple_choice
from mechattr.steering.condition import condition
from mechattr.steering.conditions import Condition
from mechattr.steering.contrasts import BEHAVIOURS, Contrasts, behaviour, prompts, read_pairs, read_triples
from mechattr.steering.controls import random_like, shuffled
from mechattr.steering.evaluate import evaluate
from mechattr.steering.evaluation import SteeringEvaluation, SteeringSweep
from mechattr.steering.files import from_gguf, from_json, to_gguf, to_json
from mechattr.steering.frontier import Frontier
from mechattr.steering.gact import GAct, g_act
from mechattr.steering.given import act_add, from_direction
from mechattr.steering.grains import grains
from mechattr.steering.intervals import Estimate
from mechattr.steering.learned import learned
from mechattr.steering.operators import OPERATORS
from mechattr.steering.preference import TokenScores, token_scores
from mechattr.steering.probes import iti, probe
from mechattr.steering.propensity import propensity
from mechattr.steering.reft import ReFT, reft
from mechattr.steering.refusal import refusal
from mechattr.steering.side_effects import cross_entropy, kl_of_logits, kl_to_base, perplexity
from mechattr.steering.sweep import sweep
from mechattr.steering.text_measures import distinct_n, repetition
from mechattr.steering.truthful import truthfulqa
from mechattr.steering.vector import SteeringVector

__all__ = [
    "BEHAVIOURS",
    "OPERATORS",
    "Condition",
    "Contrasts",
    "Estimate",
    "Frontier",
    "GAct",
    "MultipleChoice",
    "Question",
    "ReFT",
    "SteeringEvaluation",
    "SteeringSweep",
    "SteeringVector",
    "TokenScores",
    "act_add",
    "behaviour",
    "condition",
    "cross_entropy",
    "distinct_n",
    "evaluate",
    "from_direction",
    "from_gguf",
    "from_json",
    "g_act",
    "grains",
    "iti",
    "kl_of_logits",
    "kl_to_base",
    "learned",
    "mass_mean",
    "mean_difference",
    "multiple_choice",
    "pca",
    "perplexity",
    "probe",
    "prompts",
    "propensity",
    "random_like",
    "read_pairs",
    "read_triples",
    "reft",
    "refusal",
    "repetition",
    "shuffled",
    "sweep",
    "to_gguf",
    "to_json",
    "token_scores",
    "truthfulqa",
]
