"""The frame: lazy names, the table of methods, packaging, house rules, and pages that must keep up with the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import mechattr
from mechattr import cli, errors
from mechattr.methods import METHODS, MethodRow

MAX_LINES = 320


def sources(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


# --- lazy names


def test_importing_the_package_loads_no_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'nnsight', 'transformer_lens', 'ray', 'matplotlib', 'pandas', 'typer'}"
    code = f"import sys, mechattr; mechattr.METHODS; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_help_of_the_command_line_loads_no_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'matplotlib', 'pandas'}"
    code = f"import sys, mechattr.cli; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_package_takes_less_than_a_second_beyond_torch_and_transformers() -> None:
    """Every public name and the bundled model, in CPU time, which other work on the machine does not lengthen."""
    code = (
        "import sys, time, torch, transformers.modeling_utils, transformers.masking_utils\n"
        "begin = time.process_time()\n"
        "import mechattr as ma\n"
        "names = [getattr(ma, name) for name in ma.__all__]\n"
        "spent = time.process_time() - begin\n"
        "ma.load('tiny')\n"
        "backends = {'nnsight', 'transformer_lens', 'ray', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "print(spent < 1, sorted(backends))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True []"


@pytest.mark.parametrize("name", sorted(mechattr.__all__))
def test_every_public_name_exists(name: str) -> None:
    assert getattr(mechattr, name) is not None
    assert name in dir(mechattr)


def test_the_three_lists_of_public_names_agree(root: Path) -> None:
    tree = ast.parse((root / "mechattr/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(mechattr._WHERE) == set(mechattr.__all__) - {"__version__"}


def test_unknown_name_gives_the_nearest_ones() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'atribution_patching': did you mean 'attribution_patching'"
    ):
        mechattr.atribution_patching  # noqa: B018


# --- methods


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS.keys())
def test_a_row_of_the_table_is_true(row: MethodRow, root: Path) -> None:
    module, _, attribute = row.function.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    assert getattr(mechattr, row.name) is function
    assert function.__doc__
    commands = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert row.command is None or row.command in commands
    assert (root / row.page).is_file()
    index = (root / "docs/index.md").read_text()
    promises = ", ".join(sorted(row.promises))
    command = "" if row.command is None else f"`{row.command}`"
    assert f"[`{row.name}`]({Path(row.page).name}) | {row.cost} | {promises or '–'} | {command or '–'} |" in index


def is_method(function: object) -> bool:
    """A method of the field takes a model and a task or prompt, all else by keyword, and returns an artifact."""
    if not inspect.isfunction(function):
        return False
    parameters = inspect.signature(function).parameters.values()
    by_place = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    return by_place in (["model", "task"], ["model", "prompt"])


def unlisted(package: str) -> set[str]:
    listed = {row.function for row in METHODS.values()}
    module = importlib.import_module(package)
    functions = [value for name, value in vars(module).items() if not name.startswith("_") and is_method(value)]
    return {f"{function.__module__}:{function.__name__}" for function in functions} - listed


def test_every_public_method_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unlisted("mechattr.patching") == set() == unlisted("mechattr.decomposition")

    def forgotten(model: object, task: object) -> None: ...

    import mechattr.patching

    monkeypatch.setattr(mechattr.patching, "forgotten", forgotten, raising=False)
    assert unlisted("mechattr.patching") == {f"{__name__}:forgotten"}


# --- packaging


def test_every_package_is_in_the_wheel(root: Path) -> None:
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "mechattr").rglob("__init__.py")}
    assert set(packages) == found | {"mechattr._data"}


def test_a_wheel_carries_the_bundled_models(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("mechattr", "data"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"mechattr"}
    assert {path.name for path in (installed / "mechattr/_data").iterdir()} == {"models"}
    code = (
        "import mechattr as ma; from mechattr.models.files import BUNDLED; print(ma.__file__)\n"
        "for name in BUNDLED: print(len(ma.load(name).tokenize(['The cat']).tokens))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert run.stdout.split() == [str(installed / "mechattr/__init__.py"), "1", "1", "1"]


def test_constraints_pin_every_requirement(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[<>=]", line)[0] for line in wanted} <= pinned
    local = [line for line in lines if "+" in line or "@" in line]  # builds of one machine
    assert local == []


# --- house rules


@pytest.mark.parametrize("folder", ["mechattr", "circuits"])
def test_files_stay_short(folder: str, root: Path) -> None:
    long = {str(path): len(path.read_text().splitlines()) for path in sources(root, folder)}
    assert {path: count for path, count in long.items() if count > MAX_LINES} == {}


def backward_calls(source: str) -> list[int]:
    """Lines that call `.backward()`, which nnsight replaces for the whole process."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "backward"]


