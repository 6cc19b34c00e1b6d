"""The models of the zoo: each a function that builds it, with random weights and a small batch."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxeff


@dataclasses.dataclass(frozen=True)
class Built:
    """A model as the verbs of jaxeff take it, `apply_fn(params, *batch, **keywords)`."""

    params: Any
    apply_fn: Callable[..., Any]
    batch: Any
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        package: the package on PyPI that it comes from.
        build: makes the model. Imports the package.
        published: multiply-accumulates of one example as published, in millions; None where there is no such figure.
        published_build: makes the model at its published size; only traced.
        large: whether it runs only where `--models` names it.
    """

    package: str
    build: Callable[[], Built]
    published: float | None = None
    published_build: Callable[[], Built] | None = None
    large: bool = False


def images(side: int, count: int = 2, channels_first: bool = False) -> jax.Array:
    shape = (count, 3, side, side) if channels_first else (count, side, side, 3)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def tokens(length: int = 8, count: int = 2, vocabulary: int = 64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (count, length)), jnp.int32)


def shaken(tree: Any, seed: int = 0) -> Any:
    """Move all weights a little: zeros and ones, as a fresh model has them, hide a unit too many."""
    draw = np.random.default_rng(seed)

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        value = np.asarray(leaf, np.float32)
        if value.ndim > 1 and not value.any():
            value = draw.normal(size=value.shape) / math.sqrt(math.prod(value.shape[:-1]))
        offset = 0.01 * draw.uniform(size=value.shape) if value.ndim < 2 else 0
        return jnp.asarray(value * draw.uniform(0.8, 1.2, value.shape) + offset, leaf.dtype)

    return jax.tree.map(one, tree)


