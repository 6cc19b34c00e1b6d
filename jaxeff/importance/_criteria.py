"""Importance criteria, each a score per weight from the weight and the statistics of its operation.

A criterion is a function `criterion(weight, site) -> importance`; pass your own in the same way. `site` is a
`SiteStatistics`, whose sums broadcast against the weight, so that a criterion reads like its formula. L is the
mean loss of a batch, and g = dL/dw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxeff.statistics import Moments, SiteStatistics
from jaxeff.statistics.derivatives import WITHOUT_LOSS, Need

Score = Callable[[jax.Array, SiteStatistics], jax.Array]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A scoring function and its properties.

    Attributes:
        function: `f(weight, site) -> importance`.
        side: what it reads: 'post', 'input', 'magnitude' for the weight alone, 'gradient', 'none', or
            'user' for your own function.
        needs: the sums of derivatives that it reads.
        null_power: the power of abs(w) that it is proportional to; None if there is none, in which case the scores
            of noise are unknown.
    """

    function: Score
    side: str
    needs: tuple[Need, ...] = ()
    null_power: int | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def needs_loss(self) -> bool:
        return any(quantity not in WITHOUT_LOSS for quantity, _ in self.needs)

    @property
    def reads_activations(self) -> bool:
        """Whether it needs activations, and therefore cannot score a weight without them."""
        return self.side in ("post", "input", "user") or any(quantity == "gate" for quantity, _ in self.needs)


def magnitude(weight: jax.Array, site: SiteStatistics | None = None) -> jax.Array:
    """Score abs(w), whatever the unit emits.

    References:
        Han, Pool, Tran and Dally, Learning both Weights and Connections, 2015, arXiv:1506.02626

    >>> magnitude(jnp.array([[-2.0, 1.0]]))
    Array([[2., 1.]], dtype=float32)
    """
    return jnp.abs(weight)


