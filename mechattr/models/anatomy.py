"""Finding the modules of a transformers model that carry its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from mechattr.errors import UnknownNameError, UnsupportedFeatureError, UnsupportedModelError, nearest
from mechattr.models.families.family import PARTS, Cross, Family, text_config
from mechattr.models.norms import Norm, is_norm, norm_of
from mechattr.models.placement import stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What a model multiplies by between its modules: token embeddings, what a block writes, and logits."""

    embed: float = 1.0
    write: float = 1.0
    logits: float = 1.0

    @classmethod
    def of(cls, config: Any, family: Family) -> Factors:
        """Those of a config: Granite has all three, Cohere and T5 with tied embeddings one of their logits."""
        if getattr(config, "scale_decoder_outputs", False):
            return cls(logits=config.d_model**-0.5)
        if not family.multiplied:
            return cls(logits=float(getattr(config, "logit_scale", None) or 1.0))
        return cls(
            embed=float(config.embedding_multiplier),
            write=float(config.residual_multiplier),
            logits=1 / float(config.logits_scaling),
        )


@dataclass(frozen=True, eq=False, slots=True)
class Anatomy:
    """The modules of one model that carry sites.

    Attributes:
        base: the model without its head; of a vision-language model, the language model inside.
        blocks: the blocks.
        parts: for each block, the modules of its family row by field name; a norm that is the identity is left out.
        ends: `embed`, `pos_embed` and `final`.
        head: of an encoder's prediction head its activation function `act`, or `before` and `behind` it.
        norms: every norm module, for the rule that freezes them; with those of the prediction head.
        configured: the modules that hold a config object of the model, from which attention takes its implementation.
        factors: what is multiplied between modules.
        logit_bias: what is added to the logits beside the bias of the unembedding.
        cross: for each block, the modules of its cross-attention by field name; empty where there is none.
        source: the anatomy of the encoder that cross-attention looks at.
        stack: what the names of its blocks begin with.
    """

    base: nn.Module
    family: Family
    blocks: tuple[nn.Module, ...]
    parts: tuple[dict[str, nn.Module], ...]
    ends: dict[str, nn.Module]
    norms: tuple[nn.Module, ...]
    configured: tuple[nn.Module, ...]
    n_heads: int
    n_kv_heads: int
    factors: Factors = Factors()
    logit_bias: Tensor | None = None
    cross: tuple[dict[str, nn.Module], ...] = ()
    source: Anatomy | None = None
    stack: str = "blocks"
    head: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[Anatomy, ...]:
        """This stack of blocks, and the encoder beside it."""
        return (self,) if self.source is None else (self, self.source)

    def norm(self, name: str) -> Norm | None:
        """The norm through which attention (`"blocks.0.ln1"`), the MLP (`"blocks.0.ln2"`) or the unembedding
        (`"ln_final"`) reads the residual stream, or the one behind attention (`"blocks.0.ln1_post"`) or the MLP
        (`"blocks.0.ln2_post"`); `None` where there is none.

        Raises:
            UnknownNameError: no such norm.
            UnsupportedFeatureError: a norm before a part of a post-norm encoder, where norms act on the stream itself.
        """
        names: dict[str, nn.Module | None] = {"ln_final": self.ends.get("final")}
        for layer, parts in enumerate(self.parts):
            first, second = parts.get("ln1"), parts.get("ln2")
            names[f"blocks.{layer}.ln1"] = first
            names[f"blocks.{layer}.ln2"] = first if second is None and self.family.parallel else second
            for ln, write, own in (("ln1", "attn_out", first), ("ln2", "mlp_out", second)):
                behind = own if self.family.post_norm else parts.get(write)
                names[f"blocks.{layer}.{ln}_post"] = behind if behind is not None and is_norm(behind) else None
        if self.family.post_norm and not name.endswith("_post"):
            raise UnsupportedFeatureError(
                f"the norm {name}", "a post-norm encoder normalises the stream itself", "use a decoder"
            )
        if name not in names:
            raise UnknownNameError(f"norm {name!r}", "this model has no such norm", nearest(name, names))
        module = names[name]
        like = stored(self.ends["embed"], "weight")
        return None if module is None or like is None else norm_of(module, like)


def locate(
    model: Any,
    family: Family,
    n_heads: int,
    n_kv_heads: int,
    bare: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Anatomy:
    """Finds the modules of a family row; `bare` takes a wrapper off a module, where a tool wraps each of them.

    Raises:
        UnsupportedModelError: a module of the row is missing.
    """
    base = model.base_model
    missing: dict[str, int] = {}  # paths, and the first block without them

    def find(root: nn.Module, path: str | None, layer: int = 0) -> nn.Module | None:
        if path is None:
            return None
        for name in path.split("."):
            child = getattr(bare(root), name, None)
            if not isinstance(child, nn.Module):
                missing.setdefault(path, layer)
                return None
            root = child
        return bare(root)

    base = find(base, family.language) or base
    source = None if family.source is None else locate(model, family.source, n_heads, n_kv_heads, bare)
    blocks = find(base, family.layers)
    block_list = tuple(map(bare, blocks.children())) if blocks is not None else ()

    def within(row: Family | Cross, names: Iterable[str]) -> tuple[dict[str, nn.Module], ...]:
        return tuple(
            {
                name: m
                for name in names
                if (m := find(block, getattr(row, name), layer)) is not None and not isinstance(m, nn.Identity)
            }
            for layer, block in enumerate(block_list)
        )

    parts = within(family, PARTS)
    cross = () if family.cross is None else within(family.cross, [field.name for field in fields(family.cross)])
    ends = {name: m for name in ("embed", "pos_embed", "final") if (m := find(base, getattr(family, name))) is not None}
    if missing or not block_list:
        layer = min(missing.values(), default=0)
        children = ", ".join(name for name, _ in (block_list[layer] if block_list else base).named_children())
        absent = ", ".join(sorted(missing)) or family.layers
        raise UnsupportedModelError(
            f"a hooked model of family {model.config.model_type!r}",
            f"no module at {absent}{f' in block {layer}, unlike in block 0' if layer else ''}; found {children}",
            "use a model whose blocks are built alike"
            if layer
            else "use the transformers class of this family, with its own module names",
        )
    if source is not None and source.ends["embed"] is ends["embed"]:
        raise UnsupportedModelError(
            f"a hooked {type(model).__name__}",
            "encoder and decoder share one embedding module, so that their calls cannot be told apart",
            "save the model and load it again, which gives each its own module with shared weights",
        )
    behind = (("act", family.head_act), *zip(("before", "behind"), family.head_gelu or (), strict=False))
    head = {name: m for name, path in behind if (m := find(model, path)) is not None}
    inside = set(base.modules())
    outside = set(model.modules()).difference(model.base_model.modules())
    config = text_config(model.config, family)
    configs = [config, *(m.config for m in base.children() if source is not None and hasattr(m, "config"))]
    return Anatomy(
        base,
        family,
        block_list,
        parts,
        ends,
        tuple(m for m in model.modules() if is_norm(m) and (m in outside or m in inside)),
        tuple(m for m in model.modules() if any(m.__dict__.get("config") is c for c in configs)),
        n_heads,
        n_kv_heads,
        Factors.of(config, family),
        getattr(model, "final_logits_bias", None),
        cross,
        None if source is None else replace(source, stack="encoder", norms=()),
        head=head,
    )
