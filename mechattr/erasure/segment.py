"""Documents in the units that a model seems to use: spans of tokens whose pieces are forgotten."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.base import Artifact
from mechattr.erasure.documents import WINDOW, Document, aligned, documents, encoded
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.psi import OFFSETS, psi, segment_spans
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.record import check_belongs
from mechattr.models.tokenize import decode_token
from mechattr.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd

Segment = tuple[int, int, float]  # first and last token, both inclusive, and psi
DEPTH, START, END = 32, 1, 9  # the published layers, and the depth of the models that they are for


class Segmentation(Artifact):
    """A document as segments. `tensors` has `first`, `last` and `score` along the axis `segment`, and `psi` [start,
    end] of all spans; `settings["strings"]` has the tokens as text."""

    kind: ClassVar[str] = "segmentation"

    @property
    def segments(self) -> list[Segment]:
        """(first, last, psi) of each segment, in order of position."""
        first, last, score = (self.tensors[name].values.tolist() for name in ("first", "last", "score"))
        return list(zip(first, last, score, strict=True))

    @property
    def strings(self) -> list[str]:
        """The tokens as text."""
        return cast(list[str], self.settings["strings"])

    def to_pandas(self) -> pd.DataFrame:
        """Columns first, last, n_tokens, text, psi; one row a segment."""
        import pandas as pd

        rows = [
            {"first": p, "last": q, "n_tokens": q - p + 1, "text": "".join(self.strings[p : q + 1]), "psi": score}
            for p, q, score in self.segments
        ]
        return pd.DataFrame(rows, columns=["first", "last", "n_tokens", "text", "psi"])

    def _repr_html_(self) -> str:
        from mechattr.draw.footprints import segments_html

        return segments_html(self.strings, self.segments)


def segment(
    model: HookedModel,
    text: str,
    *,
    probes: ErasureProbes,
    start: int | None = None,
    end: int | None = None,
    longest: int | None = None,
    first: str = "corrected",
    window: int = WINDOW,
) -> Segmentation:
    """The segments of one document: the best spans by psi that do not overlap.

    Args:
        model: the model of the probes.
        text: a document.
        probes: with offsets 0, -1 and -2 at both layers.
        start: the layer from which probabilities drop; the published 1 of 32 scaled to this model's depth without it.
        end: the layer to which they drop; the published 9 of 32 without it.
        longest: most tokens of a span.
        first: `"corrected"` keeps a special first token by itself and asks no probe about it; `"reference"` is as
            published: psi of spans that end there is undefined, and it comes first.
        window: tokens of the document that are looked at.

    Returns:
        The segments: none of a text without a token; psi is NaN where it is not defined.

    Raises:
        MismatchError: probes of another model or tokenizer.
        SettingError: layers or offsets without probes, or an end that does not lie above the start.

    Cost:
        1 forward pass, and two products of d_vocab by d_model a token and offset.
    """
    check_belongs(probes, model)
    a, b = layers_between(model, probes, start, end)
    rows = encoded(model, [text], window)
    (document,) = documents(model, rows, (a, b), batch_size=1)
    scores = spans_of(model, document, probes, (a, b), first=first)
    segments = segments_of(scores, longest=longest)
    table = torch.tensor(segments, dtype=torch.float64).reshape(-1, 3)
    columns = {"first": table[:, 0].long(), "last": table[:, 1].long(), "score": table[:, 2].to(scores)}
    tensors = {name: Labelled(column.contiguous(), ("segment",)) for name, column in columns.items()}
    settings: dict[str, Any] = {
        "method": "segment",
        "strings": [decode_token(model.tokenizer, token) for token in rows[0]],
        "start": a,
        "end": b,
        "longest": longest,
        "first": first,
    }
    made = provenance({**asdict(model.info), **model.fingerprint()}, tokens=torch.tensor(rows))
    return Segmentation({**tensors, "psi": Labelled(scores, ("start", "end"))}, settings=settings, provenance=made)


def default_layers(model: HookedModel, start: int | None, end: int | None) -> tuple[int, int]:
    """The given layers, or the published 1 and 9 of 32 scaled to this model's depth.

    Raises:
        SettingError: an end that does not lie above the start.
    """
    n = model.info.n_layers
    a = round(START * n / DEPTH) if start is None else start
    b = max(a + 1, round(END * n / DEPTH)) if end is None else end
    if b <= a:
        raise SettingError(f"start={a}, end={b}", "the end does not lie above the start", "give a later end")
    return a, b


def layers_between(model: HookedModel, probes: ErasureProbes, start: int | None, end: int | None) -> tuple[int, int]:
    """The two layers between which probabilities drop.

    Raises:
        SettingError: no probes of offsets 0, -1 and -2 there, or an end that does not lie above the start.
    """
    a, b = default_layers(model, start, end)
    for layer in (a, b):
        for offset in OFFSETS:
            probes.weights(layer, offset)
    return a, b


def drops(
    document: Document, probes: ErasureProbes, layers: tuple[int, int], *, first: bool = True
) -> Float[Tensor, "3 pos"]:
    """E_o(t) for offsets 0, -1, -2: the probability of token t + o at the first layer minus that at the second.

    Args:
        document: with the states of these two layers.
        probes: of both.
        layers: from which to which.
        first: whether the first position is asked about itself.
    """
    found = torch.full((len(OFFSETS), len(document.tokens)), torch.nan, device=document.states.device)
    for i, offset in enumerate(OFFSETS):
        states, labels = aligned(document, offset, first=first)
        if len(labels):
            early, late = (
                probes.probability(layer, offset, part, labels) for layer, part in zip(layers, states, strict=True)
            )
            found[i, len(document.tokens) - len(labels) :] = (early - late).to(found)
    return found


def spans_of(
    model: HookedModel, document: Document, probes: ErasureProbes, layers: tuple[int, int], *, first: str
) -> Float[Tensor, "start end"]:
    """psi of all spans of a document; a special first token stands by itself."""
    scores = psi(drops(document, probes, layers, first=False).cpu(), first=first)
    tokenizer: Any = model.tokenizer
    if not len(scores):
        return scores
    if first == "reference":
        scores[0, 0] = torch.inf  # an undefined score, which the published order puts before all others
    elif int(document.tokens[0]) in (getattr(tokenizer, "all_special_ids", None) or ()):
        scores[0, 1:] = torch.nan
    return scores


def segments_of(scores: Float[Tensor, "start end"], *, longest: int | None) -> list[Segment]:
    """`segment_spans`, with NaN as the score of a span that only came first because it has none."""
    found = segment_spans(scores, longest=longest)
    return [(p, q, score if math.isfinite(score) else math.nan) for p, q, score in found]
