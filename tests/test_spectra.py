"""Spectra: NumPy's singular values, laws of the numbers made of them, and what noise gives."""

import json
import math
from pathlib import Path

import devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import jaxeff
from jaxeff.spectral import _null
from jaxeff.spectral._null import null
from jaxeff.spectral._power_law import alpha
from jaxeff.spectral._singular_values import singular_values

NUMBERS = ("utilization", "effective_rank", "stable_rank", "energy_beyond_edge")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def only(matrix, **options):
    (row,) = jaxeff.spectra({"kernel": matrix}, **options).rows
    return row


def low_rank(rows, columns, rank):
    return normal(rows, rank) @ normal(rank, columns, seed=1)


MATRICES = {
    "square": normal(60, 60),
    "wide": normal(20, 300),
    "tall": normal(300, 20),
    "of rank 3": low_rank(50, 80, 3),
    "steep": np.diag(10.0 ** -np.arange(12.0)),
    "with dead rows and columns": np.pad(normal(20, 30), ((5, 5), (0, 10))),
    "huge": 1e30 * normal(12, 9),
    "tiny": 1e-30 * normal(12, 9),
    "with a mean": 5 + normal(30, 40),
    "one column": normal(10, 1),
    "one element": np.array([[2.0]]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_are_those_of_numpy_in_float64(name):
    matrix = MATRICES[name]
    want = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix), want, rtol=1e-6, atol=1e-12 * want[0])


@pytest.mark.parametrize("name", MATRICES)
def test_numbers_are_those_of_the_definitions(name):
    # The path in JAX's precision: what is computed here is of the float32 array.
    matrix = MATRICES[name].astype(np.float32)
    row = only(matrix)
    exact = matrix.astype(np.float64)
    values = np.linalg.svd(exact / np.abs(exact).max(), compute_uv=False)
    shares = values[values > 0] / values.sum()
    energy = values**2 / np.sum(values**2)
    beyond = energy[energy > (np.sqrt(row.rows) + np.sqrt(row.columns)) ** 2 / exact.size].sum()
    used = np.abs(exact[exact != 0])
    used = used / used.sum()
    want = {
        "utilization": math.exp(-np.sum(used * np.log(used))) / exact.size,
        "effective_rank": math.exp(-np.sum(shares * np.log(shares))),
        "stable_rank": 1 / energy[0],
        "energy_beyond_edge": beyond,
    }
    for number, value in want.items():
        assert getattr(row, number) == pytest.approx(value, rel=1e-4, abs=1e-12), number


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "one element"])
def test_numbers_depend_on_neither_scale_nor_transposition(name):
    matrix = MATRICES[name]
    first = only(matrix)
    for other in (only(4 * matrix), only(matrix.T), only(-matrix[::-1])):
        for number in NUMBERS:
            assert getattr(other, number) == pytest.approx(getattr(first, number), rel=1e-6, abs=1e-9)
        assert other.verdict == first.verdict


def test_an_orthogonal_matrix_has_full_rank():
    row = only(np.linalg.qr(normal(50, 50))[0])
    assert row.effective_rank == pytest.approx(50)
    assert row.stable_rank == pytest.approx(50)
    assert row.energy_beyond_edge == 0
    assert row.verdict is None


def test_a_matrix_of_rank_one_has_rank_one():
    row = only(low_rank(50, 70, 1))
    assert row.effective_rank == pytest.approx(1, abs=1e-9)
    assert row.stable_rank == pytest.approx(1)
    assert row.energy_beyond_edge == pytest.approx(1)


# Shapes with the number of draws: single draws of small matrices spread, their mean does not.
NOISE = {
    (2, 2): 3000, (2, 4096): 100, (3, 40): 1000, (8, 8): 1000, (16, 64): 200, (32, 33): 150,
    (33, 33): 150, (40, 300): 60, (100, 100): 40, (128, 512): 10, (512, 128): 10, (300, 300): 10, (1000, 1000): 1,
}  # fmt: skip


@pytest.mark.parametrize("shape", NOISE)
def test_noise_is_its_null(shape):
    draws = [only(normal(*shape, seed=seed)) for seed in range(NOISE[shape])]
    for ratio in ("utilization_ratio", "effective_rank_ratio", "stable_rank_ratio"):
        assert np.mean([getattr(row, ratio) for row in draws]) == pytest.approx(1, abs=0.02), ratio


