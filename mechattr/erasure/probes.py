"""Erasure probes: which token stood near a position, read off what a layer holds there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechattr.base import Artifact
from mechattr.engines.linear_probes import log_probabilities
from mechattr.errors import SettingError, UnknownNameError
from mechattr.labelled import Labelled
from mechattr.provenance import JSON

if TYPE_CHECKING:
    import pandas as pd


class ErasureProbes(Artifact):
    """Linear probes by layer and offset: P(token at t + offset | state at t) = softmax(W h).

    `tensors` has `layer.L` for each layer L, with axes offset, label and d_model. `settings` says how they were made,
    and has the losses. They belong to the model whose hashes the provenance has.
    """

    kind: ClassVar[str] = "erasure_probes"

    @classmethod
    def of(
        cls,
        weights: Mapping[int, Float[Tensor, "offset vocab d_model"]],
        offsets: Sequence[int],
        *,
        settings: Mapping[str, JSON],
        provenance: Mapping[str, JSON],
    ) -> ErasureProbes:
        """Probes from their weights by layer."""
        axes, coords = ("offset", "label", "d_model"), {"offset": tuple(offsets)}
        tensors = {f"layer.{layer}": Labelled(weight, axes, coords) for layer, weight in weights.items()}
        return cls(tensors, settings=settings, provenance=provenance)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have probes, ascending: -1 is the embedding, the one after the last block the final norm."""
        return tuple(sorted(int(name.removeprefix("layer.")) for name in self.tensors))

    @property
    def offsets(self) -> tuple[int, ...]:
        """The offsets that have probes."""
        return cast(tuple[int, ...], tuple(self.tensors[f"layer.{self.layers[0]}"].coords["offset"]))

    def weights(self, layer: int, offset: int) -> Float[Tensor, "vocab d_model"]:
        """One probe.

        Raises:
            SettingError: no probe of this layer or offset.
        """
        if layer not in self.layers:
            found, fix = f"probes of layers {self.layers}", "fit probes of this layer too, or name one of these"
            raise SettingError(f"the probe of layer {layer}", found, fix)
        if offset not in self.offsets:
            found, fix = f"probes of offsets {self.offsets}", "fit probes of this offset too, or name one of these"
            raise SettingError(f"the probe of offset {offset}", found, fix)
        return self.tensors[f"layer.{layer}"].values[self.offsets.index(offset)]

    def probability(
        self, layer: int, offset: int, states: Float[Tensor, "n d_model"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """P(label | state) of one label a state; the whole table of logits is never held."""
        w = self.weights(layer, offset).to(states.device, torch.promote_types(states.dtype, torch.float32))
        states = states.to(w.dtype)
        return log_probabilities(w[None], states[None], labels[None])[0].exp()

    def to_pandas(self) -> pd.DataFrame:
        """The losses: columns layer, offset, epoch, train, held_out (mean cross-entropy in nats).

        Raises:
            UnknownNameError: probes that were fitted elsewhere, of which no losses are known.
        """
        import pandas as pd

        losses = self.settings.get("losses")
        if not losses:
            raise UnknownNameError(
                "the losses of probes", "these were imported", "measure their accuracy: erasure.footprint"
            )
        return pd.DataFrame(cast(list, losses))
