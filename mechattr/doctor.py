"""What this installation has, what is wrong with it and how to mend it: the answer of `mechattr doctor`."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import Requirement

from mechattr.errors import MechattrError

# Backend of `mechattr.load` -> the library behind it; the first two are needed by everything else.
BACKENDS: Mapping[str, str] = MappingProxyType(
    {"plain": "torch", "hf": "transformers", "transformer_lens": "transformer_lens", "nnsight": "nnsight"}
)
CHECKSUMS = "SHA256SUMS"
REINSTALL = "install mechattr and its requirements again, under constraints.txt"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        topic: what was looked at.
        found: what is there.
        fix: what to do about it; `None` when nothing is wrong.
    """

    topic: str
    found: str
    fix: str | None = None


def diagnose() -> list[Finding]:
    """Looks at versions, backends, device, threads, memory and the bundled model, and changes nothing.

    Every backend is imported in a process of its own: importing nnsight changes torch for the process that does it.
    """
    backends = import_backends(BACKENDS)
    findings = [Finding("python", f"{platform.python_version()} on {platform.platform()}"), *versions(), *backends]
    if all(
        finding.fix is None for finding in backends[:2]
    ):  # without torch and transformers nothing below can be asked
        findings += [*machine(), bundled_model()]
    return findings


def versions() -> Iterator[Finding]:
    """The installed version of every requirement and of Ray, against the range that mechattr declares."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("mechattr") or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            "mechattr", "runs from its sources without being installed", "pip install -e . -c constraints.txt"
        )
        return
    yield Finding("mechattr", metadata.version("mechattr"))
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_version(requirement)
        elif requirement.marker.evaluate({"extra": "ray"}):
            yield check_extra(requirement)


def check_version(requirement: Requirement) -> Finding:
    """One requirement against what is installed."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", f"pip install '{wanted}'")
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, version, None if fits else f"pip install '{wanted}'")


def check_extra(requirement: Requirement) -> Finding:
    """The requirement of an extra: nothing is wrong where it is missing."""
    found = check_version(requirement)
    if found.found != "not installed":
        return found
    name = requirement.name
    return Finding(name, f"not installed, and needed by executor={name!r} only: pip install 'mechattr[{name}]'")


def import_backends(backends: Mapping[str, str], timeout: float = 300.0) -> list[Finding]:
    """Imports the library of each backend in its own process, all at the same time."""
    started = {
        backend: subprocess.Popen(
            [sys.executable, "-c", f"import {library}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for backend, library in backends.items()
    }
    findings = []
    for backend, process in started.items():
        library = backends[backend]
        try:
            _, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            stderr = f"importing took more than {timeout:.0f} s"
        if process.returncode == 0:
            findings.append(Finding(f"backend {backend}", f"{library} imports"))
        else:
            reason = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit status {process.returncode}"
            fix = f"python -c 'import {library}' shows the whole error; {REINSTALL}"
            findings.append(Finding(f"backend {backend}", f"{library} does not import: {reason}", fix))
    return findings


def machine() -> Iterator[Finding]:
    """The device that torch would use, its threads and the memory that is free."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding("device", f"cuda: {torch.cuda.get_device_name()}, {_gib(free)} of {_gib(total)} free")
    elif torch.backends.mps.is_available():
        yield Finding("device", "mps")
    else:
        yield Finding("device", "cpu")
    yield Finding("threads", f"torch uses {torch.get_num_threads()} of {os.cpu_count()} processors")
    yield Finding("free memory", free_memory(Path("/proc/meminfo")))


def free_memory(meminfo: Path) -> str:
    """What Linux says can be had without swapping."""
    if not meminfo.exists():
        return "unknown on this system"
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return _gib(1024 * int(values["MemAvailable"].split()[0]))


def bundled_model() -> Finding:
    """Whether the model `tiny` is there and its files are those that were published."""
    from mechattr.models.files import bundled_path

    try:
        return check_sums(bundled_path("tiny"))
    except MechattrError as error:
        return Finding("bundled model", error.found, error.fix)


def check_sums(folder: Path) -> Finding:
    """The files of a folder against its `SHA256SUMS` (lines of digest, two spaces and name)."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return Finding("bundled model", f"{folder} has no {CHECKSUMS}", REINSTALL)
    expected = {name: digest for digest, name in (line.split("  ", 1) for line in sums.read_text().splitlines())}
    wrong = [name for name, digest in expected.items() if _sha256(folder / name) != digest]
    if wrong:
        return Finding("bundled model", f"missing or changed in {folder}: {', '.join(wrong)}", REINSTALL)
    return Finding("bundled model", f"tiny, {len(expected)} files with the right sha256, in {folder}")


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
