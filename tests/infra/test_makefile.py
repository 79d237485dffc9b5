"""How `make` finds an interpreter and keeps .venv: with stand-ins for Python and pip that write down their calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG_AGO = 1_000_000_000
INTERPRETERS = ("python3", "python3.11", "python3.12", "python3.13")
NEW_PYTHON = """#!/bin/sh
case "$*" in *venv*)
  echo "$(basename "$0") $*" >> venv.log; rm -rf .venv; mkdir -p .venv/bin; cp pip .venv/bin/python; cp deconv .venv/bin
esac
"""
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
PIP = '#!/bin/sh\necho "$@" >> pip.log; test ! -e no-network\n'
DECONV = '#!/bin/sh\necho "deconv $*"\n'


def script(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    """A checkout where nothing is installed, on a machine whose only new interpreter is python3.12."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (LONG_AGO, LONG_AGO))
    (tmp_path / "bin").mkdir()
    for name in INTERPRETERS:
        script(tmp_path / "bin" / name, NEW_PYTHON if name == "python3.12" else OLD_PYTHON)
    script(tmp_path / "pip", PIP)
    script(tmp_path / "deconv", DECONV)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.defpath}"
    return subprocess.run(["make", *arguments], cwd=folder, env={"PATH": path}, capture_output=True, text=True)


def calls(folder: Path, log: str) -> list[str]:
    file = folder / log
    return file.read_text().splitlines() if file.exists() else []


def edit(file: Path, stamp: Path) -> None:
    """Date `file` after the install that `stamp` marks."""
    os.utime(stamp, (LONG_AGO + 100, LONG_AGO + 100))
    os.utime(file, (LONG_AGO + 200, LONG_AGO + 200))


@pytest.mark.parametrize("target", ["run", "test", "test-fast", "lint", "bench", "clean", "help"])
def test_make_knows_the_target(target):
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout


def test_run_installs_and_passes_arguments(folder):
    result = make(folder, "run", "ARGS=--set train.steps=10")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "deconv run --set train.steps=10"
    assert calls(folder, "venv.log") == ["python3.12 -m venv --clear .venv"]
    (install,) = calls(folder, "pip.log")
    assert install.endswith("install --disable-pip-version-check -c constraints.txt -e .")


def test_nothing_is_installed_twice(folder):
    for _ in range(2):
        assert make(folder, "run").returncode == 0
    assert len(calls(folder, "pip.log")) == 1


def test_tests_add_their_extras_to_the_same_environment(folder):
    assert make(folder, "run").returncode == 0
    for _ in range(2):
        assert make(folder, "test-fast").returncode == 0
    assert [line.rpartition(" ")[2] for line in calls(folder, "pip.log") if "install" in line] == [
        ".",
        ".[bench,test]",
    ]
    assert make(folder, "run").returncode == 0
    assert len(calls(folder, "venv.log")) == 1


def test_the_check_of_every_change_sets_itself_up(folder):
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    path = f"{folder / 'bin'}{os.pathsep}{os.defpath}"
    subprocess.run([folder / ".ci" / "run"], cwd="/", env={"PATH": path}, check=True, capture_output=True)
    install, *checks = calls(folder, "pip.log")
    assert install.endswith("-e .[bench,test]"), "one install is enough"
    assert checks == ["-m ruff format --check .", "-m ruff check .", "-m mypy", "-m pytest"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_the_requirements_is_installed(folder, name):
    assert make(folder, "run").returncode == 0
    edit(folder / name, folder / ".venv" / ".installed")
    for _ in range(2):
        assert make(folder, "run").returncode == 0
    assert len(calls(folder, "pip.log")) == 2
    assert len(calls(folder, "venv.log")) == 1, "a whole environment is brought up to date in place"


@pytest.mark.parametrize("installed_before", [False, True])
def test_an_install_that_failed_is_done_again_from_nothing(folder, installed_before):
    if installed_before:
        assert make(folder, "run").returncode == 0
        edit(folder / "constraints.txt", folder / ".venv" / ".installed")
    before = len(calls(folder, "venv.log"))
    (folder / "no-network").touch()
    assert make(folder, "run").returncode == 2
    (folder / "no-network").unlink()
    result = make(folder, "run")
    assert result.returncode == 0, result.stderr
    assert len(calls(folder, "venv.log")) == before + (1 if installed_before else 2)


def test_a_python_that_is_too_old_is_one_clear_line(folder):
    script(folder / "bin" / "python3.12", OLD_PYTHON)
    result = make(folder, "run")
    assert result.returncode == 2
    message, failed = result.stderr.splitlines()
    assert message.startswith("No Python 3.11 or newer found.")
    assert failed.startswith("make: ***")
    assert not (folder / ".venv").exists()


def test_an_interpreter_can_be_named(folder):
    script(folder / "mine", NEW_PYTHON)
    assert make(folder, "run", f"PYTHON={folder / 'mine'}").returncode == 0
    assert calls(folder, "venv.log") == ["mine -m venv --clear .venv"]


def test_clean_keeps_what_the_user_made(folder):
    assert make(folder, "run").returncode == 0
    for name in (".deconv/train-1", "deconv_model/__pycache__", "pipelines", "tests", "infra", ".mypy_cache"):
        (folder / name).mkdir(parents=True)
    assert make(folder, "clean").returncode == 0
    left = {path.name for path in folder.iterdir()}
    assert {".deconv", "deconv_model", "pyproject.toml"} <= left
    assert not {".venv", ".mypy_cache"} & left
    assert (folder / ".deconv" / "train-1").is_dir()
    assert list((folder / "deconv_model").iterdir()) == []
