"""What attention heads do on routes: how often they occur on them, and which tokens they move."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.artifact import Passes
from mechattr.base import Artifact
from mechattr.decomposition.flow import information_flow_routes
from mechattr.decomposition.prompt import prompt_of
from mechattr.decomposition.routes import INTO, KINDS
from mechattr.errors import EmptyTaskError, SettingError, UnknownNameError, nearest
from mechattr.labelled import Labelled
from mechattr.models.base import Batch, HookedModel
from mechattr.models.tokenize import decode_token

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("active", "weight", "previous", "self", "first", "word", "same_token", "induction")
_OF_KEYS = ROLES[2:]
_SHOWN = 3  # heads of each role in a notebook


class HeadRoles(Artifact):
    """Scores of heads in roles, over the places that routes reach.

    `tensors` holds `score` [layer, head, role], NaN where a layer had no place that allows the role, and `nodes`
    [layer, role], the number of places that a score is the mean of.
    """

    kind: ClassVar[str] = "head_roles"

    @property
    def score(self) -> Labelled:
        """Mean over places."""
        return self.tensors["score"]

    @property
    def nodes(self) -> Labelled:
        """How many places allow a role."""
        return self.tensors["nodes"]

    @property
    def passes(self) -> Passes:
        """What the result cost, in prompt rows."""
        return Passes(**cast(dict[str, float], self.settings["passes"]))

    def top(self, role: str, k: int = 10) -> pd.DataFrame:
        """The heads with the largest scores in a role, largest first.

        Raises:
            UnknownNameError: no such role.
        """
        if role not in ROLES:
            raise UnknownNameError(f"role {role!r}", "no such role", nearest(role, ROLES))
        frame = self.to_pandas()
        chosen = frame[(frame["role"] == role) & frame["score"].notna()]
        return chosen.sort_values("score", ascending=False, kind="stable")[:k].reset_index(drop=True)

    def to_pandas(self) -> pd.DataFrame:
        """Columns layer, head, role, score, nodes."""
        frame = self.score.to_pandas().rename(columns={"value": "score"})
        nodes = self.nodes.to_pandas().rename(columns={"value": "nodes"})
        return frame.merge(nodes, on=["layer", "role"], how="left", sort=False)

    def __repr__(self) -> str:
        return f"HeadRoles({self.settings['n_prompts']} prompts, routes from {self.settings['threshold']:g})"

    def _repr_html_(self) -> str:
        import pandas as pd

        table = pd.concat([self.top(role, _SHOWN) for role in ROLES])
        return f"<div>{escape(repr(self))}</div>" + table.to_html(index=False, float_format="{:.4g}".format)


def head_roles(
    model: HookedModel,
    prompts: Sequence[str] | Batch,
    *,
    position: int = -1,
    threshold: float = 0.04,
    batch_size: int = 32,
) -> HeadRoles:
    """What each head does on the routes of many predictions.

    A place counts if the routes of its prompt reach it after attention. In each role, a head's score is the mean, over
    the places of its layer that allow the role, of the weight that it keeps on these tokens:

    - `active`: the share of places into which the head has an edge; `weight`: the weight of all of them.
    - `previous`: the token before. `self`: the place itself. `first`: the prompt's first token, BOS where there is one.
    - `word`: earlier tokens of the same word; only places that continue a word allow it.
    - `same_token`: earlier occurrences of the place's token. `induction`: the tokens right after these. Only places
      whose token occurred before allow them.

    Places at the first token allow neither `previous` nor `first`. A token can count in several roles.

    Args:
        model: a hooked model; without a tokenizer, no place continues a word.
        prompts: texts or a batch.
        position: where each prediction is made, as for `information_flow_routes`.
        threshold: of the routes.
        batch_size: prompts that are run together.

    Raises:
        EmptyTaskError: no prompts.
        SettingError: a batch size below 1, or what `information_flow_routes` refuses.
        UnsupportedFeatureError: an encoder-decoder model.

    Cost:
        1 forward pass a prompt.

    Source:
        Ferrando and Voita 2024, Information Flow Routes, arXiv:2403.00824.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"batch_size={batch_size!r}", "no number of prompts", "give a whole number from 1")
    if not isinstance(prompts, Batch) and len(prompts) == 0:
        raise EmptyTaskError("roles of heads", "no prompts", "give texts or a batch")
    batch = prompt_of(model, prompts).batch
    info = model.info
    total = torch.zeros(info.n_layers * info.n_heads, len(ROLES), dtype=torch.float64)
    nodes = torch.zeros(info.n_layers, len(ROLES), dtype=torch.float64)
    for rows in torch.arange(len(batch)).split(batch_size):
        some = batch.rows(rows)
        routes = information_flow_routes(model, some, position=position, threshold=threshold)
        names = ("batch", "layer", "query", "key", "kind", "head")
        mid = routes.column("into") == INTO.index("resid_mid")
        b, layer, query, key, kind, head = (routes.column(name)[mid] for name in names)
        roles = _roles(model, some)
        places = torch.stack([b, layer, query], 1).unique(dim=0)
        nodes.index_add_(0, places[:, 1], _allowed(roles)[places[:, 0], :, places[:, 2]])
        moved = kind == KINDS.index("attention")
        b, query, key, slot = b[moved], query[moved], key[moved], (layer * info.n_heads + head)[moved]
        weight = routes.column("weight")[mid][moved].double()
        counted = torch.cat([torch.ones(len(slot), 1), roles[b, :, query, key]], 1).double() * weight[:, None]
        total[:, 1:] = total[:, 1:].index_add(0, slot, counted)
        occurs = torch.stack([b, query, slot], 1).unique(dim=0)[:, 2]
        total[:, 0] += torch.bincount(occurs, minlength=len(total))
    score = total.unflatten(0, (info.n_layers, info.n_heads)) / nodes[:, None]
    settings: dict[str, Any] = {
        "threshold": float(threshold),
        "position": position,
        "n_prompts": len(batch),
        "passes": {"forward": len(batch), "backward": 0},
    }
    tensors = {
        "score": Labelled(score, ("layer", "head", "role"), {"role": ROLES}),
        "nodes": Labelled(nodes.long(), ("layer", "role"), {"role": ROLES}),
    }
    return HeadRoles(tensors, settings=settings, provenance=prompt_of(model, batch).provenance(model))


