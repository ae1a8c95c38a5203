"""One writer per folder, and no trace of a dead one."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from jaxrec.errors import UserError
from jaxrec.training.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from jaxrec.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = f"run is being written by process {holder.pid} on .* choose another --name"
        with pytest.raises(UserError, match=refused), locked(folder):
            pytest.fail("two processes hold one folder")
        holder.send_signal(signal.SIGKILL)
    with locked(folder) as complaint:  # the lock file is still there
        assert complaint is None
        assert f"process {os.getpid()} on " in (folder / "lock").read_text()


def test_the_holder_lets_go_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="power"), locked(tmp_path):
        raise RuntimeError("the power failed")
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path) as complaint:
        assert "cannot lock (Operation not supported): see to it that no other run" in complaint


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"Cannot write in .*Choose another place"),
        locked(tmp_path / "file" / "run"),
    ):
        pytest.fail("locked a folder below a file")