@pytest.mark.parametrize("shape", [(2, 5), (10, 10), (40, 40), (33, 200)])
def test_95_percent_of_noise_lie_in_the_range(shape):
    draws = [only(normal(*shape, seed=seed)) for seed in range(400)]
    expected = null(*shape)
    for number in ("utilization", "effective_rank", "stable_rank"):
        inside = np.mean([getattr(row, number) in getattr(expected, number) for row in draws])
        assert 0.91 < inside < 0.995, (number, inside)
    assert np.mean([row.energy_beyond_edge <= expected.energy_beyond_edge.high for row in draws]) > 0.95


@pytest.mark.parametrize("long", [1, 8])
def test_closed_forms_meet_the_drawn(long):
    effective, stable, _ = _null._drawn(32, 32 * long)
    closed = _null._effective_rank(32, 32 * long), _null._of_largest(32, 32 * long)[0]
    for drawn, form in zip((effective, stable), closed, strict=True):
        assert form.mean == pytest.approx(drawn.mean, rel=0.01)
        assert form.low == pytest.approx(drawn.low, rel=0.03)
        assert form.high == pytest.approx(drawn.high, rel=0.03)


@pytest.mark.parametrize(
    "draw, law",
    [
        (lambda key: jax.random.normal(key, (200, 300)), "normal"),
        (lambda key: nn.initializers.lecun_normal()(key, (200, 300)), "truncated normal"),
        (lambda key: jax.random.uniform(key, (200, 300), minval=-1), "uniform"),
    ],
)
def test_an_initialization_is_indistinguishable_from_its_law(draw, law):
    laws = [only(draw(jax.random.key(seed))).law for seed in range(12)]
    assert laws.count(law) >= 8
    assert set(laws) <= {law, None}
    named = only(draw(jax.random.key(laws.index(law))))
    assert named.verdict == f"indistinguishable from random numbers ({law})"
    assert f"kernel ({law})" in str(jaxeff.Spectra((named,)))


def test_a_spike_is_no_noise():
    spike = normal(100, 1) @ normal(1, 200, seed=1)
    row = only(normal(100, 200, seed=2) + 0.5 * spike)
    assert row.verdict is None
    assert row.stable_rank_ratio < 0.5
    assert row.energy_beyond_edge > row.null.energy_beyond_edge.high


@pytest.mark.parametrize(
    "matrix, reason",
    [
        (np.zeros((4, 5)), "all of its weights are 0"),
        (np.where(np.eye(4) > 0, np.nan, 1.0), "it holds nan or infinity"),
        (np.where(np.eye(4) > 0, -np.inf, 1.0), "it holds nan or infinity"),
        (jnp.full((4, 5), jnp.inf, jnp.bfloat16), "it holds nan or infinity"),
    ],
)
def test_what_has_no_numbers_says_why(matrix, reason):
    result = jaxeff.spectra({"kernel": matrix, "other": {"kernel": normal(4, 5)}})
    row = result["kernel"]
    assert row.reason == reason
    assert all(math.isnan(getattr(row, number)) for number in (*NUMBERS, "alpha"))
    assert row.verdict is None
    assert result["other/kernel"].reason is None
    assert reason in str(result)
    assert reason in str(row)
    assert json.loads(json.dumps(result.to_records()))[0]["effective_rank"] is None


def test_one_column_has_numbers_and_no_verdict():
    row = only(normal(9, 1))
    assert (row.effective_rank, row.stable_rank, row.effective_rank_ratio) == pytest.approx((1, 1, 1))
    assert row.verdict is None
    assert "one row or column" in str(row.reason)