def _roles(model: HookedModel, batch: Batch) -> Bool[Tensor, "batch role query key"]:
    """Which keys each query's roles speak of."""
    tokens, n = batch.tokens.cpu(), batch.tokens.shape[1]
    place = torch.arange(n)
    query, key = place[:, None], place[None, :]
    before = key < query
    same = (tokens[:, :, None] == tokens[:, None, :]) & before
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    word = torch.stack([_word_numbers(model, row) for row in tokens])
    within = (word[:, :, None] == word[:, None, :]) & before
    every = [(key == query - 1), key == query, (key == 0) & (query > 0)]
    shape = (len(tokens), n, n)
    return torch.stack([*(mask.expand(shape) for mask in every), within, same, after], 1)


def _allowed(roles: Bool[Tensor, "batch role query key"]) -> Tensor:
    """Which roles a query allows: [batch, query, role], with the two that every place allows in front."""
    found = roles.any(3).double()
    return torch.cat([torch.ones_like(found[:, :2]), found], 1)


def _word_numbers(model: HookedModel, tokens: Tensor) -> Tensor:
    """The number of the word that each token belongs to.

    A token continues a word if the tokenizer marks it so (`##`) or, where it marks none, if it begins with a letter or
    digit and the token before ends with one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return torch.arange(len(tokens))
    if any(str(piece).startswith("##") for piece in tokenizer.get_vocab()):
        pieces = tokenizer.convert_ids_to_tokens(tokens.tolist())
        begins = [not str(piece).startswith("##") for piece in pieces]
    else:
        texts = [decode_token(tokenizer, token) for token in tokens.tolist()]
        ends = [False, *(text[-1:].isalnum() for text in texts[:-1])]
        begins = [not (text[:1].isalnum() and open_word) for text, open_word in zip(texts, ends, strict=True)]
    return torch.tensor(begins).cumsum(0)