def drawn(init: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Draw the arrays that `init` would return, from their shapes alone."""
    shapes = jax.eval_shape(functools.partial(init, **keywords), jax.random.key(0), *arguments)
    draw = np.random.default_rng(0)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path[-1:])
        if len(leaf.shape) > 1 and math.prod(leaf.shape) > max(leaf.shape):
            value = draw.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        elif any(word in name for word in ("scale", "var", "average", "hidden", "gamma")):
            value = draw.uniform(0.8, 1.2, leaf.shape)
        else:
            value = 0.1 * draw.normal(size=leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def functional(model: Any, batch: Any, **keywords: Any) -> Built:
    params, apply_fn = jaxeff.functional(model)
    if getattr(apply_fn, "state", None) is not None:
        apply_fn = apply_fn.with_state(shaken(apply_fn.state, 1))
    return Built(shaken(params), apply_fn, batch, keywords)


def linen(module: Any, *batch: Any, **keywords: Any) -> Built:
    return Built(drawn(module.init, *batch, **keywords), module.apply, batch, keywords)


# Keras


SIDES = {"Xception": 71, "InceptionV3": 75, "InceptionResNetV2": 75}
"""The smallest images where these are not of 32 pixels."""

APPLICATIONS: Mapping[str, tuple[float | None, int]] = {
    "MobileNet": (569, 224),
    "MobileNetV2": (300, 224),
    "MobileNetV3Small": (56, 224),
    "MobileNetV3Large": (219, 224),
    "EfficientNetB0": (390, 224),
    "EfficientNetB1": (700, 240),
    "EfficientNetB2": (None, 260),
    "EfficientNetB3": (1800, 300),
    "EfficientNetB4": (4400, 380),
    "EfficientNetB5": (10300, 456),
    "EfficientNetB6": (19100, 528),
    "EfficientNetB7": (37000, 600),
    "EfficientNetV2B0": (720, 224),
    "EfficientNetV2B1": (1200, 240),
    "EfficientNetV2B2": (1700, 260),
    "EfficientNetV2B3": (3000, 300),
    "EfficientNetV2S": (8400, 384),
    "EfficientNetV2M": (24700, 480),
    "EfficientNetV2L": (56300, 480),
    "ResNet50": (3800, 224),
    "ResNet101": (7600, 224),
    "ResNet152": (11300, 224),
    "ResNet50V2": (None, 224),
    "ResNet101V2": (None, 224),
    "ResNet152V2": (None, 224),
    "VGG16": (15500, 224),
    "VGG19": (19600, 224),
    "DenseNet121": (2870, 224),
    "DenseNet169": (3400, 224),
    "DenseNet201": (4340, 224),
    "ConvNeXtTiny": (4500, 224),
    "ConvNeXtSmall": (8700, 224),
    "ConvNeXtBase": (15400, 224),
    "ConvNeXtLarge": (34400, 224),
    "ConvNeXtXLarge": (60900, 224),
    "InceptionV3": (5700, 299),
    "InceptionResNetV2": (13200, 299),
    "Xception": (8400, 299),
    "NASNetMobile": (564, 224),
    "NASNetLarge": (23800, 331),
}
"""Published multiply-accumulates in millions, and the side of the images they are of.

From the papers or their authors' repositories (MobileNet, EfficientNet B0 and B7, EfficientNetV2, ResNet, ConvNeXt,
NASNet), from torchvision (other EfficientNets, VGG, InceptionV3) and from imgclsmob (DenseNet, InceptionResNetV2,
Xception).
"""

LARGE = ("B5", "B6", "B7", "V2M", "V2L", "tLarge", "tXLarge", "tBase", "152", "InceptionResNetV2")


def application(name: str, side: int, **options: Any) -> Built:
    import keras

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), **options)
    return functional(model, images(side))


def published_application(name: str, side: int) -> Built:
    import keras

    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3))
    params, apply_fn = jaxeff.functional(model)
    return Built(params, apply_fn, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def applications() -> dict[str, Entry]:
    found = {}
    for name, (published, side) in APPLICATIONS.items():
        small = functools.partial(application, name, SIDES.get(name, 32), include_top=False, pooling="avg")
        whole = functools.partial(published_application, name, side)
        large = name.endswith(LARGE) or "152" in name
        found[f"keras/{name}"] = Entry("keras", small, published, whole, large)
    return found


# KerasHub at small sizes: two layers, width 32.

TEXT: dict[str, Any] = {
    "vocabulary_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
GROUPED: dict[str, Any] = {
    "vocabulary_size": 64,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
SEEN: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "patch_size": 8,
}
IMAGE: dict[str, Any] = {"image_shape": (32, 32, 3)}
SMOL: dict[str, Any] = {
    "vocabulary_size": 64,
    "num_layers": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["full_attention"] * 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
}
MOE: dict[str, Any] = {**GROUPED, "num_experts": 4, "top_k": 2}
RESNET: dict[str, Any] = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 96],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_strides": [1, 2],
}
CSP: dict[str, Any] = {
    "stem_filters": 16,
    "stem_kernel_size": 3,
    "stem_strides": 1,
    "stackwise_depth": [1, 2, 2],
    "stackwise_strides": [1, 2, 2],
    "stackwise_num_filters": [16, 24, 32],
}

LINEAR: dict[str, Any] = {
    **GROUPED,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
T5GEMMA: dict[str, Any] = {
    "vocabulary_size": 64,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8.0,
    **{
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
}

HUB: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "Bert": ("text", TEXT, {"segment_ids": 0}),
    "Albert": ("text", {**TEXT, "embedding_dim": 16}, {"segment_ids": 0}),
    "DistilBert": ("text", TEXT, {}),
    "Roberta": ("text", TEXT, {}),
    "XLMRoberta": ("text", TEXT, {}),
    "Electra": (
        "text",
        {"vocab_size": 64, "embedding_dim": 16, **{k: v for k, v in TEXT.items() if k != "vocabulary_size"}},
        {"segment_ids": 0},
    ),
    "DebertaV3": ("text", {**TEXT, "bucket_size": 8}, {}),
    "FNet": ("unmasked", {k: v for k, v in TEXT.items() if k != "num_heads"}, {"segment_ids": 0}),
    "RoformerV2": ("unmasked", {**TEXT, "head_size": 8}, {"segment_ids": 0}),
    "ESM": ("unmasked", TEXT, {}),
    "ESM2": ("unmasked", TEXT, {}),
    "XLNet": ("text", TEXT, {"segment_ids": 0}),
    "GPT2": ("text", TEXT, {}),
    "GPTNeoX": ("text", TEXT, {}),
    "OPT": ("text", TEXT, {}),
    "Bloom": ("text", TEXT, {}),
    "Falcon": (
        "text",
        {"num_attention_heads": 4, **{k: v for k, v in TEXT.items() if k != "num_heads"}},
        {},
    ),
    "Gemma": ("text", {**GROUPED, "head_dim": 8}, {}),
    "Gemma (soft caps, sliding windows)": (
        "text",
        {
            **GROUPED,
            "head_dim": 8,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "attention_logit_soft_cap": 50.0,
            "final_logit_soft_cap": 30.0,
            "use_sliding_window_attention": True,
            "sliding_window_size": 4,
        },
        {},
    ),
    "Gemma3": ("text", {**GROUPED, "head_dim": 8, "image_size": 16}, {}),
    "Llama": ("text", GROUPED, {}),
    "Llama3": ("text", GROUPED, {}),
    "Llama3 (tied)": ("text", {**GROUPED, "tie_word_embeddings": True}, {}),
    "Mistral": ("text", GROUPED, {}),
    "Mixtral": ("text", MOE, {}),
    "GptOss": ("text", MOE, {}),
    "Phi3": ("text", GROUPED, {}),
    "Qwen": ("text", GROUPED, {}),
    "Qwen3": ("text", {**GROUPED, "head_dim": 8}, {}),
    "QwenMoe": (
        "text",
        {**MOE, "moe_intermediate_dim": 24, "shared_expert_intermediate_dim": 24},
        {},
    ),
    "Qwen3Moe": ("text", {**MOE, "head_dim": 8, "moe_intermediate_dim": 24}, {}),
    "Qwen3_5": ("text", LINEAR, {}),
    "Qwen3_5Moe": (
        "text",
        {
            **{k: v for k, v in LINEAR.items() if k != "intermediate_dim"},
            "moe_intermediate_dim": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "top_k": 2,
        },
        {},
    ),
    "Gemma4": (
        "text",
        {**GROUPED, "head_dim": 8, "image_size": 16, "sliding_window_size": 4, "sliding_window_pattern": 2},
        {"position_ids": 0},
    ),
    "PaliGemma": (
        "text with images",
        {
            **GROUPED,
            "head_dim": 8,
            "image_size": 16,
            "vit_patch_size": 8,
            "vit_num_heads": 4,
            "vit_hidden_dim": 32,
            "vit_num_layers": 2,
        },
        {"response_mask": 0},
    ),
    "SmolLM3": ("text", SMOL, {}),
    "RWKV7": (
        "text",
        {
            "hidden_size": 32,
            "head_size": 8,
            "num_layers": 2,
            "vocabulary_size": 64,
            "intermediate_dim": 48,
            "gate_lora": 8,
            "mv_lora": 8,
            "aaa_lora": 8,
            "decay_lora": 8,
        },
        {},
    ),
    "T5": ("both", TEXT, {}),
    "T5Gemma": ("both", T5GEMMA, {}),
    "T5Gemma2": ("both", T5GEMMA, {}),
    "Bart": ("both", TEXT, {}),
    "EdRec": (
        "both",
        {
            "vocab_size": 64,
            "num_layers_enc": 2,
            "num_layers_dec": 2,
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "num_heads": 4,
        },
        {},
    ),
    "ViT": (
        "image",
        {**{k: v for k, v in SEEN.items() if k != "intermediate_dim"}, "mlp_dim": 48, **IMAGE},
        {},
    ),
    "DeiT": ("image", {**SEEN, **IMAGE}, {}),
    "DINOV2": ("pixels", {**SEEN, **IMAGE, "position_embedding_shape": (32, 32, 3)}, {}),
    "DINOV2 (SwiGLU)": (
        "pixels",
        {
            **SEEN,
            **IMAGE,
            "position_embedding_shape": (32, 32, 3),
            "use_swiglu_ffn": True,
            "num_register_tokens": 2,
        },
        {},
    ),
    "DINOV3": ("pixels", {**SEEN, **IMAGE}, {}),
    "SwinTransformer": (
        "image",
        {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, **IMAGE},
        {},
    ),
    "MiT": (
        "image",
        {
            "layerwise_depths": [1, 1],
            "num_layers": 2,
            "layerwise_num_heads": [1, 2],
            "layerwise_sr_ratios": [2, 1],
            "max_drop_path_rate": 0.0,
            "layerwise_patch_sizes": [7, 3],
            "layerwise_strides": [4, 2],
            "hidden_dims": [16, 32],
            **IMAGE,
        },
        {},
    ),
    "ViTDet": (
        "image",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "intermediate_dim": 48,
            "num_heads": 4,
            "global_attention_layer_indices": [1],
            "patch_size": 8,
            "num_output_channels": 16,
            "window_size": 2,
            **IMAGE,
        },
        {},
    ),
    "ResNet (basic)": ("image", {**RESNET, "block_type": "basic_block", **IMAGE}, {}),
    "ResNet (bottleneck)": ("image", {**RESNET, "block_type": "bottleneck_block", **IMAGE}, {}),
    "ResNet (basic, D)": (
        "image",
        {
            **RESNET,
            "input_conv_filters": [32, 32, 64],
            "input_conv_kernel_sizes": [3, 3, 3],
            "block_type": "basic_block_vd",
            **IMAGE,
        },
        {},
    ),
    "ResNet (pre-activation)": (
        "image",
        {**RESNET, "block_type": "bottleneck_block", "use_pre_activation": True, **IMAGE},
        {},
    ),
    "VGG": ("image", {"stackwise_num_repeats": [1, 2], "stackwise_num_filters": [8, 16], **IMAGE}, {}),
    "DenseNet": ("image", {"stackwise_num_repeats": [2, 3], "growth_rate": 8, **IMAGE}, {}),
    "CSPNet (cross stage)": (
        "image",
        {
            **CSP,
            "block_type": "bottleneck_block",
            "stage_type": "csp",
            "bottle_ratio": [0.5],
            "expand_ratio": [2.0],
            **IMAGE,
        },
        {},
    ),
    "CSPNet (dark)": ("image", {**CSP, "block_type": "dark_block", "stage_type": "dark", **IMAGE}, {}),
    "Xception": (
        "image",
        {"stackwise_conv_filters": [[8, 16], [16, 16]], "stackwise_pooling": [True, False], **IMAGE},
        {},
    ),
    "CLIPVisionEncoder": ("image", {**SEEN, **IMAGE}, {}),
    "CLIPTextEncoder": ("unmasked", {**TEXT, "embedding_dim": 32, "max_sequence_length": 8}, {}),
    "SigLIPVisionEncoder": ("image", {**SEEN, **IMAGE}, {}),
    "SigLIPTextEncoder": ("unmasked", {**TEXT, "embedding_dim": 32, "max_sequence_length": 8}, {}),
    "HGNetV2": (
        "image",
        {
            "depths": [1, 1],
            "embedding_size": 16,
            "hidden_sizes": [32, 48],
            "stem_channels": [3, 8, 16],
            "hidden_act": "relu",
            "use_learnable_affine_block": False,
            "stackwise_stage_filters": [[16, 8, 32, 1, 2, 3], [32, 16, 48, 1, 2, 3]],
            "apply_downsample": [False, True],
            "use_lightweight_conv_block": [False, True],
            **IMAGE,
        },
        {},
    ),
    "VideoPrism": (
        "video",
        {
            "num_frames": 2,
            "patch_size": 8,
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "num_heads": 4,
            "num_spatial_layers": 2,
            "num_temporal_layers": 2,
            "num_auxiliary_layers": 0,
            **IMAGE,
        },
        {},
    ),
    "Flux": (
        "diffusion",
        {
            "input_channels": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 4,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [2, 2, 4],
            "theta": 10000,
            "use_bias": True,
            "image_shape": (4, 16),
            "text_shape": (6, 16),
            "image_ids_shape": (4, 3),
            "text_ids_shape": (6, 3),
            "y_shape": (8,),
        },
        {},
    ),
    "Moonshine": (
        "waves",
        {
            "vocabulary_size": 64,
            "filter_dim": 32,
            "encoder_num_layers": 2,
            "decoder_num_layers": 2,
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "encoder_num_heads": 4,
            "decoder_num_heads": 4,
        },
        {},
    ),
    "Whisper": ("speech", {**TEXT, "max_encoder_sequence_length": 16, "max_decoder_sequence_length": 8}, {}),
}
"""For each name: what it reads, its arguments, and further inputs."""


def hub(name: str) -> Built:
    models = importlib.import_module("keras_hub").models
    importlib.import_module("keras").utils.set_random_seed(0)
    reads, arguments, more = HUB[name]
    kind = name.partition(" ")[0]
    model = getattr(models, kind if kind.endswith("Encoder") else f"{kind}Backbone")(**arguments)
    ids, ones = tokens(), jnp.ones((2, 8), jnp.int32)

    def noise(*shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)

    batch = {
        "text": {"token_ids": ids, "padding_mask": ones},
        "text with images": {"token_ids": ids, "padding_mask": ones, "images": images(16)},
        "unmasked": {"token_ids": ids},
        "both": {
            f"{side}_{what}": array
            for side in ("encoder", "decoder")
            for what, array in (("token_ids", ids), ("padding_mask", ones))
        },
        "image": images(32),
        "pixels": {"pixel_values": images(32)},
        "video": noise(2, 32, 32, 3),
        "diffusion": {
            "image": noise(4, 16),
            "image_ids": noise(4, 3),
            "text": noise(6, 16),
            "text_ids": noise(6, 3),
            "y": noise(8),
            "timesteps": noise(),
            "guidance": noise(),
        },
        "waves": {
            "encoder_input_values": noise(1600, 1),
            "encoder_padding_mask": jnp.ones((2, 1600), bool),
            "decoder_token_ids": ids,
            "decoder_padding_mask": ones.astype(bool),
        },
        "speech": {
            "encoder_features": noise(16, 80),
            "decoder_token_ids": ids,
            "decoder_padding_mask": ones,
        },
    }[reads]
    if more:
        batch = {**batch, **{key: jnp.zeros((2, 8), jnp.int32) for key in more}}
    if isinstance(batch, dict) and "pixel_values" in batch and "masks" in getattr(model, "input_names", ()):
        batch["masks"] = jnp.zeros((2, 16), bool)
    return functional(model, batch)


# Haiku


def haiku(make: Callable[[Any], Callable[..., Any]], *batch: Any, **keywords: Any) -> Built:
    hk = importlib.import_module("haiku")
    pair = hk.transform_with_state(lambda *inputs, **options: make(hk)(*inputs, **options))
    # In training the averages are made; the model then runs as it serves.
    params, state = drawn(pair.init, *batch, **{**keywords, **({"is_training": True} if keywords else {})})

    # Of what BatchNorm keeps, only the averages are read when the model serves.
    averages = {name: {"average": held["average"]} for name, held in state.items() if "average" in held}

    def apply_fn(variables: Any, *inputs: Any) -> Any:
        full = {name: {**held, **variables["averages"].get(name, {})} for name, held in state.items()}
        return pair.apply(variables["params"], full, None, *inputs, **keywords)[0]

    return Built({"params": params, "averages": averages}, apply_fn, batch)


def haiku_resnet(name: str, side: int, version: bool) -> Built:
    def make(hk: Any) -> Any:
        return getattr(hk.nets, name)(1000, resnet_v2=version)

    return haiku(make, images(side), is_training=False)


def haiku_transformer(hk: Any) -> Callable[..., Any]:
    """The encoder of Haiku's example, with its attention."""

    def call(ids: jax.Array) -> jax.Array:
        h = hk.Embed(64, 32)(ids) + hk.get_parameter("positions", (8, 32), init=jnp.zeros)
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(h)
            h = h + hk.MultiHeadAttention(4, 8, w_init=hk.initializers.VarianceScaling(), model_size=32)(
                y, y, y
            )
            y = hk.Linear(64)(hk.LayerNorm(-1, True, True)(h))
            h = h + hk.Linear(32)(jax.nn.gelu(y))
        return hk.Linear(64)(hk.LayerNorm(-1, True, True)(h))

    return call


