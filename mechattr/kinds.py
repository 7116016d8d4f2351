"""Where each kind of artifact lives, as import strings, so that opening a file loads what it needs and no more."""

from __future__ import annotations

# Kind tag -> "module:Class", imported when a file of that kind is opened.
KINDS: dict[str, str] = {
    "cache": "mechattr.artifact:Cache",
    "attribution": "mechattr.artifact:Attribution",
    "bound": "mechattr.patching.bound_result:Bound",
    "circuit": "mechattr.patching.circuit:Circuit",
    "comparison": "mechattr.evaluation.comparison:Comparison",
    "decomposition": "mechattr.decomposition.result:Decomposition",
    "edge_attribution": "mechattr.patching.edge_artifact:EdgeAttribution",
    "evidence": "mechattr.evaluation.evidence_result:EvidenceScores",
    "erasure_probes": "mechattr.erasure.probes:ErasureProbes",
    "erasure_training": "mechattr.erasure.training:TrainingState",
    "footprint": "mechattr.erasure.accuracy:Footprint",
    "faithfulness": "mechattr.evaluation.faithfulness:Faithfulness",
    "head_roles": "mechattr.decomposition.roles:HeadRoles",
    "lens": "mechattr.decomposition.lens_result:Lens",
    "implicit_vocabulary": "mechattr.erasure.vocabulary:ImplicitVocabulary",
    "minimality": "mechattr.evaluation.minimality:Minimality",
    "multiple_choice": "mechattr.steering.choice_scores:MultipleChoice",
    "segmentation": "mechattr.erasure.segment:Segmentation",
    "routes": "mechattr.decomposition.routes:Routes",
    "undertrained": "mechattr.vocabulary.undertrained:UnderTrained",
    "tuned_lens": "mechattr.decomposition.tuned_lens:TunedLens",
    "steering_evaluation": "mechattr.steering.evaluation:SteeringEvaluation",
    "steering_sweep": "mechattr.steering.evaluation:SteeringSweep",
    "steering_condition": "mechattr.steering.conditions:Condition",
    "steering_vector": "mechattr.steering.vector:SteeringVector",
    "reft": "mechattr.steering.reft:ReFT",
    "g_act": "mechattr.steering.gact:GAct",
}
