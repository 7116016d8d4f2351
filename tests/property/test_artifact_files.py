"""Every artifact comes back from its file bit by bit, and 1,000 damaged files all give `ArtifactError`."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechattr import header, storage, writer
from mechattr.artifact import Attribution, Cache
from mechattr.artifact import open as open_artifact
from mechattr.errors import ArtifactError
from mechattr.header import DIGEST, DTYPES, FILE_PREFIX, KEY, MANIFEST, MANIFEST_PREFIX
from mechattr.labelled import Labelled

SITES = ("hook_embed", "blocks.0.hook_attn_out", "blocks.0.attn.hook_z", "blocks.11.attn.hook_pattern")


@st.composite
def labelled(draw: st.DrawFn) -> Labelled:
    """Tensors of any stored dtype, of 0 to 4 axes, some of size 0, in any memory layout, with any coordinates."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    layout = draw(st.sampled_from(["plain", "permuted", "strided", "expanded"]))
    order = draw(st.permutations(range(len(shape))))
    values = torch.randint(0, 2**16, [2 * size for size in shape], generator=torch.Generator().manual_seed(1))
    values = values.to(torch.float64).sub(2**15).div(7).to(dtype)
    values = values[tuple(slice(None, None, 2) if layout == "strided" else slice(size) for size in shape)]
    values = values.permute(order) if layout == "permuted" else values
    values = values[:1].expand(values.shape) if layout == "expanded" and shape and shape[0] else values
    axes = [f"axis{dim}" for dim in range(len(shape))]
    coordinate = st.one_of(st.integers(-5, 5), st.text(max_size=3))
    coords = {
        axis: draw(st.lists(coordinate, min_size=size, max_size=size, unique=True))
        for axis, size in zip(axes, values.shape, strict=True)
        if draw(st.booleans())
    }
    return Labelled(values, axes, coords)


json_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same_bits(one: Labelled, other: Labelled) -> bool:
    """Equal labels and equal bits, NaN included."""
    labels = [(each.axes, each.coords, each.dtype, each.shape) for each in (one, other)]
    copies = [each.values.clone(memory_format=torch.contiguous_format).reshape(-1) for each in (one, other)]
    return labels[0] == labels[1] and torch.equal(*(copy.view(torch.uint8) for copy in copies))


@given(
    tensors=st.dictionaries(st.sampled_from(SITES), labelled(), max_size=4),
    settings=st.dictionaries(st.text(), json_documents, max_size=3),
)
def test_every_artifact_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Labelled], settings: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    made = Cache(tensors, settings=settings)
    made.save(folder / "one")
    made.save(folder / "two")
    back = open_artifact(folder / "one")
    back.verify()
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    assert list(back.tensors) == list(tensors)
    assert back.settings == made.settings
    assert all(same_bits(back.tensors[name], tensors[name]) for name in tensors)
    back.save(folder / "three")
    assert (folder / "three").read_bytes() == (folder / "one").read_bytes()
    with storage.ShardWriter(folder / "shards", settings=settings, shard_bytes=8) as shards:
        for name, tensor in tensors.items():
            shards.add(name, tensor)
    sharded = open_artifact(folder / "shards")
    assert list(sharded.tensors) == list(tensors)
    assert all(same_bits(sharded.tensors[name], tensors[name]) for name in tensors)


# Damage


def small() -> Attribution:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(2, 3, generator=generator) for name in ("score/z", "signed/z", "score/k")}
    return Attribution(
        {name: Labelled(values, ("layer", "head"), {"layer": [2, 5]}) for name, values in scores.items()},
        settings={"method": "atp", "direction": "noising", "n_pairs": 64},
    )


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The safetensors header, the document in it, and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    return head, json.loads(head["__metadata__"][KEY]), data[8 + length :]


def join(head: dict[str, Any], document: dict[str, Any], body: bytes, *, sealed: bool) -> bytes:
    """The inverse of `split`; `sealed` with the right sha256 of the header, as a deliberate forgery would have it."""
    digest = document["header_sha256"] = "0" * DIGEST if sealed else document["header_sha256"]
    tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
    head = {"__metadata__": {KEY: json.dumps(document, separators=(",", ":"))}, **tensors}
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if sealed:
        digest = hashlib.sha256(raw).hexdigest()
    place = len(FILE_PREFIX)
    return len(raw).to_bytes(8, "little") + raw[:place] + digest.encode() + raw[place + DIGEST :] + body


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flip_length_bit(data: bytes, rng: random.Random) -> bytes:
    return flip_bit(data[:8], rng) + data[8:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 2, 8, 64])) + data[place:]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice([1, 2, 8, 64]) :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    place, piece = rng.randrange(len(data)), rng.randbytes(rng.choice([1, 4, 32]))
    return data[:place] + piece + data[place + len(piece) :]