def lazy_imports(source: str) -> list[str]:
    """Names taken from the package's lazy list, which the import contract cannot see through."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = [
        alias.name for node in imports for alias in node.names if getattr(node, "module", "mechattr") == "mechattr"
    ]
    return [name for name in names if name == "mechattr" or ":" in mechattr._WHERE.get(name, "")]


def test_only_the_command_line_uses_the_lazy_names(root: Path) -> None:
    assert lazy_imports("import mechattr as ma") == ["mechattr"]
    assert lazy_imports("from mechattr import draw, load") == ["load"]
    users = {path.name for path in sources(root, "mechattr") if lazy_imports(path.read_text())}
    assert users - {"__init__.py"} == {"cli.py"}


def test_gradients_come_from_autograd_grad(root: Path) -> None:
    assert backward_calls("loss.sum().backward()") == [1]
    assert {str(path): backward_calls(path.read_text()) for path in sources(root, "mechattr", "circuits")} == {
        str(path): [] for path in sources(root, "mechattr", "circuits")
    }


# --- pages


def error_classes() -> list[str]:
    kinds = inspect.getmembers(errors, inspect.isclass)
    return [name for name, kind in kinds if issubclass(kind, errors.MechattrError)]


@pytest.mark.parametrize("name", error_classes())
def test_every_error_has_its_entry(name: str, root: Path) -> None:
    page = (root / "docs/errors.md").read_text()
    entry = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert entry is not None, f"docs/errors.md has no entry for {name}"
    assert re.findall(r"\*\*(.+?)\.\*\*", entry[1]) == ["Symptom", "Cause", "What to do"]
    builtin = [base.__name__ for base in getattr(errors, name).__bases__ if not issubclass(base, errors.MechattrError)]
    assert name == "MechattrError" or re.search(rf"Also an? `{builtin[0]}`\.", entry[1])


def test_the_errors_page_has_no_entry_too_many(root: Path) -> None:
    entries = re.findall(r"^## `(\w+)`", (root / "docs/errors.md").read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(error_classes())


def skips(source: str) -> Iterator[str]:
    """The reason of every skip and expected failure in a test file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and re.fullmatch(
            r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)", ast.unparse(node.func)
        ):
            reasons = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            yield ast.literal_eval((reasons or node.args)[0])


def test_every_skip_is_in_the_quarantine(root: Path) -> None:
    planted = "@pytest.mark.skipif(not gpu, reason='no gpu')\ndef test(): pytest.skip('no data')"
    assert sorted(skips(planted)) == ["no data", "no gpu"]
    rows = re.findall(r"^\| `(tests/.+?)` \| (.+?) \|$", (root / "docs/quarantine.md").read_text(), re.MULTILINE)
    found = [
        (str(path.relative_to(root)), reason) for path in sources(root, "tests") for reason in skips(path.read_text())
    ]
    assert sorted(found) == sorted(rows)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/errors.md", "docs/quarantine.md"])
def test_links_between_pages_lead_somewhere(page: str, root: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", (root / page).read_text())
    assert [target for target in targets if not ((root / page).parent / target).exists()] == []


def test_analyses_are_no_part_of_the_package() -> None:
    assert find_spec("mechattr.circuits") is None