def test_sharded_weights_have_the_spectra_of_whole_ones():
    devices.run(Path(__file__).with_name("spectral.py"), 8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types_are_read_as_they_are(dtype):
    matrix = jnp.asarray(normal(30, 40), dtype)
    want = only(np.asarray(matrix.astype(jnp.float32), np.float64))
    assert only(matrix).to_record() == want.to_record()


def test_it_is_not_for_traced_params():
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(lambda w: jaxeff.spectra({"kernel": w}))(jnp.ones((3, 3)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"share": 0.0}, "`share` must be above 0"),
        ({"apply_fn": lambda params, x: x}, "`batch` is missing"),
        ({"batch": jnp.ones(2)}, "`apply_fn` is missing"),
        ({"heads": True}, "`heads` are found in the traced program"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        jaxeff.spectra({"kernel": normal(3, 3)}, **options)


# Models


def grouped_attention(params, x):
    queries = jnp.einsum("btd,dhk->bthk", x, params["q"]).reshape(*x.shape[:2], 2, 2, 3)
    keys, values = (jnp.einsum("btd,dgk->btgk", x, params[name]) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("btghk,bsgk->bghts", queries, keys))
    mixed = jnp.einsum("bghts,bsgk->btghk", weights, values)
    return mixed.reshape(*x.shape[:2], 12) @ params["o"]


def test_heads_that_share_keys_are_a_group():
    params = {"q": normal(6, 4, 3), "k": normal(6, 2, 3), "v": normal(6, 2, 3), "o": normal(12, 6)}
    params = jax.tree.map(np.float32, params)
    result = jaxeff.spectra(params, grouped_attention, jnp.asarray(normal(2, 5, 6), jnp.float32), heads=True)
    for group in range(2):
        part = params["q"][:, 2 * group : 2 * group + 2].reshape(6, 6)
        want = np.linalg.svd(part, compute_uv=False)
        np.testing.assert_allclose(result[f"q group {group}"].singular_values, want, rtol=1e-5)
        want = np.linalg.svd(params["k"][:, group], compute_uv=False)
        np.testing.assert_allclose(result[f"k group {group}"].singular_values, want, rtol=1e-5)


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 2))(x)).mean((1, 2)))


def test_a_convolution_is_its_patches_times_its_filters():
    x = jnp.asarray(normal(4, 8, 8, 5))
    params = Convolution().init(jax.random.key(0), x)
    for result in (jaxeff.spectra(params), jaxeff.spectra(params, Convolution().apply, x)):
        row = result["Conv_0/kernel"]
        kernel = np.asarray(params["params"]["Conv_0"]["kernel"])
        assert (row.shape, row.rows, row.columns) == ((3, 2, 5, 6), 30, 6)
        want = np.linalg.svd(kernel.reshape(30, 6), compute_uv=False)
        np.testing.assert_allclose(row.singular_values, want, rtol=1e-5)
    assert "convolution" in row.note


def test_pytorch_names_have_units_first():
    kernel = normal(6, 5, 3, 2)
    row = jaxeff.spectra({"conv": {"weight": kernel}})["conv/weight"]
    assert (row.rows, row.columns) == (30, 6)
    np.testing.assert_allclose(row.singular_values, np.linalg.svd(kernel.reshape(6, 30), compute_uv=False))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadAttention(num_heads=4, qkv_features=16, name="attention")(x)


def test_attention_has_one_matrix_or_one_for_each_head():
    x = jnp.asarray(normal(2, 5, 12))
    params = Attention().init(jax.random.key(0), x)
    inner = params["params"]["attention"]
    whole = jaxeff.spectra(params, Attention().apply, x)
    by_name = jaxeff.spectra(params)
    heads = jaxeff.spectra(params, Attention().apply, x, heads=True)
    for name, rows, columns in (("query", 12, 16), ("value", 12, 16), ("out", 16, 12)):
        path = f"attention/{name}/kernel"
        kernel = np.asarray(inner[name]["kernel"])
        want = np.linalg.svd(kernel.reshape(rows, columns), compute_uv=False)
        np.testing.assert_allclose(whole[path].singular_values, want, rtol=1e-5)
        np.testing.assert_allclose(by_name[path].singular_values, want, rtol=1e-5)
        for head in range(4):
            part = kernel[head] if name == "out" else kernel[:, head]
            want = np.linalg.svd(part, compute_uv=False)
            np.testing.assert_allclose(heads[f"{path} head {head}"].singular_values, want, rtol=1e-5)


def batched_attention(params, x):
    queries, keys, values = (jnp.einsum("btd,hdk->bhtk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", queries, keys))
    return jnp.einsum("bhtk,hkd->bhtd", jnp.einsum("bhts,bhsk->bhtk", weights, values), params["o"]).sum(1)