def move_a_block(data: bytes, rng: random.Random) -> bytes:
    one, other = rng.randrange(len(data) - 8), rng.randrange(len(data) - 8)
    return data[:one] + data[other : other + 8] + data[one + 8 :]


def swap_characters(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(8, int.from_bytes(data[:8], "little") + 7)
    return data[:place] + data[place + 1 : place + 2] + data[place : place + 1] + data[place + 2 :]


def swap_tensor_bytes(data: bytes, rng: random.Random) -> bytes:
    head, _, body = split(data)
    one, other = (
        head[name]["data_offsets"] for name in rng.sample([name for name in head if name != "__metadata__"], 2)
    )
    swapped = bytearray(body)
    swapped[slice(*one)], swapped[slice(*other)] = body[slice(*other)], body[slice(*one)]
    return data[: len(data) - len(body)] + bytes(swapped)


def edit_a_setting(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    document["settings"][rng.choice(["method", "direction", "n_pairs", "new"])] = rng.randrange(1000)
    return join(head, document, body, sealed=False)


def forge_offsets(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    head[rng.choice(list(document["tensors"]))]["data_offsets"] = rng.choice(
        [[0, 8], [24, 0], [-24, 0], [0, 2**63], [24, 48.0], [True, 24], [8, 32], [2**70, 2**70 + 24], [0], "0", None]
    )
    return join(head, document, body, sealed=True)


def forge_shape(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    head[rng.choice(list(document["tensors"]))]["shape"] = rng.choice(
        [[3], [2, 4], [-2, -3], [2.0, 3], [2, 3, 1], [], [2**61, 0], [2**100, 3], None, {"2": 3}, ["2", "3"]]
    )
    return join(head, document, body, sealed=True)


def forge_dtype(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    dtypes = ["F64", "I8", "F128", "f32", "", 32, None, ["F32"]]
    head[rng.choice(list(document["tensors"]))]["dtype"] = rng.choice(dtypes)
    return join(head, document, body, sealed=True)


def forge_labels(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    described = document["tensors"][rng.choice(list(document["tensors"]))]
    key, value = rng.choice(
        [
            ("axes", ["layer"]),
            ("axes", ["layer", "layer"]),
            ("axes", "lh"),
            ("axes", [1, 2]),
            ("coords", {"layer": [1]}),
            ("coords", {"layer": [1, 1]}),
            ("coords", {"layer": [1, 2.5]}),
            ("coords", {"layer": "ab"}),
            ("coords", {"pos": [1, 2]}),
            ("coords", [1, 2]),
            ("sha256", "0" * 64),
            ("sha256", 7),
            ("extra", None),
        ]
    )
    described[key] = value
    return join(head, document, body, sealed=True)


def forge_names(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    names = rng.sample(list(document["tensors"]), 2)
    entries = document["tensors"] if rng.random() < 0.5 else head
    if rng.random() < 0.5:
        entries[names[0]], entries[names[1]] = entries[names[1]], entries[names[0]]  # each takes the other's place
    else:
        entries["score/new"] = entries.pop(names[0])
    return join(head, document, body, sealed=True)


def forge_fields(data: bytes, rng: random.Random) -> bytes:
    head, document, body = split(data)
    key = rng.choice([key for key in document if key != "header_sha256"])
    if rng.random() < 0.3:
        del document[key]
    else:
        document[key] = rng.choice([None, 1, [], "mechattr/2", "other", [1, {"a": []}]])
    return join(head, document, body, sealed=True)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bit,
    flip_length_bit,
    truncate,
    insert,
    cut_out,
    overwrite,
    move_a_block,
    swap_characters,
    swap_tensor_bytes,
    edit_a_setting,
    forge_offsets,
    forge_shape,
    forge_dtype,
    forge_labels,
    forge_names,
    forge_fields,
]


def outcome(path: Path) -> str:
    """What opening and verifying a file ends with."""
    try:
        open_artifact(path).verify()
    except ArtifactError:
        return "ArtifactError"
    except Exception as error:
        return repr(error)
    return "accepted"


def test_a_thousand_damaged_files_give_artifact_errors_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    small().save(path)
    whole = path.read_bytes()
    head, document, body = split(whole)
    path.write_bytes(join(head, document, body, sealed=True))
    assert outcome(path) == "accepted"  # the forgeries fail for what they forge, not for how they are put together
    rng = random.Random(0)
    bad: list[tuple[str, int, str]] = []
    count = 0
    while count < 1000:
        mutate = MUTATIONS[count % len(MUTATIONS)]
        damaged = mutate(whole, rng)
        if damaged == whole:  # not a mutation
            continue
        path.write_bytes(damaged)
        if (ended := outcome(path)) != "ArtifactError":
            bad.append((mutate.__name__, count, ended))
        count += 1
    assert bad == []


def test_damaged_folders_give_artifact_errors_and_nothing_else(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with storage.ShardWriter(whole, shard_bytes=1) as shards:
        for layer in range(3):
            shards.add(f"blocks.{layer}.hook_mlp_out", Labelled(torch.rand(1, 2, 3), ("batch", "pos", "d_model")))
    assert outcome(whole) == "accepted"
    rng = random.Random(1)
    bad = []
    for count in range(150):
        damaged = tmp_path / f"damaged{count}"
        shutil.copytree(whole, damaged)
        target = rng.choice(sorted(damaged.iterdir()))
        mutate = rng.choice([flip_bit, truncate, insert, cut_out, overwrite])
        before = target.read_bytes()
        target.write_bytes(mutate(before, rng))
        if target.read_bytes() != before and (ended := outcome(damaged)) != "ArtifactError":
            bad.append((mutate.__name__, target.name, ended))
    assert bad == []


def test_a_reader_that_skips_the_header_sum_misses_an_edited_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    small().save(path)
    path.write_bytes(edit_a_setting(path.read_bytes(), random.Random(0)))
    assert outcome(path) == "ArtifactError"
    monkeypatch.setattr(header, "_check_document", lambda path, document, *rest: document["header_sha256"])
    assert outcome(path) == "accepted"


def test_a_reader_that_skips_the_tensor_sums_misses_swapped_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    small().save(path)
    path.write_bytes(swap_tensor_bytes(path.read_bytes(), random.Random(0)))
    assert outcome(path) == "ArtifactError"

    def unchecked(entry: header.Entry) -> bytearray:
        return bytearray(entry.path.read_bytes()[entry.begin : entry.end])

    monkeypatch.setattr(header.Entry, "read", unchecked)
    monkeypatch.setattr(Attribution, "verify", lambda self: None)
    assert outcome(path) == "accepted"


@pytest.mark.parametrize("turn", ["transposed", "sliced", "strided"])
def test_a_writer_in_memory_order_fails_the_round_trip(
    turn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "sliced": base[:, 2:5], "strided": base[::2, ::3]}
    tensor = Labelled(views[turn], ("pos", "d_model"))

    def comes_back() -> bool:
        storage.save(tmp_path / "a", "cache", {"x": tensor}, {}, {})
        return same_bits(storage.open(tmp_path / "a")["x"], tensor)

    def in_memory_order(name: str, tensor: Labelled) -> torch.Tensor:
        row_major = torch.empty(tensor.shape).stride()
        return tensor.values.as_strided(tensor.shape, row_major).clone()

    assert comes_back()
    monkeypatch.setattr(writer, "_copy", in_memory_order)
    assert not comes_back()


def manifest_with(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest after a change, sealed again."""
    document = json.loads(raw)
    change(document)
    document = {"header_sha256": "0" * DIGEST, **{key: document[key] for key in document if key != "header_sha256"}}
    changed = json.dumps(document, separators=(",", ":")).encode()
    digest = hashlib.sha256(changed).hexdigest().encode()
    return changed[: len(MANIFEST_PREFIX)] + digest + changed[len(MANIFEST_PREFIX) + DIGEST :]


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["shards"][0].update(file="../outside/shard-00000.safetensors"),
        lambda document: document["shards"][0].update(file="/etc/passwd"),
        lambda document: document["shards"][0].update(file=7),
        lambda document: document["shards"][0].update(header_sha256="0" * 64),
        lambda document: document["shards"][0].pop("file"),
        lambda document: document["shards"].reverse(),
        lambda document: document["shards"].pop(),
        lambda document: document["shards"].append(document["shards"][0]),
        lambda document: document.update(shards={"0": "shard-00000.safetensors"}),
        lambda document: document.update(shards=None),
        lambda document: document.update(format="mechattr/3"),
        lambda document: document.pop("kind"),
    ],
)
def test_forged_manifests_give_artifact_errors(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    whole = tmp_path / "whole"
    with storage.ShardWriter(whole, shard_bytes=1) as shards:
        for name in SITES[:2]:
            shards.add(name, Labelled(torch.rand(1, 2, 3), ("batch", "pos", "d_model")))
    shutil.copytree(whole, tmp_path / "outside")
    raw = (whole / MANIFEST).read_bytes()
    (whole / MANIFEST).write_bytes(manifest_with(raw, lambda document: None))
    assert outcome(whole) == "accepted"
    (whole / MANIFEST).write_bytes(manifest_with(raw, change))
    assert outcome(whole) == "ArtifactError"
