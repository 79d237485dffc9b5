import json
import os
import subprocess
import sys
import time

import pytest

from pipelines import lease as leases
from pipelines.errors import InfraError
from pipelines.lease import LEASE_FILE, Lease, read_lease
from pipelines.store import OutputFolder, Storage

# Waits for a line, tries once to take the lease of the folder, says how that ended, and keeps it.
CONTENDER = """
import sys
from pipelines.lease import Lease
from pipelines.store import OutputFolder
lease = Lease(OutputFolder(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print("won" if lease.try_acquire() is None else "lost", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def output(tmp_path):
    return OutputFolder(str(tmp_path / "train-0123456789ab"))


@pytest.fixture
def contend(output):
    """Start processes that are about to take the lease; none outlives the test."""
    processes = []

    def start(count):
        command = [sys.executable, "-c", CONTENDER, output.uri]
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert [answer(process) for process in processes] == ["ready"] * count
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_record(output: OutputFolder, **changes: object) -> dict[str, object]:
    """Put a lease of a living owner into the folder, changed as told; `None` leaves a key out."""
    record = {**Lease(output)._record(), "token": "another", **changes}
    output.write_json(LEASE_FILE, record)
    return record


@pytest.mark.fault
def test_of_processes_that_race_one_wins_and_after_its_death_the_next_takes_over(output, contend):
    processes = contend(6)
    for process in processes:
        go(process)
    answers = [answer(process) for process in processes]
    assert sorted(answers) == ["lost"] * 5 + ["won"]
    winner = processes[answers.index("won")]
    owner = Lease(output).try_acquire()
    assert owner is not None
    assert owner["pid"] == winner.pid
    winner.kill()
    os.waitid(os.P_PID, winner.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the process table
    heir = Lease(output)
    assert heir.try_acquire() is None, "a zombie owns nothing"
    with heir:
        assert read_lease(output)["token"] == heir.token


@pytest.mark.fault
def test_after_a_kill_exactly_one_of_those_who_waited_takes_over(output, contend):
    processes = contend(5)
    go(processes[0])
    assert answer(processes[0]) == "won"
    processes[0].kill()
    processes[0].wait()
    for process in processes[1:]:
        go(process)
    assert sorted(answer(process) for process in processes[1:]) == ["lost"] * 3 + ["won"]


def test_a_lease_is_held_once_and_given_back(output):
    first, second = Lease(output), Lease(output)
    assert first.try_acquire() is None
    with first:
        owner = second.try_acquire()
        assert owner is not None
        assert (owner["token"], owner["pid"]) == (first.token, os.getpid())
        assert str(os.getpid()) in leases.describe_owner(owner)
    assert read_lease(output) is None
    assert second.try_acquire() is None
    with second:
        pass
    assert set(output.sizes()) == {"_lease.lock"}


def test_an_error_in_the_work_gives_the_lease_back(output):
    lease = Lease(output)
    lease.try_acquire()
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    assert read_lease(output) is None


def test_giving_back_leaves_the_lease_of_another(output):
    lease = Lease(output)
    lease.try_acquire()
    with lease:
        write_record(output)
    assert read_lease(output)["token"] == "another"


def test_the_owner_shows_that_it_lives(output, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.01)
    lease = Lease(output)
    lease.try_acquire()
    with lease:
        first = read_lease(output)
        while (now := read_lease(output))["heartbeat"] == first["heartbeat"]:
            time.sleep(0.005)
        assert {**now, "heartbeat": 0} == {**first, "heartbeat": 0}
        record = write_record(output)
        lease._thread.join()
        assert read_lease(output) == record, "an owner that lost its lease does not write over the new one"


def test_a_process_number_that_was_given_again_is_another_process(output):
    write_record(output, process_start="1")
    assert Lease(output).try_acquire() is None
    write_record(output)
    assert Lease(output).try_acquire() is not None, "this process lives"


@pytest.mark.parametrize("pid", [2**22 + 1, None, "12", -1])
def test_a_process_that_cannot_be_is_dead(output, pid):
    write_record(output, pid=pid)
    assert Lease(output).try_acquire() is None


@pytest.mark.parametrize("clock", [-600.0, 0.0, 600.0])
def test_an_owner_elsewhere_lives_as_long_as_its_heartbeat_moves(output, monkeypatch, clock):
    monkeypatch.setattr(leases, "TIMEOUT_S", 0.05)
    lease = Lease(output)
    start = time.time() + clock
    for beat in range(20):
        record = write_record(output, machine="elsewhere", heartbeat=start + beat)
        assert lease.owner_is_alive(record), "its clock is not ours, but it moves"
        time.sleep(0.01)
    while lease.owner_is_alive(record):
        time.sleep(0.01)
    assert lease.try_acquire() is None
    with lease:
        assert read_lease(output)["token"] == lease.token


def test_an_owner_elsewhere_is_watched_before_it_is_taken_for_dead(output):
    record = write_record(output, machine="elsewhere", heartbeat=time.time() - 800.0)
    assert Lease(output).try_acquire() == record


def test_an_owner_elsewhere_that_died_long_ago_is_not_waited_for(output):
    write_record(output, machine="elsewhere", heartbeat=time.time() - 1000.0)
    assert Lease(output).try_acquire() is None


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b"\xff", b"{}"])
def test_a_damaged_record_is_nobodys(output, garbage):
    output.write_bytes(LEASE_FILE, garbage)
    assert Lease(output).try_acquire() is None


def test_a_writer_that_lost_its_lease_stops_at_its_next_write(output):
    lease = Lease(output)
    assert lease.try_acquire() is None
    with lease:
        mine = output.owned_by(lease.token)
        mine.write_bytes("a", b"1")

        def write_while_the_lease_changes_hands() -> None:
            with mine.write("b") as path:
                path.write_bytes(b"2")
                write_record(output, pid=77, user="ann", host="far")

        with pytest.raises(InfraError, match="owned by process 77 of ann on far"):
            write_while_the_lease_changes_hands()
        with pytest.raises(InfraError):
            mine.write_json("c", {})
        with pytest.raises(InfraError):
            mine.finish({}, 1.0)
        output.remove(LEASE_FILE)
        with pytest.raises(InfraError, match="owned by nobody"):
            mine.write_bytes("d", b"4")
    assert [path.name for path in output.local().iterdir() if path.name[0] != "_"] == ["a"]
    assert not output.is_complete()


def test_on_an_object_store_the_record_that_stayed_owns(tmp_path, monkeypatch):
    monkeypatch.setenv("DECONV_CACHE", str(tmp_path / "cache"))
    output = Storage(f"fsspec+memory://{tmp_path.name}").output("train-0123456789ab")
    late = Lease(output)
    monkeypatch.setattr(time, "sleep", lambda _: write_record(output))
    assert late.try_acquire()["token"] == "another"
    output.remove(LEASE_FILE)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    first, second = Lease(output), Lease(output)
    assert first.try_acquire() is None
    with first:
        assert second.try_acquire()["token"] == first.token
    assert read_lease(output) is None


def test_the_record_is_plain_json_for_people(output):
    lease = Lease(output)
    lease.try_acquire()
    with lease:
        record = json.loads(output.local(LEASE_FILE).read_text())
    assert {"host", "pid", "user", "command", "heartbeat"} <= set(record)
