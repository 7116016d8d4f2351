"""Small random models of every supported family: large weights and non-zero biases, so that no bug hides in a zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

from mechattr.labelled import Labelled
from mechattr.models import Batch, HookedHF
from mechattr.models.cross import arguments
from mechattr.models.families import FAMILIES as ROWS
from mechattr.models.families import small_configs
from mechattr.models.small import small_model

EVERY = tuple(small_configs())
SOURCED = tuple(name for name, config in small_configs().items() if ROWS[config.model_type].source is not None)
FAMILIES = tuple(name for name in EVERY if name not in SOURCED)  # those that run rows of tokens alone
ENCODERS = tuple(name for name, config in small_configs().items() if ROWS[config.model_type].encoder)
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)
# transformers has no sdpa for scores with a softcap or sinks, nor for some families whose attention is their own
ATTENTIONS = tuple(
    (name, attention)
    for name in EVERY
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in ("gemma2", "vaultgemma", "gpt_oss", "gptj", "codegen", "gpt_neo", "bloom")
)
_ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}  # fmt: skip
# One of each shape of block and of attention, for what works on sites alone and takes long
SHAPES = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "opt"),
    *("gpt_neox", "gpt_neox_sequential", "phi", "falcon_groups", "bloom", "mixtral", "bert", "modernbert"),
)
configs = small_configs
model = small_model


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation function of a small model's MLP, as its config names it (BLOOM's does not)."""
    fields = ("hidden_act", "hidden_activation", "activation_function", "activation")
    config = small_configs()[name].get_text_config()
    named = (getattr(config, field, None) for field in fields)
    return _ACTIVATIONS[next((found for found in named if found), "gelu_new")]


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids that avoid the special ones."""
    return torch.randint(5, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Eight tokens with leading spaces, and a BOS of its own."""
    words = ["<s>", "</s>", "<pad>", "a", "b", "Ġa", "Ġb", "Ġ"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("Ġ", "a"), ("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


FLOAT32 = torch.float32, torch.Tensor.float


@contextmanager
def _float32_is(dtype: torch.dtype, cast: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Another dtype under the name of float32."""
    before = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = dtype  # type: ignore[misc]
    torch.Tensor.float = cast  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = torch.float = before[0]  # type: ignore[misc]
        torch.Tensor.float = before[1]  # type: ignore[method-assign]


def widened() -> AbstractContextManager[None]:
    """Makes the casts to float32 inside transformers' norms and softmaxes casts to float64, so that a float64 model has
    float64 precision throughout and finite differences resolve its gradients."""
    return _float32_is(torch.float64, torch.Tensor.double)


@cache
def hooked(family: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> HookedHF:
    """The same model behind the protocol. It is shared between tests, which a model that is never changed allows."""
    with _float32_is(*FLOAT32):  # whoever asks first may have widened it, and rotary angles are made with the model
        return HookedHF(small_model(family, dtype, attention))


def hooks_of(model: HookedHF) -> list[tuple[str, int]]:
    """How many hooks each module has: a shared model may have some of other tools."""
    modules = model.model.named_modules()
    return [(name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in modules]


def batch_of(family: str, ids: torch.Tensor) -> Batch:
    """Rows without padding that a small model can run: with a source of another length where it reads one."""
    batch = Batch.of(ids)
    source = Batch.of(tokens(len(ids), 5, seed=int(ids[0, 0])))
    return replace(batch, source=source) if family in SOURCED else batch


def ragged_of(family: str, side: str = "right") -> Batch:
    """`ragged` rows that a small model can run: with a ragged source where it reads one."""
    return with_source(ragged(side)) if family in SOURCED else ragged(side)


def with_source(batch: Batch) -> Batch:
    """Three rows, and a ragged source that is padded on the same side."""
    return replace(batch, source=ragged(batch.padding_side, (3, 6, 5)))


def alone(batch: Batch, row: int) -> Batch:
    """One row without its padding."""
    source = None if batch.source is None else alone(batch.source, row)
    return replace(Batch.of(batch.tokens[row, batch.mask[row]]), source=source)


def real(x: Labelled, batch: Batch, row: int) -> torch.Tensor:
    """One row of an activation without its padding."""
    part = x.values[row]
    for dim, axis in enumerate(x.axes[1:]):
        side = batch if axis in ("pos", "query", "key") else batch.source if "source" in axis else None
        part = part if side is None else part.index_select(dim, side.mask[row].nonzero()[:, 0])
    return part


def own_logits(model: HookedHF, batch: Batch) -> torch.Tensor:
    """What transformers' model itself gives, with the positions of a padded batch where it takes them."""
    if batch.source is None:
        first = 3 if "roberta" in model.info.family else 0  # which counts from behind its padding token, whose id is 2
        given = {"input_ids": batch.tokens, "position_ids": batch.positions.clamp(min=0) + first}
        given |= {"attention_mask": batch.mask.long()} if batch.padded else {}
    else:
        given = arguments(batch)
    with torch.no_grad():
        return model.model(**given).logits


def ragged(side: str = "right", lengths: tuple[int, ...] = (7, 4, 5)) -> Batch:
    """Rows of different lengths, the same ones padded on either side."""
    ids, width = tokens(len(lengths), max(lengths)), max(lengths)
    padded, mask = torch.full_like(ids, 2), torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        padded[row, place], mask[row, place] = ids[row, :length], True
    return Batch.of(padded, mask)


def inside_mlp(model: HookedHF) -> str:
    """A site inside the MLP: its neurons, or the logits that route tokens to experts."""
    return "router_logits" if model.info.n_experts else "mlp_post"


def probe(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A random linear metric of all logits at real tokens, with one weight for each position and vocabulary entry."""
    noise = torch.randn(64, logits.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = noise.to(logits)[batch.positions.clamp(min=0)] * batch.mask[..., None]
    return (logits * weights).sum((1, 2))
