"""The footprint of erasure: how often each probe is right at the last tokens of words, by layer and offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechattr.base import Artifact
from mechattr.engines.linear_probes import ranks
from mechattr.erasure.documents import WINDOW, aligned, documents
from mechattr.erasure.probes import ErasureProbes
from mechattr.erasure.words import Span, Words, words_of
from mechattr.errors import SettingError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.models.record import check_belongs
from mechattr.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GROUPS = ("all", "multi", "single", "ngram")
BEST = (1, 5)  # a probe is right when the token is its first, or among its first five
DRAWS = 1000


class Footprint(Artifact):
    """Right answers of erasure probes, document by document.

    `tensors`: `hits` [document, group, layer, offset, best] and `counts` [document, group, offset]. Groups are all
    tokens, the last tokens of words of several tokens (`multi`), words of one token (`single`), for offset i words of
    exactly |i| + 1 tokens (`ngram`: their last token, or their first for offsets above 0), and what the caller gave,
    likewise with its n-grams. `best` is 1 or 5: among how many guesses the token is.
    """

    kind: ClassVar[str] = "footprint"

    def accuracy(self, group: str, offset: int, *, best: int = 1) -> Float[Tensor, " layer"]:
        """The share of right answers by layer; NaN where a group has no token.

        Raises:
            SettingError: no such group or offset.
        """
        hits, counts = self._of(group, offset, best)
        return hits.sum(0) / counts.sum(0)

    def interval(
        self, group: str, offset: int, *, best: int = 1, confidence: float = 0.95, seed: int = 0
    ) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
        """A percentile interval of `accuracy` by layer, from 1,000 bootstrap draws of documents."""
        hits, counts = self._of(group, offset, best)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(hits), (DRAWS, len(hits)), generator=generator)
        means = hits[drawn].sum(1) / counts[drawn].sum(1)
        edge = (1 - confidence) / 2
        low, high = torch.nanquantile(means, torch.tensor([edge, 1 - edge], dtype=means.dtype), dim=0)
        return low, high

    def drop(
        self, group: str, offset: int, early: int, late: int, *, confidence: float = 0.95, seed: int = 0
    ) -> tuple[float, float, float]:
        """Accuracy lost from one layer to another: (estimate, low, high), both by the same draws of documents.

        Raises:
            SettingError: no such group, offset or layer.
        """
        hits, counts = self._of(group, offset, 1)
        layers = list(self.tensors["hits"].coords["layer"])
        for layer in (early, late):
            if layer not in layers:
                raise SettingError(f"layer {layer} of a footprint", f"layers {layers}", "name two of them")
        lost = hits[:, layers.index(early)] - hits[:, layers.index(late)]
        drawn = torch.randint(len(hits), (DRAWS, len(hits)), generator=torch.Generator().manual_seed(seed))
        means = lost[drawn].sum(1) / counts[drawn, 0].sum(1)
        edge = (1 - confidence) / 2
        low, high = torch.nanquantile(means, torch.tensor([edge, 1 - edge], dtype=means.dtype)).tolist()
        return float(lost.sum() / counts[:, 0].sum()), low, high

    def to_pandas(self) -> pd.DataFrame:
        """Columns group, layer, offset, best, accuracy, low, high, n."""
        import pandas as pd

        hits, rows = self.tensors["hits"], []
        for group in hits.coords["group"]:
            for offset in hits.coords["offset"]:
                n = int(self.tensors["counts"].sel(group=group, offset=offset).values.sum())
                for best in hits.coords["best"]:
                    found = self.accuracy(str(group), int(offset), best=int(best))
                    low, high = self.interval(str(group), int(offset), best=int(best))
                    rows += [
                        {
                            "group": group, "layer": layer, "offset": offset, "best": best,
                            "accuracy": float(found[i]), "low": float(low[i]), "high": float(high[i]), "n": n,
                        }
                        for i, layer in enumerate(hits.coords["layer"])
                    ]  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy of each offset by layer; see `mechattr.draw.footprint_curve`."""
        from mechattr import draw

        offsets = [int(o) for o in self.tensors["hits"].coords["offset"]]
        curves = {
            group: {o: (self.accuracy(group, o), *self.interval(group, o)) for o in offsets}
            for group in ("multi", "single")
        }
        layers = [int(layer) for layer in self.tensors["hits"].coords["layer"]]
        return draw.footprint_curve(layers, curves, ax=ax)

    def _of(self, group: str, offset: int, best: int) -> tuple[Tensor, Tensor]:
        hits = self.tensors["hits"]
        for axis, value in (("group", group), ("offset", offset), ("best", best)):
            known = list(hits.coords[axis])
            if value not in known:
                fix = nearest(str(value), [str(x) for x in known])
                raise SettingError(f"{axis} {value!r} of a footprint", f"{axis}s {known}", fix)
        counts = self.tensors["counts"].sel(group=group, offset=offset).values
        return hits.sel(group=group, offset=offset, best=best).values.double(), counts.double()[:, None]


