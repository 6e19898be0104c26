"""Meshes: refusals that name a mesh that works, and programs on eight devices against one."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from sapo_jax import model
from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.parallel.sharding import Dimension
from tests import fakes


def test_programs_on_eight_devices():
    """`eight_devices.py`, in a process whose CPU counts as eight devices."""
    fakes.on_eight_devices("tests/parallel/eight_devices.py")


@pytest.mark.slow
def test_more_programs_on_eight_devices():
    fakes.on_eight_devices("tests/parallel/eight_devices.py", "-m", "slow")


@pytest.mark.slow
def test_a_sampler_with_devices_of_its_own():
    fakes.on_eight_devices("tests/parallel/apart.py", "-m", "slow or not slow")


def test_a_mesh_has_every_axis_and_automatic_types():
    """`jax.make_mesh` makes explicit axes, `topologies.make_mesh` automatic ones."""
    mesh = sharding.make_mesh(fsdp=-1, devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"run": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 2}, ("data=2", "number of devices, 1", "data=1, fsdp=1, expert=1, tensor=1")),
        ({"fsdp": -1, "tensor": 2}, ("fsdp=-1", "tensor=2", "does not match")),
        ({"fsdp": -1, "data": -1}, ("only one axis",)),
        ({"tensor": 0}, ("tensor=0", "at least 1")),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(sizes, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        sharding.make_mesh(**sizes, devices=jax.devices()[:1])
    assert all(word in str(error.value) for word in words), error.value


def abstract(**sizes):
    shape = [sizes.get(axis, 1) for axis in sharding.AXES]
    return AbstractMesh(tuple(shape), sharding.AXES, (AxisType.Auto,) * len(shape))


QWEN = model.make("qwen3_0_6b")
MOE = model.make("nano_moe", vocab_size=24)
REFUSED = [
    (params.dimensions(QWEN), {"tensor": 16}, "k_proj", "'kv_heads' of size 8",
     "data=2, fsdp=1, expert=1, tensor=8"),
    (params.dimensions(QWEN), {"tensor": 3}, "'vocab' of size 151936", "size 3", "data=3, fsdp=1"),
    ([*params.dimensions(QWEN), Dimension("batch.prompts", "rows", 8)], {"data": 3},
     "batch.prompts", "size 3", "none works"),
    (params.dimensions(MOE), {"expert": 16}, "experts.{}", "'experts' of size 8", "expert=8"),
    (params.dimensions(MOE), {"fsdp": 128}, "'embed' of size 64", "'fsdp' of size 128", "fsdp=64"),
    ([Dimension("batch.prompts", "rows", 12)], {"data": 2, "fsdp": 4}, "batch.prompts: axis 'rows'",
     "'data' × 'fsdp' of size 2 × 4", "data=2, fsdp=2, expert=1, tensor=2"),
]  # fmt: skip


@pytest.mark.parametrize(("dimensions", "sizes", "name", "numbers", "works"), REFUSED)
def test_a_dimension_that_does_not_divide_is_refused(dimensions, sizes, name, numbers, works):
    """The error names the parameter, its axis, the sizes, and the nearest mesh that works."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        sharding.check(abstract(**sizes), dimensions)
    assert all(word in str(error.value) for word in (name, numbers, works)), error.value
    best = sharding.nearest(sizes, abstract(**sizes).size, dimensions)
    if best is not None:
        sharding.check(abstract(**best), dimensions)


def test_rows_are_split_over_every_axis_but_tensor():
    """The order of the axes keeps the rows of a process together."""
    assert sharding.parts(abstract(data=2, fsdp=3, expert=5, tensor=7)) == 30
    assert sharding.AXES[1:4] == sharding.ROWS
