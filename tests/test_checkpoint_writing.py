"""Checkpoints written in the hub's form, and pruned where they lie."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxeff import cli, prune
from jaxeff.checkpoints import CheckpointError, open_checkpoint, prune_checkpoint, write_checkpoint

WIDTH, HIDDEN, HEADS, GROUPS, SIZE, BLOCKS = 8, 12, 4, 2, 4, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE,
}  # fmt: skip


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def llama(blocks=BLOCKS, hidden=HIDDEN, heads=HEADS, groups=GROUPS, dtype=np.float32):
    arrays = {"model.embed_tokens.weight": normal(20, WIDTH), "model.norm.weight": normal(WIDTH)}
    for i in range(blocks):
        sizes = {
            "self_attn.q_proj": (heads * SIZE, WIDTH), "self_attn.k_proj": (groups * SIZE, WIDTH),
            "self_attn.v_proj": (groups * SIZE, WIDTH), "self_attn.o_proj": (WIDTH, heads * SIZE),
            "mlp.gate_proj": (hidden, WIDTH), "mlp.up_proj": (hidden, WIDTH), "mlp.down_proj": (WIDTH, hidden),
        }  # fmt: skip
        arrays |= {f"model.layers.{i}.{name}.weight": normal(*shape, seed=i) for name, shape in sizes.items()}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def read(path):
    found = {}
    for name, array in open_checkpoint(path).arrays.items():
        with array.open() as elements:
            found[name] = elements(0, array.size).reshape(array.shape)
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_what_is_written_is_read(dtype, tmp_path):
    arrays = {**llama(dtype=dtype), "steps": np.arange(3), "flag": np.array(True)}
    write_checkpoint(tmp_path / "m.safetensors", arrays)
    found = read(tmp_path / "m.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99])
def test_the_zeros_are_those_of_masks(dtype, sparsity, tmp_path):
    arrays = llama(dtype=dtype)
    write_checkpoint(tmp_path / "a.safetensors", arrays)
    found = prune_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", sparsity=sparsity)
    weights = {name: jnp.asarray(array) for name, array in arrays.items() if "layers" in name}
    expected = prune.apply(weights, prune.masks(prune.scored(weights), sparsity, scope="layer"))
    pruned = read(tmp_path / "b.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(pruned[name], np.asarray(expected.get(name, array)))
    assert found.zeros == sum(round(sparsity * array.size) for array in weights.values())
    assert len(str(found).splitlines()) < 60 and str(tmp_path / "b.safetensors") in str(found).replace(
        "\n", ""
    )


def test_of_equal_weights_the_first_go(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"w": np.array([[1, -1, 2, 1]], np.float32)})
    _ = prune_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", sparsity=0.5)
    np.testing.assert_array_equal(read(tmp_path / "b.safetensors")["w"], [[0, 0, 2, 1]])


def sharded(folder):
    folder.mkdir()
    arrays = llama()
    names = [*arrays]
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for shard, held in shards.items():
        write_checkpoint(folder / shard, {name: arrays[name] for name in held})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    _ = (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _ = (folder / "config.json").write_text(json.dumps(CONFIG))
    _ = (folder / "tokenizer.json").write_text("{}")
    return arrays


def test_a_directory_of_shards_is_copied_and_pruned(tmp_path, capsys):
    arrays = sharded(tmp_path / "a")
    assert cli.main(["prune", str(tmp_path / "a"), "--sparsity", "0.5", "--output", str(tmp_path / "b")]) == 0
    assert "zeroed by magnitude" in capsys.readouterr().out.replace("\n", " ")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
    assert (tmp_path / "b/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()
    for name, array in read(tmp_path / "b").items():
        zeros = array.size // 2 if "layers" in name else 0
        assert (array == 0).sum() == zeros
        np.testing.assert_array_equal(array[array != 0], arrays[name][array != 0])
    np.testing.assert_array_equal(read(tmp_path / "a")["model.norm.weight"], arrays["model.norm.weight"])


def test_patterns_of_names_stay_whole(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", llama())
    found = prune_checkpoint(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        sparsity=0.5,
        exclude=["*.layers.[02].*", "*embed*"],
    )
    assert {each.name.split(".")[2] for each in found.zeroed} == {"1"}


def test_a_config_gets_the_sizes_of_the_arrays(tmp_path):
    arrays = {name: array for name, array in llama(hidden=9, heads=2, groups=1).items() if ".1." not in name}
    write_checkpoint(tmp_path / "small", arrays, config=CONFIG)
    found = json.loads((tmp_path / "small/config.json").read_text())
    assert found == CONFIG | {
        "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    saved = read(tmp_path / "small")
    assert {name.split(".")[2] for name in saved if "layers" in name} == {"0", "1"}
    np.testing.assert_array_equal(
        saved["model.layers.1.mlp.up_proj.weight"], arrays["model.layers.2.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("names", [("encoder.layer", "bert."), ("encoder.layer", "vit.")])
def test_the_sizes_of_bert_and_vit(names, tmp_path):
    blocks, model = names
    attention = "attention.self.query" if model == "bert." else "attention.attention.query"
    arrays = {
        f"{model}{blocks}.{i}.{name}.weight": normal(*shape)
        for i in range(2)
        for name, shape in {attention: (12, 24), "intermediate.dense": (5, 24)}.items()
    }
    config = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 7}
    write_checkpoint(tmp_path / "m", arrays, config=config)
    assert json.loads((tmp_path / "m/config.json").read_text()) == {
        "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 5, "head_dim": 6,
    }  # fmt: skip


def test_one_config_cannot_say_that_blocks_differ(tmp_path):
    arrays = llama()
    arrays["model.layers.1.mlp.up_proj.weight"] = normal(5, WIDTH)
    with pytest.raises(CheckpointError, match="equally many"):
        write_checkpoint(tmp_path / "m", arrays, config=CONFIG)
    arrays = llama()
    for i in range(BLOCKS):
        arrays[f"model.layers.{i}.self_attn.q_proj.weight"] = normal(7, WIDTH)
    with pytest.raises(CheckpointError, match="not a multiple of the head size 4"):
        write_checkpoint(tmp_path / "m", arrays, config=CONFIG)
    assert [*tmp_path.iterdir()] == []


def test_wrong_arguments_leave_nothing_behind(tmp_path):
    good, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_checkpoint(good, {"w": normal(3, 4)})
    with pytest.raises(ValueError, match="`sparsity` must be in .0, 1., the fraction to remove, got 1.5"):
        _ = prune_checkpoint(good, other, sparsity=1.5)
    with pytest.raises(FileExistsError, match="pass a path that does not"):
        _ = prune_checkpoint(good, good, sparsity=0.5)
    with pytest.raises(CheckpointError, match="no weights besides those excluded"):
        _ = prune_checkpoint(good, other, sparsity=0.5, exclude=["*"])
    write_checkpoint(tmp_path / "nan.safetensors", {"w": np.full((2, 2), np.nan, np.float32)})
    with pytest.raises(CheckpointError, match="'w' holds nan"):
        _ = prune_checkpoint(tmp_path / "nan.safetensors", other, sparsity=0.5)
    with pytest.raises(TypeError, match="'s' of <U1, which safetensors cannot hold"):
        write_checkpoint(other, {"s": np.array(["x"])})
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "nan.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity", "2", "--output", "b"], "'2' is not a fraction in [0, 1)"),
        (["--sparsity", "0.5"], "the following arguments are required: --output"),
        (["--sparsity", "0.5", "--output", "a.safetensors"], "exists"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, said, tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", {"w": normal(3, 4)})
    command = [sys.executable, "-m", "jaxeff.cli", "prune", "a.safetensors", *arguments]
    code = "import sys; from jaxeff import cli; sys.exit(cli.main(sys.argv[1:]))"
    found = subprocess.run(
        [sys.executable, "-c", code, *command[3:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 2 and said in found.stderr and len(found.stderr.splitlines()) == 1
