"""Models of any make are one function: the same network gives the same report however it is written."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import drawn, normal

import jaxeff
from jaxeff import cost, prune

ROWS = ("nonlinearity", "kind", "unit_axes", "macs")


class LinenNet(nn.Module):
    """Convolution, BatchNorm, dropout, attention and a recurrent cell, in one chain."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9, name="norm")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.Dropout(0.5, deterministic=not self.train, name="dropout")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        x = nn.gelu(nn.Dense(10, name="expand")(x))
        x = nn.RNN(nn.GRUCell(5, name="cell"), name="rnn")(x)
        return nn.Dense(3, name="head")(x)


class NNXNet(nnx.Module):
    """The same, with the same names; but for the GRU, whose gates NNX fuses into one kernel a side."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(8, rngs=rngs)
        self.expand = nnx.Linear(8, 10, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(10, 5, rngs=rngs))
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(x.reshape(x.shape[0], -1, 8))
        x = self.layer_norm(self.attention(x))
        return self.head(self.rnn(nnx.gelu(self.expand(x))))


@pytest.fixture(scope="module")
def pair():
    """The two networks with the same parameters and running averages, and a batch."""
    x = normal(4, 4, 4, 2)
    variables = drawn(LinenNet(), x)
    model = NNXNet(nnx.Rngs(0))
    model.eval()
    params = dict(variables["params"])
    cell = params.pop("cell")
    gates = [cell[f"i{gate}"] for gate in "rzn"]
    params["rnn"] = {
        "cell": {
            "dense_i": {name: jnp.concatenate([gate[name] for gate in gates], -1) for name in gates[0]},
            "dense_h": {"kernel": jnp.concatenate([cell[f"h{gate}"]["kernel"] for gate in "rzn"], -1)},
        }
    }
    # Linen's candidate adds its bias inside the reset gate, NNX's has none there.
    variables["params"]["cell"]["hn"]["bias"] = jnp.zeros(5)
    nnx.update(model, nnx.State(params))
    nnx.update(model, nnx.State({"norm": variables["batch_stats"]["norm"]}))
    return variables, model, x


def test_linen_and_nnx_give_the_same_report(pair):
    variables, model, x = pair
    linen = jaxeff.analyze(variables, LinenNet().apply, x)
    report = jaxeff.analyze(*jaxeff.functional(model), x)
    shared = [path for path in linen.layers if not path.startswith("cell/")]
    assert [path for path in report.layers if not path.startswith("rnn/")] == shared
    for path in shared:
        ours, theirs = report[path], linen[path]
        for field in ROWS:
            assert getattr(ours, field) == getattr(theirs, field), path
        # The two frameworks compute the same in another order of operations.
        for one, other in zip(jax.tree.leaves(ours.metrics), jax.tree.leaves(theirs.metrics), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours.units, theirs.units, rtol=1e-4, atol=1e-7)


def test_the_gates_of_a_fused_cell_are_those_of_a_cell_with_a_kernel_a_gate(pair):
    variables, model, x = pair
    linen = jaxeff.analyze(variables, LinenNet().apply, x)
    report = jaxeff.analyze(*jaxeff.functional(model), x)
    for side, fused in (("i", "dense_i"), ("h", "dense_h")):
        layer = report[f"rnn/cell/{fused}/kernel"]
        assert layer.nonlinearity == "sigmoid/tanh"
        gates = [linen[f"cell/{side}{gate}/kernel"] for gate in "rzn"]
        np.testing.assert_allclose(layer.units, np.concatenate([gate.units for gate in gates]), rtol=1e-4)


def test_outputs_are_those_of_the_model(pair):
    _, model, x = pair
    params, apply_fn = jaxeff.functional(model)
    np.testing.assert_allclose(apply_fn(params, x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_drops_out_only_when_asked_to_and_stays_as_it_was(pair, mode):
    _, model, x = pair
    getattr(model, mode)()
    try:
        before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
        evaluated = jaxeff.collect(*jaxeff.functional(model), x)
        trained = jaxeff.collect(*jaxeff.functional(model, training=True), x)
        after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
        assert model.dropout.deterministic == (mode == "eval")
    finally:
        model.eval()
    assert all(map(np.array_equal, before, after))
    zeros = [
        next(site.input.zero_fraction.mean() for site in found.sites if site.path == "attention/query/kernel")
        for found in (evaluated, trained)
    ]
    assert zeros[1] > zeros[0] + 0.1


def test_equal_nnx_models_compile_once(compilations):
    x = normal(3, 4)
    models = [nnx.Linear(4, 2, rngs=nnx.Rngs(seed)) for seed in range(2)]
    pairs = [jaxeff.functional(model) for model in models]
    jax.block_until_ready(jaxeff.collect(*pairs[0], x))
    with compilations() as compiled:
        jax.block_until_ready(jaxeff.collect(*pairs[1], x))
    assert compiled.count == 0


def test_keywords_reach_an_nnx_model():
    class Scaled(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, x, *, scale):
            return jnp.tanh(scale * (x @ self.w[...]))

    (site,) = jaxeff.collect(*jaxeff.functional(Scaled()), np.ones((5, 3)), scale=0.1).sites
    np.testing.assert_allclose(site.post.mean_absolute, np.full((1, 2), np.tanh(0.3)), rtol=1e-6)


def _squares(outputs, targets):
    return jnp.mean((outputs - targets) ** 2, axis=1)


LOSS = {"loss_fn": _squares, "targets": jnp.ones((16, 2))}
# keyword of the user -> the verb, its other arguments, and the argument that was meant; None for one of the model's.
KEYWORDS = {
    "critereon": (jaxeff.analyze, {}, "criterion"),
    "hessian": (jaxeff.collect, {}, "hessians"),
    "tolerence": (jaxeff.advise, LOSS, "tolerance"),
    "alow": (prune.groups, {}, "allow"),
    "sparsitys": (prune.sensitivity, LOSS, "sparsities"),
    "blocks": (jaxeff.outliers, {}, None),
    "cache": (cost.count, {}, None),
    "train": (jaxeff.analyze, {}, None),
}


@pytest.mark.parametrize("keyword", KEYWORDS)
@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_a_mistyped_keyword_of_a_verb_is_told_from_one_of_the_model(kind, keyword):
    verb, arguments, meant = KEYWORDS[keyword]
    x = jnp.ones((16, 3))
    model = {
        "function": lambda: ({"w": jnp.ones((3, 2))}, lambda params, x: x @ params["w"], x),
        "linen": lambda: ({"params": nn.Dense(2).init(jax.random.key(0), x)["params"]}, nn.Dense(2).apply, x),
        "nnx": lambda: (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), x),
    }[kind]()
    with pytest.raises(ValueError, match=f"unexpected keyword argument '{keyword}'") as raised:
        verb(*model, **arguments, **{keyword: 0.5})
    said = f" Did you mean `{meant}`, an argument of `{verb.__name__}`?"
    assert (said in str(raised.value)) if meant else ("Did you mean" not in str(raised.value))


class _TakesAny(nn.Module):
    @nn.compact
    def __call__(self, x, **kwargs):
        return nn.Dense(2, name="dense")(x)

    def other(self, x, alow, **kwargs):
        return self(x)


class _NNXTakesAny(nnx.Linear):
    def __call__(self, x, rng=None, **kwargs):
        return super().__call__(x)


@pytest.mark.parametrize("keyword", [name for name, (*_, meant) in KEYWORDS.items() if meant])
@pytest.mark.parametrize("kind", ["function", "jitted", "linen", "nnx"])
def test_a_model_that_takes_any_keyword_does_not_swallow_a_mistyped_one_of_a_verb(kind, keyword):
    verb, arguments, meant = KEYWORDS[keyword]
    x, module = jnp.ones((16, 3)), _TakesAny()
    params, plain = {"w": jnp.ones((3, 2))}, lambda params, x, **kwargs: x @ params["w"]
    model = {
        "function": (params, plain, x),
        "jitted": (params, jax.jit(plain), x),
        "linen": (module.init(jax.random.key(0), x), module.apply, x),
        "nnx": (_NNXTakesAny(3, 2, rngs=nnx.Rngs(0)), x),
    }[kind]
    said = rf"`{verb.__name__}` takes `{meant}`, and '{keyword}' would go unnoticed into the `\*\*kwargs`.*partial"
    with pytest.raises(TypeError, match=said):
        verb(*model, **arguments, **{keyword: 0.5})


def test_a_keyword_that_is_nearly_a_verbs_reaches_the_model_that_names_or_binds_it():
    x, seen = jnp.ones((16, 3)), []

    def takes_any(params, x, **kwargs):
        seen.append(kwargs)
        return x @ params["w"]

    params = {"w": jnp.ones((3, 2))}
    _ = prune.groups(params, functools.partial(takes_any, alow=1), x)
    _ = prune.groups(params, takes_any, x, train=2)
    _ = prune.groups(params, lambda params, x, alow, **kwargs: takes_any(params, x, alow=alow), x, alow=3)
    assert seen == [{"alow": 1}, {"train": 2}, {"alow": 3}]
    module = _TakesAny()
    variables = module.init(jax.random.key(0), x)
    assert len(prune.groups(variables, module.apply, x, method="other", alow=1)) == 2
    network = _NNXTakesAny(3, 2, rngs=nnx.Rngs(0))
    assert len(prune.groups(network, x, rng=1)) == 2
    with pytest.raises(TypeError, match="`groups` takes `allow`"):
        prune.groups(network, x, rng=1, alow=1)


@pytest.mark.parametrize("verb", [jaxeff.analyze, jaxeff.spectra, jaxeff.outliers, prune.layout])
def test_rngs_without_a_function_to_take_them_are_refused(verb):
    for given in ({"w": jnp.ones((3, 2))}, nnx.Linear(3, 2, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match="no `apply_fn` that could take the keyword 'rngs'"):
            verb(given, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize("verb", [jaxeff.analyze, jaxeff.spectra, jaxeff.outliers, prune.layout])
def test_a_keyword_without_a_function_to_take_it_is_refused(verb):
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(
        TypeError, match="no `apply_fn` that could take the keyword 'rng'.*Did you mean `rngs`"
    ):
        verb(params, rng=0)
    with pytest.raises(TypeError, match="could take the keyword 'train'") as raised:
        verb(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), train=False)
    assert "Did you mean" not in str(raised.value)


def test_a_keyword_of_the_users_own_partial_is_no_argument_of_a_verb():
    apply_fn = functools.partial(lambda params, x: x @ params["w"], critereon="wanda")
    with pytest.raises(ValueError, match="'critereon'") as raised:
        jaxeff.analyze({"w": jnp.ones((3, 2))}, apply_fn, jnp.ones((4, 3)))
    assert "Did you mean" not in str(raised.value)


def test_a_module_in_the_wrong_place_is_named():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`apply_fn` is the NNX module Linear itself.*functional"):
        jaxeff.analyze(nnx.state(model, nnx.Param), model, np.ones((2, 3)))
    with pytest.raises(TypeError, match="`params` is the module Linear itself.*functional"):
        prune.scored(model)


# Linen modules that cannot be hashed: what holds their sizes can change.


@dataclasses.dataclass
class Config:
    features: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    features: Any


class Opaque:
    """Equal to what has the same sizes, and so without a hash; of no kind that can be looked into."""

    def __init__(self, features):
        self.features = features

    def __eq__(self, other):
        return self.features == other.features


class Sized(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x, skipped=()):
        sizes = self.config["features"] if isinstance(self.config, Mapping) else self.config
        for index, size in enumerate(getattr(sizes, "features", sizes)):
            if index not in skipped:
                x = nn.relu(nn.Dense(size, name=f"layer_{index}")(x))
        return x


CONFIGS = {
    "a list": lambda *sizes: Sized([*sizes]),
    "a list in a frozen dataclass": lambda *sizes: Sized(Frozen([*sizes])),
    "a dataclass": lambda *sizes: Sized(Config([*sizes])),
    "a map": lambda *sizes: Sized({"features": [*sizes]}),
    "an object": lambda *sizes: Sized(Opaque(sizes)),
}
SIZES = (6, 4)


def _of_sizes():
    """The same network with a hash, its variables and a batch."""
    x, model = normal(8, 5), Sized(SIZES)
    return model, drawn(model, x), x


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_a_module_without_a_hash_is_analyzed_as_the_same_with_one(make):
    model, variables, x = _of_sizes()
    with pytest.raises(TypeError, match="unhashable"):
        _ = hash(make(*SIZES))
    expected = jaxeff.analyze(variables, model.apply, x)
    for params in (variables, variables["params"]):
        report = jaxeff.analyze(params, make(*SIZES).apply, x)
        assert report.structure == expected.structure
        for one, other in zip(report.units, expected.units, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        if make is not CONFIGS["an object"]:
            assert [module.path for module in report.modules] == [module.path for module in expected.modules]


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_every_part_of_jaxeff_takes_bare_params_of_a_module_without_a_hash(make):
    model, variables, x = _of_sizes()
    params, apply_fn = variables["params"], make(*SIZES).apply
    for apply in (apply_fn, jax.jit(apply_fn)):
        assert len(jaxeff.collect(params, apply, x).sites) == 2
    counted = cost.count(params, apply_fn, x)
    assert str(counted) == str(cost.count(params, model.apply, x))
    # 8 examples of 5 inputs, 6 hidden units and 4 outputs.
    assert counted.macs == 8 * (5 * 6 + 6 * 4)
    groups = prune.groups(params, apply_fn, x)
    assert {group.name: group.size for group in groups if group.locked is None} == {"layer_0/kernel:1": 6}


def test_a_sequence_in_a_list_takes_bare_params():
    model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(4)]), normal(8, 5)
    variables = drawn(model, x)
    report = jaxeff.analyze(variables["params"], model.apply, x)
    assert [row.nonlinearity for row in report.rows] == ["relu", "identity"]
    assert {"layers_0", "layers_2"} <= {module.path for module in report.modules}


def test_a_list_among_keywords_takes_bare_params():
    model, variables, x = _of_sizes()
    report = jaxeff.analyze({"layer_0": variables["params"]["layer_0"]}, model.apply, x, skipped=[1])
    assert list(report.layers) == ["layer_0/kernel"]


def test_equal_modules_without_a_hash_share_their_programs(compilations):
    _, variables, x = _of_sizes()
    _ = jaxeff.analyze(variables, Sized([*SIZES]).apply, x)
    with compilations() as compiled:
        _ = jaxeff.analyze(variables, Sized([*SIZES]).apply, x)
    assert compiled.count == 0


def test_a_list_that_changes_changes_the_model():
    _, variables, x = _of_sizes()
    model = Sized([*SIZES])
    assert len(jaxeff.collect(variables, model.apply, x).sites) == 2
    model.config.pop()
    first = {"layer_0": variables["params"]["layer_0"]}
    assert [site.path for site in jaxeff.collect(first, model.apply, x).sites] == ["layer_0/kernel"]
    # The same parameters, of which one layer is read no more.
    assert [site.path for site in jaxeff.collect(variables, model.apply, x).sites] == ["layer_0/kernel"]


_W = {"w": np.ones((4, 3), np.float32)}
_X = np.ones((5, 4), np.float32)


def _product(p, x):
    return x @ p["w"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: prune.masks(jaxeff.analyze(_W, _product, _X), 0.5), "`importance`.*Report"),
        (lambda: prune.masks(jaxeff.collect(_W, _product, _X), 0.5), "`importance`.*Statistics"),
        (lambda: prune.scored(_W, jaxeff.analyze(_W, _product, _X)), "`statistics`.*Report"),
        (lambda: prune.scored(_W, "wanda"), "`statistics`.*str"),
        (lambda: prune.plan(prune.scored(_W), prune.groups(_W, _product, _X), 0.5), "`groups`.*dict"),
        (lambda: cost.latency(_W, _product, _X), "`function`.*dict"),
        (lambda: cost.compiled(_W, _product, _X), "`function`.*dict"),
        (lambda: cost.count_function(_W, _X), "`function`.*dict"),
        (lambda: cost.floor(_W, _product, _X, chip="h100"), "`function`.*dict"),
        (lambda: prune.sparsify(0.5, optax.sgd(0.1)), "`optimizer`.*float"),
        (lambda: prune.sparsify(optax.sgd(0.1), 0.5), "`schedule`.*0.5"),
        (lambda: _fisher(targets="labels"), "`targets` holds a str"),
        (lambda: _fisher(targets={"labels": ["a"]}), r"`targets` holds a str at \['labels'\]\[0\]"),
    ],
)
def test_arguments_in_the_wrong_place_are_named(call, named):
    with pytest.raises(TypeError, match=named):
        call()


def _fisher(targets):
    loss_fn = lambda outputs, targets: outputs.mean(-1)  # noqa: E731
    return jaxeff.collect(_W, _product, _X, criterion="fisher", loss_fn=loss_fn, targets=targets)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, ValueError, "returned None, which holds no arrays"),
        ({"logits": None}, ValueError, "holds no arrays"),
        ("logits", TypeError, "returned a str"),
        ((np.ones(3), jnp.tanh), TypeError, "returned a (jitted|PjitFunction|function|custom_jvp)"),
    ],
)
def test_what_a_function_returns_must_be_arrays(returned, error, message):
    with pytest.raises(error, match=message):
        jaxeff.analyze(_W, lambda p, x: returned, _X)
    with pytest.raises(error, match=message):
        cost.count(_W, lambda p, x: returned, _X)


def test_statistics_of_other_params_do_not_score():
    statistics = jaxeff.collect(_W, _product, _X)
    with pytest.raises(ValueError, match="other `params`"):
        jaxeff.importance.scores({"w": np.ones((4, 2), np.float32)}, statistics)
