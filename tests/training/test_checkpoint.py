"""Checkpoints: bit-exact on any mesh, or one line that says what to do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrec.errors import UserError
from jaxrec.training import checkpoint, manifest
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.sharding import build_mesh

META = {"model": "package.module:TINY", "config": {"width": 4, "rate": 0.1}, "list": [1, None]}


def state(seed=0, ema=True):
    """A state with every kind of leaf; `table` is large enough to get a file of its own."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {0: jax.random.normal(a, (8, 4)), 1: jnp.ones((2, 0))},
        "table": jax.random.normal(b, (16, 32)),
        "half": jax.random.normal(c, (8,), jnp.bfloat16),
    }
    return {
        "params": params,
        "opt_state": ((), (jax.tree.map(lambda x: x * 2, params), jnp.int32(seed))),
        "ema": jax.tree.map(lambda x: -x, params) if ema else None,
        "step": jnp.int32(7),
        "key": jax.random.key_data(a),
        "flags": jnp.array([True, False]),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf]),
    }


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def same(path, x, y):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path

    jax.tree_util.tree_map_with_path(same, actual, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 5 and 7; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (5, 7):
            checkpoints.save(step, state(step), META)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_saved_is_restored_bit_for_bit(tmp_path, ema):
    original = state(ema=ema)
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, original, META)
        checkpoints.wait()
        assert checkpoints.latest_step() == 7
        assert checkpoints.meta(7) == META
        assert_same_bits(checkpoints.restore(7, abstract(original)), original)


def test_a_fresh_reader_sees_the_same(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5, 7]
        assert_same_bits(checkpoints.restore(5, abstract(state())), state(5))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    values = {str(i): jnp.full((300, 300), float(i)) for i in range(8)}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x - 1, tree), donate_argnums=0)
    overwrite.lower(values).compile()
    shapes = abstract({"params": values})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": values}, {})
        jax.block_until_ready(overwrite(overwrite(values)))
        checkpoints.wait()
        restored = checkpoints.restore(1, shapes)["params"]
    for name, value in restored.items():
        np.testing.assert_array_equal(value, float(name))


def test_restores_onto_another_mesh(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    rows = NamedSharding(build_mesh("fsdp=8"), P("fsdp"))
    blocks = NamedSharding(build_mesh("data=2,model=4"), P("model", "data"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": jax.device_put(params, rows)}, {})
        checkpoints.wait()
        for sharding in (blocks, rows):
            restored = checkpoints.restore(1, abstract({"params": params}, sharding))["params"]
            assert restored["w"].sharding == sharding
            assert_same_bits(restored, params)


def test_restores_only_the_parameters(saved):
    expected = state(7)
    with Checkpoints(saved, read_only=True) as checkpoints:
        shapes = abstract(expected["params"])
        assert_same_bits(checkpoints.restore_params(7, shapes), expected["params"])
        average = checkpoints.restore_params(7, shapes, average=True)
        assert_same_bits(average, expected["ema"])


def test_parameters_without_an_average(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(ema=False), {})
        checkpoints.wait()
        with pytest.raises(UserError, match="has no running average"):
            checkpoints.restore_params(1, abstract(state()["params"]), average=True)


def test_only_the_newest_are_kept(tmp_path):
    small = {"params": {"w": jnp.ones(3)}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("step", [7, 6])
def test_an_existing_or_older_step_is_not_saved_in_silence(copy, step):
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(UserError, match=f"Step {step} was not saved: .* already holds step 7"),
    ):
        checkpoints.save(step, state(), {})


def test_a_missing_step_names_those_there_are(saved):
    with (
        Checkpoints(saved, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"has no checkpoint of step 6; its steps are: 5, 7"),
    ):
        checkpoints.meta(6)


def test_reading_nothing_makes_nothing(tmp_path):
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "none").exists()


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot keep checkpoints in"):
        Checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"half": jnp.ones(9, jnp.bfloat16)}, "bfloat16 [8] there and bfloat16 [9] here"),
        ({"half": jnp.ones(8)}, "bfloat16 [8] there and float32 [8] here"),
        ({"half": None}, "bfloat16 [8] there and absent here"),
        ({"new": jnp.ones(2)}, "absent there and float32 [2] here"),
    ],
)
def test_another_model_is_named(saved, change, message):
    other = state()
    other["params"].update(change)
    message = f"belongs to another model or optimizer: params/{next(iter(change))} is {message}"
    with (
        Checkpoints(saved, read_only=True) as checkpoints,
        pytest.raises(UserError, match=re.escape(message)),
    ):
        checkpoints.restore(7, abstract(other))


