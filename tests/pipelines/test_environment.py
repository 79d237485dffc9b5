import os
import subprocess
import sys

import pytest

from pipelines.environment import read_environment

VARIABLES = ("DECONV_HOME", "DECONV_STORAGE", "MLFLOW_TRACKING_URI", "DECONV_MLFLOW_ARTIFACTS")
QUIET = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PREFECT_SERVER_ANALYTICS_ENABLED", "RAY_USAGE_STATS_ENABLED")


@pytest.fixture(autouse=True)
def _nothing_is_set(tmp_path, monkeypatch):
    """An environment that says nothing, put back as it was however the code changes it."""
    for name in (*VARIABLES, *QUIET):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_by_default_all_is_kept_in_the_working_folder(tmp_path):
    environment = read_environment()
    home = tmp_path / ".deconv"
    assert environment.home == home
    assert environment.storage == str(home / "steps")
    assert environment.mlflow_tracking_uri == f"sqlite:///{home}/mlflow.db"
    assert environment.mlflow_artifacts == home / "mlflow-artifacts"
    assert list(tmp_path.iterdir()) == [], "reading makes nothing"


def test_what_libraries_and_children_look_for_is_exported(tmp_path):
    read_environment()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/.deconv/mlflow.db"
    assert os.environ["DECONV_MLFLOW_ARTIFACTS"] == f"file://{tmp_path}/.deconv/mlflow-artifacts"
    assert [os.environ[name] for name in QUIET] == ["1", "true", "false", "0"]


def test_a_second_reading_says_the_same():
    first = read_environment()
    assert read_environment() == first, "what the first one exported is no setting of the user"


def test_a_child_in_another_folder_uses_the_same_home(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("DECONV_HOME", "state")
    home = read_environment().home
    assert home == tmp_path / "state"
    code = "from pipelines.environment import read_environment as r; print(r().mlflow_tracking_uri)"
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert child.stdout.strip() == f"sqlite:///{home}/mlflow.db"


def test_home_and_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DECONV_HOME", "~/state")
    assert str(read_environment().home) == "/home/ann/state"


def test_services_of_the_user_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("DECONV_STORAGE", "s3://bucket/steps")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    environment = read_environment()
    assert environment.storage == "s3://bucket/steps"
    assert environment.mlflow_tracking_uri == "http://mlflow:5000"
    assert environment.mlflow_artifacts is None, "a server has a place of its own"
    assert "DECONV_MLFLOW_ARTIFACTS" not in os.environ


def test_empty_variables_are_not_set(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    environment = read_environment()
    assert environment.home == tmp_path / ".deconv"
    assert environment.storage == str(tmp_path / ".deconv" / "steps")
    assert environment.mlflow_tracking_uri.startswith("sqlite:///")


def test_what_the_user_says_about_telemetry_stays(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    read_environment()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
