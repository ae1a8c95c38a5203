"""Reading the .npy files of others."""

from pathlib import Path

import numpy as np

from jaxrec.errors import UserError


def read_array(file: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory: nothing is allocated for what its header says,
    and what is longer than the file is refused. Objects, which could run code, are not read.

    Raises:
      UserError: it cannot be read as one array of numbers.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's reader raises whatever broken headers lead it to
        raise UserError(f"Cannot read {file}: {error}.") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{file} must be one array, got an archive of arrays.")
    return array
