"""Where a trace of the nnsight backend runs, and what can go wrong on the way there.

nnsight is imported inside functions, because importing it changes `torch.Tensor.backward` everywhere.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mechattr.errors import (
    BackendError,
    SettingError,
    UnknownModelError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)

PLACES = (False, "local", True)


def wrapped(model: Any, remote: bool | str) -> Any:
    """The nnsight model of a transformers model; an nnsight model as it is, with its weights loaded.

    Raises:
        BackendError: nnsight is not installed.
        UnsupportedModelError: no transformers model.
    """
    try:
        from nnsight.intervention.envoy import Envoy
        from nnsight.modeling.mixins.remotable import Remotable
    except ImportError as error:
        fix = "install it: pip install 'mechattr[nnsight]'"
        raise BackendError("backend 'nnsight'", f"it cannot be imported ({error})", fix) from error
    traced = model if isinstance(model, Envoy) else None
    if not hasattr(model if traced is None else traced._module, "config"):
        raise UnsupportedModelError(
            f"a hooked {type(model).__name__}",
            "it has no config",
            "give a transformers model or an nnsight model of one",
        )
    if traced is not None:
        if remote is not True and not getattr(traced, "dispatched", True):
            traced.dispatch()
        return traced
    with warnings.catch_warnings():  # an encoder's module called `output` is found under the name that nnsight gives it
        warnings.filterwarnings("ignore", "Module .* has a submodule named")
        return Remotable(model)


def check_remote(source: Any, remote: bool | str) -> None:
    """Whether runs of a source can happen where they are to, before anything is loaded or sent.

    Args:
        source: a hub name, a folder, a transformers model or an nnsight model.
        remote: `False`, `"local"` or `True`.

    Raises:
        SettingError: another value of `remote`.
        UnsupportedModelError: `True` for a model that a server cannot find.
        BackendError: `True` without a key.
    """
    if remote not in PLACES or (remote in (0, 1) and not isinstance(remote, bool)):
        raise SettingError(f"remote={remote!r}", "no such place", "use False, 'local' or True")
    if remote == "local" and not isinstance(source, str) and not _can_travel(source):
        raise UnsupportedModelError(
            "remote='local'", f"a {type(source).__name__}", "give the transformers model, or an nnsight LanguageModel"
        )
    if remote is not True:
        return
    name = source if isinstance(source, str) else getattr(source, "repo_id", None)
    local = not isinstance(name, str) or not name or Path(name).expanduser().exists()
    if local or not (isinstance(source, str) or getattr(source, "args", None)):
        shown = f"the folder {name!r}" if isinstance(name, str) and name else f"a {type(source).__name__} in memory"
        raise UnsupportedModelError(
            "remote=True",
            f"{shown}, which a server does not have: it finds models by their hub name",
            "load it by its hub name, such as load('openai-community/gpt2', backend='nnsight', remote=True)",
        )
    from nnsight.schema.config import CONFIG

    if not (CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY")):
        raise BackendError(
            "remote=True",
            "no key for NDIF",
            "get one at https://login.ndif.us and set the environment variable NDIF_API_KEY, "
            "or keep it with nnsight.CONFIG.set_default_api_key(key)",
        )


def _can_travel(source: Any) -> bool:
    return not hasattr(source, "_module") or hasattr(source, "_remoteable_persistent_objects")


def on_server(name: str, tokenizer: Any, revision: str | None, attention: str) -> Any:
    """The nnsight model of a hub name, without weights: its config is read from the hub.

    Raises:
        UnknownModelError: it cannot be read.
    """
    from nnsight.modeling.transformers import TransformersModel

    try:
        return TransformersModel(
            name, task="text-generation", tokenizer=tokenizer, revision=revision, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnknownModelError(f"model {name!r}", found, "give a hub name, and a network to reach the hub") from error


def weight_name(traced: Any) -> str:
    """What stands for the hash of weights on a server."""
    return f"hub:{traced.repo_id}@{traced.revision or 'main'}"


def trace(
    traced: Any, body: Callable[..., Any], plan: Mapping[str, Any], inputs: Mapping[str, Any], remote: bool | str
) -> dict[str, Any]:
    """Runs `body(model, plan)` inside one trace and returns what it returns.

    Raises:
        UnsupportedFeatureError: a function of the plan cannot be sent.
        BackendError: the server failed or could not be reached.
    """
    import nnsight

    settings: dict[str, Any] = {"remote": remote}
    if remote:
        for module in _modules(plan):
            nnsight.register(module)
    if remote == "local":
        from mechattr.models.nnsight_dry import DryRun

        settings = {"backend": DryRun(traced)}
    try:
        with traced.trace(**settings, **inputs):
            found = nnsight.save(body(traced, plan))
    except _failures(remote) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"a run of {traced.repo_id!r} on NDIF",
            f"{type(error).__name__}: {first}",
            "look at nnsight.status() whether the model is up, and at the network; then run it again",
        ) from error
    except Exception as error:
        said = f"{type(error).__name__} {error}".lower()
        if remote and (isinstance(error, ModuleNotFoundError | SyntaxError) or "pickl" in said):
            raise UnsupportedFeatureError(
                "sending a metric, an edit or a reduce function",
                str(error),
                "use functions of torch and plain values, without open files or locks; or run with remote=False",
            ) from error
        raise
    return found


def _modules(plan: Mapping[str, Any]) -> set[str]:
    """The packages whose functions are sent by value, because a server has none of them: this one, and those of what
    was given."""
    functions = [plan["metric"], plan["reduce"]]
    functions += [value for edits in plan["edits"].values() for kind, value, _ in edits if kind == "call"]
    names = {str(getattr(f, "__module__", None) or type(f).__module__) for f in functions if f is not None}
    there = {"__main__", "builtins", "torch", "numpy", "nnsight", "einops", *sys.stdlib_module_names}
    return {"mechattr", *(root for name in names if (root := name.partition(".")[0]) not in there)}


def _failures(remote: bool | str) -> tuple[type[BaseException], ...]:
    """What a server or the way there may raise."""
    if remote is not True:
        return ()
    import httpx
    import websocket
    from nnsight.intervention.backends.remote import RemoteError

    return (RemoteError, httpx.HTTPError, websocket.WebSocketException, OSError)
