"""Every family: published sizes, what its config.json leaves to defaults, what can be trained and what is refused."""

import json
from functools import partial

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.model_shape import attention_window
from asft_nemo.errors import CheckpointError, ConfigError, UserError
from asft_nemo.launch_local import launch, launch_cache
from asft_nemo.model import FAMILIES, megatron_config_kwargs, model_spec, parameter_count

CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config(
    family: str,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 128,
    heads: int = 4,
    groups: int = 2,
    vocab: int = 256,
    **more: object,
) -> dict[str, object]:
    """The fields of a config.json that matter here, with published models' names for them."""
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


# layers, hidden, ffn, query heads, key/value heads, vocabulary as in the published config.json files; the counts are those of the
# published weights (the totals of their safetensors files), tied embeddings once.
TIED = {"tie_word_embeddings": True}
PUBLISHED = {
    "Qwen2.5-0.5B": (config("qwen2", 24, 896, 4864, 14, 2, 151936, **TIED), 494_032_768),
    "Qwen2.5-1.5B": (config("qwen2", 28, 1536, 8960, 12, 2, 151936, **TIED), 1_543_714_304),
    "Qwen2.5-3B": (config("qwen2", 36, 2048, 11008, 16, 2, 151936, **TIED), 3_085_938_688),
    "Qwen2.5-7B": (config("qwen2", 28, 3584, 18944, 28, 4, 152064), 7_615_616_512),
    "Qwen2.5-14B": (config("qwen2", 48, 5120, 13824, 40, 8, 152064), 14_770_033_664),
    "Qwen2.5-32B": (config("qwen2", 64, 5120, 27648, 40, 8, 152064), 32_763_876_352),
    "Qwen2.5-72B": (config("qwen2", 80, 8192, 29568, 64, 8, 152064), 72_706_203_648),
    "Qwen3-0.6B": (config("qwen3", 28, 1024, 3072, 16, 8, 151936, head_dim=128, **TIED), 596_049_920),
    "Qwen3-8B": (config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Qwen3-32B": (config("qwen3", 64, 5120, 25600, 64, 8, 151936, head_dim=128), 32_762_123_264),
    "Llama-2-7B": (config("llama", 32, 4096, 11008, 32, 32, 32000), 6_738_415_616),
    "Llama-2-70B": (config("llama", 80, 8192, 28672, 64, 8, 32000), 68_976_648_192),
    "Llama-3-8B": (config("llama", 32, 4096, 14336, 32, 8, 128256), 8_030_261_248),
    "Llama-3-70B": (config("llama", 80, 8192, 28672, 64, 8, 128256), 70_553_706_496),
    "Llama-3.2-1B": (config("llama", 16, 2048, 8192, 32, 8, 128256, head_dim=64, **TIED), 1_235_814_400),
    "Mistral-7B-v0.1": (config("mistral", 32, 4096, 14336, 32, 8, 32000), 7_241_732_096),
    "Mistral-7B-v0.3": (config("mistral", 32, 4096, 14336, 32, 8, 32768), 7_248_023_552),
    "Mistral-Nemo": (config("mistral", 40, 5120, 14336, 32, 8, 131072, head_dim=128), 12_247_782_400),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    values, parameters = PUBLISHED[name]
    assert parameter_count(model_spec(values)) == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_computes_reaches_megatron(family):
    spec = model_spec(config(family, head_dim=32, rms_norm_eps=3e-5, rope_theta=5e5))
    kwargs = megatron_config_kwargs(spec)
    assert (kwargs["qk_layernorm"], kwargs["add_qkv_bias"]) == (family == "qwen3", family == "qwen2")
    assert (kwargs["kv_channels"], kwargs["layernorm_epsilon"], kwargs["rotary_base"]) == (32, 3e-5, 5e5)
    assert not kwargs["rope_scaling"]
    assert kwargs["seq_len_interpolation_factor"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_take_the_values_of_the_hugging_face_class(family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(family)
    spec = model_spec(config(family, hidden=32 * 128, heads=32))
    assert spec.norm_epsilon == theirs.rms_norm_eps
    assert spec.hidden_act == theirs.hidden_act
    assert spec.rope_theta == theirs.rope_theta
    assert spec.tie_word_embeddings == theirs.tie_word_embeddings
    assert spec.attention_dropout == theirs.attention_dropout
    assert spec.initializer_range == theirs.initializer_range
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert spec.attention_window == theirs.to_dict().get("sliding_window")
    assert spec.output_bias == getattr(theirs, "attention_bias", False)
    assert spec.mlp_bias == getattr(theirs, "mlp_bias", False)


def test_heads_that_are_not_written():
    def without(family: str) -> dict[str, object]:
        return {key: value for key, value in config(family).items() if key != "num_key_value_heads"}

    assert model_spec(without("llama")).num_query_groups == 4
    for family in FAMILIES:
        assert model_spec(config(family) | {"num_key_value_heads": None}).num_query_groups == 4
    for family in set(FAMILIES) - {"llama"}:
        with pytest.raises(CheckpointError, match="'num_key_value_heads' is missing"):
            model_spec(without(family))
    assert model_spec(config("qwen3")).head_dim == 128
    assert model_spec(config("llama")).head_dim == 16
    assert model_spec(config("mistral", head_dim=None)).head_dim == 16


def test_llama3_scaling_reaches_megatron():
    kwargs = megatron_config_kwargs(model_spec(config("llama", rope_scaling=LLAMA3_SCALING)))
    assert kwargs["rope_scaling"] is True
    assert kwargs["rope_scaling_factor"] == 8.0
    linear = {"type": "linear", "factor": 4}
    kwargs = megatron_config_kwargs(model_spec(config("llama", rope_scaling=linear)))
    assert (kwargs["rope_scaling"], kwargs["seq_len_interpolation_factor"]) == (False, 4.0)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "llama",
            {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 2.0}},
            r"low_freq_factor=2.0 .*=1 only",
        ),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 8.0}}, r"high_freq_factor=8.0"),
        (
            "llama",
            {"rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 4096}},
            r"original_max_position_embeddings=4096 .*=8192 only",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
        ("llama", {"rope_scaling": LLAMA3_SCALING | {"factor": "8"}}, "factor is '8' where a number"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}, "factor=3 .* power of two"),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"'yarn' .* \(only linear, llama3 can\)",
        ),
        ("mistral", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"attention_bias": True}, "config.json: attention_bias=true can be converted"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias=true and mlp_bias=true"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true can be converted, but not trained"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu' can be converted, but not trained"),
    ],
)
def test_what_megatron_does_not_compute_is_described_but_not_trained(family, fields, message):
    spec = model_spec(config(family, **fields))
    with pytest.raises(UserError, match=message):
        megatron_config_kwargs(spec)


