import logging
import os
import pty
import subprocess
import sys

import pytest

from pipelines.progress import configure_logging, progress

SCRIPT = """
from pipelines.progress import configure_logging, get_logger, progress
configure_logging()
with progress("tokens", total=3, unit="shards") as bar:
    for i in range(3):
        bar.advance(1, note=f"note {i}")
get_logger("pipelines.x").info("one\\u00efline")
print("result")
"""


def lines(caplog):
    return [record.getMessage().split(" after")[0] for record in caplog.records if record.name == "pipelines.progress"]


@pytest.fixture(autouse=True)
def _listen(caplog):
    caplog.set_level(logging.INFO, "pipelines")


def test_in_a_log_the_end_is_a_line_and_quick_work_no_more(caplog):
    with progress("tokens", total=1000, unit="shards") as bar:
        for _ in range(1000):
            bar.advance()
    assert lines(caplog) == ["[tokens] 1,000/1,000 shards"]


def test_work_that_goes_on_after_its_end_says_so_once(caplog):
    with progress("train", total=10, unit="steps") as bar:
        bar.set(9.5)
        bar.set(10, note="loss 3.2")
        bar.set(12)
    assert lines(caplog) == ["[train] 10/10 steps"]
    assert caplog.records[-1].getMessage().endswith("s  loss 3.2")


def test_an_error_in_the_work_comes_through():
    with pytest.raises(ZeroDivisionError), progress("train", total=1, unit="steps"):
        raise ZeroDivisionError


def test_lines_go_to_standard_error_and_results_to_standard_output():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout == "result\n"
    first, second = result.stderr.splitlines()
    assert "  [tokens] 3/3 shards after 0 s" in first
    assert second.endswith("  oneïline")


def test_a_terminal_gets_a_bar_and_keeps_only_the_lines():
    ours, theirs = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert result.stdout == b"result\n"
    assert "3/3" in shown
    assert "note 2" in shown
    assert "[tokens] 3/3 shards" not in shown, "a bar and a line for the same"
    assert "oneïline" in shown


def test_configuring_twice_does_not_say_everything_twice(capsys):
    logger = logging.getLogger("pipelines")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    try:
        configure_logging()
        configure_logging()
        logging.getLogger("pipelines.steps").info("once")
        logging.getLogger("pipelines.steps").debug("never")
        assert [line.split("  ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["once"]
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
