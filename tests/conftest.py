"""One strict JAX for every test: nothing is promoted, broadcast or warned about in silence.

Set through the environment, before jax is imported, so that child processes obey too.
"""

import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile far more than they run. Without LLVM's optimisations a training step compiles
    # in 40 % of the time, and what it computes is the same program.
    + " --xla_backend_optimization_level=0"
    # And in half of that time, where loops are written by the older emitter and a program is not
    # cut into 32 parts for as many threads: all cores are busy with other tests.
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # Eight devices share a few cores, and XLA ends the process when one of them comes 40 s late to
    # a collective, which a machine with other work can bring about.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# Where a program has two independent collectives, each device waits in one of them with a thread;
# with no more threads than devices, each may wait for another in the wrong one, for ever.
os.environ["PJRT_NPROC"] = "64"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Compiled programs are kept between runs, however small: most of the suite's time is compilation.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

pytest.register_assert_rewrite("tests.laws")  # so that a broken law shows its values


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 10_000
"""Each compiled program takes several mappings of memory, of which Linux gives a process 65,530;
XLA crashes when there are no more."""


def scope_of(nodeid: str) -> str:
    """Tests that share fixtures and compiled programs: those of a file, and in laws.py those of one
    subject, whose name ends the brackets.
    """
    file = nodeid.partition("::")[0]
    subject = nodeid.rpartition("[")[2].rpartition("-")[2]
    return subject if file.endswith("laws.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With pytest-xdist, a scope stays in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between scopes, drops what was compiled before the process runs out of mappings."""
    if nextitem is None or scope_of(item.nodeid) == scope_of(nextitem.nodeid):
        return
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import gc

        import jax

        jax.clear_caches()
        gc.collect()