def test_heads_of_a_batched_product_are_matrices_with_or_without_heads():
    params = {name: normal(4, 6, 3).astype(np.float32) for name in "qkv"} | {"o": normal(4, 3, 6)}
    x = jnp.asarray(normal(2, 5, 6), jnp.float32)
    for heads in (False, True):
        result = jaxeff.spectra(params, batched_attention, x, heads=heads)
        for head in range(4):
            want = np.linalg.svd(params["o"][head], compute_uv=False)
            np.testing.assert_allclose(result[f"o[{head}]"].singular_values, want, rtol=1e-5)
    assert result["q head 3"].rows == 6


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["w"])[0]


def unrolled(params, x):
    for index in range(4):
        x = x + jnp.tanh(x @ params[f"w{index}"])
    return x


def test_blocks_of_a_scan_are_matrices_of_their_own():
    weights, x = np.asarray(normal(4, 6, 6), np.float32), jnp.asarray(normal(20, 6))
    stacked = jaxeff.spectra({"w": weights}, scanned, x, share=0.9)
    apart = jaxeff.spectra(
        {f"w{index}": weight for index, weight in enumerate(weights)}, unrolled, x, share=0.9
    )
    assert [*stacked] == ["w[0]", "w[1]", "w[2]", "w[3]"]
    for one, other in zip(stacked.rows, apart.rows, strict=True):
        np.testing.assert_allclose(one.singular_values, other.singular_values)
        assert one.output_rank == other.output_rank
        assert one.shape == other.shape


def test_members_of_a_batched_product_are_matrices_of_their_own():
    experts = normal(3, 5, 7)
    apply_fn = lambda params, x: jnp.einsum("ebi,eio->ebo", x, params["experts"])  # noqa: E731
    result = jaxeff.spectra({"experts": experts}, apply_fn, jnp.asarray(normal(3, 4, 5)))
    for index, row in enumerate(result.rows):
        assert row.path == f"experts[{index}]"
        np.testing.assert_allclose(
            row.singular_values, np.linalg.svd(experts[index], compute_uv=False), rtol=1e-6
        )
        assert "products side by side" in row.note


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_output_rank_is_the_least_that_keeps_the_share(shape, share):
    x = normal(40, shape[0]) * np.linspace(0.01, 3, shape[0])
    weight = normal(*shape, seed=1)
    row = only(weight, apply_fn=lambda params, x: x @ params["kernel"], batch=jnp.asarray(x), share=share)
    energy = np.linalg.svd(x @ weight, compute_uv=False) ** 2
    kept = np.cumsum(energy) / energy.sum()
    assert row.output_rank == 1 + np.count_nonzero(kept < share)
    assert row.factored_size == row.output_rank * sum(shape)
    assert row.factored_saving == max(0, 1 - row.factored_size / weight.size)


def test_inputs_that_vary_along_few_directions_need_little_rank():
    x = normal(50, 3) @ normal(3, 20, seed=1)
    options = {"apply_fn": lambda params, x: x @ params["kernel"], "batch": jnp.asarray(x)}
    assert only(normal(20, 20), **options).output_rank <= 3
    assert only(normal(20, 20), **options, share=None).output_rank is None


def test_statistics_of_several_batches_replace_the_model():
    params = {"kernel": normal(6, 5).astype(np.float32)}
    apply_fn = lambda params, x: x @ params["kernel"]  # noqa: E731
    batches = [jnp.asarray(normal(30, 6, seed=seed), jnp.float32) for seed in range(2)]
    parts = [jaxeff.collect(params, apply_fn, batch, hessians=True) for batch in batches]
    whole = jaxeff.spectra(params, apply_fn, jnp.concatenate(batches))
    merged = jaxeff.spectra(params, statistics=jaxeff.merge(*parts))
    assert merged.to_records() == whole.to_records()
    without = jaxeff.spectra(params, statistics=jaxeff.collect(params, apply_fn, batches[0]))
    assert "hessians=True" in without["kernel"].note
    with pytest.raises(ValueError, match="other `params`"):
        jaxeff.spectra({"kernel": np.ones((5, 5))}, statistics=parts[0])


