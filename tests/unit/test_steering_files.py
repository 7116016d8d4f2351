"""Steering vectors in the files of other programs: exact round trips, a file built byte by byte, and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from mechattr.errors import ArtifactError, SettingError
from mechattr.sites import full_name
from mechattr.steering import SteeringVector, from_gguf, from_json, gguf, to_gguf, to_json


def vector(**settings: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    sites = [full_name("resid_post", layer) for layer in (11, 1, 3)]
    return SteeringVector.of({name: torch.randn(9, generator=generator) for name in sites}, settings=settings)


def same(a: SteeringVector, b: SteeringVector) -> None:
    assert set(a.sites) == set(b.sites)
    for layer, x in a.directions.items():
        assert torch.equal(x, b.directions[layer])  # bit for bit


def by_hand(architecture: bytes = b"controlvector", version: int = 3, count: int = 1, kind: int = 0) -> bytes:
    """A file of one direction, from the description of the format."""

    def text(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw

    head = b"GGUF" + struct.pack("<IQQ", version, 1, 4)
    head += text(b"general.architecture") + struct.pack("<I", 8) + text(architecture)
    head += text(b"controlvector.layer_count") + struct.pack("<II", 4, count)
    head += text(b"list") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", -1, 7)
    head += text(b"general.alignment") + struct.pack("<II", 4, 64)
    head += text(b"direction.5") + struct.pack("<IQIQ", 1, 3, kind, 0)
    return head + bytes(-len(head) % 64) + struct.pack("<fff", 1.0, -2.5, 0.125)


def test_gguf_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    to_gguf(vector(), path, model_hint="llama")
    again = from_gguf(path)
    same(again, vector())
    assert again.settings["model_hint"] == "llama"
    meta, tensors = gguf.read(path)
    assert meta == {"general.architecture": "controlvector", "controlvector.model_hint": "llama",
                    "controlvector.layer_count": 3}  # fmt: skip
    assert list(tensors) == ["direction.1", "direction.3", "direction.11"]
    first = path.read_bytes()
    to_gguf(again, path, model_hint="llama")
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]
    assert len(first) % gguf.ALIGNMENT == 0


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(by_hand())
    assert from_gguf(path).directions[5].tolist() == [1.0, -2.5, 0.125]
    assert gguf.read(path)[0]["list"] == [-1, 7]
    big = by_hand().replace(struct.pack("<fff", 1.0, -2.5, 0.125), struct.pack(">fff", 1.0, -2.5, 0.125))
    path.write_bytes(big)  # the control: numbers in the other order of bytes
    assert from_gguf(path).directions[5].tolist() != [1.0, -2.5, 0.125]


def test_damaged_and_foreign_gguf_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "v.gguf", by_hand()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ArtifactError, match=r"damaged or truncated|no GGUF file"):
            from_gguf(path)
    wrong = {
        "it is no GGUF file": b"GGML" + whole[4:],
        "GGUF of version 4": by_hand(version=4),
        "GGUF of version 1": by_hand(version=1),
        "the architecture 'llama'": by_hand(b"llama"),
        "1 directions of 2": by_hand(count=2),
        "has type 1, which is not float32": by_hand(kind=1),
        "a tensor 'weights.005'": whole.replace(b"direction.5", b"weights.005"),
        "with NaN or infinity": whole[:-4] + struct.pack("<f", float("nan")),
        "an alignment of 0": whole.replace(struct.pack("<II", 4, 64), struct.pack("<II", 4, 0)),
    }
    for text, data in wrong.items():
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=text):
            from_gguf(path)
    with pytest.raises(ArtifactError, match="No such file"):
        from_gguf(tmp_path / "nowhere.gguf")


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "v.svec"
    variances = {"1": 0.25, "3": 0.5, "11": 0.125}
    to_json(vector(explained_variances=variances), path, model_type="llama")
    again = from_json(path)
    same(again, vector())
    assert again.settings["model_hint"] == "llama" and again.settings["explained_variances"] == variances
    first = path.read_text()
    to_json(again, path, model_type="llama")
    assert path.read_text() == first
    document = json.loads(first)
    assert set(document) == {"model_type", "directions", "explained_variances"}
    wrong = {
        "Expecting": first[:-5],
        "no 'directions'": "[1]",
        "no lists of numbers by layer": json.dumps({"directions": {"1": ["a"]}}),
        "directions of shapes": json.dumps({"directions": {"0": [1.0], "1": [1.0, 2.0]}}),
        "with NaN or infinity": '{"directions": {"0": [NaN]}}',
        "directions of the layer '01'": '{"directions": {"1": [1.0], "01": [2.0]}}',
        "'explained_variances' not by layer": '{"directions": {"1": [1.0]}, "explained_variances": [1.0]}',
        "int too large": json.dumps({"directions": {"1": [10**400]}}),
        "recursion": "[" * 100_000,
    }
    for text, data in wrong.items():
        path.write_text(data)
        with pytest.raises(ArtifactError, match=text):
            from_json(path)


def test_what_the_files_do_not_hold_is_refused(tmp_path: Path) -> None:
    other = SteeringVector.of({full_name("z", 0): torch.ones(2, 3)})
    wide = SteeringVector.of({full_name("resid_post", 0): torch.full((3,), 0.1, dtype=torch.float64)})
    for v, text in ((other, "axes head, d_head at blocks.0.attn.hook_z"), (wide, "that float32 does not hold")):
        with pytest.raises(SettingError, match=text):
            to_gguf(v, tmp_path / "v", model_hint="x")
        with pytest.raises(SettingError, match=text):
            to_json(v, tmp_path / "v", model_type="x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="no folder"):
        to_gguf(vector(), tmp_path / "nowhere" / "v", model_hint="x")
    with pytest.raises(ArtifactError, match="no folder"):
        to_json(vector(), tmp_path / "nowhere" / "v", model_type="x")
    with pytest.raises(SettingError, match="the architecture that a vector is for"):
        to_gguf(vector(), tmp_path / "v", model_hint=None)  # type: ignore[arg-type]
