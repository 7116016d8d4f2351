"""How a model's writers write to the residual stream and its readers read from it, in numbers.

A head writes z W_O (the output bias belongs to no head), an MLP its whole output, the input what enters block 0. A
reader takes a residual stream of its own through its own norm and projection. With both at hand any reader can be given
another sum of writes than its neighbours get, exactly, norm included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechattr.errors import MismatchError
from mechattr.models.base import HookedModel
from mechattr.patching.graph import Graph, check_additive
from mechattr.sites import full_name

ELEMENTS_AT_ONCE = 2**26  # numbers in the tensor of all writers' outputs, which sets how many rows run together


@dataclass(frozen=True, slots=True)
class SiteReaders:
    """The readers of one site: a site's heads, an MLP's input, or the logits.

    Attributes:
        site: the full name of what is computed from their inputs.
        stream: the full name of the residual stream that they read.
        columns: their columns in the graph's mask.
        seen: how many writers, from the first, are connected with them.
        norm: the name of their norm; `None` where the stream itself is replaced (logits).
        weight: the name of their projection.
        bias: the name of its bias.
        layer: the block that a run with other inputs can start from.
    """

    site: str
    stream: str
    columns: slice
    seen: int
    norm: str | None
    weight: str
    bias: str
    layer: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """The writers and readers of one model.

    Args:
        model: a model whose blocks add what they compute to the residual stream.

    Raises:
        UnsupportedFeatureError: norms act on what blocks write.
    """

    model: HookedModel
    graph: Graph = field(init=False)
    readers: tuple[SiteReaders, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_additive(self.model.info)
        object.__setattr__(self, "graph", Graph.of(self.model.info))
        object.__setattr__(self, "readers", tuple(self._readers()))

    def places(self, name: str) -> slice:
        """The rows of the mask that belong to a recorded activation: one writer, or all heads of a block."""
        n = self.graph.writers_a_layer
        if name == full_name("resid_pre", 0):
            return slice(0, 1)
        layer = int(name.split(".")[1])
        heads = slice(1 + layer * n, 1 + layer * n + self.graph.n_heads)
        return heads if name == full_name("z", layer) else slice(heads.stop, heads.stop + 1)

    def outputs(self, name: str, x: Tensor) -> Float[Tensor, "batch writer pos d_model"]:
        """What an activation (or a difference of two) writes to the residual stream, by writer.

        Args:
            name: one of `Graph.written`.
            x: z [batch, pos, head, d_head], or a residual-stream tensor [batch, pos, d_model].
        """
        if x.ndim == 3:
            return x[:, None]
        w = self.model.weight(name.replace("hook_z", "W_O")).to(x.dtype)
        return torch.einsum("bthe,hed->bhtd", x, w)

    def project(
        self, readers: SiteReaders, inputs: Float[Tensor, "batch reader pos d_model"], which: slice | int = slice(None)
    ) -> Float[Tensor, "batch pos ..."]:
        """What a site holds when its readers get these inputs.

        Args:
            readers: the readers of one site.
            inputs: each reader's residual stream.
            which: the readers that `inputs` has; an int leaves the axis of heads out of the result.
        """
        if readers.norm is None:
            return inputs[:, 0]
        norm = self.model.norm(readers.norm)
        y = (inputs if norm is None else norm(inputs)).to(inputs.dtype)
        w, b = self.model.weight(readers.weight), self.model.weight(readers.bias)
        if w.ndim == 2:
            return y[:, 0] @ w + b
        if isinstance(which, int):
            return y[:, 0] @ w[which] + b[which]
        return torch.einsum("bhtd,hde->bthe", y, w[which]) + b[which]

    def rows(self, width: int) -> int:
        """How many rows of so many columns run together."""
        per_row = (len(self.graph.writers) + 4 * self.graph.readers_a_layer) * width * self.model.info.d_model
        return max(1, ELEMENTS_AT_ONCE // per_row)

    def _readers(self) -> list[SiteReaders]:
        graph, found, column = self.graph, [], 0
        sites = set(self.model.sites())
        for layer in range(graph.n_layers):
            p, stream = f"blocks.{layer}.", full_name("resid_pre", layer)
            for kind in "qkv":
                size = graph.n_heads if kind == "q" else graph.n_kv_heads
                columns, column = slice(column, column + size), column + size
                if full_name(kind, layer) not in sites:  # an attention pattern that nothing reads
                    continue
                weight, bias = (f"{p}attn.{letter}_{kind.upper()}" for letter in "Wb")
                seen = graph.seen_by(layer)
                found.append(SiteReaders(full_name(kind, layer), stream, columns, seen, p + "ln1", weight, bias, layer))
            if not graph.has_mlp:
                continue
            columns, column = slice(column, column + 1), column + 1
            stream = stream if graph.parallel else full_name("resid_mid", layer)
            parts = {"mlp_pre": "gate", "mlp_pre_linear": "in"} if self.model.info.gated else {"mlp_pre": "in"}
            for short, part in parts.items():
                weight, bias = f"{p}mlp.W_{part}", f"{p}mlp.b_{part}"
                seen = graph.seen_by(layer, mlp=True)
                found.append(
                    SiteReaders(full_name(short, layer), stream, columns, seen, p + "ln2", weight, bias, layer)
                )
        last = full_name("resid_post", graph.n_layers - 1)
        columns, seen = slice(column, column + 1), graph.seen_by(graph.n_layers)
        return [*found, SiteReaders(last, last, columns, seen, None, "", "", graph.n_layers - 1)]


def check_keep(graph: Graph, keep: Bool[Tensor, "... writer reader"]) -> None:
    """Whether a mask fits a graph.

    Raises:
        MismatchError: another shape or type.
    """
    shape = (len(graph.writers), len(graph.readers))
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or tuple(keep.shape[-2:]) != shape:
        found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else f"a {type(keep).__name__}"
        raise MismatchError(f"a mask of {shape[0]} writers by {shape[1]} readers", found, "use this model's graph.mask")
