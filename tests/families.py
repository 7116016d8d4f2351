"""Small random models of every supported family: large weights and non-zero biases, so that no bug hides in a zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mechattr.models import Batch, HookedHF

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED: dict[str, Any] = {**SMALL, "intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}


def _ids(start: int = 0) -> dict[str, int]:
    return {"bos_token_id": start, "eos_token_id": start + 1, "pad_token_id": start + 2}


def configs() -> dict[str, Any]:
    """A fresh config of every family."""
    gemma: dict[str, Any] = {
        **GATED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 6, **_ids(),
        "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
    }  # fmt: skip
    return {
        "gpt2": tf.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, **_ids()),
        "llama": tf.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True, **_ids()),
        "mistral": tf.MistralConfig(**GATED, sliding_window=4, **_ids()),
        "qwen2": tf.Qwen2Config(**GATED, **_ids()),
        "qwen3": tf.Qwen3Config(**GATED, head_dim=8, attention_bias=True, **_ids()),
        "gpt_neox": tf.GPTNeoXConfig(**SMALL, intermediate_size=40, max_position_embeddings=64, **_ids()),
        "gpt_neox_sequential": tf.GPTNeoXConfig(
            **SMALL, intermediate_size=40, max_position_embeddings=64, use_parallel_residual=False, **_ids()
        ),
        "gemma2": tf.Gemma2Config(**gemma, attn_logit_softcapping=3.0, final_logit_softcapping=20.0),
        "gemma3": tf.Gemma3TextConfig(**gemma),
        "phi3": tf.Phi3Config(**GATED, **_ids()),
        "olmo2": tf.Olmo2Config(**GATED, **_ids()),
        "opt": tf.OPTConfig(
            **SMALL,
            ffn_dim=40,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
            **_ids(),
            activation_function="gelu",  # a ReLU has kinks, which finite differences cannot cross
        ),
        "bert": tf.BertConfig(**SMALL, intermediate_size=40, max_position_embeddings=64, pad_token_id=2),
    }


FAMILIES = tuple(configs())


def model(family: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """A seeded random model in eval mode with weights of scale 0.3 and biases and norms away from 0 and 1."""
    config = copy.deepcopy(configs()[family])
    config._attn_implementation = attention
    auto = tf.AutoModelForMaskedLM if family == "bert" else tf.AutoModelForCausalLM
    built = auto.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(built.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() or ".ln_" in name
            centre = 1.0 if is_norm and name.endswith("weight") else 0.0
            centre = 0.0 if family.startswith("gemma") else centre
            parameter.copy_(centre + 0.3 * noise)
    return built.to(dtype).eval()


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


@contextmanager
def widened() -> Iterator[None]:
    """Makes the casts to float32 inside transformers' norms and softmaxes casts to float64, so that a float64 model has
    float64 precision throughout and finite differences resolve its gradients."""
    narrow, method = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[misc,method-assign]
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = narrow, method  # type: ignore[misc,method-assign]


@cache
def hooked(family: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> HookedHF:
    """The same model behind the protocol. It is shared between tests, which a model that is never changed allows."""
    return HookedHF(model(family, dtype, attention))


def ragged(side: str = "right", lengths: tuple[int, ...] = (7, 4, 5)) -> Batch:
    """Rows of different lengths, the same ones padded on either side."""
    ids, width = tokens(len(lengths), max(lengths)), max(lengths)
    padded, mask = torch.full_like(ids, 2), torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        padded[row, place], mask[row, place] = ids[row, :length], True
    return Batch.of(padded, mask)


def probe(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A random linear metric of all logits at real tokens, with one weight for each position and vocabulary entry."""
    noise = torch.randn(64, logits.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = noise.to(logits)[batch.positions.clamp(min=0)] * batch.mask[..., None]
    return (logits * weights).sum((1, 2))
