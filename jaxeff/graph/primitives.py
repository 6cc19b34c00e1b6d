"""Primitives of JAX that are left unknown on purpose, and why.

Three passes read a program operation by operation: pairing (what each weight is used for), coupling (what
goes together when a network is made smaller) and counting (what it costs). Each has rules of its own, by the
names of primitives; a primitive without a rule in one of them is named here for it, or in no table at all:
then it is as new as the JAX that has it. To users an unknown primitive is a reason, never silence: the weight
is unpaired, the axes are locked, the work is listed as uncounted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

COLLECTIVES = frozenset({
    "all_gather", "all_gather_done", "all_gather_invariant", "all_gather_reduced", "all_gather_reduced_start",
    "all_gather_start", "all_to_all", "all_to_all_done", "all_to_all_start", "pbroadcast", "pbroadcast_done",
    "pbroadcast_dynamic", "pbroadcast_start", "pmax", "pmin", "ppermute", "ppermute_done", "ppermute_start",
    "precv", "psend", "psum", "psum2", "psum_done", "psum_invariant", "psum_invariant_start", "psum_scatter",
    "psum_start", "ragged_all_to_all", "reduce_scatter", "reduce_scatter_done", "reduce_scatter_start",
    "unreduced_pmax", "unreduced_pmin", "unreduced_psum", "unreduced_psum_start", "unreduced_reduce_scatter",
    "unreduced_reduce_scatter_start",
})  # fmt: skip
RANDOM = frozenset({
    "iota_2x32_shape", "philox2x32", "philox4x32", "random_bits", "random_clone", "random_fold_in",
    "random_gamma", "random_seed", "random_split", "random_unwrap", "random_wrap", "rng_bit_generator",
    "rng_uniform", "threefry2x32", "threefry4x32",
})  # fmt: skip
"""Random numbers and their keys."""

_LINEAR_ALGEBRA = frozenset({
    "cholesky", "cholesky_update", "custom_linear_solve", "eig", "eigh", "fft", "geqp3", "geqrf",
    "hessenberg", "householder_product", "lu", "lu_pivots_to_permutation", "ormqr", "qr", "schur", "svd",
    "symmetric_product", "triangular_solve", "tridiagonal", "tridiagonal_solve",
})  # fmt: skip
_CALLBACKS = frozenset({
    "check", "debug_callback", "debug_print", "inspect_sharding", "io_callback", "outside_call",
    "pure_callback",
})  # fmt: skip
_OPAQUE = frozenset({
    "call_exported", "call_hi_primitive", "call_hi_primitive_linearized", "cudnn_fusion", "custom_call",
    "custom_partitioning", "dot_product_attention_bwd", "dot_product_attention_bwd_wrapper",
    "dot_product_attention_fp8_bwd", "dot_product_attention_fp8_bwd_wrapper", "dot_product_attention_fp8_fwd",
    "dot_product_attention_fp8_fwd_wrapper", "dot_product_attention_fwd", "dot_product_attention_fwd_wrapper",
    "ffi_call", "from_edtype", "log_extend", "log_read", "new_log", "pallas_call", "scaled_dot",
    "scaled_matmul", "scaled_matmul_wrapper", "to_edtype", "tpu_custom_call", "triton_call",
})  # fmt: skip
_MUTABLE = frozenset({
    "accum_grad_in_ref", "addupdate", "box_get", "box_set", "broadcast_to", "core_map", "create_linear",
    "empty_ref", "free_ref", "freeze", "get", "mutable_array", "new_box", "new_ref", "pin", "run_state",
    "swap", "unpin",
})  # fmt: skip
_TRANSFORMATIONS = frozenset({
    "custom_jvp_call_jaxpr", "custom_lin", "dce_sink", "linear_call", "remat_opt", "tie", "unreachable",
})  # fmt: skip
_SYMBOLIC = frozenset({"dim_as_value", "dimension_size", "shape_assertion"})

COMMUNICATION = "communication between devices, with what it adds up on the way"
_BY_VALUE = "it moves elements by their values"


def _named(*groups: tuple[Iterable[str], str]) -> Mapping[str, str]:
    return {name: reason for names, reason in groups for name in names}


_EVERYWHERE = _named(
    (COLLECTIVES, COMMUNICATION),
    (_LINEAR_ALGEBRA, "a library's algorithm, whose steps are up to the backend"),
    (_CALLBACKS, "runs Python on the host"),
    (_OPAQUE, "a program that JAX does not see into"),
    (_MUTABLE, "reads or writes an array in place"),
    (_TRANSFORMATIONS, "a step of a transformation of JAX, whose derivatives are not those of what it runs"),
    (_SYMBOLIC, "a size that is not known before the program runs"),
)

UNPAIRED: Mapping[str, str] = {
    **_EVERYWHERE,
    **_named(
        (("approx_top_k", "argmax", "argmin", "sort", "top_k"), _BY_VALUE),
        (
            ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "reduce", "reduce_window",
             "reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_gather_add",
             "select_and_scatter", "select_and_scatter_add"),
            "each of its elements is made of several",
        ),
        (
            ("dynamic_slice", "dynamic_update_slice", "pad", "scatter", "scatter-add", "scatter-max",
             "scatter-min", "scatter-mul", "scatter-sub", "scatter_add", "scatter_max", "scatter_min",
             "scatter_mul", "scatter_sub"),
            "it reads or writes a part, at a position that may depend on data",
        ),
        (("bitcast_convert_type",), "it reads numbers as bits"),
        (("ragged_dot", "ragged_dot_general"), "which rows meet which of its matrices depends on data"),
        (("shard_map",), "weights are not followed into what each device does"),
    ),
}  # fmt: skip
"""Primitives through which no weight is followed: one that meets data there is unpaired, for this reason."""

LOCKED: Mapping[str, str] = {
    **_EVERYWHERE,
    **_named(
        (("approx_top_k",), _BY_VALUE),
        (
            ("select_and_gather_add", "select_and_scatter", "select_and_scatter_add"),
            "the gradient of a pooling: no step of a forward pass",
        ),
        (("ragged_dot", "ragged_dot_general"), "which rows meet which of its matrices depends on data"),
        (("shard_map",), "what each device does is not followed"),
    ),
}
"""Primitives that lock the axes of what they are given."""

UNCOUNTED: Mapping[str, str] = {
    **_EVERYWHERE,
    **_named(
        (("approx_top_k", "sort", "top_k"), "its number of comparisons is up to the algorithm"),
        (
            RANDOM - {"random_clone", "random_unwrap", "random_wrap"},
            "integer work of the random generator that JAX is configured with",
        ),
        (("cumlogsumexp",), "its number of exponentials is up to the algorithm"),
        (
            ("reduce", "reduce_window", "select_and_scatter"),
            "what it does to each pair of elements is a function that the program brings",
        ),
    ),
}
"""Primitives whose work is listed as uncounted."""
