"""Files that are meant to do harm, for the tests of security."""

import os
import pickle
from pathlib import Path


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path) -> bytes:
    """What runs code wherever it is unpickled."""
    return pickle.dumps(Bomb(mark))


def object_array(mark: Path) -> bytes:
    """A .npy file of objects, which NumPy would unpickle if it were allowed to."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled(mark)