def haiku_recurrent(kind: str) -> Callable[[Any], Callable[..., Any]]:
    def make(hk: Any) -> Callable[..., Any]:
        def call(x: jax.Array) -> jax.Array:
            core = getattr(hk, kind)(16)
            outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
            return hk.Linear(4)(outputs)

        return call

    return make


def sequence() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 12)), jnp.float32)


RESNETS = {"ResNet18": 1820, "ResNet34": 3670, "ResNet50": 4090, "ResNet101": 7800, "ResNet152": 11500}
"""Multiply-accumulates in millions at 224 pixels, with the stride in the 3 x 3 convolutions, from torchvision."""


def of_haiku() -> dict[str, Entry]:
    found = {
        "haiku/MLP": Entry("dm-haiku", lambda: haiku(lambda hk: hk.nets.MLP([32, 32, 10]), sequence()[:, 0])),
        "haiku/MobileNetV1": Entry(
            "dm-haiku",
            lambda: haiku(lambda hk: hk.nets.MobileNetV1(num_classes=1000), images(32), is_training=False),
            569,
            lambda: haiku(
                lambda hk: hk.nets.MobileNetV1(num_classes=1000), images(224, 1), is_training=False
            ),
        ),
        "haiku/Transformer": Entry("dm-haiku", lambda: haiku(haiku_transformer, tokens())),
    }
    for kind in ("LSTM", "GRU", "VanillaRNN"):
        found[f"haiku/{kind}"] = Entry("dm-haiku", lambda kind=kind: haiku(haiku_recurrent(kind), sequence()))
    for name, published in RESNETS.items():
        for version in (False, True):
            small, whole = (functools.partial(haiku_resnet, name, side, version) for side in (32, 224))
            figure = None if version else published
            large = name == "ResNet152"
            found[f"haiku/{name}{'V2' if version else ''}"] = Entry("dm-haiku", small, figure, whole, large)
    return found


