"""The implicit vocabulary of a model: the segments of many documents, counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from mechattr import storage
from mechattr.base import Artifact
from mechattr.engines.sweep import sweep
from mechattr.erasure.documents import documents, encoded
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.segment import Segment, layers_between, segments_of, spans_of
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.record import check_belongs
from mechattr.models.tokenize import decode_token
from mechattr.provenance import JSON, provenance

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 256  # tokens of a document that are read out, as published


class ImplicitVocabulary(Artifact):
    """Segments of several tokens over a corpus.

    `tensors` has `count` and `psi` (the mean) along the axis `item`; `settings["items"]` has the ids of each, and
    `settings["texts"]` their text. `tensors["segments"]` has document, first and last of every segment of the corpus,
    those of one token included, and `tensors["score"]` its psi.
    """

    kind: ClassVar[str] = "implicit_vocabulary"

    def to_pandas(self) -> pd.DataFrame:
        """Columns text, n_tokens, count, psi, ids; the highest mean psi first."""
        import pandas as pd

        items = cast(list[list[int]], self.settings["items"])
        frame = pd.DataFrame(
            {
                "text": self.settings["texts"],
                "n_tokens": [len(item) for item in items],
                "count": self.tensors["count"].values.tolist(),
                "psi": self.tensors["psi"].values.tolist(),
                "ids": items,
            }
        )
        return frame.sort_values(["psi", "count"], ascending=False, kind="stable").reset_index(drop=True)

    def segments(self) -> list[list[Segment]]:
        """The segments of each document."""
        found: list[list[Segment]] = [[] for _ in range(int(cast(int, self.settings["n_documents"])))]
        for (document, first, last), score in zip(
            self.tensors["segments"].values.tolist(), self.tensors["score"].values.tolist(), strict=True
        ):
            found[document].append((first, last, score))
        return found

    def _repr_html_(self) -> str:
        frame = self.to_pandas()
        shown = frame.head(30).drop(columns="ids").to_html(index=False, escape=True, float_format="{:.3f}".format)
        return f"<div>{len(frame)} items of several tokens in {self.settings['n_documents']} documents</div>{shown}"


def read_out(
    model: HookedModel,
    texts: Sequence[str],
    *,
    probes: ErasureProbes,
    start: int | None = None,
    end: int | None = None,
    longest: int | None = None,
    first: str = "corrected",
    window: int = WINDOW,
    batch_size: int = 8,
    progress: bool | None = None,
    resume: Path | None = None,
) -> ImplicitVocabulary:
    """Segments every document of a corpus, and counts the segments of several tokens.

    Args:
        model: the model of the probes.
        texts: one a document; one without a token has no segment.
        probes, start, end, longest, first: as for `segment`.
        window: tokens of a document that are looked at.
        batch_size: documents of one forward pass.
        progress: `None` shows a bar on a terminal only.
        resume: a journal that keeps finished documents.

    Raises:
        MismatchError, SettingError: as `segment`.
        OutputExistsError: the journal belongs to other work.

    Cost:
        1 forward pass a document, and what scoring costs; nothing of earlier documents is kept but their segments.
    """
    check_belongs(probes, model)
    layers = layers_between(model, probes, start, end)
    rows = encoded(model, texts, window)
    made = provenance(
        {**asdict(model.info), **model.fingerprint()},
        tokens=torch.tensor([len(row) for row in rows] + [token for row in rows for token in row]),
    )
    settings: dict[str, Any] = {
        "method": "read_out",
        "start": layers[0],
        "end": layers[1],
        "longest": longest,
        "first": first,
    }
    key = {**settings, "tokens": made["tokens_sha256"], "model": made["weight_hash"], "probes": digest(probes, layers)}

    def segments(part: Sequence[int]) -> list[float]:
        """Document, first, last and psi of each segment, one after another."""
        flat: list[float] = []
        some = documents(model, [rows[i] for i in part], layers, batch_size=batch_size)
        for i, document in zip(part, some, strict=True):
            scores = spans_of(model, document, probes, layers, first=first)
            for p, q, score in segments_of(scores, longest=longest):
                flat += [i, p, q, score]
        return flat

    parts = [list(range(i, min(i + batch_size, len(rows)))) for i in range(0, len(rows), batch_size)]
    found = sweep(
        [[part] for part in parts],
        segments,
        n_groups=len(parts),
        key=key,
        resume=resume,
        progress=progress,
        label="segmenting",
    )
    table = torch.tensor([number for numbers in found for number in numbers], dtype=torch.float64).reshape(-1, 4)
    totals: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for i, p, q, score in table.tolist():
        if q > p:
            totals[tuple(rows[int(i)][int(p) : int(q) + 1])].append(score)
    items = sorted(totals, key=lambda item: (-len(totals[item]), item))
    texts_of: list[JSON] = ["".join(decode_token(model.tokenizer, token) for token in item) for item in items]
    return ImplicitVocabulary(
        {
            "count": Labelled(torch.tensor([len(totals[item]) for item in items], dtype=torch.long), ("item",)),
            "psi": Labelled(
                torch.tensor([sum(totals[item]) / len(totals[item]) for item in items], dtype=torch.float64), ("item",)
            ),
            "segments": Labelled(table[:, :3].long(), ("segment", "field"), {"field": ("document", "first", "last")}),
            "score": Labelled(table[:, 3].contiguous(), ("segment",)),
        },
        settings={**settings, "n_documents": len(rows), "items": [list(item) for item in items], "texts": texts_of},
        provenance=made,
    )


def digest(probes: ErasureProbes, layers: Sequence[int]) -> str:
    """What tells the probes of some layers from others."""
    return " ".join(storage.checksum(probes.tensors[f"layer.{layer}"].values)[:16] for layer in layers)
