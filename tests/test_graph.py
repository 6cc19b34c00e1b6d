"""Which operation consumes each weight, and what its units emit: structure alone, nothing compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from networks import NETWORKS

import jaxeff
from jaxeff import graph
from jaxeff.graph import nonlinearities

UNITS = jnp.zeros((4, 6))
NO_HOOKS = graph.Hooks()


@pytest.fixture(scope="module")
def found():
    """The traced statistics of each network: shapes in place of numbers."""
    known = {}

    def trace(name):
        if name not in known:
            network = NETWORKS[name]()
            known[name] = jax.eval_shape(lambda v: _collect(network, v), network.variables)
        return known[name]

    return trace


def _collect(network, variables):
    return jaxeff.collect(variables, network.module.apply, network.batch, **network.keywords)


def _pair(function, params):
    """The graph of a plain function of named arrays."""
    names, leaves = zip(*params.items(), strict=True)
    closed = jax.make_jaxpr(lambda *leaves: function(**dict(zip(names, leaves, strict=True))))(*leaves)
    described = [graph.Leaf(name, leaf.shape, leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
    return graph.build(graph.flatten(closed), described)


def _nonlinearity(function):
    """What follows `x @ w` in `function(x @ w)`, x of shape (5, 4)."""
    (site,) = _pair(lambda w, x: function(x @ w), {"w": UNITS, "x": jnp.zeros((5, 4), jnp.int32)}).sites
    return site.activation.nonlinearity


@pytest.mark.parametrize("name", NETWORKS)
def test_each_weight_is_paired_with_its_sites_in_execution_order(name, found):
    sites = [(site.path, site.kind, site.nonlinearity, site.unit_axes) for site in found(name).sites]
    assert sites == [site[:4] for site in NETWORKS[name]().sites]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_leaf_is_in_exactly_one_place(name, found):
    statistics, network = found(name), NETWORKS[name]()
    assert sorted(place.path for place in statistics.params) == sorted(network.leaves)
    with_sites = {site.path for site in statistics.sites}
    for place in statistics.params:
        without_reason = place.role == "weight" and place.reason is None
        assert without_reason == (place.path in with_sites)
        assert place.role == "weight" or place.reason is None


@pytest.mark.parametrize("name", NETWORKS)
def test_leaves_without_a_site_say_what_they_are(name, found):
    network = NETWORKS[name]()
    places = {place.path: place for place in found(name).params}
    reasons = {path: place.reason for path, place in places.items() if place.reason is not None}
    assert reasons.keys() == network.unpaired.keys()
    assert all(part in reasons[path] for path, part in network.unpaired.items())
    for path, place in places.items():
        if place.role != "weight":
            assert place.role == network.others.get(path, path.rpartition("/")[2])


@pytest.mark.parametrize("name", NETWORKS)
def test_places_are_in_forward_order(name, found):
    network = NETWORKS[name]()
    used = [place.path for place in found(name).params if place.path not in network.unpaired]
    weights = [path for path in used if any(path == site.path for site in network.sites)]
    assert weights == list(dict.fromkeys(site.path for site in network.sites))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layers_own_bias_belongs_to_its_pre_activation(name, found):
    paths = {place.path for place in found(name).params}
    for site in found(name).sites:
        own = site.path.rpartition("/")[0] + "/bias"
        assert site.bias == (own if own in paths and site.kind != "embedding" else None)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("mlp", {"Dense_0/kernel": 8 * 16, "Dense_1/kernel": 16 * 12, "Dense_2/kernel": 12 * 5}),
        # Output positions x kernel elements: 'SAME' on 8 x 8; 3 x 3 at stride 2 on 4 x 4 leaves 1 x 1.
        ("cnn", {"conv0/kernel": 64 * 9 * 3 * 6, "conv1/kernel": 9 * 6 * 8, "head/kernel": 8 * 4}),
        ("convolutions", {"depthwise/kernel": 8 * 7 * 9 * 8, "grouped/kernel": 8 * 7 * 9 * 4 * 6}),
        ("dense general", {"split/kernel": 7 * 8 * 12, "join/kernel": 7 * 12 * 5}),
        ("transformer", {"wpe/embedding": 0, "block/expand/kernel": 6 * 12 * 24}),
    ],
)
def test_macs_are_per_example(name, macs, found):
    counted = {site.path: site.macs for site in found(name).sites}
    assert {path: counted[path] for path in macs} == macs


SPELLINGS = {
    "identity": [
        lambda y: y,
        lambda y: y.T.reshape(2, 3, 5),
        lambda y: 3 * y - 1,
        lambda y: jnp.maximum(y @ y.T, 0),
    ],
    "relu": [
        nn.relu,
        lambda y: jnp.maximum(y, 0),
        lambda y: jnp.maximum(0.0, y),
        lambda y: jnp.where(y > 0, y, 0),
        lambda y: jnp.where(y <= 0, 0, y),
        lambda y: jnp.clip(y, 0, None),
        lambda y: y * (y > 0),
        jax.jit(nn.relu),
        lambda y: nn.relu(y.reshape(5, 2, 3)),
    ],
    "gelu_tanh": [
        nn.gelu,
        lambda y: 0.5 * y * (1 + jnp.tanh(0.7978845608 * (y + 0.044715 * y**3))),
        lambda y: 0.5 * y * (1 + jnp.tanh(0.7978845608 * y * (1 + 0.044715 * y * y))),
    ],
    "gelu_erf": [
        lambda y: nn.gelu(y, approximate=False),
        lambda y: 0.5 * y * (1 + jax.lax.erf(y / 2**0.5)),
        lambda y: y * jax.scipy.stats.norm.cdf(y),
    ],
    "silu": [nn.silu, lambda y: y * nn.sigmoid(y), lambda y: y / (1 + jnp.exp(-y))],
    "tanh": [jnp.tanh, nn.tanh],
    "sigmoid": [nn.sigmoid, lambda y: 1 / (1 + jnp.exp(-y))],
    "elu": [nn.elu, nn.celu, lambda y: jnp.where(y > 0, y, jnp.exp(y) - 1)],
    "selu": [nn.selu, lambda y: 1.0507009873 * nn.elu(y, 1.6732632423)],
    "softplus": [nn.softplus, lambda y: jnp.log(1 + jnp.exp(y)), lambda y: jnp.logaddexp(y, 0)],
    "relu6": [nn.relu6, lambda y: jnp.clip(y, 0, 6), lambda y: jnp.minimum(nn.relu(y), 6)],
    "hard_tanh": [nn.hard_tanh, lambda y: jnp.clip(y, -1, 1)],
    "hard_sigmoid": [nn.hard_sigmoid, lambda y: jnp.clip(y / 6 + 0.5, 0, 1)],
    "hard_silu": [nn.hard_silu, lambda y: y * nn.relu6(y + 3) / 6],
    "mish": [jax.nn.mish, lambda y: y * jnp.tanh(nn.softplus(y))],
    "squared_relu": [lambda y: jnp.square(nn.relu(y)), lambda y: jnp.maximum(y, 0) ** 2],
    "quick_gelu": [lambda y: y * nn.sigmoid(1.702 * y)],
    "soft_sign": [nn.soft_sign, lambda y: y / (1 + jnp.abs(y))],
    "log_sigmoid": [nn.log_sigmoid, lambda y: -nn.softplus(-y)],
    "abs": [jnp.abs, lambda y: jnp.maximum(y, -y), lambda y: jnp.where(y < 0, -y, y)],
    "square": [jnp.square, lambda y: y**2, lambda y: y * y],
    "exp": [jnp.exp, lambda y: jnp.power(jnp.e, y)],
    "leaky_relu": [nn.leaky_relu, lambda y: nn.leaky_relu(y, 0.3), lambda y: jnp.maximum(0.2 * y, y)],
    "pointwise": [jnp.sin, jnp.floor, lambda y: jnp.where(y > 1, y, -1)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        pytest.param(name, spelling, id=f"{name}-{number}")
        for name, spellings in SPELLINGS.items()
        for number, spelling in enumerate(spellings)
    ],
)
def test_a_nonlinearity_is_named_however_it_is_spelled(name, spelling):
    assert _nonlinearity(spelling) == name


def test_spellings_cover_the_catalog():
    assert nonlinearities.CATALOG.keys() <= SPELLINGS.keys()


def grouped(x, w, groups):
    numbers = ("NHC", "HIO", "NHC")
    x = x.astype(w.dtype)
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def rows(w, indices):
    """The columns of w, looked up as named axes are: of slices of size 1, squeezed after."""
    numbers = jax.lax.GatherDimensionNumbers((0, 2), (), (1,))
    return jax.lax.gather(w, indices[:, None], numbers, (w.shape[0], 1), mode="clip")[..., 0]


SITES = {
    "a transposed weight": (lambda w, x: x @ w.T, {"w": (6, 4)}, (5, 4), [("dense", {0}, {1})]),
    "batched weights (experts)": (
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
        {"w": (3, 4, 6)},
        (3, 5, 4),
        [("dense", {0, 2}, {0, 1})],
    ),
    "a weight made of two (low rank)": (
        lambda w, a, b, x: x @ (w + a @ b),
        {"w": (4, 6), "a": (4, 2), "b": (2, 6)},
        (5, 4),
        [("dense", {1}, {0})],
    ),
    "a kernel laid out (out, in, space)": (
        lambda w, x: jax.lax.conv(x.astype(w.dtype), w, (1, 1), "SAME"),
        {"w": (6, 3, 2, 2)},
        (2, 3, 5, 5),
        [("conv", {0}, {1})],
    ),
    "a reshaped weight": (
        lambda w, x: x @ w.reshape(4, 6),
        {"w": (4, 2, 3)},
        (5, 4),
        [("dense", {1, 2}, {0})],
    ),
    "a depthwise kernel laid out (space, channels, multiplier)": (
        lambda w, x: grouped(x, w.reshape(3, 1, 8), 4),
        {"w": (3, 4, 2)},
        (2, 5, 4),
        [("conv", {1, 2}, {1})],
    ),
    "a grouped kernel laid out (groups, space, in, out)": (
        lambda w, x: grouped(x, w.transpose(1, 2, 0, 3).reshape(3, 2, 6), 2),
        {"w": (2, 3, 2, 3)},
        (2, 5, 4),
        [("conv", {0, 3}, {0, 2})],
    ),
    "rows that a gather leaves a dimension of": (
        lambda w, x: rows(w.T, x),
        {"w": (6, 4)},
        (5,),
        [("embedding", {1}, {0})],
    ),
}


@pytest.mark.parametrize(("function", "shapes", "batch", "expected"), SITES.values(), ids=SITES)
def test_axes_are_those_of_the_weight_as_it_is_stored(function, shapes, batch, expected):
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    sites = _pair(function, {**arrays, "x": jnp.zeros(batch, jnp.int32)}).sites
    first = [(site.kind, set(site.unit_axes), set(site.input_axes)) for site in sites if site.leaf == 0]
    assert first == expected


def test_the_first_nonlinearity_in_execution_order_is_the_post_activation():
    assert _nonlinearity(lambda y: jnp.tanh(nn.relu(y))) == "relu"
    assert _nonlinearity(lambda y: (jnp.tanh(y), nn.relu(y))) == "tanh"


@pytest.mark.parametrize("name", ["mlp", "transformer", "cnn in training", "dropout", "lifted"])
def test_an_inlined_program_computes_what_the_model_does(name):
    network = NETWORKS[name]()
    function = lambda variables: network.module.apply(variables, *network.batch, **network.keywords)  # noqa: E731
    program = graph.flatten(jax.make_jaxpr(function)(network.variables))
    outputs, observed = jax.jit(lambda leaves: graph.evaluate(program, leaves, NO_HOOKS))(
        jax.tree.leaves(network.variables)
    )
    expected = jax.tree.leaves(jax.jit(function)(network.variables))
    assert not observed and len(outputs) == len(expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        # Both are compiled from the same operations; only the fusions may differ.
        assert jnp.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_observer_sees_its_value_once_and_the_value_is_not_kept():
    program = graph.flatten(jax.make_jaxpr(lambda x: jnp.tanh(2.0 * x).sum())(jnp.ones(3)))
    doubled = program.operations[0].outputs[0]
    seen = []
    hooks = graph.Hooks({doubled: lambda x: seen.append(x) or x.max()})
    _, observed = graph.evaluate(program, [jnp.ones(3)], hooks)
    assert len(seen) == 1 and {value: float(kept) for value, kept in observed.items()} == {doubled: 2.0}


# What a weight goes through on its way to the data.

W, STACK, V = jnp.ones((4, 4)), jnp.ones((3, 4, 4)), jnp.ones((4, 4))
MASK = jnp.tri(4)


def _each(p, x):
    for w in p["w"]:
        x = jax.nn.relu(x @ w)
    return x


def _scanned(select):
    return lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, select(p["w"]))[0]


def _noisy(p, x, rngs):
    return jax.nn.relu(x @ (p["w"] * jax.random.bernoulli(rngs, 0.5, (4, 4))))


READ = {
    "masked by a constant": (lambda p, x: jax.nn.relu(x @ (p["w"] * MASK)), W, {}),
    "masked by an argument": (lambda p, x, m: jax.nn.relu(x @ jnp.where(m > 0, p["w"], 0)), W, {"m": MASK}),
    "under noise": (_noisy, W, {"rngs": jax.random.key(0)}),
    "normalized": (lambda p, x: jax.nn.relu(x @ (p["w"] / jnp.linalg.norm(p["w"]))), W, {}),
    "scanned": (_scanned(lambda w: w), STACK, {}),
}
NOT_READ = {
    "layers of a stack, one by one": (_each, STACK, "before dot_general"),
    "a scan over part of a stack": (_scanned(lambda w: w[:2]), STACK, "part of an axis"),
    "a scan over a stack reversed": (_scanned(lambda w: w[::-1]), STACK, "axis 0"),
    "units reversed": (lambda p, x: x @ p["w"][:, ::-1], W, "axis 1"),
    "units permuted": (lambda p, x: x @ p["w"][:, jnp.array([1, 0, 3, 2])], W, "axis 1"),
    "halves of two weights": (
        lambda p, x: x @ jnp.concatenate([p["w"][:, :2], V[:, :2]], 1),
        W,
        "concatenate",
    ),
    "matrices looked up": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, p["w"][jnp.argmax(x, 1) % 3]),
        STACK,
        "matrices",
    ),
    "multiplied by another weight": (lambda p, x: x @ (V + p["w"] @ p["w"]), W, "axes"),
    "beside data, and sorted by data": (
        lambda p, x: (jnp.concatenate([p["w"], x]), jax.lax.sort((x[:4], p["w"]), num_keys=1)),
        W,
        "consumed by sort",
    ),
}


@pytest.mark.parametrize(("function", "weight", "arguments"), READ.values(), ids=READ)
def test_a_weight_stays_one_under_what_does_not_depend_on_the_batch(function, weight, arguments):
    statistics = jaxeff.collect({"w": weight}, function, jnp.ones((8, 4)), **arguments)
    assert [site.path for site in statistics.sites] == ["w"]


@pytest.mark.parametrize(("function", "weight", "reason"), NOT_READ.values(), ids=NOT_READ)
def test_part_of_a_weight_is_never_paired_as_the_whole(function, weight, reason):
    statistics = jaxeff.collect({"w": weight}, function, jnp.ones((8, 4)))
    assert not statistics.sites and reason in statistics.params[0].reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_beside_those_of_data_are_values_and_not_weights(rows, axis):
    def function(p, x):
        return jax.nn.relu(
            jnp.concatenate([p["tokens"], x] if axis == 0 else [p["tokens"].T, x], axis) @ p["w"]
        )

    params = {"tokens": jnp.ones((rows, 4)), "w": W if axis == 0 else jnp.ones((4 + rows, 4))}
    statistics = jaxeff.collect(params, function, jnp.ones((8 if axis == 0 else 4, 4)))
    assert [site.path for site in statistics.sites] == ["w"]
    (tokens,) = (info for info in statistics.params if info.path == "tokens")
    assert (tokens.role, tokens.reason) == ("consumed by concatenate", None)


def test_a_mask_among_the_inputs_is_pointed_out():
    statistics = jaxeff.collect({"w": W}, lambda p, x, m: x @ (p["w"] * m), (jnp.ones((8, 4)), MASK))
    assert "mask" in statistics.params[0].reason


def test_a_scale_as_large_as_the_batch_is_still_a_scale_of_the_data():
    params = {"scale": jnp.ones((2, 4)), "w": W}
    statistics = jaxeff.collect(params, lambda p, x: (x * p["scale"]) @ p["w"], jnp.ones((2, 4)))
    assert [site.path for site in statistics.sites] == ["w"]


@pytest.mark.parametrize(("sign", "nonlinearity"), [(1.0, "tanh"), (-1.0, "relu")])
def test_a_weight_in_both_branches_is_read_in_the_one_taken(sign, nonlinearity):
    def function(p, x):
        return jax.lax.cond(x.sum() > 0, lambda y: jnp.tanh(y @ p["w"]), lambda y: jax.nn.relu(y @ p["w"]), x)

    statistics = jaxeff.collect({"w": W}, function, sign * jnp.ones((8, 4)))
    assert {site.nonlinearity for site in statistics.sites if site.post.count > 0} == {nonlinearity}
    assert jaxeff.analyze({"w": W}, statistics=statistics)["w"].side == "post"
