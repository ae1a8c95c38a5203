"""One writer per run folder: a lock that the kernel releases when its process ends, however it
ends.

A lock file that is merely there means nothing, so that a run that was killed leaves nothing to
clean up. Between hosts the lock holds where the file system passes flock on: local disks, NFS (with
its lock manager, from Linux 2.6.12), GPFS, and Lustre mounted with `flock`. Where it is refused, as
on some FUSE mounts, the run goes on unlocked and says so. A mount that keeps flock to its own host
(Lustre with `localflock`, gcsfuse) stops only a second run on the same host.
"""

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxrec.errors import UserError

LOCK_FILE = "lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Holds the folder for this process alone; makes it when missing.

    Yields:
      None, or a line that says that this file system cannot lock.

    Raises:
      UserError: another process holds the folder, or nothing can be written there.
    """
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"Cannot write in {folder} ({error.strerror}). Choose another place with --runs,"
            " or make that folder writable."
        ) from error
    try:
        yield _take(handle, folder)
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> str | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            raise UserError(
                f"{folder} is being written by {holder or 'another process'}. Wait for it or stop"
                " it, or choose another --name."
            ) from error
        if error.errno not in _UNSUPPORTED:
            raise UserError(f"Cannot lock {folder} ({error.strerror}).") from error
        return (
            f"The file system of {folder} cannot lock ({error.strerror}): see to it that no other"
            " run writes there."
        )
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
    return None
