"""`jaxrec train` in processes of their own, which tests may kill."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from jaxrec.cli.train import Options, command_line

ROOT = str(Path(__file__).parents[2])
PATIENCE = 240  # seconds


def train_words(path, model, config, runs) -> list[str]:
    """What follows `jaxrec` on the command line of a run."""
    arguments = SimpleNamespace(model=model, train=config, options=Options(runs=runs))
    words = shlex.split(command_line(path, arguments))
    return words[words.index("train") :]


OBEYS_MODES = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs Python such that what a folder's mode forbids is forbidden for root too."""


@contextlib.contextmanager
def started(words, *, environment=None, log=None, obeys_modes=False):
    """Runs a command; it is dead when the block ends."""
    before = ["-c", OBEYS_MODES] if obeys_modes else []
    command = [sys.executable, *before, "-m", "jaxrec", *words]
    output = subprocess.DEVNULL if log is None else log.open("w")
    environment = os.environ | {"PYTHONPATH": ROOT} | (environment or {})
    with (
        contextlib.nullcontext() if log is None else output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def started_together(words, folder, *, processes, devices):
    """The same command as several processes with so many virtual devices each; each writes to
    <folder>/<process>.log."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    with socket.socket() as free, contextlib.ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        folder.mkdir()
        children = []
        for index in range(processes):
            environment = {
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            log = folder / f"{index}.log"
            children.append(stack.enter_context(started(words, environment=environment, log=log)))
        yield children


def wait_for_lines(metrics, lines, child) -> None:
    """Waits until a run has written so many lines of metrics."""
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < lines:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.005)


def kill_after_lines(words, metrics, lines) -> None:
    """Starts a run and kills it once it has written so many lines of metrics."""
    with started(words) as child:
        wait_for_lines(metrics, lines, child)
        child.send_signal(signal.SIGKILL)