# Linen


def of_flaxmodels() -> dict[str, Entry]:
    def vision(name: str, side: int) -> Built:
        models = importlib.import_module("flaxmodels")
        # VGG's dense layers take images of 224 pixels and no others.
        options = {"include_head": side == 224} if name.startswith("VGG") else {}
        module = getattr(models, name)(output="logits", pretrained=None, normalize=False, **options)
        return linen(module, images(side), train=False)

    found = {}
    for name in (*RESNETS, "VGG16", "VGG19"):
        figure = {**RESNETS, "VGG16": 15500, "VGG19": 19600}[name]
        small, whole = (functools.partial(vision, name, side) for side in (32, 224))
        found[f"flaxmodels/{name}"] = Entry("flaxmodels", small, figure, whole, name == "ResNet152")

    return found


def of_jax_resnet() -> dict[str, Entry]:
    figures = {
        **RESNETS,
        "WideResNet50": 11400,
        "ResNeXt50": 4290,
        "ResNeSt50Fast": 4340,
    }

    def make(name: str, side: int) -> Built:
        module = getattr(importlib.import_module("jax_resnet"), name)(n_classes=1000)
        batch = images(side)
        return Built(
            drawn(module.init, batch),
            functools.partial(module.apply, mutable=False),
            batch,
        )

    names = [
        *RESNETS,
        "WideResNet50",
        "ResNeXt50",
        "ResNetD18",
        "ResNetD34",
        "ResNetD50",
        "ResNeSt50Fast",
        "ResNeSt50",
    ]
    return {
        f"jax-resnet/{name}": Entry(
            "jax-resnet",
            functools.partial(make, name, 64),
            figures.get(name),
            functools.partial(make, name, 224),
            name == "ResNet152",
        )
        for name in names
    }