def filter_norm(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score the l1 norm of the weight's unit (its filter), shared evenly by the unit's weights.

    The scores of a unit sum to its norm, and show no concentration within the unit.

    References:
        Li, Kadav, Durdanovic, Samet and Graf, Pruning Filters for Efficient ConvNets, 2017,
        arXiv:1608.08710
    """
    within = tuple(axis for axis in range(weight.ndim) if axis not in site.unit_axes)
    return jnp.broadcast_to(jnp.mean(jnp.abs(weight), within, keepdims=True), weight.shape)


def random(weight: jax.Array, site: SiteStatistics | None = None, seed: int = 0) -> jax.Array:
    """Score uniform noise, the control that every other criterion has to beat.

    Equal weights get equal noise; layers that differ in one bit get different noise.
    """
    bits = jax.lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(seed), jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.uniform(key, weight.shape, weight.dtype)


def activation(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(w_ij) mean abs(a_j), with a_j the post-activation of unit j over the batch and all positions.

    All weights of a unit share one factor. It ranks the units, and leaves the order of weights within a unit to
    their magnitude.

    Args:
        weight: any shape.
        site: its `post` sums broadcast against the weight.
    """
    return jnp.abs(weight) * site.post.mean_absolute


def wanda(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(w_ij) rms(x_i), with x_i input i over the batch and all positions.

    A weight on an input that is always 0 has importance 0, which output-side criteria cannot see. For an
    embedding, x is the one-hot row of each token.

    Args:
        weight: any shape.
        site: its `input` sums broadcast against the weight.

    References:
        Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models,
        2023, arXiv:2306.11695
    """
    return jnp.abs(weight) * site.input.rms


def ria(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score (abs(w_ij) / sum_i abs(w_ij) + abs(w_ij) / sum_j abs(w_ij)) rms(x_i)^(1/2), of input i and unit j.

    A weight counts relative to the others of its unit and to the others on its input, so that no unit and no input
    loses all of its weights. The published norm of x_i is a sum over positions, where this is a mean, as in `wanda`:
    one factor for all weights of a layer. The channels of a convolution are its inputs: the sum over units includes
    the kernel's window, and all of its groups.

    Args:
        weight: any shape. Layers that it stacks are scored apart.
        site: its `input` sums broadcast against the weight.

    References:
        Zhang, Bai, Lin, Zhao, Hou and Cannistraci, Plug-and-Play: An Efficient Post-training Pruning Method for
        Large Language Models, 2024, ICLR
    """
    size = jnp.abs(weight)

    def relative(shared: tuple[int, ...]) -> jax.Array:
        over = tuple(axis for axis in range(size.ndim) if axis not in (*shared, *site.layer_axes))
        # Of weights that are all 0 each is 0 of the sum.
        return size / jnp.maximum(jnp.sum(size, over, keepdims=True), jnp.finfo(size.dtype).tiny)

    return (relative(site.unit_axes) + relative(site.input_axes)) * jnp.sqrt(site.input.rms)


def gradient(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score mean abs(g) over batches: how steeply the loss changes with the weight."""
    return _given(site.derivatives.gradient).mean_absolute


def taylor(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score mean (g w)^2 over batches: the squared first-order change of the loss when w goes to 0.

    References:
        Molchanov, Mallya, Tyree, Frosio and Kautz, Importance Estimation for Neural Network Pruning,
        2019, arXiv:1906.10771
    """
    return jnp.square(weight) * _given(site.derivatives.gradient).mean_square


def unit_taylor(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score mean abs(sum of a dL/da) over batches, with a the unit's post-activations; shared by its weights.

    This is the first-order change of the loss when the whole unit (a channel, a neuron) goes silent.

    References:
        Molchanov, Tyree, Karras, Aila and Kautz, Pruning Convolutional Neural Networks for Resource
        Efficient Inference, 2017, arXiv:1611.06440
    """
    per_unit = _given(site.gate).mean_absolute
    return jnp.broadcast_to(per_unit * (per_unit.size / weight.size), weight.shape)


def fisher(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score mean g_n^2 over examples, times w^2: twice the second-order change by the empirical Fisher matrix.

    References:
        Theis, Korshunova, Tejani and Huszar, Faster Gaze Prediction with Dense Networks and Fisher
        Pruning, 2018, arXiv:1801.05787
    """
    return jnp.square(weight) * _given(site.derivatives.example_gradient).mean_square


def obd(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(h) w^2 / 2, with h the diagonal of the Hessian of L: the second-order change when w goes to 0.

    h is estimated from `derivatives.SAMPLES` random sign vectors per batch (Hutchinson); its standard error
    is `site.derivatives.hessian.standard_error`. At a minimum h >= 0, so a negative estimate is noise, from a
    weight that is strongly coupled to others. Its absolute value counts, since 0 would remove that weight first.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, 1990
    """
    return jnp.square(weight) * jnp.abs(_given(site.derivatives.hessian).mean) / 2


def obd_gauss_newton(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(h) w^2 / 2, with h the diagonal of the Gauss-Newton matrix, estimated as for `obd`.

    It leaves out the curvature of the network itself, as LeCun et al. did, so that h >= 0.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, 1990
        Martens, New Insights and Perspectives on the Natural Gradient Method, 2020, arXiv:1412.1193
    """
    return jnp.square(weight) * jnp.abs(_given(site.derivatives.gauss_newton).mean) / 2


def snip(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(g w), with g the mean over batches; meant for a network at initialization.

    The published score is divided by its sum over the network, which does not change the order.

    References:
        Lee, Ajanthan and Torr, SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019,
        arXiv:1810.02340
    """
    return jnp.abs(weight * _given(site.derivatives.gradient).mean)


def grasp(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score max(w (Hg), 0): how much removing w lowers the gradient flow; meant for a network at initialization.

    The published score is -w (Hg), whose highest are removed first. Weights whose removal raises the gradient flow
    are removed before all others; here they have importance 0, and no order among them.

    References:
        Wang, Zhang and Grosse, Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020,
        arXiv:2002.07376
    """
    return jnp.maximum(weight * _given(site.derivatives.gradient_flow).mean, 0)


def synflow(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(w) dR/dabs(w), with R the summed outputs if all parameters are positive and all inputs 1.

    It needs no data: only the shapes of the batch count (and token numbers, which stay as they are). This is one
    step; the published procedure repeats it while pruning.

    References:
        Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively
        conserving synaptic flow, 2020, arXiv:2006.05467
    """
    return jnp.abs(weight * _given(site.derivatives.synaptic_flow).mean)


def lrp(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score abs(sum of R), with R the relevance of the winning outputs that passes through the weight; epsilon rule.

    R_ij = x_i w_ij R_j / z_j at each position; the winning output is the largest at each position of the
    model's outputs. No loss is needed. `jaxeff.graph.lrp_rules` defines how products of data (attention, gates),
    normalizers and nonlinearities pass relevance on; `statistics.conservation` tells how much was lost.

    References:
        Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
        Propagation, 2015, doi:10.1371/journal.pone.0130140
        Yeom et al., Pruning by Explaining, 2021, arXiv:1912.08881
    """
    return jnp.abs(_given(site.derivatives.relevance).mean)


def lrp_alpha_beta(weight: jax.Array, site: SiteStatistics) -> jax.Array:
    """Score as `lrp`, by the alpha-beta rule: alpha = 2 of the positive shares minus beta = 1 of the negative.

    References:
        Bach et al., 2015, as for `lrp`
    """
    return jnp.abs(_given(site.derivatives.relevance_alpha_beta).mean)


def _given(moments: Moments | None) -> Moments:
    if moments is None:
        raise ValueError("these statistics hold no derivatives for this criterion: collect them for it")
    return moments


_ALL_OF_GRADIENT: tuple[Need, ...] = tuple(
    ("gradient", total) for total in ("sum", "absolute_sum", "square_sum")
)

CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(activation, "post", null_power=1),
        Criterion(magnitude, "magnitude", null_power=1),
        Criterion(wanda, "input", null_power=1),
        Criterion(ria, "input"),
        Criterion(filter_norm, "magnitude"),
        Criterion(random, "none"),
        Criterion(gradient, "gradient", (("gradient", "absolute_sum"),)),
        Criterion(taylor, "gradient", (("gradient", "square_sum"),), null_power=2),
        Criterion(unit_taylor, "gradient", (("gate", "absolute_sum"),)),
        Criterion(fisher, "gradient", (("example_gradient", "square_sum"),), null_power=2),
        Criterion(obd, "gradient", (("hessian", "sum"), ("hessian", "square_sum")), null_power=2),
        Criterion(
            obd_gauss_newton,
            "gradient",
            (("gauss_newton", "sum"), ("gauss_newton", "square_sum")),
            null_power=2,
        ),
        Criterion(snip, "gradient", (("gradient", "sum"),), null_power=1),
        Criterion(grasp, "gradient", (("gradient_flow", "sum"),)),
        Criterion(synflow, "gradient", (("synaptic_flow", "sum"),), null_power=1),
        Criterion(lrp, "gradient", (("relevance", "sum"),)),
        Criterion(lrp_alpha_beta, "gradient", (("relevance_alpha_beta", "sum"),)),
    )
}


def named(criterion: str | Score | Criterion, *, with_loss: bool = False) -> Criterion:
    """Return the criterion of a name, or a function of your own as a criterion.

    Args:
        with_loss: whether gradients are available to a function of your own.

    >>> named("taylor").side
    'gradient'
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        known = [known for known in CRITERIA.values() if known.function is criterion]
        return known[0] if known else Criterion(criterion, "user", _ALL_OF_GRADIENT if with_loss else ())
    if criterion not in CRITERIA:
        raise ValueError(
            f"`criterion` must be one of {', '.join(map(repr, CRITERIA))} or a function "
            f"(weight, site) -> importance, got {criterion!r}"
        )
    return CRITERIA[criterion]
