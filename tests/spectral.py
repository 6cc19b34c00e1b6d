"""Run by test_spectra.py in a process with eight devices: spectra of sharded weights."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxeff


def main() -> None:
    assert len(jax.devices()) == 8
    weight = np.random.default_rng(0).standard_normal((3, 64, 40)).astype(np.float32)
    names = {f"block_{index}": {"kernel": matrix} for index, matrix in enumerate(weight)}
    alone = jaxeff.spectra(names)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
        for spec in (P("a"), P(None, "b"), P("a", "b"), P(("a", "b"))):
            parts = NamedSharding(mesh, spec)
            found = jaxeff.spectra(jax.tree.map(lambda leaf, at=parts: jax.device_put(leaf, at), names))
            assert found.to_records() == alone.to_records(), (kind, spec)


if __name__ == "__main__":
    main()