def footprint(
    model: HookedModel,
    texts: Sequence[str],
    *,
    probes: ErasureProbes,
    groups: Mapping[str, Sequence[Sequence[Span]]] | None = None,
    window: int = WINDOW,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Footprint:
    """How often probes find the tokens at and around the last tokens of words, on texts that they were not fitted on.

    At the last token of a word of n tokens, offset i is a token of that word where -n < i <= 0, and else one of its
    neighbours. All of them count, so that a drop at offset -1 says the same of words of two tokens and of more.

    Args:
        model: the model of the probes.
        texts: one a document; not those of the fit.
        probes: of `fit_probes`.
        groups: spans of your own by name, such as entities: for each document its (first, last) tokens.
        window: most tokens of a document.
        batch_size: documents of one forward pass.
        progress: `None` shows a bar on a terminal only.

    Raises:
        MismatchError: probes of another model or tokenizer.
        SettingError: no texts, or spans for another number of documents.

    Cost:
        1 forward pass a document.
    """
    check_belongs(probes, model)
    if isinstance(texts, str) or not texts:
        raise SettingError("texts", "none" if not texts else "a str", "give a list of texts, one a document")
    given = {} if groups is None else dict(groups)
    for name, spans in given.items():
        if len(spans) != len(texts):
            raise SettingError(f"group {name!r}", f"spans of {len(spans)} documents", f"give {len(texts)}, one a text")
    parts = [words_of(model, text, window=window) for text in texts]
    names = (*GROUPS, *(name for own in given for name in (own, f"{own} ngram")))
    rows = [list(part.tokens) for part in parts]
    shape = len(rows), len(names), len(probes.layers), len(probes.offsets)
    hits, counts = torch.zeros(*shape, len(BEST), dtype=torch.long), torch.zeros(*shape[:2], shape[3], dtype=torch.long)
    found = documents(model, rows, probes.layers, batch_size=batch_size)
    hidden = None if progress is None else not progress
    for number, document in enumerate(tqdm(found, total=len(rows), desc="footprint", disable=hidden)):
        extra = {name: spans[number] for name, spans in given.items()}
        for i, offset in enumerate(probes.offsets):
            states, labels = aligned(document, offset, first=False)
            if not len(labels):
                continue
            begin = max(0, -offset) if offset else 1
            weights = torch.stack([probes.weights(layer, offset) for layer in probes.layers]).to(states)
            order = ranks(weights, states, labels.expand(len(states), -1))
            for g, ends in enumerate(_ends(parts[number], extra, offset)):
                asked = [t - begin for t in ends if begin <= t < begin + len(labels)]
                counts[number, g, i] = len(asked)
                for b, best in enumerate(BEST):
                    hits[number, g, :, i, b] = (order[:, asked] < best).sum(-1)
    own: dict[str, Sequence[int | str]] = {"group": names, "offset": probes.offsets}
    coords: dict[str, Sequence[int | str]] = {**own, "layer": probes.layers, "best": BEST}
    axes = ("document", "group", "layer", "offset", "best")
    tokens = torch.tensor([len(row) for row in rows] + [t for row in rows for t in row])
    return Footprint(
        {
            "hits": Labelled(hits, axes, coords),
            "counts": Labelled(counts, ("document", "group", "offset"), own),
        },
        settings={"method": "footprint", "n_documents": len(rows), "window": window},
        provenance=provenance({**asdict(model.info), **model.fingerprint()}, tokens=tokens),
    )


def _ends(words: Words, extra: Mapping[str, Sequence[Span]], offset: int) -> list[list[int]]:
    """The positions that each group asks about at an offset."""
    several = [words.multi, words.single, _ngrams(words.spans, offset)]
    for spans in extra.values():
        several += [tuple(spans), _ngrams(spans, offset)]
    return [list(range(len(words.tokens))), *(sorted({last for _, last in spans}) for spans in several)]


def _ngrams(spans: Sequence[Span], offset: int) -> tuple[Span, ...]:
    """Spans of exactly |offset| + 1 tokens, cut off after the token from which the other end is that far away."""
    n = abs(offset)
    return tuple((first, last if offset <= 0 else first) for first, last in spans if last - first == n)
