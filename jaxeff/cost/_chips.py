"""Peak rates of chips, which need not be present.

TPUs are read from JAX, GPUs from NVIDIA's datasheets, and this machine is measured by `timing.peak`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxeff.cost._timing import Peak


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of a chip, as stated by its maker. One JAX device is one chip.

    Attributes:
        name: of the chip.
        flops_per_second: of matrix products, two per multiply-accumulate, by the dtype of the operands.
        bytes_per_second: between the chip and its main memory.
        source: of these figures.
        memory_bytes: of its main memory; None where that is not known.
    """

    name: str
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    source: str
    memory_bytes: float | None = None

    def rate(self, *dtypes: Any) -> float:
        """Return the FLOPs per second for operands of these dtypes: the fastest that may be meant, else the best."""
        best = max(self.flops_per_second.values())
        names = (getattr(dtype, "name", dtype) for dtype in dtypes)
        return max((self.flops_per_second.get(name, best) for name in names), default=best)


def chip_of(chip: str | Peak | Chip) -> Chip:
    """Return the chip of a name or of a measured peak; return a chip unchanged.

    Raises:
        ValueError: no chip has this name.

    >>> chip_of("tpu v5e").rate("bfloat16"), chip_of("h100").bytes_per_second
    (197000000000000.0, 3350000000000.0)
    """
    if isinstance(chip, Chip):
        return chip
    if isinstance(chip, Peak):
        # Other dtypes may be faster than the measured one, but are assumed to be equally fast.
        return Chip(
            chip.device, {chip.dtype: chip.flops_per_second}, chip.bytes_per_second, "measured by cost.peak"
        )
    name = chip.lower()
    if name in _GPUS:
        half, single, eighth, memory, source = _GPUS[name]
        rates = {"bfloat16": half, "float16": half, "float32": single, **dict.fromkeys(_EIGHTHS, eighth)}
        return Chip(name, rates, memory, source)
    tpus = _tpus()
    if name in tpus:
        return _tpu(name, *tpus[name])
    known = ", ".join(map(repr, [*tpus, *_GPUS]))
    raise ValueError(
        f"`chip` must be one of {known}, a result of `cost.peak`, or a `cost.Chip`, got {chip!r}"
    )


_EIGHTHS = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")
_TERA, _GIGA = 1e12, 1e9
# FLOPs a second of dense products, without sparsity: of 16 bits; of float32 as JAX multiplies it by default (TF32
# where there is one); of 8 bits, or of 16 where there is nothing faster. Then the memory's bytes a second.
_GPUS: Mapping[str, tuple[float, float, float, float, str]] = {
    "v100": (125 * _TERA, 15.7 * _TERA, 125 * _TERA, 900 * _GIGA, "NVIDIA V100 datasheet (2020), SXM2"),
    "t4": (65 * _TERA, 8.1 * _TERA, 130 * _TERA, 320 * _GIGA, "NVIDIA T4 datasheet (2019)"),
    "a100": (312 * _TERA, 156 * _TERA, 624 * _TERA, 2039 * _GIGA, "NVIDIA A100 datasheet (2021), 80 GB SXM"),
    "l4": (121 * _TERA, 60 * _TERA, 242 * _TERA, 300 * _GIGA, "NVIDIA L4 datasheet (2023)"),
    "h100": (989 * _TERA, 494 * _TERA, 1979 * _TERA, 3350 * _GIGA, "NVIDIA H100 datasheet (2023), SXM"),
    "h200": (989 * _TERA, 494 * _TERA, 1979 * _TERA, 4800 * _GIGA, "NVIDIA H200 datasheet (2024), SXM"),
}
_MEGACORE = frozenset({"v4", "v5p"})


def _tpus() -> dict[str, tuple[Any, int]]:
    """Return the version of every TPU known to JAX, with the number of cores of one JAX device, by name."""
    # Imported here, because the import takes a quarter of a second.
    from jax.experimental.pallas import tpu

    versions = getattr(tpu, "ChipVersion", ())
    return {f"tpu {one.value}": (one, 2 if one.value in _MEGACORE else 1) for one in versions}


def tpu_chip(generation: str, cores: int) -> Chip | None:
    """Return the TPU of a generation ('v5e', '7x') and number of cores per device; None if JAX does not know it."""
    name = f"tpu {generation}"
    known = _tpus().get(name)
    return None if known is None else _tpu(name, known[0], cores)


def _tpu(name: str, version: Any, cores: int) -> Chip:
    from jax.experimental.pallas import tpu

    found = tpu.get_tpu_info_for_chip(version, cores)
    wide = float(found.bf16_ops_per_second * found.num_cores)
    whole, narrow = (
        float(rate * found.num_cores) or wide
        for rate in (found.int8_ops_per_second, found.fp8_ops_per_second)
    )
    # JAX multiplies float32 in one pass of bfloat16 there by default.
    rates: dict[str, float] = dict.fromkeys(("bfloat16", "float16", "float32"), wide)
    rates |= dict.fromkeys(_EIGHTHS[:2], whole) | dict.fromkeys(_EIGHTHS[2:], narrow)
    memory = float(found.mem_bw_bytes_per_second * found.num_cores)
    source = "jax.experimental.pallas.tpu.get_tpu_info_for_chip"
    return Chip(name, rates, memory, source, float(found.hbm_capacity_bytes * found.num_cores))
