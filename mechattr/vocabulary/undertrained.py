"""Tokens that a model never learned: candidates by their embeddings, and what it does when asked to repeat them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from mechattr.base import Artifact
from mechattr.errors import SettingError
from mechattr.labelled import Labelled
from mechattr.models.base import HookedModel
from mechattr.provenance import provenance
from mechattr.vocabulary.indicators import indicator
from mechattr.vocabulary.reach import CATEGORIES, REACHABLE, never_in_text, round_trips
from mechattr.vocabulary.verify import repetition

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CONTROLS = 20  # tokens of highest indicator that are asked about beside the candidates
STRONG, WEAK = 0.001, 0.1  # labels of verification, by probability
REPORTED = 0.01


class UnderTrained(Artifact):
    """Every token of a vocabulary, by how little it was trained.

    `tensors` has `indicator` and `probability` (NaN where the model was not asked) along the axis `token`;
    `settings["categories"]` and `settings["texts"]` have the category and the text of each.
    """

    kind: ClassVar[str] = "undertrained"

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens each category has."""
        counted = Counter(cast(list[str], self.settings["categories"]))
        return {name: counted[name] for name in CATEGORIES if counted[name]}

    def candidates(self) -> list[int]:
        """The reachable tokens of lowest indicator that were asked about, lowest first."""
        return list(cast(list[int], self.settings["candidates"]))

    def control(self) -> list[int]:
        """The reachable tokens of highest indicator that were asked about as well: what a trained token gives."""
        return list(cast(list[int], self.settings["control"]))

    @property
    def calibration(self) -> dict[str, float]:
        """Where the indicator puts ids that are known to be unused: their number, its mean and largest value among
        them, and how many reachable tokens lie no higher; empty without such ids."""
        known, values = cast(list[int], self.settings["unused"]), self.tensors["indicator"].values
        if not known:
            return {}
        low = self.to_pandas()["indicator"] <= float(values[known].max())
        mean, highest = float(values[known].mean()), float(values[known].max())
        return {"known": len(known), "mean": mean, "highest": highest, "no_higher": int(low.sum())}

    def top(self, k: int) -> list[int]:
        """The k reachable tokens of lowest indicator."""
        return self.to_pandas()["id"].tolist()[:k]

    def to_pandas(self, *, reachable: bool = True) -> pd.DataFrame:
        """Columns id, text, category, indicator, probability, verdict; the lowest indicator first.

        Args:
            reachable: leave out what no text produces.
        """
        import pandas as pd

        probability = self.tensors["probability"].values
        frame = pd.DataFrame(
            {
                "id": range(len(probability)),
                "text": self.settings["texts"],
                "category": self.settings["categories"],
                "indicator": self.tensors["indicator"].values.numpy(),
                "probability": probability.numpy(),
                "verdict": [_verdict(float(p)) for p in probability],
            }
        )
        if reachable:
            frame = frame[frame["category"].isin(REACHABLE)]
        return frame.sort_values("indicator", kind="stable").reset_index(drop=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Probability of a repetition against the indicator; see `mechattr.draw.indicator_scatter`."""
        from mechattr import draw

        frame = self.to_pandas(reachable=False)
        known = set(cast(list[int], self.settings["unused"]))
        return draw.indicator_scatter(
            frame["indicator"].to_numpy(),
            frame["probability"].to_numpy(),
            unused=[token in known for token in frame["id"]],
            label=str(self.settings["indicator"]),
            ax=ax,
        )

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.counts.items())
        table = self.to_pandas().head(20).to_html(index=False, escape=True, na_rep="", float_format="{:.4g}".format)
        return f"<div>{counts}</div>{table}"


def undertrained(
    model: HookedModel,
    *,
    by: str | None = None,
    unused: Sequence[int] | None = None,
    share: float = 0.02,
    verify: bool = True,
    shots: Sequence[int] = (0, 5, 20),
    batch_size: int = 64,
    progress: bool | None = None,
) -> UnderTrained:
    """Which tokens did a model never learn?

    1. Every id goes through the tokenizer and back (`round_trips`).
    2. An indicator ranks tokens by their embeddings (`indicator`): the length of the input row, or, where input and
       output share their weights, the distance of the output row from those of tokens known to be unused.
    3. The lowest `share` of the reachable tokens are candidates: the model is asked to repeat each (`repetition`), and
       beside them 20 of the highest indicator, which show whether it repeats what it knows.

    Args:
        model: a hooked model with a tokenizer.
        by: the indicator; `"input_norm"` for untied and `"cosine"` for tied weights without it.
        unused: ids known to be unused; without it, rows of the embedding for which the tokenizer has no token, and
            tokens of bytes that UTF-8 never uses.
        share: of the reachable tokens, how many are asked about.
        verify: ask the model at all.
        shots: examples in each prompt that asks.
        batch_size: rows of one forward pass.
        progress: `None` shows a bar on a terminal only.

    Raises:
        SettingError: no tokenizer, no such indicator, a share outside 0 to 1, ids that do not exist, or an indicator
            that needs unused ids where none are known.

    Cost:
        3 forward passes a prompt for each candidate and each of the 20 others; none without `verify`.

    References:
        Land, Bartolo (2024), Fishing for Magikarp, arXiv 2405.05417; prompts of our own, and probabilities beside the
        verdicts, since the published source has two thresholds.
    """
    if not 0 < share <= 1:
        raise SettingError(f"share={share!r}", "no share", "give a share of the vocabulary above 0, at most 1")
    trips = round_trips(model)
    categories = [trip.category for trip in trips]
    embedding, unembedding = model.weight("embed.W_E"), model.weight("unembed.W_U").T
    tied = _tied(embedding, unembedding)
    known = never_in_text(model, trips) if unused is None else list(unused)
    wrong = [i for i in known if not 0 <= i < model.info.d_vocab]
    if wrong:
        found = f"a vocabulary of {model.info.d_vocab}"
        raise SettingError(f"unused token {wrong[0]}", found, "give ids of this model's embedding")
    by = ("cosine" if tied else "input_norm") if by is None else by
    values = indicator(by, embedding, unembedding, known).cpu()
    reachable = torch.tensor([trip.reachable and trip.id not in set(known) for trip in trips])
    order = values.masked_fill(~reachable, torch.inf).argsort(stable=True)
    candidates = order[: max(1, round(share * int(reachable.sum())))].tolist() if bool(reachable.any()) else []
    last = int(reachable.sum())
    control = [token for token in order[:last].tolist()[-CONTROLS:] if token not in candidates] if verify else []
    probability = torch.full((len(trips),), torch.nan, dtype=torch.float64)
    if verify and candidates:
        asked = candidates + control
        probability[asked] = repetition(model, asked, shots=shots, batch_size=batch_size, progress=progress)
    settings: dict[str, Any] = {
        "method": "undertrained",
        "indicator": by,
        "tied": tied,
        "unused": known,
        "share": share,
        "shots": list(shots),
        "candidates": candidates,
        "control": control,
        "categories": categories,
        "texts": [trip.text for trip in trips],
    }
    tensors = {"indicator": Labelled(values, ("token",)), "probability": Labelled(probability, ("token",))}
    return UnderTrained(
        tensors, settings=settings, provenance=provenance({**asdict(model.info), **model.fingerprint()})
    )


def _tied(embedding: Tensor, unembedding: Tensor) -> bool:
    """Whether both matrices are one, up to a factor."""
    if embedding.shape != unembedding.shape:
        return False
    a, b = embedding[:64].double().flatten(), unembedding[:64].double().flatten()
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - 1e-6)


def _verdict(probability: float) -> str:
    if probability != probability:
        return ""
    return "under-trained" if probability < STRONG else "weak" if probability < WEAK else "trained"
