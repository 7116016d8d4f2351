"""How good is what a method found: faithful circuits, true circuits, and how fast an order finds what matters."""

from __future__ import annotations

from mechattr.evaluation.compare import compare_orders
from mechattr.evaluation.comparison import Comparison
from mechattr.evaluation.estimate import estimate
from mechattr.evaluation.evidence_benchmark import evidence_benchmark
from mechattr.evaluation.evidence_result import EvidenceScores
from mechattr.evaluation.faithfulness import Faithfulness, faithfulness
from mechattr.evaluation.ground_truth import edge_auroc
from mechattr.evaluation.minimality import Minimality, minimality

__all__ = [
    "Comparison",
    "EvidenceScores",
    "Faithfulness",
    "Minimality",
    "compare_orders",
    "edge_auroc",
    "estimate",
    "evidence_benchmark",
    "faithfulness",
    "minimality",
]