def of_other_linen() -> dict[str, Entry]:
    def tnt() -> Built:
        package = importlib.import_module("transformer_in_transformer_flax")
        heads = {f"{part}_{what}": 4 for part in ("inner", "outer") for what in ("heads", "dim_head", "r")}
        sizes = {
            "image_size": 32,
            "patch_size": 16,
            "transformed_patch_size": 4,
            "inner_dim": 16,
            "outer_dim": 32,
        }
        config = package.TNTConfig(num_classes=10, depth=2, **sizes, **heads)
        return linen(package.TransformerInTransformer(config=config), images(32))

    def icj_vit() -> Built:
        part = importlib.import_module("image_classification_jax.models.ViT")
        return linen(part.Transformer(2, 32, 4, output_dim=10), images(32), is_training=False)

    def icj_resnet() -> Built:
        part = importlib.import_module("image_classification_jax.models.resnet")
        module = part.ResNet(stage_sizes=[1, 1, 1], num_filters=8, num_classes=10, block_cls=part.ResNetBlock)
        return linen(module, images(32), is_training=False)

    def jaxzoo(name: str) -> Built:
        parts = importlib.import_module("jaxzoo.neural_components")
        if name == "MLP":
            return linen(parts.MLP([32, 16], 4, "swish", "linear"), sequence()[:, 0])
        # It takes one image.
        module, batch = parts.CNN([8, 16], 3, 1, [4], "relu", "linear"), images(16)
        variables = drawn(module.init, batch[0])
        return Built(variables, lambda v, x: jax.vmap(lambda image: module.apply(v, image))(x), batch)

    return {
        "transformer-in-transformer-flax/TNT": Entry("transformer-in-transformer-flax", tnt),
        "image-classification-jax/ViT": Entry("image-classification-jax", icj_vit),
        "image-classification-jax/ResNet": Entry("image-classification-jax", icj_resnet),
        "jaxzoo/MLP": Entry("jaxzoo", functools.partial(jaxzoo, "MLP")),
        "jaxzoo/CNN": Entry("jaxzoo", functools.partial(jaxzoo, "CNN")),
    }


