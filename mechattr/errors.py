"""Errors of mechattr: every message says what was asked, what was found and what to do.

Each kind also inherits the built-in exception that a caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MechattrError(Exception):
    """Base of all errors that mechattr raises on purpose.

    Args:
        asked: what the caller asked for.
        found: what was found instead.
        fix: what to do about it.
    """

    def __init__(self, asked: str, found: str, fix: str) -> None:
        super().__init__(asked, found, fix)
        self.asked, self.found, self.fix = asked, found, fix

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return f"{self.asked}\n  found: {self.found}\n  fix: {self.fix}"


class SettingError(MechattrError, ValueError):
    """An argument has a value that cannot be used: a head, position, dtype, device, count or option."""


class UnknownNameError(MechattrError, ValueError):
    """A name (of an option, metric, method or label) is not one of those that exist."""


class UnknownSiteError(MechattrError, KeyError):
    """A site name is not one of the site table, or this model does not have it."""


class UnknownTaskError(MechattrError, ValueError):
    """A task name is not one of the task generators, nor a readable pairs file."""


class UnknownModelError(MechattrError, ValueError):
    """A model name or folder could not be found."""


class UnsupportedModelError(MechattrError, NotImplementedError):
    """The model's architecture cannot be hooked faithfully, so it is refused."""


class UnsupportedFeatureError(MechattrError, NotImplementedError):
    """This model or backend does not offer the site, edit operator or rule that was asked for."""


class SelfCheckError(MechattrError, RuntimeError):
    """The hooks of a model do not do what their names say."""


class ModelStateError(MechattrError, RuntimeError):
    """The model is in a state in which numbers would be wrong, such as training mode."""


class BackendError(MechattrError, ImportError):
    """An optional backend cannot be imported; the rest of the package works without it."""


class ExecutorError(MechattrError, RuntimeError):
    """A block of work failed for good, or the cluster that it should run on is not there."""


class AxisError(MechattrError, ValueError):
    """Labelled tensors with different axes or coordinates were combined, or an axis does not exist."""


class AlignmentError(MechattrError, ValueError):
    """The clean and the corrupt prompt of a pair, or the pairs of a task, do not line up token by token."""


class AnswerError(MechattrError, ValueError):
    """An answer or foil is not one token, where the metric needs one token."""


class EmptyTaskError(MechattrError, ValueError):
    """No prompt pair is left."""


class NonFiniteError(MechattrError, ArithmeticError):
    """NaN or infinity appeared in a forward pass."""


class MismatchError(MechattrError, ValueError):
    """A stored result does not belong to this model, tokenizer or task."""


class ArtifactError(MechattrError, ValueError):
    """A file is damaged, truncated, foreign, of a newer format or of another kind."""


class OutputExistsError(MechattrError, FileExistsError):
    """An output folder holds a result that was made with other settings."""


def nearest(name: object, candidates: Iterable[str], n: int = 3) -> str:
    """The candidates closest to `name` as a phrase for the `fix` part of an error."""
    names = sorted(set(candidates))
    close = difflib.get_close_matches(str(name), names, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:30])
    return f"choose one of: {shown}" + (f", ... ({len(names)} in all)" if len(names) > 30 else "")
