"""What golden tests share: the cases in a file's FOLDERS one after another, the model of each and
its tokens."""

import jax.numpy as jnp
import pytest

from tests.golden.harness import Case, of_no_case


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folders = metafunc.module.FOLDERS
        names = [folder.name for folder in folders]
        metafunc.parametrize("case", folders, indirect=True, ids=names, scope="module")


def pytest_collection_modifyitems(config, items):
    """Where there is no case of a kind, pytest would skip one test; here there is none."""
    left_out = [item for item in items if of_no_case(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.load_model()


@pytest.fixture(scope="module")
def tokens(case):
    return jnp.asarray(case["input_ids"], jnp.int32)