# Equinox

EQUIMO = {
    "attnet_xxs": 224,
    "convnext_t": 64,
    "iformer_t": 64,
    "lowformer_backbone_b0": 64,
    "mobilenetv3_small": 64,
    "mobilenetv3_large": 64,
    "reduceformer_backbone_b1": 64,
    "vit_tiny_patch16_224": 32,
    "vit_small_patch16_224": 32,
    "dinov2_vits14_reg": 28,
    "dinov3_vits16_pretrain_lvd1689m": 32,
    "vit5_small": 32,
}
"""Names, and the side of the images that each is given."""


EQUIMO_SMALL: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "Vssd": (64, {"dim": 16, "d_state": 8, "depths": [1, 1, 1, 1], "num_heads": [2, 4, 4, 8]}),
    "PartialFormer": (
        64,
        {"dim": 16, "num_heads": [2, 4], "depths": [1, 1], "foreground_ratios": 0.5, "patch_size": 4},
    ),
    "FasterViT": (
        64,
        {
            "dim": 16,
            "in_dim": 8,
            "num_heads": [2, 4],
            "hat": [True, False],
            "depths": [1, 1],
            "window_size": [4, 4],
            "ct_size": 2,
        },
    ),
}
"""Classes at small sizes: the side of the images that each is given, and its arguments."""


