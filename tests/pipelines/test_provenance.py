import json
import shutil
import subprocess
import sys
from pathlib import Path

import pipelines
from pipelines.provenance import collect_provenance

# Collects the facts with a copy of the package that lies where the first argument says.
COLLECT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pipelines.provenance import collect_provenance
print(json.dumps(collect_provenance()))
"""


def collect(folder: Path, **variables: str) -> dict[str, object]:
    command = [sys.executable, "-c", COLLECT, str(folder)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=variables)
    return json.loads(result.stdout)


def copy_of_the_code(folder: Path) -> Path:
    (folder / "pipelines").mkdir()
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(Path(pipelines.__file__).with_name(name), folder / "pipelines" / name)
    return folder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=ann", "-c", "user.email=ann@example.com"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_facts_are_plain_data():
    facts = collect_provenance()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"].count(".") == 2
    assert facts["cpus"] >= 1
    assert all(version for version in facts["packages"].values()), "a package that is not there"


def test_a_checkout_names_its_commit_and_whether_it_was_changed(tmp_path):
    copy_of_the_code(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    facts = collect(tmp_path, **path)
    assert (facts["git_commit"], facts["git_dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)
    with (tmp_path / "pipelines" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    assert collect(tmp_path, **path)["git_dirty"] is True


def test_outside_of_a_checkout_the_image_says_the_commit(tmp_path):
    copy_of_the_code(tmp_path)
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    facts = collect(tmp_path, **path)
    assert (facts["git_commit"], facts["git_dirty"]) == (None, None)
    assert collect(tmp_path, **path, DECONV_GIT_COMMIT="0123abc")["git_commit"] == "0123abc"


def test_a_package_installed_inside_another_checkout_does_not_take_its_commit(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "of the user")
    (tmp_path / ".venv").mkdir()
    copy_of_the_code(tmp_path / ".venv")
    facts = collect(tmp_path / ".venv", PATH="/usr/local/bin:/usr/bin:/bin")
    assert (facts["git_commit"], facts["git_dirty"]) == (None, None)


def test_without_git_nothing_is_said_about_it(tmp_path):
    copy_of_the_code(tmp_path)
    assert collect(tmp_path, PATH="/nowhere")["git_commit"] is None
