"""The task grammars by name, and the words that they fill in."""

from mechattr.tasks.grammar import gendered_pronoun, greater_than, ioi, subject_verb

GRAMMARS = {
    "ioi": ioi,
    "greater_than": greater_than,
    "subject_verb": subject_verb,
    "gendered_pronoun": gendered_pronoun,
}


def words(*splits: str) -> list[str]:
    """Filler words of all tasks on the given splits, each once, sorted."""
    return sorted({word for grammar in GRAMMARS.values() for split in splits for word in grammar.words(split)})


def texts(answer: object) -> tuple[str, ...]:
    """The texts of an answer or foil of a `PairText`, which has one or several."""
    return tuple(map(str, answer)) if isinstance(answer, tuple) else (str(answer),)
