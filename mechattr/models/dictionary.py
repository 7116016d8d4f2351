"""Dictionaries of the user: a sparse autoencoder or a transcoder whose latents become sites."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mechattr.errors import SettingError, nearest
from mechattr.models.weights import Hasher
from mechattr.sites import HOSTS, SITES, full_name


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Dictionary:
    """An encoder and a decoder between a site and latents.

    Args:
        encode: what is read -> latents; bound methods of a module, or modules, are known by their weights.
        decode: latents -> what the host would hold.
        site: the host, one of `resid_pre`, `attn_out`, `resid_mid`, `mlp_out` and `resid_post`.
        layer: its block.
        reads: the site of the same block that `encode` gets, such as `"ln2"` for a transcoder that writes `mlp_out`;
            by default the host.
        name: what results call it.

    Raises:
        SettingError: functions that are none, another host, or something to read that is no site with positions.
    """

    encode: Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos latent"]]
    decode: Callable[[Float[Tensor, "batch pos latent"]], Float[Tensor, "batch pos d_model"]]
    site: str
    layer: int
    reads: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for what in ("encode", "decode"):
            if not callable(getattr(self, what)):
                found = f"{what}={getattr(self, what)!r:.60}"
                raise SettingError("a dictionary", found, "give two functions on tensors, or modules")
        if self.site not in HOSTS:
            raise SettingError(f"a dictionary at {self.site!r}", "no host of dictionaries", nearest(self.site, HOSTS))
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise SettingError(f"a dictionary of layer {self.layer!r}", "no whole number", "give one block")
        spec = SITES.get(self.reads or self.site)
        if spec is None or not spec.layered or spec.axes[:2] != ("batch", "pos") or len(spec.axes) != 3:
            fix = "name a site with axes batch, pos and one more, such as 'ln2'"
            raise SettingError(f"a dictionary that reads {self.reads!r}", "no such site", fix)

    @property
    def host(self) -> str:
        """The full name of the host."""
        return full_name(self.site, self.layer)

    @property
    def read(self) -> str:
        """The full name of what `encode` gets."""
        return full_name(self.reads or self.site, self.layer)

    @property
    def sites(self) -> tuple[str, str]:
        """The full names of latents and error."""
        return full_name(f"{self.site}_latents", self.layer), full_name(f"{self.site}_error", self.layer)


def hash_of(dictionaries: Mapping[str, Dictionary]) -> dict[str, str]:
    """`dictionary_hash`: sha256 of the weights behind dictionaries, their places and names; nothing without any."""
    if not dictionaries:
        return {}
    digest = hashlib.sha256()
    for host, dictionary in sorted(dictionaries.items()):
        digest.update(f"{host}|{dictionary.read}|{dictionary.name}|".encode())
        for function in (dictionary.encode, dictionary.decode):
            owner = getattr(function, "__self__", function)
            digest.update(getattr(function, "__qualname__", type(function).__qualname__).encode())
            if isinstance(owner, nn.Module):
                digest.update(Hasher()(owner.state_dict()).encode())
    return {"dictionary_hash": digest.hexdigest()}
