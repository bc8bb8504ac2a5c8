"""Hugging Face configs to specs, to Megatron's arguments, and the counts that follow from them."""

import json

import pytest
import torch.nn.functional as F

from asft_nemo.errors import CheckpointError
from asft_nemo.model import (
    megatron_config_kwargs,
    model_spec,
    padded_vocab_size,
    read_hf_config,
    read_model_spec,
)

# Values of the published config.json files.
QWEN25_1P5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_72B = QWEN25_1P5B | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


def test_megatron_takes_every_value_from_the_config():
    kwargs = megatron_config_kwargs(model_spec(QWEN25_72B))
    assert kwargs["layernorm_epsilon"] == 1e-5
    assert kwargs["rotary_base"] == 1e6
    assert kwargs["share_embeddings_and_output_weights"] is False
    assert (kwargs["num_layers"], kwargs["hidden_size"], kwargs["ffn_hidden_size"]) == (80, 8192, 29568)
    assert (kwargs["num_attention_heads"], kwargs["num_query_groups"], kwargs["kv_channels"]) == (64, 8, 128)
    assert kwargs["activation_func"] is F.silu
    assert kwargs["add_qkv_bias"]
    assert not kwargs["add_bias_linear"]
    instruct = megatron_config_kwargs(model_spec(QWEN25_72B | {"rms_norm_eps": 1e-6}))
    assert instruct["layernorm_epsilon"] == 1e-6
    assert megatron_config_kwargs(model_spec(QWEN25_1P5B))["share_embeddings_and_output_weights"] is True


def test_fields_left_out_take_the_values_of_the_hugging_face_class():
    left_out = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "use_sliding_window", "hidden_act")
    spec = model_spec({key: value for key, value in QWEN25_1P5B.items() if key not in left_out})
    assert (spec.norm_epsilon, spec.rope_theta, spec.tie_word_embeddings) == (1e-6, 10_000.0, False)


def test_head_dim_need_not_be_hidden_size_over_heads():
    assert model_spec(QWEN25_1P5B | {"head_dim": 64}).head_dim == 64
    with pytest.raises(CheckpointError, match="hidden_size=1530 is no multiple"):
        model_spec(QWEN25_1P5B | {"hidden_size": 1530})


def test_both_spellings_of_rope():
    new = {key: value for key, value in QWEN25_1P5B.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert (model_spec(new).rope_theta, model_spec(new).rope_scaling) == (5e5, None)
    yarn = model_spec(QWEN25_1P5B | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert yarn.rope_scaling == {"rope_type": "yarn", "factor": 4.0}


def test_two_spellings_of_rope_that_say_the_same_are_one():
    linear = {"rope_type": "linear", "factor": 2.0}
    both = QWEN25_1P5B | {
        "rope_scaling": {**linear, "type": "linear"},
        "rope_parameters": {"rope_theta": 1e6, **linear},
    }
    assert model_spec(both) == model_spec(QWEN25_1P5B | {"rope_scaling": linear})
    moved = {key: value for key, value in QWEN25_1P5B.items() if key != "rope_theta"}
    assert model_spec(moved | {"rope_scaling": {"rope_theta": 5e5, "rope_type": "default"}}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, r"1000000\.0 and 10000\.0"),
        (
            {
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "two different scalings",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "yarn", "factor": 4.0}},
            "types 'default' and 'yarn'",
        ),
    ],
)
def test_two_spellings_of_rope_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        model_spec(QWEN25_1P5B | change)


def test_padded_vocab_size():
    assert padded_vocab_size(151936, tp_size=1) == 151936
    assert padded_vocab_size(151936, tp_size=8) == 152576
    assert padded_vocab_size(300, tp_size=2) == 512
    assert padded_vocab_size(300, tp_size=3, divisible_by=1) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}, "Qwen2ForCausalLM .* Mistral"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "not a supported family"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads=5"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is None"),
        ({"hidden_size": "1536"}, "'hidden_size' is '1536'"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'"),
        ({"hidden_act": None}, "'hidden_act' is None where a text"),
    ],
)
def test_a_config_we_cannot_use_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        model_spec(QWEN25_1P5B | change)


def test_a_missing_field_is_named():
    with pytest.raises(CheckpointError, match="'vocab_size' is missing"):
        model_spec({key: value for key, value in QWEN25_1P5B.items() if key != "vocab_size"})


def test_reading_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_hf_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(CheckpointError, match="looks like a NeMo checkpoint"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_1P5B))
    assert read_hf_config(tmp_path) == QWEN25_1P5B
    assert read_model_spec(tmp_path) == model_spec(QWEN25_1P5B)
