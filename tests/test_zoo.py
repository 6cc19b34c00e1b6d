"""A sample of the zoo (benchmarks/zoo.py): models as other people wrote them."""

import sys
from pathlib import Path

import jax
import pytest
from test_replay import assert_replayed
from test_replay import observed as observed

SAMPLE = ["flax/Mixer (NNX)", "equinox/MLP", "penzai/Llama", "keras/MobileNet"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def zoo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import zoo

        # Models of other libraries add arrays of different ranks.
        with jax.numpy_rank_promotion("allow"):
            yield zoo
    for name in ("zoo", "zoo_models"):
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_another_package_goes_through_all_parts(name, zoo):
    entry = zoo.ZOO[name]
    pytest.importorskip(entry.package)
    row = zoo.run(entry)
    assert not row.faults
    assert row.leaves[0] == row.leaves[1] > 0
    assert row.analyzed == 1
    assert row.left < 0.9 and row.error < zoo.TOLERANCE
    if row.macs is not None:
        counted, published = row.macs
        assert counted == pytest.approx(published, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE[:-1])
def test_the_observed_program_of_a_model_computes_what_the_model_does(name, zoo, observed):
    pytest.importorskip(zoo.ZOO[name].package)
    model = zoo.ZOO[name].build()
    batch = model.batch if isinstance(model.batch, tuple) else (model.batch,)
    assert_replayed(observed, model.params, model.apply_fn, batch, model.keywords)


def test_a_row_names_what_is_wrong(zoo):
    assert zoo.Row(leaves=(4, 4), matrices=2, error=1e-7).faults == []
    wrong = zoo.Row(leaves=(4, 3), matrices=2, unpaired={"w": "a custom kernel"}, error=1e-3)
    assert wrong.faults == [
        "1 leaves not accounted for",
        "1 of 2 matrices not paired",
        "the smaller model differs from the masked one by 1.0e-03",
    ]
    assert zoo.Row(leaves=(4, 4), error=float("nan")).faults != []
    assert zoo.Row(failure="ValueError: no").faults == ["ValueError: no"]


def test_what_raises_is_a_row(zoo):
    def build():
        raise ValueError("it does not build\nand says why at length")

    assert zoo.run(zoo.Entry("flax", build)).faults == ["ValueError: it does not build"]
