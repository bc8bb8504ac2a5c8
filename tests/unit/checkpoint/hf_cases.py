"""Writes small random checkpoints of every family the way they lie on the hub; no code of ours takes part."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, FFN, LAYERS, HEADS, GROUPS, HEAD_DIM, VOCAB = 32, 48, 3, 4, 2, 8, 300
# Deliberately not what json.dump would write: byte identity must not come from rewriting.
CONFIG_TEXT = """{
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
  "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 0.00003,
  "rope_theta": 1e6, "max_position_embeddings": 64, "tie_word_embeddings": %s, "torch_dtype": "%s", "own": "\\u00e9" }
"""

# What is special about a variant, as its config.json says it; the rest is in `config_of`.
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": False, "rope_scaling": None},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "llama-2": {"model_type": "llama", "num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None},
    "llama-3": {"model_type": "llama", "rope_theta": 500000.0, "mlp_bias": False},
    "llama-3.1": {"model_type": "llama", "rope_scaling": LLAMA3_SCALING},
    "llama-3.2": {
        "model_type": "llama",
        "head_dim": 8,
        "rope_scaling": LLAMA3_SCALING | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-v0.1": {"model_type": "mistral", "sliding_window": 40},
    "mistral-v0.3": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
}
# Those that convert but that the training stack cannot compute.
CONVERTED_ONLY = ("qwen3-biases", "llama-biases")
_CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}


def config_of(variant: str, *, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS) -> dict[str, Any]:
    """Returns the config.json of a variant."""
    special = VARIANTS[variant]
    return {
        "architectures": [_CLASSES[special["model_type"]] + "ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": 3e-05,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special,
    }


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's tensors by name, in the order of the forward pass, as transformers' classes make them."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    biases = config.get("attention_bias", False)
    projections = {
        "self_attn.q_proj": (heads * width, hidden, biases or config["model_type"] == "qwen2"),
        "self_attn.k_proj": (groups * width, hidden, biases or config["model_type"] == "qwen2"),
        "self_attn.v_proj": (groups * width, hidden, biases or config["model_type"] == "qwen2"),
        "self_attn.o_proj": (hidden, heads * width, biases),
        "mlp.gate_proj": (ffn, hidden, config.get("mlp_bias", False)),
        "mlp.up_proj": (ffn, hidden, config.get("mlp_bias", False)),
        "mlp.down_proj": (hidden, ffn, config.get("mlp_bias", False)),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, (rows, columns, bias) in projections.items():
            shapes[f"{block}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{block}{name}.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes[f"{block}self_attn.q_norm.weight"] = (width,)
            shapes[f"{block}self_attn.k_norm.weight"] = (width,)
        shapes[f"{block}input_layernorm.weight"] = (hidden,)
        shapes[f"{block}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def variant_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random tensors of a model that computes something sensible: matrices of size 0.3, norms and biases of size 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * 0.3
        return (values if len(shape) == 2 else 1.0 + values).to(dtype)

    return {name: fill(shape) for name, shape in shapes_of(config).items()}


def write_variant(
    directory: Path, config: dict[str, Any], *, files: int = 1, tensors: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Writes a variant's checkpoint; returns its tensors."""
    tensors = variant_tensors(config) if tensors is None else tensors
    write_hf(directory, files=files, tensors=tensors)
    text = json.dumps(config, indent=3, separators=(" ,", " :")).replace("\n}", ',\n\n "own": "\\u00e9"}')
    (directory / "config.json").write_text(text)
    return tensors


def tensors_of(*, tied: bool, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random tensors of a Qwen2 model under Hugging Face's names, some of them numbers that arithmetic would not keep."""
    torch.manual_seed(seed)
    shapes = shapes_of(config_of("qwen2-tied" if tied else "qwen2"))
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    # Values that arithmetic would not keep: they have to come through as bits.
    tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")]).to(dtype)
    return tensors


def write_hf(
    directory: Path,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    files: int = 1,
    tensors: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a Qwen2 checkpoint in `files` safetensors files, with what else lies on the hub; returns its tensors."""
    directory.mkdir(parents=True)
    tensors = tensors_of(tied=tied, dtype=dtype) if tensors is None else tensors
    names = list(tensors)
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(files):
            file_name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::files]}
            save_file(part, directory / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    text = CONFIG_TEXT % (str(tied).lower(), str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(text)
    (directory / "generation_config.json").write_bytes(b'{"eos_token_id": [1, 2]}')
    (directory / "tokenizer.json").write_bytes(b"{}\r\n")
    (directory / "merges.txt").write_bytes(bytes(range(256)))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (directory / ".gitattributes").write_text("* -text")
    (directory / "pytorch_model.bin").write_bytes(b"weights in another format")
    return tensors


KEPT = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
}


def read_hf(directory: Path) -> dict[str, torch.Tensor]:
    """Reads every safetensors file with the library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Asserts equal names, dtypes, shapes and bits."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(ours[name]), bits(tensor)), name
