"""A model set by hand that agrees with one position: the evidence is known because the weights say so.

The residual stream is split: number of the token | whether it stands where the head looks | output | the token itself.
The one head of each block looks, from everywhere, at that position and copies the number there to the output, which
the logits of the verbs read; two blocks do the same, so that most of what reaches the end comes from there by any
measure. Attractors have a number, too, and nothing looks at them.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from mechattr.models.plain import HookedPlain, plain_model
from mechattr.models.plain_config import PlainConfig
from mechattr.tasks import EvidenceSample, agreement_samples
from mechattr.tasks.grammar import agreement

NUMBER, PLACE, OUTPUT, TOKEN = range(4)  # first entries of the stream; the token has the rest
SPARE, CONTEXT = 4, 24
SHARP, GAIN = 40.0, 4.0  # gap of the scores before the softmax; how much larger the copy is than what is copied


def agreement_model(looks_at: int = 1, norm: str = "none") -> HookedPlain:
    """The model; `looks_at` is the position whose number decides, `norm` "none" or "rms"."""
    words = agreement.words()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = PlainConfig.attention_only(
        norm=norm,
        n_layers=2,
        n_heads=1,
        n_kv_heads=1,
        d_model=TOKEN + SPARE,
        d_head=1,
        d_vocab=len(words),
        n_ctx=CONTEXT,
    )
    generator = torch.Generator().manual_seed(0)
    embed = torch.zeros(len(words), config.d_model, dtype=torch.float64)
    embed[:, TOKEN:] = torch.randn(len(words), SPARE, generator=generator, dtype=torch.float64) / 4
    unembed = torch.zeros(config.d_model, len(words), dtype=torch.float64)
    for noun in agreement.NOUNS:
        embed[words.index(noun), NUMBER], embed[words.index(noun + "s"), NUMBER] = 1.0, -1.0
    for singular, plural in agreement.VERBS:
        unembed[OUTPUT, words.index(singular)], unembed[OUTPUT, words.index(plural)] = 1.0, -1.0
    position = torch.zeros(CONTEXT, config.d_model, dtype=torch.float64)
    position[looks_at, PLACE] = 1.0
    weights = {"embed.W_E": embed, "pos_embed.W_pos": position, "unembed.W_U": unembed}
    weights["unembed.b_U"] = torch.zeros(len(words))
    if norm == "rms":
        weights |= {f"{name}.w": torch.ones(config.d_model) for name in ("blocks.0.ln1", "blocks.1.ln1", "ln_final")}
    for layer in range(config.n_layers):
        p = f"blocks.{layer}.attn."
        weights |= {f"{p}b_{kind}": torch.zeros(1, 1) for kind in "KV"}
        weights |= {f"{p}W_Q": torch.zeros(1, config.d_model, 1), f"{p}b_Q": torch.full((1, 1), SHARP)}
        weights |= {f"{p}W_K": _one(PLACE, 1.0, config), f"{p}W_V": _one(NUMBER, 1.0, config)}
        weights |= {f"{p}W_O": _one(OUTPUT, GAIN, config).mT, f"{p}b_O": torch.zeros(config.d_model)}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    return plain_model(config, weights, tokenizer=fast)


def _one(entry: int, value: float, config: PlainConfig) -> torch.Tensor:
    """[head, d_model, d_head] that reads one entry of the stream."""
    found = torch.zeros(1, config.d_model, 1, dtype=torch.float64)
    found[0, entry, 0] = value
    return found


def planted_samples(n: int = 24) -> list[EvidenceSample]:
    """Samples whose subject stands at position 1 and whose first attractor, of the same number, at position 4."""
    drawn = agreement_samples(60 * n, 5)
    chosen = [s for s in drawn if s.evidence == (1,) and s.attractors[:1] == (4,) and same(s)]
    return chosen[:n]


def same(sample: EvidenceSample) -> bool:
    """Whether the attractors have the subject's number."""
    return sample.factors["attractor_number"] == "same"
