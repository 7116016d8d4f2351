"""A transformers model in the hands of nnsight: what it is, without its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mechattr.errors import ModelStateError, UnsupportedFeatureError, UnsupportedModelError
from mechattr.models import nnsight_remote as remotely
from mechattr.models import tokenize as text
from mechattr.models import weights
from mechattr.models.anatomy import Anatomy, locate
from mechattr.models.base import Batch
from mechattr.models.checks import check_batch
from mechattr.models.describe import describe
from mechattr.models.dictionary import Dictionary
from mechattr.models.discovery import row_of
from mechattr.models.families import Family, full_sites, text_config
from mechattr.models.norms import Norm
from mechattr.models.rules import Rules
from mechattr.models.sharding import check_one_process
from mechattr.models.standing import Standing, check_unedited
from mechattr.models.taps import supported
from mechattr.sites import parse, site_spec

REACHED = frozenset(
    "embed pos_embed resid_pre ln1_scale ln1 q k v rot_q rot_k attn_scores pattern z result attn_out resid_mid "
    "ln2_scale ln2 mlp_pre mlp_pre_linear mlp_post mlp_out resid_post ln_final_scale ln_final".split()
)
INSIDE = ("attn_scores", "pattern")  # what no fused kernel shows


class Traced(Standing):
    """A transformers model in the hands of nnsight: everything but its runs. Arguments and errors: `HookedNNsight`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        remote: bool | str = False,
        family: Family | None = None,
    ) -> None:
        remotely.check_remote(model, remote)
        check_one_process(getattr(model, "_module", model), "nnsight")  # wrapping a model changes its modules for good
        self.traced, self.remote = remotely.wrapped(model, remote), remote
        self.model = self.traced._module
        self.tokenizer = tokenizer or getattr(self.traced, "tokenizer", None)
        self._weight_hash = weights.Hasher()
        self._check_state()
        check_unedited(self.model)
        family, mapping = row_of(self.model, family)
        if self.model.get_output_embeddings() is None:
            found = "it has no language-model head"
            raise UnsupportedModelError(f"a hooked {type(self.model).__name__}", found, "load the ...ForCausalLM class")
        self.config = c = text_config(self.model.config, family)
        n_heads = c.num_attention_heads
        n_kv_heads = family.kv_heads or getattr(c, "num_key_value_heads", None) or n_heads
        self._anatomy = locate(self.model, family, n_heads, n_kv_heads)
        if reason := _out_of_reach(self._anatomy):
            raise UnsupportedModelError(
                f"a {type(self.model).__name__} on the nnsight backend", reason, "use backend='hf'"
            )
        self.info = describe(
            self.model, self._anatomy, backend="nnsight", name=name, revision=revision, mapping=mapping
        )
        named = full_sites(family, self._anatomy.parts)
        self.eager = c._attn_implementation == "eager"
        absent = () if self.eager else INSIDE
        self._sites = tuple(n for n in named if parse(n)[0] in REACHED and parse(n)[0] not in absent)

    def __repr__(self) -> str:
        i = self.info
        place = f", remote={self.remote!r}" if self.remote else ""
        return f"HookedNNsight({i.name!r}, {i.family}, {i.n_layers} layers, {i.n_heads} heads, {i.dtype}{place})"

    def __reduce__(self) -> Any:
        raise UnsupportedFeatureError(
            "sending a function that refers to the hooked model",
            "a trace carries its functions to where it runs, and the model stays",
            "load the model without remote=, or with backend='hf'",
        )

    def sites(self) -> tuple[str, ...]:
        """The full site names of this model, in the order of its forward pass; each was seen to fire at load."""
        return self._sites

    def supports(self, feature: Any) -> bool:
        """Whether a site name, an edit operator or a `Rules` value can be used; of rules only `hold`."""
        if isinstance(feature, Rules):
            return feature == Rules(hold=feature.hold)
        return supported(feature, self._sites)

    def weight(self, name: str) -> Tensor:
        """A weight by its standard name; see `mechattr.models.weights`.

        Raises:
            UnknownNameError: no such weight.
            UnsupportedFeatureError: the weights are on a server.
        """
        self._check_here(f"the weight {name}")
        return weights.weight(name, self._anatomy, self.model.get_output_embeddings()).detach()

    def norm(self, name: str) -> Norm | None:
        """The norm through which a part reads the residual stream; see `HookedModel.norm`.

        Raises:
            UnknownNameError: no such norm.
            UnsupportedFeatureError: a post-norm encoder, or weights that are on a server.
        """
        self._check_here(f"the norm {name}")
        return self._anatomy.norm(name)

    def tokenize(self, texts: str | Sequence[str], *, chat: bool = False, padding_side: str = "right") -> Batch:
        """Texts -> padded batch on the model's device."""
        return text.tokenize(self.tokenizer, texts, chat=chat, padding_side=padding_side, device=self.device)

    def decode_token(self, token: int) -> str:
        """One token as text, with its leading space."""
        return text.decode_token(self.tokenizer, token)

    def fingerprint(self) -> Mapping[str, str]:
        """sha256 of weights and tokenizer; for weights on a server, their hub name and revision."""
        there = self.remote is True
        weight_hash = remotely.weight_name(self.traced) if there else self._weight_hash(self.model.state_dict())
        return {"weight_hash": weight_hash, "tokenizer_hash": text.tokenizer_hash(self.tokenizer), **self._marked()}

    @property
    def device(self) -> torch.device:
        """Where token rows have to be: where the embedding is, or the CPU for a model on a server."""
        device: torch.device = self._anatomy.ends["embed"].weight.device  # type: ignore[assignment]
        return torch.device("cpu") if device.type == "meta" else device

    # -- checks

    def with_dictionaries(self, dictionaries: Sequence[Dictionary]) -> NoReturn:
        """Refuses: an encoder of the user cannot be part of a trace that may run on a server.

        Raises:
            UnsupportedFeatureError: always.
        """
        found = "backend 'nnsight' runs traces, which a function of the user cannot be part of"
        fix = "use backend='hf', 'plain' or 'transformer_lens'"
        raise UnsupportedFeatureError(f"{len(dictionaries)} dictionaries", found, fix)

    def _check(self, batch: Batch) -> None:
        self._check_state()
        check_batch(batch, self.info, self.device)

    def _check_state(self) -> None:
        if self.model.training and self.remote is not True:  # the server's model is in eval mode, whatever this one is
            raise ModelStateError(
                "a run", "the model is in training mode, where dropout makes every number random", "call model.eval()"
            )

    def _check_checkpoint(self, checkpoint: bool) -> None:
        if checkpoint:
            found = "backend 'nnsight' cannot compute a block again during a backward pass"
            raise UnsupportedFeatureError(
                "checkpoint=True", found, "leave checkpoint out, or use backend='hf' or 'plain'"
            )

    def _check_here(self, what: str) -> None:
        if self.remote is True:
            raise UnsupportedFeatureError(
                what, "the weights are on a server", "use a method that needs activations and gradients only"
            )

    def _check_inside(self, names: Sequence[str | Sequence[str]]) -> None:
        flat = [name for given in names for name in ([given] if isinstance(given, str) else given)]
        for name in flat:
            if not self.eager and site_spec(name).short in INSIDE:
                raise UnsupportedFeatureError(
                    f"site {name}",
                    f"the model runs {self.config._attn_implementation!r} attention, which never has it",
                    "load it with attention='eager', or attn_implementation='eager' in nnsight",
                )


def _out_of_reach(anatomy: Anatomy) -> str:
    """Why a family's sites cannot be had from outside its code; empty if they can."""
    reasons = {
        "what its encoder reads has no way in": anatomy.source is not None,
        "images have no way in": anatomy.family.language is not None,
        "its attention does not go through transformers' attention interface": anatomy.family.adapter is not None,
        "it multiplies what blocks write after the modules that write it": anatomy.factors.write != 1.0,
        "its softmax has attention sinks": hasattr(anatomy.parts[0]["attn"], "sinks"),
    }
    return next((reason for reason, here in reasons.items() if here), "")