@pytest.mark.parametrize(
    "network", ["mlp", "resnet", "transformer", "shared", "fused", "scanned", "bfloat16"]
)
def test_every_weight_of_a_report_has_spectra_of_the_same_path(network):
    net = getattr(networks, network)()
    report = jaxeff.analyze(*net.arguments, **net.keywords)
    result = jaxeff.spectra(*net.arguments, **net.keywords, share=None)
    assert {*result} == {*report.layers}
    for row in result.rows:
        assert row.size == report[row.path].size
        assert row.utilization <= 1


# alpha


@pytest.mark.parametrize("exponent", [2.0, 3.5, 6.0])
def test_alpha_is_the_exponent_of_a_power_law(exponent):
    draws = np.random.default_rng(0).random(4000) ** (-1 / (exponent - 1))
    assert alpha(np.sqrt(draws)) == pytest.approx(exponent, rel=0.1)
    assert alpha(7 * np.sqrt(draws)) == pytest.approx(alpha(np.sqrt(draws)))


def test_alpha_of_few_values_is_unknown():
    assert math.isnan(alpha(normal(19) ** 2))
    assert math.isnan(alpha(np.ones(30)))
    assert alpha(np.append(normal(20) ** 2, np.zeros(5))) > 1


def test_alpha_is_that_of_weightwatcher():
    # WeightWatcher 0.7.7: WWFit(np.arange(1, 101) ** 1.5).alpha
    assert alpha(np.arange(1, 101) ** 0.75) == pytest.approx(6.452549860810284, rel=1e-9)


# What shows


def test_showing_compiles_nothing(caplog):
    result = jaxeff.spectra({f"block{index}": {"kernel": normal(20, 20, seed=index)} for index in range(30)})
    weights = {"kernel": jnp.asarray(normal(4, 3))}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        text = repr(result)
        _ = result.to_records()
        _ = jaxeff.spectra(weights)
    assert not caplog.records
    assert "block0–29/kernel" in text
    assert "block7/kernel" in result.table(blocks=True)
    assert "alpha" in result.table(alpha=True)


def test_a_report_takes_them_as_columns():
    params = {f"block{index}": {"kernel": normal(20, 20, seed=index)} for index in range(24)} | {
        "b": np.ones(4)
    }
    params |= {"constant": {"kernel": np.ones((20, 20))}}
    report, result = jaxeff.analyze(params), jaxeff.spectra(params)
    lines = report.table(columns=result.columns()).splitlines()
    assert lines[0].split()[-2:] == ["e/null", "s/null"]
    ranks = [row.effective_rank_ratio for row in result.rows[:-1]]
    (folded,) = [line for line in lines if line.startswith("block0–23/kernel")]
    assert folded.split()[-2] == f"{min(ranks):.3g}–{max(ranks):.3g}"
    (constant,) = [line for line in lines if line.startswith("constant/kernel")]
    assert float(constant.split()[-1]) == pytest.approx(result["constant/kernel"].stable_rank_ratio, rel=0.01)
    assert report.table(columns={"mine": {"constant/kernel": 7.0}}).count("mine") == 1
    with pytest.raises(ValueError, match="'mine' has a number for no layer"):
        _ = report.table(columns={"mine": {"b": 1.0}})


def test_a_matrix_is_found_by_its_path():
    result = jaxeff.spectra({"a": {"kernel": normal(3, 3)}, "a_bias": np.ones(3)})
    assert len(result) == 1
    assert "a/kernel" in result
    with pytest.raises(KeyError, match="a/kernel"):
        _ = result["a_bias"]
    assert "No matrices" in str(jaxeff.spectra({"bias": np.ones(3)}))


def test_blocks_that_are_alike_share_a_row_and_a_line():
    """Of 24 blocks, those at 3 and from 10 on are trained."""
    trained = {3, *range(10, 24)}
    kernels = [low_rank(16, 12, 1) if i in trained else normal(16, 12) for i in range(24)]
    params = {f"block{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    spectra = jaxeff.spectra(params)
    text = str(spectra)
    assert len(text.splitlines()) < 15 and "block0–23/kernel" in text
    assert "- block0–2,4–9/kernel (normal)" in text
    assert "block3/kernel" in spectra.table(blocks=True)
    with pytest.raises(KeyError, match="there are block0/kernel, .*, block12/kernel and 19 more"):
        _ = spectra["kernel"]