def equimo(name: str, side: int) -> Built:
    options: dict[str, Any] = {"img_size": side} if "vit" in name else {}
    if name.startswith("lowformer"):
        options["attention_type"] = "softmax"
    if name in EQUIMO_SMALL:
        options = {"img_size": side, "in_channels": 3, **EQUIMO_SMALL[name][1]}
    model = getattr(importlib.import_module("equimo.models"), name)(key=jax.random.key(0), **options)
    return functional(model, images(side, channels_first=True), key=jax.random.key(1))


def of_equinox() -> dict[str, Entry]:
    found: dict[str, Entry] = {}

    def pde(name: str, dims: int, **options: Any) -> Built:
        package = importlib.import_module("pdequinox")
        model = getattr(package.arch, name)(dims, 2, 2, key=jax.random.key(0), **options)
        shape = (2, 2, *(16,) * dims)
        return functional(model, jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))

    circular = {"boundary_mode": "periodic"}
    options: dict[str, dict[str, Any]] = {
        "ConvNet": {"hidden_channels": 8, "depth": 3, "activation": jax.nn.relu, **circular},
        "ClassicResNet": {"hidden_channels": 8, "num_blocks": 2, "activation": jax.nn.relu, **circular},
        "ModernResNet": {"hidden_channels": 8, "num_blocks": 2, "activation": jax.nn.relu, **circular},
        "DilatedResNet": {"hidden_channels": 8, "num_blocks": 2, "activation": jax.nn.relu, **circular},
        "ClassicUNet": {"hidden_channels": 8, "num_levels": 2, "activation": jax.nn.relu, **circular},
        "ModernUNet": {"hidden_channels": 8, "num_levels": 2, "activation": jax.nn.relu, **circular},
        "ClassicFNO": {"hidden_channels": 8, "num_modes": 4, "num_blocks": 2, "activation": jax.nn.gelu},
    }
    for name, own in options.items():
        for dims in (1, 2):
            found[f"pdequinox/{name} ({dims}-D)"] = Entry(
                "pdequinox", functools.partial(pde, name, dims, **own)
            )

    def mlp() -> Built:
        import equinox as eqx

        return functional(eqx.nn.MLP(12, 4, 32, 3, key=jax.random.key(0)), sequence()[:, 0])

    images_of = {
        f"equimo/{name}": Entry("equimo", functools.partial(equimo, name, side))
        for name, side in {**EQUIMO, **{name: side for name, (side, _) in EQUIMO_SMALL.items()}}.items()
    }
    return {"equinox/MLP": Entry("equinox", mlp), **found, **images_of}