def test_the_launcher_refuses_it_before_any_rank_starts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("llama", mlp_bias=True)))
    run = compose(
        ["recipe=tiny_cpu", "objective=sft", f"model.path={tmp_path}", f"run.dir={tmp_path / 'run'}"],
        check_inputs=False,
    )
    for start in (launch, partial(launch_cache, repair=False)):
        with pytest.raises(UserError, match="mlp_bias=true can be converted, but not trained"):
            start(run)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 4096}, None),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            512,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            None,
        ),
        ({"model_type": "qwen3", "sliding_window": 512, "use_sliding_window": True}, None),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"model_type": "llama", "sliding_window": 512}, None),
    ],
)
def test_the_window_is_the_one_transformers_applies(fields, window):
    """Our reading of the fields against the layers that transformers makes of them."""
    transformers = pytest.importorskip("transformers")
    assert attention_window({"num_hidden_layers": 4, **fields}) == window
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(fields["model_type"], num_hidden_layers=4, **rest)
    if fields["model_type"] == "mistral":
        assert theirs.sliding_window == window
    elif fields["model_type"] != "llama":
        assert ("sliding_attention" in theirs.layer_types) == (window is not None)


def test_a_list_of_layers_decides_before_the_number_does():
    values = config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert attention_window(values | {"layer_types": ["full_attention"] * 2}) is None
    assert attention_window(values | {"layer_types": ["full_attention", "sliding_attention"]}) == 8
    with pytest.raises(ConfigError, match="sliding_window='8' is no number of tokens"):
        attention_window(values | {"sliding_window": "8"})
