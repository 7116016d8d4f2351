"""The prose: books from the corpus folder, split into training and held-out books."""

import lzma
from pathlib import Path

END = "<|endoftext|>"
FILES = ("children.txt.xz", "general.txt.xz")
HELD_OUT_EVERY = 20  # every 20th book, counted from the 10th, is never trained on


def books(corpus: Path) -> tuple[list[str], list[str]]:
    """Training books and held-out books of the corpus folder, in file order."""
    texts: list[str] = []
    for file in FILES:
        whole = lzma.decompress((corpus / file).read_bytes()).decode()
        texts += [book.strip() for book in whole.split(END) if book.strip()]
    held_out = range(HELD_OUT_EVERY // 2, len(texts), HELD_OUT_EVERY)
    return [text for i, text in enumerate(texts) if i not in held_out], [texts[i] for i in held_out]