# Penzai and NNX


def of_penzai() -> dict[str, Entry]:
    def transformer(**options: Any) -> Built:
        from penzai import pz
        from penzai.models.transformer.variants import llamalike_common

        config = llamalike_common.LlamalikeTransformerConfig(
            **{
                "num_kv_heads": 2,
                "query_head_multiplier": 2,
                "embedding_dim": 32,
                "projection_dim": 8,
                "mlp_hidden_dim": 48,
                "num_decoder_blocks": 2,
                "vocab_size": 64,
                "mlp_variant": "swiglu",
                "tie_embedder_and_logits": False,
                "parameter_dtype": jnp.float32,
                **options,
            }
        )
        model = llamalike_common.build_llamalike_transformer(config, jax.random.key(0))
        ids = pz.nx.wrap(tokens()).tag("batch", "seq")
        return functional_with_positions(model, ids)

    def functional_with_positions(model: Any, ids: Any) -> Built:
        from penzai import pz

        params, apply_fn = jaxeff.functional(model)
        positions = pz.nx.arange("seq", ids.named_shape["seq"])
        return Built(shaken(params), apply_fn, ids, {"token_positions": positions})

    def mlp() -> Built:
        from penzai import pz
        from penzai.models import simple_mlp

        model = simple_mlp.MLP.from_config(
            name="net", init_base_rng=jax.random.key(0), feature_sizes=[12, 32, 4]
        )
        return functional(model, pz.nx.wrap(sequence()[:, 0]).tag("batch", "features"))

    return {
        "penzai/MLP": Entry("penzai", mlp),
        "penzai/Llama": Entry("penzai", transformer),
        "penzai/Llama (all heads)": Entry("penzai", functools.partial(transformer, query_head_multiplier=1)),
        "penzai/Gemma": Entry(
            "penzai",
            functools.partial(
                transformer, num_kv_heads=1, mlp_variant="geglu_approx", tie_embedder_and_logits=True
            ),
        ),
    }


class Mixer(nnx.Module):
    """A residual block of MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self, length: int, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.across = nnx.List([nnx.Linear(length, 16, rngs=rngs), nnx.Linear(16, length, rngs=rngs)])
        self.within = nnx.List([nnx.Linear(width, 32, rngs=rngs), nnx.Linear(32, width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.swapaxes(self.norms[0](x), 1, 2)
        x = x + jnp.swapaxes(self.across[1](nnx.gelu(self.across[0](y))), 1, 2)
        return x + self.within[1](nnx.gelu(self.within[0](self.norms[1](x))))


def of_nnx() -> dict[str, Entry]:
    def mixer() -> Built:
        rngs = nnx.Rngs(0)
        layers = [
            nnx.Linear(12, 24, rngs=rngs),
            Mixer(6, 24, rngs),
            Mixer(6, 24, rngs),
            nnx.Linear(24, 4, rngs=rngs),
        ]
        return functional(nnx.Sequential(*layers), sequence())

    def recurrent(kind: str) -> Built:
        cell = getattr(nnx, kind)(12, 16, rngs=nnx.Rngs(0))
        return functional(nnx.RNN(cell), sequence())

    found = {"flax/Mixer (NNX)": Entry("flax", mixer)}
    for kind in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
        found[f"flax/{kind} (NNX)"] = Entry("flax", functools.partial(recurrent, kind))
    return found


ZOO: Mapping[str, Entry] = {
    **of_nnx(),
    **of_penzai(),
    **of_other_linen(),
    **of_haiku(),
    **{f"keras-hub/{name}": Entry("keras-hub", functools.partial(hub, name)) for name in HUB},
    **applications(),
    **of_flaxmodels(),
    **of_jax_resnet(),
    **of_equinox(),
}
