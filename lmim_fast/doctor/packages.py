"""Python, the packages that this one asks for, and its native part."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import sys
from typing import Any

import lmim_fast
from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.machine import visible_gpus
from lmim_fast.native import load

# Distributions whose module has another name.
_MODULES = {
    "opencv-python-headless": "cv2",
    "opencv-python": "cv2",
    "opencv-contrib-python-headless": "cv2",
    "opencv-contrib-python": "cv2",
    "pillow": "PIL",
    "fonttools": "fontTools",
    "nvidia-dali-cuda120": "nvidia.dali",
    "nvidia-dali-cuda130": "nvidia.dali",
}
_SAME = tuple(name for name, module in _MODULES.items() if module == "cv2")
# Packages without which training runs, and what needs them.
_LESSER = {
    "matplotlib": "report and rendered data",
    "pillow": "rendered data and pictures",
    "fonttools": "rendered data and pictures",
    "rapidfuzz": "evaluation",
    "zhconv": "Chinese labels",
    "tensorboard": "curves in TensorBoard",
}
_INSTALL = "from the folder of its source: pip install -e ."


def check_packages(findings: Findings) -> None:
    """Add what there is to say of them."""
    with findings.check("python"):
        _python(findings)
    with findings.check("packages"):
        _packages(findings)
    with findings.check("DALI"):
        _dali(findings)
    with findings.check("native part"):
        _native(findings)


def _python(findings: Findings) -> None:
    version = platform.python_version()
    try:
        asked = importlib.metadata.metadata("lmim_fast")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        findings.warning("python", f"{version}; lmim_fast {lmim_fast.__version__} is not installed", _INSTALL)
        return
    from packaging.specifiers import SpecifierSet

    if asked and not SpecifierSet(asked).contains(version, prereleases=True):
        findings.error("python", f"{version}, asked for is {asked}", "make an environment of such a version")
        return
    findings.ok("python", f"{version}, lmim_fast {lmim_fast.__version__}")


def _requirements(extra: str | None) -> list[Any]:
    """The requirements of this package, of one of its extras alone if that is named."""
    from packaging.requirements import Requirement

    found = map(Requirement, importlib.metadata.requires("lmim_fast") or [])
    if extra is None:
        return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in found if one.marker is not None and one.marker.evaluate({"extra": extra})]


def _packages(findings: Findings) -> None:
    good: list[str] = []
    for requirement in _requirements(None):
        names = _SAME if requirement.name in _SAME else (requirement.name,)
        version = _version(names)
        problem = _problem(names, version, requirement.specifier)
        if problem is None:
            good.append(f"{requirement.name} {version}")
            continue
        install = f'pip install "{requirement.name}{requirement.specifier}"'
        needed = _LESSER.get(requirement.name)
        if requirement.name == "triton" and not visible_gpus():
            needed = "training on a GPU"
        if needed is None:
            findings.error(requirement.name, problem, install)
        else:
            findings.warning(requirement.name, f"{problem}; it is for {needed}", install)
    flash = _version(("flash-attn",))
    good.append(f"flash-attn {flash}" if flash else "flash-attn none (optional)")
    findings.ok("packages", ", ".join(good))


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _problem(names: tuple[str, ...], version: str | None, asked: Any) -> str | None:
    """What is wrong with a package; None where nothing is."""
    module = _MODULES.get(names[0], names[0])
    try:
        importlib.import_module(module)
    except ImportError as error:
        return "is not installed" if version is None else f"{version} is installed but not usable: {error}"
    except Exception as error:  # of whatever kind: a package can fail in its own code
        return f"{version} fails when imported: {type(error).__name__}: {error}"
    if version is not None and not asked.contains(version, prereleases=True):
        return f"{version}, asked for is {asked}"
    return None


def _dali(findings: Findings) -> None:
    """Any of the builds of DALI that the extras name."""
    options = {extra: _requirements(extra) for extra in ("cuda13", "cuda12")}
    there = [
        (requirement, extra)
        for extra, requirements in options.items()
        for requirement in requirements
        if _version((requirement.name,)) is not None
    ]
    install = 'pip install "lmim_fast[cuda13]" (or cuda12): no training batch is made without it'
    if not there:
        findings.error("DALI", "is not installed", install)
        return
    requirement, _ = there[0]
    version = _version((requirement.name,))
    problem = _problem((requirement.name,), version, requirement.specifier)
    if problem is None:
        findings.ok("DALI", f"{requirement.name} {version}")
    else:
        findings.error("DALI", problem, install)


def _native(findings: Findings) -> None:
    try:
        load()
    except ImportError as error:
        slower = f"is not built ({error}): its Python forms run, the same results up to rounding, slower"
        findings.warning("native part", slower, f"with a C++ compiler, {_INSTALL}")
        return
    findings.ok("native part", f"built for {sys.implementation.cache_tag}")