def test_another_layout_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAYOUT", manifest.LAYOUT + 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), META)
    monkeypatch.undo()
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(UserError, match="has layout version 2 and this jaxrec reads version 1"),
    ):
        checkpoints.meta(1)


# Damage. Every file of a checkpoint, changed in every way: either one line, or no harm at all.


def flip(place):
    def damage(file):
        data = bytearray(file.read_bytes())
        if data:
            data[int(place * (len(data) - 1))] ^= 0xFF
        file.write_bytes(bytes(data))

    return damage


DAMAGES = {
    "first byte": flip(0),
    "a byte": flip(0.37),
    "middle byte": flip(0.5),
    "last byte": flip(1),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


def read_all(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.meta(7), checkpoints.restore(7, abstract(state()))


def assert_told_or_harmless(folder, file, damage):
    """Returns the message, or None when the damage does not matter."""
    kept = file.read_bytes()
    damage(file)
    try:
        meta, restored = read_all(folder)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"Checkpoint {folder / '7'} is damaged: ")
        assert message.endswith("Remove that folder to go on from step 5.")
        assert "\n" not in message
        return message
    else:
        assert meta == META
        assert_same_bits(restored, state(7))
        return None
    finally:
        file.write_bytes(kept)


def files_of(folder):
    return sorted(file for file in (folder / "7").rglob("*") if file.is_file())


@pytest.mark.parametrize("damage", ["middle byte", "cut short", "missing"])
def test_damage_is_told(copy, damage, capfd):
    data = max(files_of(copy), key=lambda file: file.stat().st_size)
    for file in (copy / "7" / "meta" / "metadata", data, copy / "7" / "params" / "manifest.ocdbt"):
        assert assert_told_or_harmless(copy, file, DAMAGES[damage]) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_told_or_harmless(copy, damage, capfd):
    told = [assert_told_or_harmless(copy, file, DAMAGES[damage]) for file in files_of(copy)]
    assert len(list(filter(None, told))) >= 8
    assert capfd.readouterr() == ("", "")


def test_a_value_that_decodes_but_differs_is_named(copy, monkeypatch):
    """The storage has no checksum over large arrays: the fingerprint is what notices."""
    restore = ocp.CheckpointManager.restore

    def one_bit_off(self, step, args):
        result = restore(self, step, args=args)
        if "params" in result:
            table = result["params"]["table"]
            bits = jax.lax.bitcast_convert_type(table, jnp.uint32).at[3, 4].add(jnp.uint32(1))
            result["params"]["table"] = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return result

    monkeypatch.setattr(ocp.CheckpointManager, "restore", one_bit_off)
    with pytest.raises(UserError, match="is damaged: params/table is not as it was saved"):
        read_all(copy)


def test_a_changed_note_is_noticed(copy):
    file = copy / "7" / "meta" / "metadata"
    note = json.loads(file.read_text())
    note["meta"]["config"]["width"] = 5
    file.write_text(json.dumps(note))
    with pytest.raises(UserError, match="meta does not have its checksum"):
        read_all(copy)


def test_without_an_older_step_the_advice_is_to_start_again(copy):
    shutil.rmtree(copy / "5")
    (copy / "7" / "meta" / "metadata").unlink()
    with pytest.raises(UserError, match="Remove that folder and start again: there is no older"):
        read_all(copy)


@pytest.mark.parametrize("damage", ["middle byte", "cut short"])
def test_a_run_goes_on_from_the_newest_that_is_whole(copy, damage):
    DAMAGES[damage](max(files_of(copy), key=lambda file: file.stat().st_size))
    with Checkpoints(copy) as checkpoints:
        step, restored, (line,) = checkpoints.restore_newest(abstract(state()))
        assert step == 5
        assert_same_bits(restored, state(5))
        assert line.startswith(f"Checkpoint {copy / '7'} is damaged: ")
        target = copy.with_name("copy-damaged") / "7"
        assert line.endswith(f"Going on from step 5; the damaged folder is now {target}.")
        checkpoints.save(7, state(8), META)
    with Checkpoints(copy) as checkpoints:
        step, restored, complaints = checkpoints.restore_newest(abstract(state()))
        assert (step, complaints) == (7, ())
        assert_same_bits(restored, state(8))
    assert any(target.rglob("*"))  # nothing was thrown away


def test_when_all_are_damaged_none_is_touched(copy):
    before = sorted(copy.rglob("*"))
    for step in ("5", "7"):
        (copy / step / "meta" / "metadata").write_text("{")
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(checkpoint.DamagedCheckpoint, match=f"{copy / '7'} is damaged"),
    ):
        checkpoints.restore_newest(abstract(state()))
    assert sorted(copy.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_no_damage(copy):
    other = state()
    other["params"]["half"] = jnp.ones(9)
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(UserError, match="belongs to another model"),
    ):
        checkpoints.restore_newest(abstract(other))
    assert sorted(path.name for path in copy.iterdir()) == ["5", "7"]


