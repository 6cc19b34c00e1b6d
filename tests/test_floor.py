"""The roofline floor, by values computed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrinkable import NETWORKS

from jaxeff import cost

CHIP = cost.Chip("toy", {"float32": 1000.0, "bfloat16": 2000.0}, 100.0, "made up")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_product_by_hand():
    found = cost.floor(jnp.dot, shape(2, 3), shape(3, 5), chip=CHIP)
    assert (found.flops, found.bytes) == (2 * 2 * 3 * 5, 4 * (6 + 15 + 10))
    assert found.compute_seconds == pytest.approx(0.06) and found.memory_seconds == pytest.approx(1.24)
    assert (found.seconds, found.bound) == (found.memory_seconds, "memory")


def test_the_peak_is_that_of_the_operands():
    found = cost.floor(
        jnp.dot, shape(100, 100, dtype=jnp.bfloat16), shape(100, 100, dtype=jnp.bfloat16), chip=CHIP
    )
    assert found.compute_seconds == pytest.approx(2e6 / 2000) and found.bound == "compute"
    # Of a dtype that nothing is known of, the fastest.
    found = cost.floor(
        jnp.dot, shape(100, 100, dtype=jnp.float16), shape(100, 100, dtype=jnp.float16), chip=CHIP
    )
    assert found.compute_seconds == pytest.approx(2e6 / 2000)


def test_operations_in_turn_are_no_faster_than_all_together():
    def function(x, w, v):
        return (x @ w) @ v

    # The first reads much and calculates little, the second the other way round.
    found = cost.floor(function, shape(1, 100), shape(100, 1), shape(1, 1000), chip=CHIP)
    first, second = found.entries if len(found.entries) == 2 else (found.entries[0], None)
    assert second is None and first.operator == "dot_general"  # one row for each module and operator
    assert found.seconds <= found.in_turn_seconds

    def named(x, w, v):
        with jax.named_scope("first"):
            y = x @ w
        with jax.named_scope("second"):
            return y @ v

    first, second = cost.floor(named, shape(1, 100), shape(100, 1), shape(1, 1000), chip=CHIP).entries
    assert (first.module, first.flops, first.bytes) == ("first", 200, 800)
    assert (second.module, second.flops, second.bytes) == ("second", 2000, 8000)
    assert first.seconds == pytest.approx(8.0) and second.seconds == pytest.approx(80.0)


def test_arguments_are_read_once_and_results_written_once():
    def function(x, w):
        y = jnp.tanh(x)
        return y @ w, y @ w.T, x + y

    found = cost.floor(function, shape(4, 4), shape(4, 4), chip=CHIP)
    assert found.bytes == 4 * (16 + 16 + 3 * 16)
    assert cost.floor(lambda x, unread: 2 * x, shape(4), shape(9), chip=CHIP).bytes == 2 * 16
    assert cost.floor(lambda x: x, shape(4), chip=CHIP).bytes == 0
    assert cost.floor(lambda x: x.reshape(2, 2).T, shape(4), chip=CHIP).bytes == 2 * 16


def test_a_scan_is_what_it_is_unrolled():
    def scanned(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, weights)

    def unrolled(weights, x):
        sums = []
        for i in range(6):
            sums.append(x.sum())
            x = jnp.tanh(x @ weights[i])
        return x, jnp.stack(sums)

    arguments = shape(6, 8, 8), shape(3, 8)
    loop, flat = (cost.floor(function, *arguments, chip=CHIP) for function in (scanned, unrolled))
    assert (loop.flops, loop.bytes) == (flat.flops, flat.bytes)
    assert loop.bytes == 4 * (6 * 64 + 24 + 24 + 6)
    assert loop.seconds == pytest.approx(flat.seconds)


def test_only_the_rows_that_are_looked_up_are_read():
    found = cost.floor(lambda table, i: 2 * table[i], shape(1000, 8), shape(3, dtype=jnp.int32), chip=CHIP)
    assert found.bytes == 4 * (3 * 8 + 3 + 3 * 8)
    assert cost.floor(lambda x: 2 * x[:2], shape(100), chip=CHIP).bytes == 4 * (2 + 2)


def test_a_step_of_decoding_reads_its_cache_and_writes_one_position():
    def step(cache, key, query, position):
        cache = jax.lax.dynamic_update_slice(cache, key, (position, 0))
        return cache, cache @ query

    arguments = shape(50, 8), shape(1, 8), shape(8), shape(dtype=jnp.int32)
    found = cost.floor(step, *arguments, chip=CHIP)
    position_and_zero = 4
    assert found.bytes == 4 * (50 * 8 + 8 + 8 + 8 + 50) + position_and_zero


def test_loops_and_branches_say_what_is_assumed():
    def function(x, w):
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, jnp.sin, x)
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    found = cost.floor(function, shape(16, 16), shape(16, 16), chip=CHIP)
    assert sum(entry.flops for entry in found.entries if entry.operator == "dot_general") == 2 * 16**3
    assert [one.operator for one in found.statements] == ["cond", "while"]
    uncounted = cost.floor(jnp.sort, shape(8), chip=CHIP)
    assert uncounted.bytes == 2 * 32 and uncounted.statements[0].kind == "uncounted"


@pytest.mark.parametrize("name", ["cnn with flatten", "gpt", "lstm", "scanned transformer"])
def test_flops_are_those_that_are_counted(name):
    network = NETWORKS[name]()
    variables = jax.eval_shape(network.module.init, jax.random.key(0), *network.batch)
    found = cost.floor(network.module.apply, variables, *network.batch, chip="h100")
    counted = cost.count(variables, network.module.apply, network.batch).total
    assert found.flops == counted.flops - 2 * counted.padding_macs
    results = jax.eval_shape(network.module.apply, variables, *network.batch)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((variables, network.batch, results))]
    assert found.bytes <= sum(sizes)
    assert all(not entry.module.startswith(type(network.module).__name__) for entry in found.entries)


def test_chips_that_makers_and_jax_know():
    matrices = [shape(4096, 4096, dtype=jnp.bfloat16)] * 8

    def layers(weights, x):
        for w in weights:
            x = x @ w
        return x

    found = [
        cost.floor(layers, matrices, shape(n, 4096, dtype=jnp.bfloat16), chip="tpu v5e") for n in (1, 1024)
    ]
    # 8 x 33.6 MB at 820 GB/s; 8 x 34.4 GFLOPs at 197 TFLOPs a second.
    assert found[0].bound == "memory" and found[0].seconds == pytest.approx(327.4e-6, rel=1e-3)
    assert found[1].bound == "compute" and found[1].seconds == pytest.approx(1395e-6, rel=1e-3)
    # A device of JAX is both cores of a v4.
    assert cost.floor(jnp.dot, shape(2, 2), shape(2, 2), chip="TPU v4").chip.rate("bfloat16") == 275e12
    with pytest.raises(TypeError, match=r"`function` must be a function, got int: it comes first"):
        cost.floor(1, jnp.tanh, chip="h100")
    with pytest.raises(ValueError, match="`chip` must be one of 'tpu v2', .*'h100'.*, got 'tpu'"):
        _ = cost.floor(jnp.dot, shape(2, 2), shape(2, 2), chip="tpu")


def test_a_measured_peak_is_a_chip():
    peak = cost.Peak("here", "float32", 1000.0, 100.0)
    one, other = (cost.floor(jnp.dot, shape(2, 3), shape(3, 5), chip=chip) for chip in (peak, CHIP))
    assert one.seconds == other.seconds and one.chip.source == "measured by cost.peak"


def test_what_is_shown():
    model, x = nn.Dense(5), np.ones((2, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = cost.floor(model.apply, variables, x, chip=CHIP)
    text = str(found)
    assert text.startswith(
        "At least 1.44 s on toy, bound by memory"
    ) and "A floor, not a latency." in text.replace("\n", " ")
    assert found.to_dict()["seconds"] == found.seconds == pytest.approx(4 * (6 + 15 + 5 + 10) / 100)
    assert {entry["operator"] for entry in found.to_dict()["entries"]} == {"dot_general", "add"}
