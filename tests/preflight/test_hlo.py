"""Counts of compiled programs: loops, batches written as convolutions, kernels, collectives.

XLA's own count visits a loop's body once (a scan of 8 layers reads an eighth), so each test has a
loop or a form that such a count gets wrong.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import learner, model, objectives
from sapo_jax.model import params
from sapo_jax.parallel import sharding
from sapo_jax.preflight import chips, costs, hlo, programs
from sapo_jax.types import Batch


def compiled(function, *arguments):
    return hlo.parse(hlo.compiled(jax.jit(function).lower(*arguments)).as_text())


def test_nested_loops_count_as_often_as_they_turn():
    def inner(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)[0], None

    def outer(x, w_7):
        return jax.lax.scan(inner, x, w_7)[0]

    module = compiled(outer, jnp.ones((4, 16)), jnp.ones((7, 16, 16)))
    assert costs.flops(module) == 7 * 3 * 2 * 4 * 16 * 16


def test_a_loop_of_unknown_length_turns_as_often_as_it_is_told():
    def loop(x, w, n):
        def around(_, y):
            with jax.named_scope("inner"):
                return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ w), y)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, around, x)

    module = compiled(loop, jnp.ones((4, 16)), jnp.ones((16, 16)), jnp.int32(5))
    assert costs.flops(module) == 2 * 4 * 16 * 16
    unknown = {"outer": 3, "inner": 5}
    assert costs.flops(module, unknown=unknown) == 3 * 5 * costs.flops(module)
    assert costs.flops(hlo.turn(module)) == costs.flops(module)


def test_buffers_inside_of_fusions_do_not_exist():
    def centred(x):
        return jnp.sum(jnp.exp(x[:, None] - x[None, :]), 1)

    largest = costs.buffers(compiled(centred, jnp.ones(512)))[0]
    assert largest.bytes == 4 * 512  # not the 512×512 of the difference


def counted_and_expected(remat, rows, mesh=None):
    """FLOPs of an update on one device, by `costs` and by formula.

    2·N a token forward, twice that backward, once more for remat. What recomputes a layer stops
    before its last matmul, whose result nothing needs. Attention without splash computes all S·S
    scores of a row; the head's logits are computed once.
    """
    s, micro_batches, chunk = 24, 2, 16
    config = model.make("tiny", vocab_size=97, num_hidden_layers=5, attention="xla")
    hp = learner.Hyperparameters(
        objectives.resolve("sapo"), 1e-3, 0.0, 1.0, 1.0, config,
        micro_batches=micro_batches, head_chunk=chunk, remat=remat, mesh=mesh,
    )  # fmt: skip
    shape = (rows * sharding.parts(mesh), s)
    batch = Batch(
        *(jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, bool, jnp.int32, "f4", "f4")),
        jax.ShapeDtypeStruct(shape[:1], jnp.float32),
    )
    batch = programs.placed(batch, mesh, sharding.spec("rows"))
    compiled = hlo.compiled(learner.update.lower(learner.abstract(hp), batch, hp))
    chunks = 3  # of each micro-batch: how many there are is known at run time
    counted = costs.flops(hlo.parse(compiled.as_text()), unknown={"head_chunks": chunks})
    tokens = rows * s
    sizes = {k: np.prod(spec.shape) for k, spec in params.table(config)["layers"].items()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    matmuls = sum(sizes.values()) - norms
    scores = 2 * config.num_hidden_layers * rows * s * s
    scores *= config.num_attention_heads * config.head_dim
    layers = 2 * matmuls * tokens + 2 * scores
    head = 2 * config.vocab_size * config.hidden_size * chunk * chunks * micro_batches
    return counted, (3 + remat) * layers - remat * 2 * sizes["down"] * tokens + 3 * head


@pytest.mark.parametrize(
    ("remat", "rows"), [pytest.param(False, 2, marks=pytest.mark.slow), (True, 4)]
)
def test_an_update_executes_the_flops_of_its_formula(remat, rows):
    """A model with a known count."""
    counted, expected = counted_and_expected(remat, rows)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_an_update_for_tpu_executes_the_flops_of_its_formula(remat):
    """There, matmuls are convolutions, some over padding, and loops have no known trip count."""
    pytest.importorskip("libtpu", reason="compiles for TPU: pip install libtpu")
    mesh = sharding.make_mesh(data=-1, devices=chips.devices("v5e:2x2")[0])
    counted, expected = counted_and_expected(remat, 4, mesh)
    assert counted == pytest.approx(expected, rel=0.01)


def test_the_text_of_a_tpu_program():
    """No trip counts, matmuls as convolutions, `S(1)` for memory on the chip."""
    module = hlo.parse((pathlib.Path(__file__).parent / "tpu_program.hlo").read_text())
    counted = costs.flops(module, kernels={"kernel": lambda i, c: 1000.0})
    assert counted == 2 * 6 * 4 * 5 * 7 + 1000
    gather, scatter = costs.collectives(module)
    assert gather == ("all-gather", 4 * 64 * 8, 9, (9,), "jit(f)/while/body/all_gather")
    assert scatter[:4] == ("reduce-scatter", 4 * 64 * 8, 9, (9,))
    shapes = [buffer.shape for buffer in costs.buffers(module)]
    assert shapes[0] == "f32[16,8]"  # what is gathered, and the kernel's result, stay on the chip
    assert "bf16[6,4,5]" not in shapes
    # A turn reads the part that is gathered onto the chip, writes the scattered one, and counts.
    one = hlo.turn(module)
    assert [c.times for c in costs.collectives(one)] == [1, 1]
    turn = 2 * 4 * 16 * 8 + 3 * 4
    assert costs.memory_bytes(one) == turn
    # Around it: a number is copied, z read, of x a slice and how it is told, w read, the result.
    rest = 2 * 4 + 2 * 6 * 4 * 5 + (4 * 4 * 8 + 4) + 2 * 6 * 5 * 7 + 2 * 6 * 4 * 7
    assert costs.memory_bytes(module) == 9 * turn + rest
