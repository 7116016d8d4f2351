"""Byte-level BPE in which years split in two-digit halves and the words of the tasks are single tokens.

The vocabulary is learned from the training books and from the words of the task generators (both splits: the
fillers of the test split need tokens of their own, though the model is never trained on them in task sentences).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.train.corpus import END
from data.train.sentences import words

# English contractions, words, pairs of digits, marks, white space; a piece may carry the one space before it.
PIECES = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?[0-9]{1,2}| ?[^\s\p{L}0-9]+|\s+(?!\S)|\s+"
FORCED = 5_000  # times that a task word is shown to the trainer: more often than any mere fragment occurs


def train(prose: list[str], vocabulary: int) -> Tokenizer:
    """Learn the tokenizer; two-digit numbers and task words are made frequent enough to become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    digits = [f"{number:02d}" for number in range(100)] + [f" {number}" for number in range(10, 21)]
    forced = digits + [f" {word}" for filler in words("train", "test") for word in filler.split() if word.isalpha()]

    def texts() -> Iterator[str]:
        for word in forced:
            yield from [word * 100] * (FORCED // 100)
        yield from prose

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, n_positions: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as `AutoTokenizer.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": n_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
