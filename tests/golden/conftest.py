"""What golden tests share: the cases in a file's FOLDERS one after another, the model of each and
its tokens."""

import jax.numpy as jnp
import pytest

from tests.golden.harness import Case


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folders = metafunc.module.FOLDERS
        names = [folder.name for folder in folders]
        metafunc.parametrize("case", folders, indirect=True, ids=names, scope="module")


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.load_model()


@pytest.fixture(scope="module")
def tokens(case):
    return jnp.asarray(case["input_ids"], jnp.int32)
