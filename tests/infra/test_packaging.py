"""What is installed, shipped and committed: dependencies, pins, image, top level, direction of imports."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deconv_model", "pipelines")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(line.count("==") == 1 for line in lines), "each line is one exact version"
    return {str(canonicalize_name(r.name)): Version(str(r.specifier).removeprefix("==")) for r in requirements}


def declared(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports anywhere in it; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return names


def third_party(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {*PACKAGES}


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def committed_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_pins_satisfy_the_declared_ranges():
    pinned = pins()
    requirements = declared(*PROJECT["optional-dependencies"])
    assert [str(r) for r in requirements if pinned[canonicalize_name(r.name)] not in r.specifier] == []
    assert [str(r) for r in requirements if not r.specifier] == [], "a dependency without a range"


def test_every_package_the_project_pulls_in_is_pinned():
    # torch is left out: its CUDA builds need packages that its CPU build does not, and it pins those itself.
    pinned = pins()
    missing, seen, todo = set(), set(), declared("bench", "test")
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in pinned:
            missing.add(name)
        if name == "torch" or name in missing or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        for line in importlib.metadata.requires(requirement.name) or []:
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(child)
    assert missing - {"setuptools"} == set()


def test_the_installed_versions_are_the_pinned_ones():
    installed = {str(canonicalize_name(d.name)): Version(d.version) for d in importlib.metadata.distributions()}
    wrong = {n: (v, installed[n]) for n, v in pins().items() if n in installed and installed[n].public != v.public}
    assert wrong == {}


def test_constraints_hold_names_and_public_versions_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    names = [line.partition("==")[0].lower() for line in lines]
    assert names == sorted(set(names))
    assert "deconv" not in names


@pytest.mark.parametrize("version", ["0.147.0", "0.150.0", "0.155.0", "1.0.0"])
def test_fastapi_stays_below_what_breaks_the_prefect_server(version):
    (fastapi,) = [r for r in declared() if r.name == "fastapi"]
    assert Version(version) not in fastapi.specifier
    assert Version("0.139.0") in fastapi.specifier


def test_every_import_is_a_declared_dependency():
    providers = importlib.metadata.packages_distributions()
    allowed = {canonicalize_name(r.name) for r in declared()}
    undeclared = {
        f"{path}: {name}"
        for path in SOURCES
        for name in third_party(path)
        if not allowed & {canonicalize_name(provider) for provider in providers.get(name, [])}
    }
    assert undeclared == set()


def test_the_model_library_needs_only_its_four_packages():
    allowed = {"torch", "numpy", "safetensors", "tokenizers"}
    for path in SOURCES:
        if path.parts[0] == "deconv_model":
            assert third_party(path) <= allowed, path
            assert not [name for name in imports_of(path) if within(name, "pipelines")], path


def test_imports_point_one_way():
    # deconv_model <- pipelines, pipelines.steps <- pipelines.flows <- pipelines.cli
    wrong = []
    for path in SOURCES:
        module, names = module_name(path), imports_of(path)
        if not within(module, "pipelines.flows"):
            wrong += [f"{module} -> {name}" for name in names if within(name, "prefect")]
            if not within(module, "pipelines.cli"):
                wrong += [f"{module} -> {name}" for name in names if within(name, "pipelines.flows")]
        if not within(module, "pipelines.cli", "pipelines.__main__"):
            wrong += [f"{module} -> {name}" for name in names if within(name, "pipelines.cli")]
    assert wrong == []


def test_the_console_script_points_at_a_function():
    module, _, function = PROJECT["scripts"]["deconv"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_all_files_of_the_packages_are_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = {
        path
        for package, globs in setuptools["package-data"].items()
        for g in globs
        for path in ROOT.glob(f"{package}/{g}")
    }
    assert data, "no preset is shipped"
    for path in map(Path, committed_files()):
        if path.parts[0] not in PACKAGES:
            continue
        if path.suffix == ".py":
            assert (ROOT / path.parent / "__init__.py").is_file(), f"{path.parent} is no package"
        else:
            assert ROOT / path in data, f"{path} is not in the package data"


def test_the_dockerfile_is_pinned_and_ends_as_a_plain_user():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    stages = {words[3] for words in lines if words[0] == "FROM" and len(words) == 4}
    bases = [words[1] for words in lines if words[0] == "FROM" and words[1] not in stages]
    assert len(set(bases)) == 1, "the environment is copied between stages, so that they must agree on Python"
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", base) for base in bases)
    final = lines[max(i for i, words in enumerate(lines) if words[0] == "FROM") :]
    users = [words[1] for words in final if words[0] == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number that is not root's, for runAsNonRoot"
    copied = {word for words in final if words[0] == "COPY" for word in words if word.startswith("--from=")}
    assert copied <= {f"--from={stage}" for stage in stages}
    for words in final:
        if "apt-get" in words and "install" in words:
            packages = words[words.index("install", words.index("apt-get")) + 1 : words.index("rm") - 1]
            assert all("=" in word for word in packages if not word.startswith("-")), "an unpinned Debian package"


def test_the_image_gets_every_file_that_its_dockerfile_copies():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    copied = {name for line in copies for name in line.split()}
    assert copied == set(kept)
    assert [name for name in kept if not (ROOT / name).exists()] == []


def test_the_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_top_level_holds_nothing_unexpected():
    allowed = {*PACKAGES, "infra", "tests", "README.md", "pyproject.toml", "constraints.txt", "Makefile", "Dockerfile"}
    top = {name.partition("/")[0] for name in committed_files()}
    assert {name for name in top if not name.startswith(".")} - allowed - {"LICENSE"} == set()


def test_no_committed_file_names_a_machine_or_a_package_index():
    # Written in pieces, so that this file is not found itself.
    pattern = re.compile(r"pypi\." + r"org|pythonhosted\." + r"org|(?<![\w.}-])/" + r"(?:root|work)/")
    found = []
    for name in committed_files():
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []
