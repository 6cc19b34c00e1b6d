"""What units take in and emit, against independent NumPy computations in float64."""

import flax.linen as nn
import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.experimental import pallas
from networks import BY_NAME, NETWORKS, Network, Seen, module_of, normal, relu, sigmoid

import jaxeff
from jaxeff.statistics.sums import sums

# The activations come from float32 forward passes that XLA fuses differently; their sums are as good.
SUMS = 1e-5
FIELDS = ("mean_absolute", "rms", "maximum", "zero_fraction")


@pytest.fixture(scope="module")
def collected():
    """name -> Statistics, compiled once for all tests."""
    known = {}

    def collect(name):
        if name not in known:
            network = NETWORKS[name]()
            known[name] = jaxeff.collect(*network.arguments, **network.keywords)
        return known[name]

    return collect


@pytest.fixture(scope="module")
def seen():
    """name -> what Flax's own interceptor saw: the truth, from nothing of jaxeff."""
    known = {}

    def intercept(name):
        if name not in known:
            network = NETWORKS[name]()
            known[name] = network.seen or _intercepted(network)
        return known[name]

    return intercept


def _intercepted(network: Network) -> Seen:
    module = network.module.clone(lifted=False) if hasattr(network.module, "lifted") else network.module

    def run(variables, batch):
        inputs, outputs = {}, {}

        def record(method, args, kwargs, context):
            output = method(*args, **kwargs)
            if context.method_name in ("__call__", "attend"):
                path = "/".join(context.module.path)
                inputs.setdefault(path, []).append(args[0])
                outputs.setdefault(path, []).append(output)
            return output

        with nn.intercept_methods(record):
            module.apply(variables, *batch, **network.keywords)
        # The model's own output may hold its updated state: no array, and no unit's.
        return inputs, {path: calls for path, calls in outputs.items() if path}

    inputs, outputs = jax.jit(run)(network.variables, network.batch)
    return Seen(*jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, outputs)))


def _sums(array: np.ndarray, axes: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Per unit, over all but the last dimensions, which are the weight's `axes`; laid out like it."""
    over = tuple(range(array.ndim - len(axes)))
    laid = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    reduced = {
        "mean_absolute": np.abs(array).mean(over),
        "rms": np.sqrt(np.square(array).mean(over)),
        "maximum": np.abs(array).max(over),
        "zero_fraction": (array == 0).mean(over),
    }
    return {name: value.reshape(laid) for name, value in reduced.items()}


def _assert_sums(statistics, expected: dict[str, np.ndarray], rtol: float = SUMS) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(statistics, name), value, rtol, atol=1e-7, err_msg=name)
        assert getattr(statistics, name).shape == value.shape


def _calls(sites) -> list[int]:
    """For each site, how many earlier ones have its path."""
    paths = [site.path for site in sites]
    return [paths[:index].count(path) for index, path in enumerate(paths)]


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in network.leaves.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_pre_activations_are_the_outputs_of_the_layers(name, collected, seen):
    sites = collected(name).sites
    for site, call in zip(sites, _calls(sites), strict=True):
        output = seen(name).outputs[module_of(site.path)][call]
        shape = _shapes(NETWORKS[name]())[site.path]
        axes = (*site.layer_axes, *site.unit_axes)
        _assert_sums(site.pre, _sums(output, axes, shape))
        assert np.all(site.pre.count == output.size // np.prod([shape[axis] for axis in axes]))


@pytest.mark.parametrize("name", NETWORKS)
def test_post_activations_are_what_the_units_emit(name, collected, seen):
    sites, expected = collected(name).sites, NETWORKS[name]().sites
    for site, call, truth in zip(sites, _calls(sites), expected, strict=True):
        own = seen(name).outputs[truth.module][call]
        emitted = truth.emits(seen(name)) if truth.emits else BY_NAME[truth.nonlinearity](own)
        axes = (*site.layer_axes, *truth.unit_axes)
        _assert_sums(site.post, _sums(emitted, axes, _shapes(NETWORKS[name]())[truth.path]))


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_are_what_the_weights_multiply(name, collected, seen):
    sites = collected(name).sites
    for site, call in zip(sites, _calls(sites), strict=True):
        taken = seen(name).inputs[module_of(site.path)][call]
        shape = _shapes(NETWORKS[name]())[site.path]
        if site.kind == "embedding":
            taken = np.eye(shape[0])[taken.astype(int)]
        elif site.kind == "conv" and taken.shape[-1] != shape[-2]:
            continue  # Grouped: tested below, by explicit indexing.
        axes = tuple(sorted(site.layer_axes + site.input_axes))
        within = {axis for axis in range(len(shape)) if axis not in site.unit_axes}
        # Of a kernel's window no axis is an input; experts and layers side by side are input and unit both.
        assert site.kind == "conv" or within <= set(axes)
        assert taken.shape[taken.ndim - len(axes) :] == tuple(shape[axis] for axis in axes)
        _assert_sums(site.input, _sums(taken, axes, shape))


@pytest.mark.parametrize(
    ("shape", "order", "groups"),
    [((3, 4, 2), (0, 1, 2), 4), ((3, 4, 1), (0, 1, 2), 4), ((2, 3, 2, 3), (1, 2, 0, 3), 2)],
    ids=["depthwise", "depthwise with a multiplier of 1", "groups on an axis of their own"],
)
def test_a_grouped_kernel_with_axes_for_its_groups_has_the_same_statistics_as_one_without(
    shape, order, groups
):
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    numbers = ("NHC", "HIO", "NHC")

    def laid(kernel):
        moved = jnp.transpose(kernel, order)
        return moved.reshape(3, 4 // groups, -1)

    def convolved(params, x):
        kernel = params["kernel"]
        return jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
            )
        )

    kernel = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    ((own,), (other,)) = (
        jaxeff.collect(*arguments, x).sites
        for arguments in (
            ({"kernel": kernel}, lambda params, x: convolved({"kernel": laid(params["kernel"])}, x)),
            ({"kernel": laid(kernel)}, convolved),
        )
    )
    assert own.nonlinearity == other.nonlinearity == "relu"
    for a, b in ((own.input, other.input), (own.post, other.post)):
        for name in ("absolute_sum", "square_sum", "maximum"):
            mine = laid(jnp.broadcast_to(getattr(a, name), kernel.shape))
            theirs = jnp.broadcast_to(getattr(b, name), mine.shape)
            np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize(("layer", "groups"), [("depthwise", 4), ("grouped", 2)])
def test_each_kernel_element_of_a_grouped_convolution_has_its_own_channels_input(
    layer, groups, collected, seen
):
    taken = seen("convolutions").inputs[layer][0]
    shape = _shapes(NETWORKS["convolutions"]())[f"{layer}/kernel"]
    (site,) = (site for site in collected("convolutions").sites if site.path == f"{layer}/kernel")
    assert site.input.rms.shape == (1, 1, *shape[2:])
    for out in range(shape[3]):
        for within in range(shape[2]):
            channel = taken[..., out // (shape[3] // groups) * shape[2] + within]
            np.testing.assert_allclose(site.input.rms[0, 0, within, out], np.sqrt(np.mean(channel**2)), SUMS)
            np.testing.assert_allclose(site.input.maximum[0, 0, within, out], np.abs(channel).max(), SUMS)


def test_an_embeddings_input_counts_how_often_each_row_was_looked_up():
    module, x = nn.Embed(5, 3), np.array([[0, 3, 3], [3, 1, 0]])
    (site,) = jaxeff.collect(module.init(jax.random.key(0), x), module.apply, x).sites
    assert site.input.absolute_sum.ravel().tolist() == [2, 1, 0, 3, 0]
    assert float(site.input.count) == 6


def _normalize(y, axes):
    """As LayerNorm (over units) and BatchNorm in training (over everything else) do it."""
    mean = y.mean(axes, keepdims=True)
    return (y - mean) / jnp.sqrt(jnp.square(y - mean).mean(axes, keepdims=True) + 1e-5)


# name -> what follows y = x @ w (beside z, other data of the same shape), and what w's units emit.
RULES = {
    "a bias": (lambda y, z: nn.relu(y + jnp.arange(6.0)[None, None]), lambda y, z: relu(y + np.arange(6.0))),
    "adding data": (lambda y, z: nn.relu(y + z), lambda y, z: relu(y + z)),
    "data minus it": (lambda y, z: jnp.tanh(z - y), lambda y, z: np.tanh(z - y)),
    "gating by data": (lambda y, z: nn.sigmoid(y * z), lambda y, z: sigmoid(y * z)),
    "a mask": (lambda y, z: nn.relu(jnp.where(z > 0, y, 0)), lambda y, z: relu(np.where(z > 0, y, 0))),
    "a fixed affine map": (lambda y, z: nn.relu(3 * (y - 0.1)), lambda y, z: relu(3 * (y - 0.1))),
    "batch norm in training": (
        lambda y, z: nn.relu(_normalize(y, (0, 1))),
        lambda y, z: relu(np.asarray(_normalize(y, (0, 1)))),
    ),
    "a gate of its own": (lambda y, z: nn.sigmoid(y) * z, lambda y, z: sigmoid(y)),
    "dropout afterwards": (lambda y, z: nn.relu(y) * (z > 0), lambda y, z: relu(y)),
    "two in a row": (lambda y, z: jnp.tanh(nn.relu(y)), lambda y, z: relu(y)),
    "also an output": (lambda y, z: (y, nn.relu(y)), lambda y, z: relu(y)),
    "a reshape": (lambda y, z: nn.relu(y.reshape(4, 3, 2, 3)), lambda y, z: relu(y)),
    "a transpose": (lambda y, z: nn.relu(y.transpose(2, 0, 1)), lambda y, z: relu(y)),
    "clipping at both ends": (lambda y, z: jnp.clip(y, -1, 1), lambda y, z: np.clip(y, -1, 1)),
    "a square after relu": (lambda y, z: jnp.square(nn.relu(y)), lambda y, z: relu(y) ** 2),
    "sigmoid spelled out": (lambda y, z: 1 / (1 + jnp.exp(-y)), lambda y, z: sigmoid(y)),
    "residual and layer norm": (lambda y, z: nn.relu(_normalize(y + z, -1)), lambda y, z: y),
    "layer norm": (lambda y, z: nn.relu(_normalize(y, -1)), lambda y, z: y),
    "norm of a group of units": (
        lambda y, z: nn.relu(_normalize(y.reshape(4, 3, 2, 3), -1)),
        lambda y, z: y,
    ),
    "unit length": (lambda y, z: jnp.tanh(y / jnp.linalg.norm(y, axis=-1, keepdims=True)), lambda y, z: y),
    "mean size": (lambda y, z: nn.relu(y / jnp.abs(y).mean(-1, keepdims=True)), lambda y, z: y),
    "softmax": (lambda y, z: nn.softmax(y) * z, lambda y, z: y),
    "a mean over positions": (lambda y, z: nn.relu(y.mean(1)), lambda y, z: y),
    "a maximum over positions": (lambda y, z: nn.relu(y.max(1)), lambda y, z: y),
    "a contraction": (lambda y, z: nn.relu(y @ z.transpose(0, 2, 1)), lambda y, z: y),
    "a running sum": (lambda y, z: nn.relu(jnp.cumsum(y, 1)), lambda y, z: y),
    "nothing": (lambda y, z: y, lambda y, z: y),
}


@pytest.mark.parametrize(("after", "emitted"), RULES.values(), ids=RULES)
def test_post_activation_is_the_first_nonlinearity_reached_pointwise(after, emitted):
    w, x, z = normal(5, 6), normal(4, 3, 5), normal(4, 3, 6, seed=8)
    (site,) = jaxeff.collect({"w": w}, lambda params, x, z: after(x @ params["w"], z), (x, z)).sites
    y = x.astype(np.float64) @ w
    _assert_sums(site.post, _sums(emitted(y, z.astype(np.float64)), (1,), (5, 6)))


def test_both_kernels_of_a_gate_share_its_activation():
    params = {"w": normal(5, 6), "v": normal(6, 6)}
    x, h = normal(4, 5), normal(4, 6)
    gate = lambda params, x, h: nn.sigmoid(x @ params["w"] + h @ params["v"])  # noqa: E731
    sites = jaxeff.collect(params, gate, (x, h)).sites
    emitted = sigmoid(x.astype(np.float64) @ params["w"] + h @ params["v"])
    for site in sites:
        _assert_sums(site.post, _sums(emitted, (1,), (5, 6)))
    assert [site.path for site in sites] == ["w", "v"]


def _iterate(x, w, times):
    return [x := np.tanh(x @ w) for _ in range(times)]


# name -> what runs f(x) = tanh(x @ w) in a loop, and all that f returned there.
LOOPS = {
    "scan": (
        lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0],
        lambda x, w: _iterate(x, w, 3),
    ),
    "scan of a scan": (
        lambda f, x: jax.lax.scan(
            lambda c, _: jax.lax.scan(lambda d, _: (f(d), None), c, length=2), x, length=2
        )[0],
        lambda x, w: _iterate(x, w, 4),
    ),
    "fori": (lambda f, x: jax.lax.fori_loop(0, 3, lambda i, c: f(c), x), lambda x, w: _iterate(x, w, 3)),
    "while": (
        lambda f, x: jax.lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, f(s[1])), (0, x)),
        lambda x, w: _iterate(x, w, 4),
    ),
    "branch": (
        lambda f, x: jax.lax.cond(x[0, 0] < 100, lambda: f(x), lambda: x),
        lambda x, w: _iterate(x, w, 1),
    ),
    "map": (lambda f, x: jax.lax.map(lambda row: f(row[None])[0], x), lambda x, w: _iterate(x, w, 1)),
}


@pytest.mark.parametrize(("loop", "emitted"), LOOPS.values(), ids=LOOPS)
def test_a_loop_sums_over_its_iterations(loop, emitted):
    w, x = normal(5, 5), normal(4, 5)
    run = lambda params, x: loop(lambda y: jnp.tanh(y @ params["w"]), x)  # noqa: E731
    (site,) = jaxeff.collect({"w": w}, run, x).sites
    everything = np.stack(emitted(x.astype(np.float64), w))
    _assert_sums(site.post, _sums(everything, (1,), (5, 5)))
    assert float(site.post.count) == len(everything) * 4 and site.nonlinearity == "tanh"
    assert site.uncounted == (loop is LOOPS["while"][0])


def _in_pallas(w, x):
    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x[:, 0], w)


def _in_shard_map(w, x):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    over, whole = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(over, whole), out_specs=over)(x, w)


# name -> a part of the reason why the weight has no site.
REASONS = {
    "a custom kernel": (_in_pallas, "consumed by pallas_call, which has no rule"),
    "a sharded map": (_in_shard_map, "consumed by shard_map, which has no rule"),
    "a ragged product": (
        lambda w, x: jax.lax.ragged_dot(x[:, 0], w[None], jnp.array([4])),
        "consumed by ragged_dot",
    ),
    "carried": (lambda w, x: jax.lax.scan(lambda c, _: (c * 2, x @ c), w, length=2)[1], "carry of a scan"),
    "unused": (lambda w, x: x, "unused"),
    "returned": (lambda w, x: (x, w), "returned as an output"),
    "a slice": (lambda w, x: x[..., :3] @ w[:3], "slice"),
    "sorted": (lambda w, x: x @ jnp.sort(w, axis=0), "sort"),
    # Which of the two rows of units is the weight's own is not followed.
    "stacked with another": (
        lambda w, x: jnp.einsum("bti,nio->btno", x, jnp.stack([w, jnp.ones((5, 5))])),
        "its axes were lost at",
    ),
    "joined to another along a new axis": (
        lambda w, x: jnp.einsum("bti,nio->btno", x, jnp.concatenate([w[None], jnp.ones((1, 5, 5))])),
        "its axes were lost at concatenate",
    ),
}


@pytest.mark.parametrize(("function", "reason"), REASONS.values(), ids=REASONS)
def test_a_weight_that_cannot_be_read_has_a_reason(function, reason):
    x = normal(4, 3, 5)
    found = jax.eval_shape(
        lambda w: jaxeff.collect({"w": w}, lambda params, x: function(params["w"], x), x), normal(5, 5)
    )
    (place,) = found.params
    assert found.sites == () and place.role == "weight"
    assert place.reason is not None and reason in place.reason


@pytest.mark.parametrize("name", ["mlp", "transformer", "convolutions", "dropout"])
def test_collecting_leaves_the_arguments_and_the_outputs_alone(name):
    network = NETWORKS[name]()
    apply = jax.jit(lambda variables: network.module.apply(variables, *network.batch, **network.keywords))
    before = jax.tree.map(np.array, network.variables)
    outputs = apply(network.variables)
    jaxeff.collect(*network.arguments, **network.keywords)
    same = jax.tree.map(np.array_equal, (before, outputs), (network.variables, apply(network.variables)))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["mlp", "cnn", "convolutions", "transformer", "shared"])
def test_merging_two_batches_equals_one_batch(name, collected):
    network = NETWORKS[name]()
    (x,) = network.batch
    half = len(x) // 2 if len(x) % 2 == 0 else 1
    parts = [jaxeff.collect(network.variables, network.module.apply, part) for part in (x[:half], x[half:])]
    merged, whole = jaxeff.merge(*parts), collected(name)
    for ours, theirs in zip(merged.sites, whole.sites, strict=True):
        for side in ("input", "pre", "post"):
            expected = {field: getattr(getattr(theirs, side), field) for field in FIELDS}
            # Sums of float32 in another order.
            _assert_sums(getattr(ours, side), expected, rtol=2e-6)


def test_merging_adds_counts(collected):
    once = collected("mlp")
    twice = jaxeff.merge(once, once)
    for ours, theirs in zip(twice.sites, once.sites, strict=True):
        assert ours.post.count == 2 * theirs.post.count == 64
        assert np.array_equal(ours.post.maximum, theirs.post.maximum)


def test_merging_is_associative_and_commutative(collected):
    a = collected("mlp")
    b, c = (jax.tree.map(lambda x, k=k: x + k, a) for k in (1.0, 2.0))
    left, right = jaxeff.merge(jaxeff.merge(a, b), c), jaxeff.merge(a, jaxeff.merge(c, b))
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_merging_statistics_of_two_models_is_refused(collected):
    for other in ("cnn", "shared"):
        with pytest.raises(ValueError, match="`first` and `second` come from different models"):
            jaxeff.merge(collected("mlp"), collected(other))


def test_modules_report_what_they_return(collected, seen):
    modules = {module.path: module.output for module in collected("cnn").modules}
    assert list(modules)[:4] == ["conv0", "norm0", "conv1", "norm1"]
    for path in ("conv0", "norm0", "conv1", "norm1", "head"):
        output = seen("cnn")[path]
        _assert_sums(modules[path], _sums(output, (0,), output.shape[-1:]))


def test_the_calls_of_a_shared_module_are_told_apart(collected, seen):
    modules = {module.path: module.output for module in collected("shared").modules}
    for path, output in zip(("layer", "layer#1"), seen("shared").outputs["layer"], strict=True):
        _assert_sums(modules[path], _sums(output, (0,), output.shape[-1:]))


def test_rngs_reach_the_model():
    network = NETWORKS["dropout"]()

    def collect(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return jaxeff.collect(*network.arguments, train=True, rngs=rngs)

    first, again, other = (collect(seed).sites[0].post.zeros for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_activations_are_summed_wide(dtype):
    w, x = jnp.ones((1, 1), dtype), jnp.ones((5000, 1), dtype)
    (site,) = jaxeff.collect({"w": w}, lambda params, x: x @ params["w"], x).sites
    # 8 bits would stop counting at 256, 11 bits at 2048.
    assert site.post.absolute_sum.dtype == jnp.float32
    assert float(site.post.absolute_sum[0, 0]) == float(site.post.count) == 5000


def test_a_unit_may_emit_more_values_than_a_float32_can_count():
    x = np.ones((2**25, 1), np.float32)
    x[::2] = 0
    (site,) = jaxeff.collect({"w": np.ones((1, 1), np.float32)}, lambda p, x: x @ p["w"], x).sites
    assert float(site.post.zeros[0, 0]) == float(site.post.absolute_sum[0, 0]) == 2**24
    assert float(site.post.count) == 2**25


def test_long_sums_are_as_good_as_short_ones():
    x = np.random.default_rng(0).random((3_000_000, 2)).astype(np.float32)
    found = sums(x, (0,), (0.25, 0.5))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found.absolute, exact.sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.square, np.square(exact).sum(0), rtol=1e-6)
    assert np.array_equal(found.saturated, ((x <= 0.25) | (x >= 0.5)).sum(0))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8, 130, 96), (0, 1)),
        ((8, 96, 126), (0, 2)),
        ((1031, 70), (0,)),
        ((40, 7, 4, 64), (0, 2)),
        ((70_000,), (0,)),
    ],
)
def test_sums_in_stages_are_those_of_float64(shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[x < -0.5] = 0
    found, exact = sums(x, axis, (-0.25, 0.5)), x.astype(np.float64)
    np.testing.assert_allclose(found.absolute, np.abs(exact).sum(axis), rtol=1e-6)
    np.testing.assert_allclose(found.square, np.square(exact).sum(axis), rtol=1e-6)
    assert np.array_equal(found.maximum, np.abs(x).max(axis))
    assert np.array_equal(found.zeros, (x == 0).sum(axis))
    assert np.array_equal(found.saturated, ((x <= -0.25) | (x >= 0.5)).sum(axis))


def test_units_with_nothing_but_zeros_have_a_zero_fraction_of_1():
    w, x = np.array([[1.0, -1.0]], np.float32), np.ones((3, 1), np.float32)
    (site,) = jaxeff.collect({"w": w}, lambda params, x: nn.relu(x @ params["w"]), x).sites
    assert site.post.zero_fraction.tolist() == [[0.0, 1.0]]
    assert site.post.maximum.tolist() == [[1.0, 0.0]]


WHOLE = {"mlp": forward.mlp, "cnn": forward.cnn, "transformer": forward.transformer}
COUNTS = ("coverage_50", "coverage_80", "coverage_90", "sparsity_1e2", "sparsity_1e3")
COUNTS += ("relative_sparsity_1e2", "relative_sparsity_1e3", "zeros")


def pre(weight, site):
    return jnp.abs(weight) * site.pre.mean_absolute


@pytest.mark.parametrize("criterion", ["activation", pre])
@pytest.mark.parametrize("name", WHOLE)
def test_metrics_equal_those_of_a_forward_pass_written_out_by_hand(name, criterion):
    network = NETWORKS[name]()
    report = jaxeff.analyze(*network.arguments, criterion=criterion)
    layers = WHOLE[name](network.variables, *network.batch)
    assert report.layers.keys() == layers.keys()
    for path, (weight, uses) in layers.items():
        emitted = [before if criterion is pre else after for before, after in uses]
        expected = reference.metrics(forward.importance(weight, emitted))
        for field, value in expected.items():
            ours = float(getattr(report[path].metrics, field))
            # A count of weights may differ by one that float32 rounds across the threshold.
            atol = 1.5 / weight.size if field in COUNTS else 0
            assert ours == pytest.approx(value, rel=1e-4, abs=atol), (path, field)


def test_forward_passes_written_out_by_hand_are_those_of_the_models():
    for name in WHOLE:
        network = NETWORKS[name]()
        outputs = []
        WHOLE[name](network.variables, *network.batch, outputs=outputs)
        expected = network.module.apply(network.variables, *network.batch)
        # float32 against float64, through all layers.
        np.testing.assert_allclose(expected, outputs[0], rtol=1e-4, atol=1e-5)
