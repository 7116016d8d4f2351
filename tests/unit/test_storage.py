"""Storage: what a file holds, lazy slices, folders of shards, and what bad files are told."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from mechattr import header, storage
from mechattr.artifact import Cache
from mechattr.artifact import open as open_artifact
from mechattr.erasure import checkpoints
from mechattr.errors import ArtifactError, AxisError, OutputExistsError, SettingError
from mechattr.header import MANIFEST, SHARD
from mechattr.labelled import Labelled

NAMES = [f"blocks.{layer}.hook_resid_pre" for layer in range(5)]


def resid(seed: int = 0) -> Labelled:
    values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    return Labelled(values, ("batch", "pos", "d_model"), {"pos": ["S1", "IO", "END"]})


def write_shards(path: Path, shard_bytes: int = 200) -> None:
    with storage.ShardWriter(path, settings={"n": 5}, provenance={"seed": 0}, shard_bytes=shard_bytes) as shards:
        for seed, name in enumerate(NAMES):
            shards.add(name, resid(seed))


def one(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """A tensor after a trip through a file."""
    storage.save(path, "cache", {"x": Labelled(tensor, [f"a{dim}" for dim in range(tensor.ndim)])}, {}, {})
    return storage.open(path)["x"].values


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(24.0).reshape(4, 6)[1:3, 2:5],
        torch.arange(24.0).reshape(4, 6)[::2, ::3],
        torch.arange(3.0).expand(4, 3),
        torch.arange(6.0).to(torch.bfloat16) / 3,
        torch.arange(6.0).to(torch.float16) / 3,
        torch.arange(6.0, dtype=torch.float64) / 3,
        torch.tensor(2.5),
        torch.tensor([True, False, True]),
        torch.arange(-3, 3) * 2**40,
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.bfloat16),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.nn.Parameter(torch.arange(3.0)),
        torch.arange(4)[::4],
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_tensors_of_every_layout_and_dtype_come_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    # equal by definition: the same bits
    assert_close(one(tensor, tmp_path / "a"), tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_tensors_that_share_memory_are_stored_twice(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    parts = {"a": Labelled(base, ("pos",)), "b": Labelled(base[2:], ("pos",)), "c": Labelled(base, ("pos",))}
    storage.save(tmp_path / "a", "cache", parts, {}, {})
    back = storage.open(tmp_path / "a")
    assert [back[name].values.tolist() for name in back] == [base.tolist(), base[2:].tolist(), base.tolist()]


def test_the_file_is_a_safetensors_file_with_one_document(tmp_path: Path) -> None:
    storage.save(tmp_path / "a.safetensors", "cache", {NAMES[0]: resid()}, {"n": 1}, {"seed": 3})
    with safetensors.safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        document = json.loads(file.metadata()["mechattr"])
        assert_close(file.get_tensor(NAMES[0]), resid().values, rtol=0, atol=0)
    assert document["format"] == "mechattr/1"
    assert (document["kind"], document["settings"], document["provenance"]) == ("cache", {"n": 1}, {"seed": 3})
    described = document["tensors"][NAMES[0]]
    assert (described["axes"], described["coords"]) == (["batch", "pos", "d_model"], {"pos": ["S1", "IO", "END"]})
    assert described["sha256"] == storage.checksum(resid().values)


def test_saving_twice_gives_the_same_bytes_and_replaces_the_file(tmp_path: Path) -> None:
    for path in ("a", "b", "b"):
        storage.save(tmp_path / path, "cache", {name: resid() for name in NAMES}, {"n": 1}, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    storage.save(tmp_path / "b", "cache", {NAMES[0]: resid(seed=1)}, {"n": 1}, {})
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    storage.save(target, "cache", {NAMES[0]: resid()}, {}, {})
    before = target.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        storage.save(target, "cache", {NAMES[0]: resid(seed=1)}, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", Labelled(torch.zeros(1, dtype=torch.complex64), ("pos",)), "dtype torch.complex64"),
        ("__metadata__", resid(), "a reserved or unprintable name"),
        ("", resid(), "a reserved or unprintable name"),
        ("\ud800", resid(), "a reserved or unprintable name"),
    ],
)
def test_what_has_no_place_in_the_format_is_refused(name: str, tensor: Labelled, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        storage.save(tmp_path / "a", "cache", {name: tensor}, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="create the folder first"):
        storage.save(tmp_path / "none" / "a", "cache", {}, {}, {})
    with pytest.raises(OutputExistsError, match="choose a file name"):
        storage.save(tmp_path, "cache", {}, {}, {})


# Lazy slices


@pytest.mark.parametrize(
    "index", [0, -1, slice(0, 1), slice(2, 0), (1, slice(1, 3)), (slice(None), 2), (0, -1, 3), (), slice(-1, None)]
)
def test_lazy_slices_are_slices_of_the_whole(index: object, tmp_path: Path) -> None:
    storage.save(tmp_path / "a", "cache", {"x": resid()}, {}, {})
    handle = storage.open(tmp_path / "a").lazy("x")
    assert (handle.axes, handle.shape, handle.dtype) == (resid().axes, resid().shape, torch.float32)
    picked = handle[index]
    assert_close(picked.values, resid().values[index], rtol=0, atol=0)
    items = index if isinstance(index, tuple) else (index,)
    kept = dict(zip(resid().axes, [*items, slice(None), slice(None)][:3] if items else [slice(None)] * 3, strict=True))
    expected = {axis: resid().coords[axis][item] for axis, item in kept.items() if isinstance(item, slice)}
    assert {axis: tuple(coords) for axis, coords in picked.coords.items()} == {
        axis: tuple(coords) for axis, coords in expected.items()
    }
    assert_close(handle.load().values, resid().values, rtol=0, atol=0)


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.empty(0, 2), torch.tensor([True, False])])
def test_lazy_scalars_and_empty_tensors(tensor: torch.Tensor, tmp_path: Path) -> None:
    storage.save(tmp_path / "a", "cache", {"x": Labelled(tensor, ["a", "b"][: tensor.ndim])}, {}, {})
    assert_close(storage.open(tmp_path / "a").lazy("x")[()].values, tensor, rtol=0, atol=0)


@pytest.mark.parametrize("index", [2, -3, slice(0, 2, 2), "S1", None, 1.0, (0, 0, 0, 0), [0, 1]])
def test_indices_that_are_out_of_range_or_no_index_are_refused(index: object, tmp_path: Path) -> None:
    storage.save(tmp_path / "a", "cache", {"x": resid()}, {}, {})
    with pytest.raises(AxisError):
        storage.open(tmp_path / "a").lazy("x")[index]


def test_a_lazy_slice_checks_shape_and_a_full_read_checks_the_sum(tmp_path: Path) -> None:
    path = tmp_path / "a"
    storage.save(path, "cache", {"x": resid()}, {}, {})
    opened = storage.open(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert opened.lazy("x")[0].shape == (3, 4)  # documented: a slice cannot check the sum of the whole
    for read in (opened.lazy("x").load, opened.verify, lambda: opened["x"]):
        with pytest.raises(ArtifactError, match="its sha256 does not match"):
            read()
    storage.save(path, "cache", {"x": Labelled(torch.zeros(3), ("pos",))}, {}, {})
    with pytest.raises(ArtifactError, match="another shape or dtype"):
        opened.lazy("x")[0]
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="changed since it was opened"):
        opened.lazy("x")[0]
    path.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        opened.verify()


# Folders


def test_a_folder_of_shards_opens_like_a_file(tmp_path: Path) -> None:
    write_shards(tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        MANIFEST,
        "shard-00000.safetensors",  # 96 bytes a tensor, so three of them reach the limit of 200
        "shard-00001.safetensors",
    ]
    opened = Cache.load(tmp_path / "cache")
    opened.verify()
    assert list(opened) == NAMES
    assert (opened.settings, opened.provenance) == ({"n": 5}, {"seed": 0})
    for seed, name in enumerate(NAMES):
        assert_close(opened[name].values, resid(seed).values, rtol=0, atol=0)
        assert_close(storage.open(tmp_path / "cache").lazy(name)[1].values, resid(seed).values[1], rtol=0, atol=0)
    assert Cache.load(tmp_path / "cache", lazy=True)["resid_pre", 4].coords["pos"] == ("S1", "IO", "END")


@pytest.mark.parametrize(("shard_bytes", "count"), [(1, 5), (97, 3), (200, 2), (10**6, 1)])
def test_shards_are_cut_at_the_byte_limit(shard_bytes: int, count: int, tmp_path: Path) -> None:
    write_shards(tmp_path / "cache", shard_bytes)
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == count


def test_the_same_tensors_give_the_same_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_writer_copies_what_it_is_given(tmp_path: Path) -> None:
    tensor = resid()
    with storage.ShardWriter(tmp_path / "cache") as shards:
        shards.add(NAMES[0], tensor)
        expected = tensor.values.clone()
        tensor.values.zero_()
    assert_close(Cache.load(tmp_path / "cache")[NAMES[0]].values, expected, rtol=0, atol=0)


def test_an_exception_inside_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with storage.ShardWriter(tmp_path / "cache", shard_bytes=1) as shards:
            shards.add(NAMES[0], resid())
            assert len(list(tmp_path.iterdir())) == 1  # the folder under its temporary name
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with storage.ShardWriter(tmp_path / "cache") as shards:
            shards.add(NAMES[0], resid())
            (tmp_path / "cache").mkdir()

    for _ in range(2):  # at the end of the first, at the start of the second
        with pytest.raises(OutputExistsError, match="choose another name or remove it"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_name_is_added_once(tmp_path: Path) -> None:
    def write() -> None:
        with storage.ShardWriter(tmp_path / "cache", shard_bytes=1) as shards:
            shards.add(NAMES[0], resid())
            shards.add(NAMES[0], resid())

    with pytest.raises(SettingError, match="use each name once"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_foreign_shards_are_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "cache", tmp_path / "other"
    write_shards(folder)
    with storage.ShardWriter(other, shard_bytes=1) as shards:
        for name in NAMES:
            shards.add(name, resid(9))
    first, extra = folder / "shard-00000.safetensors", folder / "shard-00007.safetensors"
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(ArtifactError, match=r"a folder that holds 'shard-00001\.safetensors'\n"):
        open_artifact(folder)
    first.write_bytes((other / first.name).read_bytes())
    with pytest.raises(ArtifactError, match=r"shard-00000\.safetensors belongs to another folder"):
        open_artifact(folder)
    first.write_bytes(kept)
    extra.write_bytes(kept)
    with pytest.raises(ArtifactError, match=r"'shard-00007\.safetensors'\n  fix: restore the shards"):
        open_artifact(folder)
    extra.unlink()
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="a folder without a readable manifest"):
        open_artifact(folder)


def test_one_shard_alone_points_to_its_folder(tmp_path: Path) -> None:
    write_shards(tmp_path / "cache")
    with pytest.raises(ArtifactError, match=f"one shard of a folder\n  fix: open the folder {tmp_path / 'cache'}"):
        open_artifact(tmp_path / "cache" / "shard-00000.safetensors")


def test_a_file_of_another_kind_cannot_pose_as_a_shard(tmp_path: Path) -> None:
    write_shards(tmp_path / "cache", shard_bytes=10**6)
    storage.save(tmp_path / "cache" / "shard-00000.safetensors", "cache", {NAMES[0]: resid()}, {}, {})
    with pytest.raises(ArtifactError, match="belongs to another folder"):
        storage.open(tmp_path / "cache")
    assert SHARD != "cache"


# Foreign files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0: truncated, or no safetensors file"),
        (b"PK\x03\x04" + b"\0" * 60, "truncated, or no safetensors file"),
        (b"\xff" * 8, "truncated, or no safetensors file"),
        ((4).to_bytes(8, "little") + b"\xff{}\xfe", "a header that is not JSON: 'utf-8' codec"),
        ((4).to_bytes(8, "little") + b"[[]]", "a header that is not a JSON object"),
        ((15).to_bytes(8, "little") + b'{"a":1,"a":NaN}', "a header that is not JSON: NaN is not JSON"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "a header that is not JSON: a key occurs twice"),
        ((11).to_bytes(8, "little") + b'{"a":1e999}', "a header that is not JSON: 1e999 is not JSON"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "a header that is not JSON"),
        ((2).to_bytes(8, "little") + b"{}", "not a mechattr artifact: no tag 'mechattr/1'"),
    ],
)
def test_files_that_are_no_artifacts_are_told_so(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path)
    assert str(caught.value).startswith(f"to open {path}\n  found: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"mechattr": '{"format": "other/1"}'}])
def test_plain_safetensors_files_are_not_artifacts(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "a", metadata=metadata)
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "a")
    assert "found: not a mechattr artifact" in str(caught.value)
    assert "fix: open a file that an artifact's save() wrote" in str(caught.value)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mechattr.writer.FORMAT", "mechattr/2")
        storage.save(tmp_path / "a", "cache", {}, {}, {})
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "a")
    assert "found: format 'mechattr/2'; this version reads 'mechattr/1'\n  fix: upgrade mechattr" in str(caught.value)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file or directory"):
        open_artifact(tmp_path / "none")


# No pickle


CHECKPOINTS = Path(checkpoints.__file__)


def pickling(source: str) -> list[str]:
    """The imports and calls in a source text that would read or write pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save"}
        found += [name for name in names if name in banned or name.split(".")[0] in banned]
    return found


def test_no_module_reads_or_writes_pickles(root: Path) -> None:
    sources = sorted((root / "mechattr").rglob("*.py"))
    assert Path(header.__file__) in sources
    found = {path.name: names for path in sources if (names := pickling(path.read_text()))}
    # published probes are torch checkpoints: the one place that reads them takes tensors only
    assert found == {"checkpoints.py": ["pickle", "pickle.UnpicklingError", "torch.load"]}
    calls = [node for node in ast.walk(ast.parse(CHECKPOINTS.read_text())) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    assert [[ast.unparse(k) for k in node.keywords if k.arg == "weights_only"] for node in loads] == [
        ["weights_only=True"]
    ]


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load('x')", "from torch import load", "import joblib"],
)
def test_the_search_for_pickles_finds_them(source: str) -> None:
    assert pickling(source) != []
