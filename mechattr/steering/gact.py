"""Steering by one of several directions, which a probe of the state chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.errors import SettingError
from mechattr.models.base import HookedModel
from mechattr.steering.data import Sites, check_pairs, collected
from mechattr.steering.made import Pairs
from mechattr.steering.moving import Moving, whole_sites
from mechattr.steering.numbers import check_count, check_positive


def chosen(
    x: Float[Tensor, "*rows d"],
    centroids: Float[Tensor, "cluster d"],
    weight: Float[Tensor, "cluster d"],
    bias: Float[Tensor, " cluster"],
) -> Float[Tensor, "*rows d"]:
    """The centroid of the largest logit W x + b."""
    return centroids[(x @ weight.mT + bias).argmax(-1)]


class GAct(Moving):
    """x + m c(x) at each site, where c(x) is the centroid for which softmax(W x + b) is largest.

    `tensors` holds `centroids`, `weight` [cluster, d] and `bias` [cluster] by site. `settings` say how many pairs are
    in each cluster (`"sizes"`), and for which share of the states that a probe was fitted on it chooses the cluster of
    their pair (`"accuracy"`).
    """

    kind = "g_act"
    addition = staticmethod(chosen)
    axes: ClassVar = {"centroids": ("cluster", "d"), "weight": ("cluster", "d"), "bias": ("cluster",)}

    def picks(self, site: str, x: Float[Tensor, "*rows d"]) -> Int[Tensor, "*rows"]:
        """The cluster that the probe of a site chooses for states, flattened over heads."""
        _, weight, bias = (part.to(x) for part in self.parts(site))
        return (x @ weight.mT + bias).argmax(-1)

    def refined(
        self, model: HookedModel, pairs: Pairs, *, steps: int = 20, rate: float = 0.5, batch_size: int = 16
    ) -> GAct:
        """The same centroids with probes that further pairs have taught: gradient steps on the cross-entropy of the
        centroid that is nearest to each pair's difference. This one stays as it is.

        Args:
            model: the model that it was made for.
            pairs: (text that shows the behaviour, text that does not).
            steps: of gradient descent, all pairs in each.
            rate: its step, for states about their mean in units of their root mean square.
            batch_size: pairs of one forward pass.

        Raises:
            SettingError: pairs or numbers that do not fit.
            MismatchError: a model without such sites, or of another width.

        Cost:
            2 forward passes a pair.
        """
        check_count("steps", steps)
        check_positive("rate", rate)
        self._check_fit(model)
        positions: Any = self.settings["positions"]
        tensors = dict(self.tensors)
        for name, side in collected(model, pairs, self.sites, positions, batch_size).items():
            centroids, weight, bias = (part.double() for part in self.parts(name))
            labels = torch.cdist(side.difference, centroids).argmin(1).repeat(2)
            x, middle, scale = _standard(torch.cat([side.positive, side.negative]).double())
            weight, bias = weight * scale, bias + weight @ middle
            wanted = torch.nn.functional.one_hot(labels, len(centroids)).double()
            for _ in range(steps):
                wrong = (x @ weight.mT + bias).softmax(-1) - wanted
                weight, bias = weight - rate / len(x) * wrong.mT @ x, bias - rate * wrong.mean(0)
            weight = weight / scale
            for part, values in (("weight", weight), ("bias", bias - weight @ middle)):
                tensors[f"{name}/{part}"] = type(tensors[f"{name}/{part}"])(values.float(), self.axes[part])
        more: Any = self.settings.get("refined", [])
        record = [*more, {"n_pairs": len(pairs), "steps": steps, "rate": rate}]
        return GAct(tensors, settings={**self.settings, "refined": record}, provenance=self.provenance)


def g_act(
    model: HookedModel,
    pairs: Pairs,
    *,
    layers: Sequence[int] | None = None,
    sites: Sites = None,
    clusters: int = 3,
    positions: str | int = "last",
    seed: int = 0,
    batch_size: int = 16,
    penalty: float = 1e-2,
) -> GAct:
    """Gradient-refined adaptive activation steering: the differences h(positive) - h(negative) of pairs fall into a few
    clusters; a probe of the state at each site picks one, and its centroid is added. `refined` teaches the probes on.

    The abstract of the paper has these steps: differences of prompts in clusters, a small probe for each layer that
    selects a direction, and its refinement by gradients as data comes in. Everything else is decided here: clusters by
    k-means at each site by itself; probes that are multinomial logistic regressions, with the states of both sides of a
    pair in its cluster; the hard choice of one centroid for each token; and all numbers.

    Args:
        model: a hooked model.
        pairs: (text that shows the behaviour, text that does not).
        layers: blocks whose output (`resid_post`) is steered; or
        sites: sites by name, or nodes of whole streams; the heads of a site are taken together.
        clusters: at each site; with one the mean difference is added to every state. The largest comes first.
        positions: where h is read: at the `"last"` token, the `"mean"`, or one position.
        seed: of k-means.
        batch_size: pairs of one forward pass.
        penalty: of the probes, on the mean loss, for states about their mean in units of their root mean square.

    Raises:
        SettingError: pairs, layers, positions or numbers that do not fit; fewer different differences than clusters;
            heads or neurons.
        UnknownSiteError: a site that the model does not have.

    Cost:
        2 forward passes a pair; memory for one vector a text and site.

    References:
        Sharma, Raman (2025), Steering Conceptual Bias via Transformer Latent-Subspace Activation, arXiv 2506.18887,
        of which the abstract is what is followed here.
    """
    given, names = check_pairs(pairs), whole_sites(model, layers, sites)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= len(given):
        raise SettingError(f"clusters={clusters!r}", f"{len(given)} pairs", "give a whole number from 1 to that")
    check_positive("penalty", penalty)
    parts, lengths, sizes, accuracy = {}, {}, {}, {}
    for name, side in collected(model, given, names, positions, batch_size).items():
        labels = _labels(side.difference, clusters, seed)
        centroids = torch.stack([side.difference[labels == k].mean(0) for k in range(clusters)])
        x = torch.cat([side.positive, side.negative]).double()
        weight, bias = _probe(x, labels.repeat(2), penalty)
        parts[name] = [centroids, weight, bias]
        lengths[name] = float(x.norm(dim=-1).mean())
        sizes[name] = torch.bincount(labels).tolist()
        accuracy[name] = float(((x @ weight.mT + bias).argmax(-1) == labels.repeat(2)).double().mean())
    return GAct.made(
        model, parts, "g_act", seed, clusters=clusters, positions=positions, penalty=penalty, n_pairs=len(given),
        lengths=lengths, sizes=sizes, accuracy=accuracy,
    )  # fmt: skip


def _labels(differences: Float[Tensor, "pair d"], clusters: int, seed: int) -> Int[Tensor, " pair"]:
    """The cluster of each pair, the largest cluster being 0."""
    from sklearn.cluster import KMeans

    length = differences.norm(dim=1).max().clamp(min=torch.finfo(differences.dtype).tiny)
    different = len((differences / length * 1e6).round().unique(dim=0))  # but for rounding
    if different < clusters:
        raise SettingError(f"clusters={clusters}", f"{different} different differences", "give fewer, or other pairs")
    fitted = KMeans(clusters, random_state=seed, n_init=10).fit(differences.numpy())
    labels = torch.from_numpy(np.asarray(fitted.labels_, dtype=np.int64))
    first = [int((labels == k).int().argmax()) for k in range(clusters)]
    order = sorted(range(clusters), key=lambda k: (-int((labels == k).sum()), first[k]))
    return torch.tensor(order).argsort()[labels]


def _probe(
    x: Float[Tensor, "row d"], labels: Int[Tensor, " row"], penalty: float
) -> tuple[Float[Tensor, "cluster d"], Float[Tensor, " cluster"]]:
    """Weight and bias of a multinomial logistic regression."""
    from sklearn.linear_model import LogisticRegression

    n = int(labels.max()) + 1
    if n == 1:
        return x.new_zeros(1, x.shape[1]), x.new_zeros(1)
    x, middle, scale = _standard(x)
    fitted = LogisticRegression(C=1 / (len(x) * penalty), max_iter=1000).fit(x.numpy(), labels.numpy())
    weight, bias = (
        torch.from_numpy(np.asarray(found, dtype=np.float64)) for found in (fitted.coef_, fitted.intercept_)
    )
    if n == 2:  # of two classes there is one logit: that of the second minus that of the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / scale
    return weight, bias - weight @ middle


def _standard(x: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "row d"], Float[Tensor, " d"], Tensor]:
    """States about their mean in units of their root mean square, and both."""
    middle = x.mean(0)
    scale = (x - middle).square().sum(1).mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return (x - middle) / scale, middle, scale
