"""What a run in FP8 leaves out of it: looks at the head, the embedding and the tensors of the loss, inside the rank that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.gpu_rank import at

WIDE = ("torch.bfloat16", "torch.float32")


def kind(tensor: Any) -> dict[str, str]:
    """A tensor's class and dtype. Transformer Engine's FP8 tensors are of classes of its own and call themselves bf16."""
    return {"class": f"{type(tensor).__module__}.{type(tensor).__qualname__}", "dtype": str(tensor.dtype)}


def watch(found: dict[str, Any]) -> None:
    """Lets the model and the loss of this process write into `found` what they are given."""
    from asft_nemo.nemo import gpt_model, head

    loss, postprocess = head.fused_linear_loss, gpt_model.AnchoredGPTModel._postprocess

    def seen_loss(hidden_TH: Any, head_VH: Any, *rest: Any, **given: Any) -> Any:
        tensors = {"hidden states": hidden_TH, "head": head_VH}
        tensors |= {
            "reference's hidden states": given["ref_hidden_TH"],
            "reference's head": given["ref_head_VH"],
        }
        for name, tensor in tensors.items():
            if tensor is not None:
                found["tensors"][f"loss: {name}"] = kind(tensor)
        return loss(hidden_TH, head_VH, *rest, **given)

    def seen_postprocess(self: Any, *rest: Any, **given: Any) -> Any:
        if self.pre_process:
            found["tensors"]["weight of the embedding"] = kind(self.embedding.word_embeddings.weight)
        found["tensors"]["weight of the head"] = kind(self.head_weight())
        # Transformer Engine's modules note whether their last pass was in FP8
        found["layers_in_fp8"] = [
            bool(getattr(layer.self_attention.linear_qkv, "fp8", False)) for layer in self.decoder.layers
        ]
        return postprocess(self, *rest, **given)

    head.fused_linear_loss = seen_loss
    gpt_model.AnchoredGPTModel._postprocess = seen_postprocess


def look(settings: list[str]) -> dict[str, Any]:
    """Trains with these settings in this process, which is the only rank; what was seen."""
    from asft_nemo.config.load import compose
    from asft_nemo.cpu import backend
    from asft_nemo.train import train

    run = compose(settings)
    backend.install()
    found: dict[str, Any] = {"tensors": {}, "layers_in_fp8": []}
    watch(found)
    at("training")
    train(run)
    return found


def is_off(found: Mapping[str, Any]) -> bool:
    """Whether something of the head or the loss is FP8, or nothing at all was, which would show nothing."""
    wide = (
        tensor["class"].startswith("torch.") and tensor["dtype"] in WIDE
        for tensor in found["tensors"].values()
    )
    return not (found["tensors"] and all(wide) and any(found["layers_in_fp8"]))


def table(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """What was seen in each precision, as Markdown."""
    lines = ["| precision | tensor | class | dtype |", "| --- " * 4 + "|"]
    for name, found in checks.items():
        if "tensors" not in found:
            reason = found.get("skipped") or f"failed: {found['failed']}"
            lines.append(f"| {name} | {str(reason).splitlines()[0].replace('|', '/')} |  |  |")
            continue
        layers = sum(found["layers_in_fp8"])
        lines.append(f"| {name}, {layers} layers in FP8 | **{'off' if is_off(found) else 'right'}** |  |  |")
        lines += [
            f"|  | {what} | {one['class']} | {one['dtype']} |" for what, one in found["tensors"].items()
        ]
    return "\n".join(lines)
