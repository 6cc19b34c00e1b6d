"""What the TPU compiler says is read as it stands; where libtpu is installed, the compiler is asked."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxeff import cost
from jaxeff.cost._compiling_for import collectives_in

with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused_computation (param_0: f32[8,4]) -> f32[8,4] {
  %all-reduce.7 = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%param_0), channel_id=1, to_apply=%add
}

ENTRY %main {
  %all-gather.11 = bf16[4096,2048]{1,0:T(8,128)(2,1)S(1)} all-gather(%convert.1), channel_id=3, dimensions={0}
  %all-reduce.2 = (f32[16,4]{1,0}, f32[2048]{0:T(1024)S(1)}) all-reduce(%fusion, %x), to_apply=%add
  %all-gather-start = (f32[2,2]{1,0}, f32[4,2]{1,0}) all-gather-start(%y), dimensions={0}
  %all-gather-done = f32[4,2]{1,0} all-gather-done(%all-gather-start)
  %get-tuple-element = f32[2048]{0} get-tuple-element(%all-reduce.2), index=1
  ROOT %collective-permute = f32[] collective-permute(%z), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_by_kind_and_not_those_that_name_them():
    assert collectives_in(PROGRAM) == {
        "all-gather": cost.Collective(2, 4096 * 2048),
        "all-reduce": cost.Collective(2, 2048),
        "collective-permute": cost.Collective(1, 1),
    }
    assert collectives_in("") == {}


def record(**changes):
    figures = cost.compiled(jnp.dot, jnp.ones((8, 4)), jnp.ones((4, 2)))
    fields = {
        "topology": "v5e:2x2",
        "chips": 4,
        "memory_bytes": 17.2e9,
        "figures": figures,
        "collectives": collectives_in(PROGRAM),
        "refusal": None,
    }
    return cost.CompiledFor(**{**fields, **changes})


def test_a_record_says_whether_it_fits():
    found = record()
    assert found.fits and "Fits 4 chips of 17.2GB each (v5e:2x2)" in str(found)
    assert "arguments" in str(found) and "2 all-gather, up to 8,388,608; 2 all-reduce" in " ".join(
        str(found).split()
    )
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["figures"]["argument_bytes"] == 160 and saved["fits"]
    assert saved["collectives"]["all-reduce"] == {"count": 2, "largest": 2048}
    refused = record(
        figures=None, collectives={}, chips=1, memory_bytes=None, refusal="RESOURCE_EXHAUSTED: 32.00G"
    )
    assert not refused.fits and str(refused) == "Does not fit 1 chip (v5e:2x2): RESOURCE_EXHAUSTED: 32.00G"
    assert json.loads(json.dumps(refused.to_dict()))["figures"] is None


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the compiler in libtpu: pip install libtpu"):
        cost.compile_for(jnp.dot, X, W, topology="v5e:2x2")


# --- With the compiler -------------------------------------------------------------------------------------

X, W = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((256, 512), jnp.float32)


@with_compiler
def test_on_one_chip():
    found = cost.compile_for(jnp.dot, X, W, topology="v5e:2x2")
    assert found.fits and found.chips == 1 and found.memory_bytes == pytest.approx(16 * 2**30, rel=0.01)
    assert found.figures.argument_bytes == 4 * (64 * 256 + 256 * 512) and not found.collectives
    assert found.figures.output_bytes == 4 * 64 * 512


@with_compiler
def test_on_a_mesh_each_chip_has_its_part():
    mesh = {"data": 2, "model": 2}
    found = cost.compile_for(
        lambda tree: tree["x"] @ tree["w"],
        {"x": X, "w": W},
        topology="v5e:2x2",
        mesh=mesh,
        shardings=({"x": P("data"), "w": P(None, "model")},),
    )
    assert found.chips == found.figures.devices == 4
    assert found.figures.argument_bytes == 4 * (64 * 256 + 256 * 512) // 2
    # Summed over what lies apart.
    shardings = (P(None, "data"), P("data"))
    summed = cost.compile_for(jnp.dot, X, W, topology="v5e:2x2", mesh=mesh, shardings=shardings)
    assert "all-reduce" in summed.collectives or "reduce-scatter" in summed.collectives
    whole = cost.compile_for(jnp.dot, X, W, topology="v5e:2x2", mesh=mesh)
    assert whole.figures.argument_bytes == 4 * (64 * 256 + 256 * 512) and not whole.collectives


@with_compiler
def test_a_program_that_does_not_fit_is_no_error():
    large = jax.ShapeDtypeStruct((65536, 65536), jnp.float32)
    found = cost.compile_for(jnp.dot, large, large, topology="v5e:2x2")
    assert not found.fits and found.figures is None and "memory" in found.refusal


ERRORS = [
    ({"topology": "v9:2x2"}, "`topology` must be one that libtpu knows, such as 'v5e:2x2', got 'v9:2x2'"),
    (
        {"topology": "v5e:2x2", "mesh": {"data": 3}},
        "`mesh` must have 4 devices, as 'v5e:2x2' has, got {'data': 3}",
    ),
    ({"topology": "v5e:2x2", "shardings": (P(), P())}, "`shardings` names axes of a mesh: pass `mesh` too"),
    (
        {"topology": "v5e:2x2", "mesh": {"data": 4}, "shardings": (P(),)},
        "`shardings` must have one entry for each of 2 arguments, got 1",
    ),
]


@with_compiler
@pytest.mark.parametrize(("keywords", "message"), ERRORS)
def test_errors(keywords, message):
    with pytest.raises(ValueError, match=message):
        cost.compile_for(jnp.dot, X, W, **keywords)
