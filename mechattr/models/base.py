"""The contract of a hooked model: what goes into a run, what comes out, and what every backend offers.

A *position* counts the real tokens of a row from 0 (negative: from the row's end); a *column* is an index into the
padded token tensor. Tensors of a run have the columns of `Batch.tokens`; everything a user names is a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechattr.artifact import Cache
from mechattr.errors import SettingError

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
    and MLP write before it is added (Gemma-2), `gated` that the MLP has a linear second input. `mapping` says where the
    places of the sites were taken from: `"table"`, `"discovered"` or `"given"`.
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
    dtype: str = "float32"
    revision: str | None = None
    mapping: str = "table"


@dataclass(frozen=True, eq=False)
class Batch:
    """Token rows with their attention mask. The batch axis is always there.

    Attributes:
        tokens: token ids.
        mask: true at real tokens; each row's real tokens are contiguous.
        example: for each row, the index of the pair it belongs to, so that rows may repeat and metrics find answers.
        strings: for each row, its real tokens as text.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    example: Int[Tensor, " batch"]
    strings: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.mask.shape or len(self.example) != len(self.tokens):
            shapes = [tuple(t.shape) for t in (self.tokens, self.mask, self.example)]
            raise SettingError(
                "a batch",
                f"tokens {shapes[0]}, mask {shapes[1]}, example {shapes[2]}",
                "give tokens and mask of one shape [batch, pos] and one example index a row",
            )
        if len(self.strings) not in (0, len(self.tokens)):
            found = f"{len(self.tokens)} rows and the strings of {len(self.strings)}"
            raise SettingError("a batch", found, "give strings for all rows or for none")
        if self.tokens.dtype != torch.long or self.mask.dtype != torch.bool:
            raise SettingError(
                "a batch", f"tokens {self.tokens.dtype}, mask {self.mask.dtype}", "use int64 tokens and a bool mask"
            )
        if not bool(self.mask.any(1).all()):
            raise SettingError("a batch", "a row without any real token", "drop empty prompts")
        starts = (self.mask[:, 1:] & ~self.mask[:, :-1]).sum(1) + self.mask[:, 0]
        if bool((starts > 1).any()):
            raise SettingError("a batch", "padding between real tokens", "pad at one end of each row")

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None = None, strings: Sequence[Sequence[str]] = ()) -> Batch:
        """A batch of token ids; without a mask every token is real."""
        tokens = torch.atleast_2d(tokens)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.atleast_2d(mask).bool()
        example = torch.arange(len(tokens), device=tokens.device)
        return cls(tokens, mask, example, tuple(tuple(row) for row in strings))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device

    @cached_property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens of each row."""
        return self.mask.sum(1)

    @cached_property
    def padded(self) -> bool:
        """Whether any row has padding."""
        return not bool(self.mask.all())

    @property
    def padding_side(self) -> str:
        """`"left"` when some row starts with padding, else `"right"`."""
        return "left" if not bool(self.mask[:, 0].all()) else "right"

    @cached_property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """The position of each column, -1 at padding."""
        return torch.where(self.mask, self.mask.cumsum(1) - 1, -1)

    def columns(self, position: int) -> Int[Tensor, " batch"]:
        """The column of a position in every row.

        Raises:
            SettingError: the position lies outside some row.
        """
        wanted = self.lengths + position if position < 0 else torch.full_like(self.lengths, position)
        if bool(((wanted < 0) | (wanted >= self.lengths)).any()):
            raise SettingError(
                f"position {position}",
                f"rows of {int(self.lengths.min())} to {int(self.lengths.max())} real tokens",
                "name a position that every row has (negative ones count from the row's end)",
            )
        return self.mask.int().argmax(1) + wanted

    def rows(self, index: Tensor | Sequence[int]) -> Batch:
        """The rows `index`, in that order; rows may repeat. One bool a row is a selection, too.

        Raises:
            SettingError: a row that does not exist.
        """
        index = row_numbers(index, len(self)).to(self.device)
        strings = tuple(self.strings[i] for i in index.tolist()) if self.strings else ()
        return Batch(self.tokens[index], self.mask[index], self.example[index], strings)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), self.mask.to(device), self.example.to(device), self.strings)


def row_numbers(index: Tensor | Sequence[int], n: int) -> Int[Tensor, " chosen"]:
    """Row numbers as a tensor, from numbers (negative: from the end) or from one bool for each of the `n` rows.

    Raises:
        SettingError: something else, or a row that does not exist.
    """
    chosen = torch.as_tensor(index)
    if chosen.dtype == torch.bool and chosen.shape == (n,):
        return chosen.nonzero()[:, 0]
    numbers = chosen.long()
    whole = chosen.dtype != torch.bool and bool((numbers == chosen).all())
    if chosen.ndim != 1 or not whole or bool(((numbers < -n) | (numbers >= n)).any()):
        raise SettingError(f"rows {index}", f"{n} rows", "give a list of row numbers, or one bool for each row")
    return numbers


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
        (`"ln_final"`) reads the residual stream; `None` where it is read as it is."""
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
    ) -> Run:
        """One forward pass and, if gradients are asked for, one backward pass."""
        ...

    def tape(
        self,
        batch: Batch,
        *,
        metric: Metric,
        gradients: str | Sequence[str],
        record: str | Sequence[str] = (),
        edits: Sequence[Edit] = (),
        rules: Rules | None = None,
        start: Start | None = None,
    ) -> Tape:
        """One forward pass that keeps its graph, for any number of backward passes."""
        ...

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """Continue each row under edits."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """`weight_hash` and `tokenizer_hash`: what binds a stored result to this model."""
        ...