# Failing and dying while saving.


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_failed_save_is_told_and_can_be_repeated(copy, monkeypatch, method):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def save(checkpoints):
        checkpoints.save(9, state(9), META)
        checkpoints.wait()

    message = r"Could not save step 9 .*\(No space left on device\); the last good .* step 7"
    with Checkpoints(copy) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(ocp.CheckpointManager, method, fail)
            with pytest.raises(UserError, match=message):
                save(checkpoints)
        if checkpoints.latest_step() == 7:  # what failed may also have been the waiting only
            save(checkpoints)
        assert_same_bits(checkpoints.restore(9, abstract(state())), state(9))


CHILD = """
import os, resource, signal, sys, time
import jax, jax.numpy as jnp
from jaxrec.errors import UserError
from jaxrec.training.checkpoint import Checkpoints

def state(step):
    return {"params": {"w": jax.random.normal(jax.random.key(step), (500, 500))}}

checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state(1), {})
checkpoints.wait()
"""

KILLED = """
checkpoints.save(2, state(2), {})
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""

FULL = """
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond this fails
try:
    checkpoints.save(2, state(2), {})
    checkpoints.wait()
except UserError as error:
    print(error)
assert checkpoints.latest_step() == 1
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
checkpoints.save(2, state(2), {})
checkpoints.close()
"""


def run_child(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(CHILD + script), *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check_child_state(folder, step):
    expected = {"params": {"w": jax.random.normal(jax.random.key(step), (500, 500))}}
    with Checkpoints(folder) as checkpoints:
        assert_same_bits(checkpoints.restore(step, abstract(expected)), expected)
        checkpoints.save(3, expected, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
    assert sorted(path.name for path in folder.iterdir()) in (["1", "3"], ["1", "2", "3"])


@pytest.mark.parametrize(
    "delay",
    [0.0, *(pytest.param(round(0.005 * 1.25**i, 4), marks=pytest.mark.slow) for i in range(20))],
)
def test_killed_while_saving(tmp_path, delay):
    child = run_child(KILLED, tmp_path, delay)
    assert child.returncode == -signal.SIGKILL, child.stderr
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        latest = checkpoints.latest_step()
    assert latest in (1, 2)
    check_child_state(tmp_path, latest)


def test_disk_full_while_saving(tmp_path):
    child = run_child(FULL, tmp_path)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.count("\n") == 1
    assert f"Could not save step 2 to {tmp_path} (File too large)" in child.stdout
    assert "the last good checkpoint is step 1. Make room" in child.stdout
    check_child_state(tmp_path, 2)
