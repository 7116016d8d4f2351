"""`EvidenceScores`: how well methods point at the evidence, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mechattr.base import Artifact
from mechattr.errors import UnknownNameError, nearest
from mechattr.evaluation.discovery import mean_interval
from mechattr.evaluation.evidence import METRICS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CHANCE, FIRST, LAST = "chance", "first words", "last words"
BASELINES = (CHANCE, FIRST, LAST)
PLACES = ("evidence", "attractor", "last word", "another word")
WIDTH = 4  # values of a stratum, where a factor has many
RESAMPLES = 1000  # of an interval
MOST = 6  # different numbers that are strata of their own


class EvidenceScores(Artifact):
    """Metrics of evidence, one value a method and sample.

    `tensors` holds `PG_1`, `PG_2`, `MRR`, `RMA` and `RRA`, each [method, sample], NaN where a metric is undefined. The
    last three methods are baselines: `"chance"` (what a random order gives on average), `"first words"` and `"last
    words"` (the words in the order of the prompt, and in reverse). `first` [method, sample], not for chance, has the
    kind of the word that is ranked first, as a number of `PLACES`, -1 where none is. `settings` holds
    `n_given` samples, those `skipped` (by reason), `n_fit` (that fit the tokenizer), `n_right` (that the model gets
    right: these are scored), and the `factors` of each scored sample, `length` (words of the prompt) among them.
    """

    kind = "evidence"

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, baselines last."""
        return tuple(str(name) for name in self.tensors["PG_1"].coords["method"])

    @property
    def accuracy(self) -> float:
        """The share of the samples that fit the tokenizer on which the model prefers the target to the foil."""
        return int(cast(int, self.settings["n_right"])) / int(cast(int, self.settings["n_fit"]))

    @property
    def factors(self) -> Mapping[str, list[Any]]:
        """By name, one value a scored sample."""
        return cast(Mapping[str, list[Any]], self.settings["factors"])

    def values(self, method: str, metric: str) -> np.ndarray:
        """One value a scored sample.

        Raises:
            UnknownNameError: no such method or metric.
        """
        if metric not in METRICS:
            raise UnknownNameError(f"metric {metric!r}", "no such metric", nearest(metric, METRICS))
        if method not in self.methods:
            raise UnknownNameError(f"method {method!r}", "not in this result", nearest(method, self.methods))
        return self.tensors[metric].sel(method=method).numpy()

    def strata(self, by: str | None = None) -> dict[str, np.ndarray]:
        """Scored samples by a factor, as numbers of samples; numbers with many values are grouped by fours.

        Raises:
            UnknownNameError: no such factor.
        """
        if by is None:
            return {"all": np.arange(len(self.tensors["PG_1"].coords["sample"]))}
        if by not in self.factors:
            raise UnknownNameError(f"factor {by!r}", "not of these samples", nearest(by, self.factors))
        given = self.factors[by]
        if len(set(given)) > MOST and all(isinstance(x, int) for x in given):
            groups = [(x - 1) // WIDTH for x in given]
            names = {group: f"{group * WIDTH + 1}–{(group + 1) * WIDTH}" for group in groups}
        else:
            groups, names = given, {x: str(x) for x in given}
        return {names[group]: np.flatnonzero([x == group for x in groups]) for group in sorted(set(groups))}

    def to_pandas(self, by: str | None = None, *, metrics: tuple[str, ...] = tuple(METRICS)) -> pd.DataFrame:
        """One row a method, metric and stratum.

        Columns: method, metric, stratum, mean, low and high (95 % bootstrap interval over samples), n (samples that the
        mean is of), undefined (samples without a value).

        Args:
            by: a factor that divides the samples; all together without it.
            metrics: which.

        Raises:
            UnknownNameError: no such factor or metric.
        """
        import pandas as pd

        rows = []
        for stratum, index in self.strata(by).items():
            for method in self.methods:
                for metric in metrics:
                    drawn = self.values(method, metric)[index]
                    defined = drawn[np.isfinite(drawn)]
                    low, high = mean_interval(defined, resamples=RESAMPLES) if len(defined) else (np.nan, np.nan)
                    rows.append(
                        {
                            "method": method, "metric": metric, "stratum": stratum, "mean": _mean(defined), "low": low,
                            "high": high, "n": len(defined), "undefined": len(drawn) - len(defined),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def first_places(self) -> pd.DataFrame:
        """Which words methods rank first: one row a method, shares of the scored samples by kind of word.

        Columns: `PLACES`; a word that is evidence or an attractor is not counted as the last word.
        """
        import pandas as pd

        kinds = self.tensors["first"]
        shares = {
            method: [float((kinds.sel(method=method).values == place).double().mean()) for place in range(len(PLACES))]
            for method in map(str, kinds.coords["method"])
        }
        return pd.DataFrame.from_dict(shares, orient="index", columns=list(PLACES))

    def plot(self, metric: str = "PG_1", ax: Axes | None = None, *, title: str = "", legend: bool = True) -> Axes:
        """Draws the mean of a metric by method, with intervals and the baselines; see `mechattr.draw.dots`."""
        from mechattr import draw

        table = self.to_pandas(metrics=(metric,))
        names = [method for method in self.methods if method not in BASELINES]
        value, low, high = (table[column].to_numpy()[: len(names)] for column in ("mean", "low", "high"))
        references = dict(zip(BASELINES, table["mean"].tolist()[len(names) :], strict=True))
        ax = draw.pyplot_axes(*draw.dots_size(len(names))) if ax is None else ax
        return draw.dots(
            value, names, low=low, high=high, references=references, label=metric, title=title, legend=legend, ax=ax
        )

    @property
    def summary(self) -> str:
        """How many samples were scored, and which method points at the evidence most often."""
        means = {method: _mean(self.values(method, "PG_1")) for method in self.methods}
        named = [method for method in self.methods if method not in BASELINES]
        best = f"; most often first: {(top := max(named, key=means.__getitem__))}, {means[top]:.2f}" if named else ""
        return (
            f"{self.settings['n_right']} samples that the model gets right, of {self.settings['n_fit']} that fit and "
            f"{self.settings['n_given']} given{best} (chance {means[CHANCE]:.2f})"
        )

    def __repr__(self) -> str:
        return f"EvidenceScores({self.summary})"

    def _repr_html_(self) -> str:
        table = self.to_pandas().pivot(index="method", columns="metric", values="mean").loc[list(self.methods)]
        return f"<div>{escape(self.summary)}</div>{table.to_html(float_format='{:.3f}'.format)}"


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined; NaN of nothing."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else float("nan")
