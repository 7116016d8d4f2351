"""What `mechattr models` says was verified: each claim is a test, and the test runs for every family."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pytest
from packaging.requirements import Requirement

from mechattr.models.architectures import FAMILIES, TESTED_TRANSFORMERS, VERIFIED, table

# Each claim -> the file and the tests that prove it.
PROOFS: dict[str, tuple[str, tuple[str, ...]]] = {
    "logits": (
        "contract/test_models_families.py",
        (
            "test_without_taps_logits_are_those_of_the_model_bit_for_bit",
            "test_the_same_holds_for_the_attention_that_a_model_was_loaded_with",
        ),
    ),
    "taps": (
        "contract/test_models_families.py",
        (
            "test_taps_outside_scores_and_pattern_keep_every_bit",
            "test_with_all_taps_logits_stay_within_1e_5",
            "test_an_edit_that_changes_nothing_changes_no_bit",
        ),
    ),
    "gradients": (
        "oracle/test_models_gradients.py",
        ("test_finite_differences_agree_with_the_gradient_at_every_site",),
    ),
    "padding": ("contract/test_models_families.py", ("test_a_padded_batch_gives_what_its_rows_give_alone",)),
    "restart": ("contract/test_models_families.py", ("test_a_run_from_a_cached_residual_equals_the_whole_run",)),
    "generation": (
        "unit/test_models_generate.py",
        (
            "test_an_edit_of_strength_zero_gives_the_same_tokens",
            "test_left_padded_prompts_continue_as_they_do_alone",
        ),
    ),
}


def module(path: Path) -> ModuleType:
    """A test file, read as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"proof_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def proven_for(test: Any) -> set[str]:
    """The model types that a test runs for, whatever else it is parametrised with; none where it would not run."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if any(mark.name in ("skip", "skipif", "slow", "xfail") for mark in getattr(test, "pytestmark", [])):
        return set()
    types = {name: config.model_type for name, config in families.configs().items()}
    for names, values, *_ in (mark.args for mark in marks):
        if "family" in names:
            return {types[value if names == "family" else value[0]] for value in values}
    return set()


def test_every_family_has_a_small_model() -> None:
    assert {config.model_type for config in families.configs().values()} == set(FAMILIES)


@pytest.mark.parametrize("claim", VERIFIED)
def test_a_claim_is_a_test_that_runs_for_every_family(claim: str, root: Path) -> None:
    file, names = PROOFS[claim]
    claimed = {row["family"] for row in table() if claim in row["verified"]}
    proofs = module(root / "tests" / file)
    for name in names:
        assert proven_for(getattr(proofs, name)) == claimed, name


def test_control_a_test_of_some_families_or_of_none_is_no_proof(root: Path) -> None:
    proofs = module(root / "tests" / "unit" / "test_models_generate.py")
    assert proven_for(proofs.test_cached_equals_uncached) == {"gpt2", "llama"}
    assert proven_for(proofs.test_edits_reach_what_they_name) == set()
    assert proven_for(pytest.mark.slow(proofs.test_an_edit_of_strength_zero_gives_the_same_tokens)) == set()


def test_only_encoders_do_not_generate() -> None:
    rows = {row["family"]: row["verified"] for row in table()}
    assert rows["llama"] == f"{', '.join(VERIFIED)} (transformers {TESTED_TRANSFORMERS})"
    silent = {name for name, text in rows.items() if "generation" not in text}
    assert silent == {name for name, family in FAMILIES.items() if family.encoder}
    assert silent == {"bert", "electra", "roberta", "xlm-roberta", "distilbert", "modernbert"}


def test_the_release_is_the_one_that_the_tests_are_pinned_to(root: Path) -> None:
    pins = (root / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^transformers==(.*)$", pins) == [TESTED_TRANSFORMERS]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    (allowed,) = re.findall(r'"(transformers[<>=].*?)"', project)
    assert Requirement(allowed).specifier.contains(TESTED_TRANSFORMERS)


def test_the_readme_counts_the_families(root: Path) -> None:
    assert f"| models | {len(FAMILIES)} families" in (root / "README.md").read_text(encoding="utf-8")
