"""Writes a small random Qwen2 checkpoint the way it lies on the hub; no code of ours takes part."""

import json
from pathlib import Path

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


def tensors_of(*, tied: bool, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random tensors under Hugging Face's names, in the order of the forward pass."""
    torch.manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
            shapes[f"{block}self_attn.{name}_proj.bias"] = (rows * HEAD_DIM,)
        shapes[f"{block}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{block}mlp.gate_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{block}mlp.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"{block}mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes[f"{block}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{block}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
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
    """Writes the checkpoint in `files` safetensors files, with what else lies on the hub; returns its tensors."""
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
