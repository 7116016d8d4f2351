"""A TransformerBridge from a transformers model or a folder. Booting rewrites the model that it is given, so it is
given a copy."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from mechattr.errors import BackendError, SettingError, UnsupportedModelError
from mechattr.models.lens import HookedLens
from mechattr.models.sharding import check_one_process


def boot(model: Any, tokenizer: Any, *, consume: bool = False) -> Any:
    """A bridge around a copy of a transformers model, so twice its memory; the model is left as it is.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer, which is left as it is, too.
        consume: boot the model itself, which is of no other use afterwards.

    Raises:
        BackendError: transformer_lens cannot be imported.
        UnsupportedModelError: a multimodal model. Booting one installs packages into the running environment.
        SettingError: no tokenizer.
    """
    many = [key for key in ("vision_config", "audio_config") if getattr(model.config, key, None) is not None]
    if many:
        raise UnsupportedModelError(
            f"a bridge of {type(model).__name__}",
            f"it is multimodal ({many[0]}), and TransformerLens installs torchvision while it boots such a model, "
            "which may replace torch",
            "use backend='hf'",
        )
    if tokenizer is None:
        found = "a bridge needs one, and would look for it on the hub"
        raise SettingError("backend='transformer_lens' without a tokenizer", found, "give tokenizer=")
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise BackendError("backend 'transformer_lens'", str(error), "install transformer-lens 4.3 or later") from error
    from transformers import AutoTokenizer

    inner = model if consume else copy.deepcopy(model)
    inner.config.architectures = inner.config.architectures or [type(model).__name__]  # says which adapter to take
    with tempfile.TemporaryDirectory() as folder:  # the bridge loads the tokenizer again, by its path
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
        name = f"local-{model.config.model_type}"  # a label; names that TransformerLens knows would be looked up
        try:
            return TransformerBridge.boot_transformers(
                name, hf_model=inner, tokenizer=again, device=str(model.device), dtype=model.dtype
            )
        except ValueError as error:
            found = str(error).split(". ")[0]
            raise UnsupportedModelError(f"a bridge of {type(model).__name__}", found, "use backend='hf'") from error


def lens_model(hooked: Any, source: Any) -> HookedLens:
    """A hooked transformers model on this backend; one that was loaded from `source`, a folder or a name, is booted
    itself.

    Raises:
        SettingError: a model of another backend.
    """
    if hooked.info.backend != "hf":
        raise SettingError(f"a bridge of {hooked!r}", "it is no transformers model", "give one")
    check_one_process(hooked.model, "transformer_lens")
    bridge = boot(hooked.model, hooked.tokenizer, consume=isinstance(source, str | Path))
    return HookedLens(bridge, hooked.tokenizer, name=hooked.info.name, revision=hooked.info.revision)
