"""The contract of a hooked model: what goes into a run, what comes out, and what every backend offers.

A *position* counts the real tokens of a row from 0 (negative: from the row's end); a *column* is an index into the
padded token tensor. Tensors of a run have the columns of `Batch.tokens`; everything a user names is a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.models.batch import Batch as Batch
from mechattr.models.batch import row_numbers as row_numbers

if TYPE_CHECKING:
    from mechattr.models.edits import Edit
    from mechattr.models.norms import Norm
    from mechattr.models.rules import Rules
    from mechattr.models.tape import Tape

# Metrics are per example and never reduced: `metric(logits, batch) -> one number a row`.
Metric = Callable[[Tensor, "Batch"], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a method needs to know of a model without touching its weights.

    `norm` is `"layer"`, `"rms"` or `"none"`; `parallel` says that attention and MLP read the same residual stream,
    `post_norm` that norms act on the stream after each addition (BERT), `write_norm` that a norm acts on what attention
    and MLP write before it is added (Gemma-2), `gated` that the MLP has a linear second input, `bounded` that there are
    no positions beyond `n_ctx` (by default, where they are no rotations). `image_token` is the id that stands for an
    image's places in the text, `None` without a vision tower. `mapping` says where the places of the sites were taken
    from: `"table"`, `"discovered"` or `"given"`. `n_experts` counts the experts that stand in place of an MLP (0: there
    are none); `d_mlp` is then the width of one of them. `n_encoder_layers` counts the blocks of the encoder of an
    encoder-decoder model, whose `n_layers` are those of its decoder. `latents` has the number of latents of
    dictionaries, by site.
    """

    name: str
    family: str
    backend: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: str
    parallel: bool = False
    post_norm: bool = False
    write_norm: bool = False
    encoder: bool = False
    rotary: bool = False
    gated: bool = False
    image_token: int | None = None
    bounded: bool | None = None
    dtype: str = "float32"
    revision: str | None = None
    mapping: str = "table"
    n_experts: int = 0
    n_encoder_layers: int = 0
    latents: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis that depends neither on the batch nor on the site."""
        return {
            "head": self.n_heads, "kv_head": self.n_kv_heads, "d_head": self.d_head, "d_model": self.d_model,
            "neuron": self.d_mlp, "expert": self.n_experts,
        }  # fmt: skip

    def sizes_at(self, short: str) -> dict[str, int]:
        """The length of each axis of a site that does not depend on the batch."""
        return {**self.sizes, "latent": dict(self.latents).get(short, 0)}


@dataclass(frozen=True, eq=False)
class Start:
    """A point in the middle of the network from which a run begins: the residual stream before block `layer`."""

    layer: int
    resid_pre: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False, slots=True)
class AttentionForm:
    """What a block's attention does between q.k and its pattern; the mask is not part of it.

    Attributes:
        scaling: factor of q.k.
        softcap: scores are softcap * tanh(score / softcap), where there is one.
        sinks: one more logit for each head, which takes mass in the softmax and gives no value.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None

    def to(self, device: torch.device) -> AttentionForm:
        """The same form on another device."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))


@dataclass(frozen=True, eq=False)
class Run:
    """What one run returned. `activations` and `gradients` hold what was named, nothing else."""

    logits: Float[Tensor, "batch pos d_vocab"]
    activations: Cache
    gradients: Cache
    metric: Float[Tensor, " batch"] | None


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated rows: prompt and continuation as ids, and the continuation as text."""

    tokens: Int[Tensor, "batch total"]
    prompt_columns: int
    texts: tuple[str, ...]


# Called as `visit(site, activation, gradient)` while the backward pass goes by; nothing is kept then.
Visit = Callable[[str, Tensor, Tensor], None]


@runtime_checkable
class HookedModel(Protocol):
    """Record, edit, differentiate and change the backward rule at named sites. The model itself is never changed."""

    info: ModelInfo
    tokenizer: Any

    def sites(self) -> tuple[str, ...]:
        """The full site names that this model fires, in the order of its forward pass."""
        ...

    def supports(self, feature: Any) -> bool:
        """Whether a site name, an edit operator or a `Rules` value can be used."""
        ...

    def weight(self, name: str) -> Tensor:
        """A weight under its standard name and orientation, such as `"blocks.0.attn.W_O"` [head, d_head, d_model]."""
        ...

    def norm(self, name: str) -> Norm | None:
        """The norm through which a block's attention (`"blocks.0.ln1"`), its MLP (`"blocks.0.ln2"`) or the unembedding
        (`"ln_final"`) reads the residual stream; `None` where it is read as it is. `"blocks.0.ln1_post"` and
        `"blocks.0.ln2_post"` are those behind attention and MLP: on what they write, or, in a post-norm encoder, on the
        stream after the addition; `None` where there are none."""
        ...

    def attention(self, layer: int) -> AttentionForm:
        """How a block's attention turns q.k into scores."""
        ...

    def tokenize(self, texts: str | Sequence[str], *, chat: bool = False, padding_side: str = "right") -> Batch:
        """Texts -> padded batch, with the tokenizer's own special tokens and no second BOS."""
        ...

    def run(
        self,
        batch: Batch,
        *,
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        metric: Metric | None = None,
        gradients: str | Sequence[str] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        visit: Visit | None = None,
        checkpoint: bool = False,
    ) -> Run:
        """One forward pass and, if gradients are asked for, one backward pass."""
        ...

    def tape(
        self,
        batch: Batch,
        *,
        metric: Metric | None = None,
        gradients: str | Sequence[str],
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        rules: Rules | None = None,
        start: Start | None = None,
        checkpoint: bool = False,
    ) -> Tape:
        """One forward pass that keeps its graph, for any number of backward passes."""
        ...

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """Continue each row under edits."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """`weight_hash` and `tokenizer_hash`: what binds a stored result to this model."""
        ...
