"""Propensity: how much more a model is inclined to one answer than to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.models.base import HookedModel
from mechattr.models.halving import Halving
from mechattr.steering.numbers import check_count
from mechattr.steering.preference import Triples, answer_log_probabilities, sequences


def propensity(model: HookedModel, triples: Triples, *, batch_size: int = 32) -> Float[Tensor, " triple"]:
    """log p(matching answer | prompt) - log p(other answer | prompt) of each triple, in nats, of the model as it is:
    inside a block of `vector.apply` of the steered one.

    Args:
        model: a causal language model.
        triples: (prompt, answer that matches the behaviour, answer that does not); answers stand right behind prompts.
        batch_size: rows of a forward pass; halved when memory runs out.

    Raises:
        SettingError: triples that do not fit.
        UnsupportedFeatureError: a model that does not predict next tokens.

    Cost:
        2 forward passes a triple.
    """
    check_count("batch_size", batch_size)
    batch, starts = sequences(model, triples)

    def scores(rows: Sequence[int]) -> list[Tensor]:
        index = torch.tensor(rows, device=batch.device)
        part = batch.rows(index)
        return list(answer_log_probabilities(model.run(part).logits, part, starts[index]))

    found = Halving(batch_size)(range(len(batch)), scores)
    matching, other = torch.stack(found).split(len(batch) // 2)
    return matching - other
