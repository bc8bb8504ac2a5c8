"""The fused loss on a GPU: right in bf16, how fast beside the head's bare products and other libraries, how much memory beside the naive way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from asft_nemo.losses import VocabShard, dense_loss, fused_linear_loss
from asft_nemo.losses.fused_linear import HeadGradient
from bench.contenders import (
    CONTENDERS,
    Case,
    Tensors,
    Unavailable,
    build_objective,
    fused_chunk_tokens,
    make_tensors,
)
from bench.gpu_clock import peak_above, seconds_of, tidy
from bench.gpu_parts import NO_TF32, Bar, Check, Part, cell, gpu_gib, package
from bench.gpu_rank import at, sentence
from bench.truth import GRADIENT_BOUNDS, LOSS_BOUND, checks, triton_set_to

MIB = 2**20
SIZE = {"tokens": 8192, "vocab": 152064, "hidden": 5120}  # the head of Qwen2.5-32B
SMALL = {"tokens": 96, "vocab": 640, "hidden": 32}
KERNEL_SIZE = {"tokens": 2048, "vocab": 32768, "hidden": 1024}
ROUNDS, ORACLE_ROWS = 10, 512
CHUNKS = (256, 1024, 2048)  # tokens; what `auto` takes is set by bytes that no GPU has been asked about
OUR_TIME, OUR_MEMORY = 1.6, 1 / 8

Work = Callable[[], Any]
TITLES = {
    "gemms": "the head's four products alone",
    "fused": "ours as training calls it: dHead is added to main_grad",
    "fused_returned": "ours, dHead returned in bf16",
    "fused_pytorch": "ours as training calls it, without Triton",
    **{f"fused_{tokens}": f"ours as training calls it, {tokens} tokens a chunk" for tokens in CHUNKS},
    "authors": "naive: the authors' arithmetic",
    "liger": "Liger-Kernel, Triton",
    "liger_chunked": "Liger-Kernel, chunked, CE unweighted",
    "modelopt": "ModelOpt's KL, Megatron's CE",
}

OURS = tuple(name for name in TITLES if name == "gemms" or name.startswith("fused"))


def _products(t: Tensors) -> Work:
    """Logits of both models, dHidden and dHead, in the inputs' dtype, and nothing else."""

    def work() -> None:
        with torch.no_grad():
            logits_TV = t.hidden_TH @ t.head_VH.T
            _ = t.ref_hidden_TH @ t.ref_head_VH.T
            _, _ = logits_TV @ t.head_VH, logits_TV.T @ t.hidden_TH

    return work


def _main_grad(t: Tensors) -> Tensor:
    """What Megatron's `main_grad` is to the head: fp32 [V, H]."""
    return torch.zeros_like(t.head_VH, dtype=torch.float32)


def _as_training(case: Case, t: Tensors, main_grad_VH: Tensor, *, triton: bool = True) -> Work:
    """Ours: the head's gradient is added to `main_grad_VH` while the loss is computed."""
    chosen, shard = build_objective(case.objective), VocabShard.full(case.vocab)
    sink = HeadGradient(main_grad_VH, upstream_scale=1.0)

    def work() -> None:
        t.hidden_TH.grad = None
        with triton_set_to(triton):
            output = fused_linear_loss(
                t.hidden_TH,
                t.head_VH,
                t.labels_T,
                t.mask_T,
                objective=chosen,
                shard=shard,
                ref_hidden_TH=t.ref_hidden_TH,
                ref_head_VH=t.ref_head_VH,
                chunk_tokens=case.chunk_tokens,
                head_gradient=sink,
            )
            output.loss_sum.backward()

    return work


def _contender(name: str, case: Case, t: Tensors) -> Work:
    row = CONTENDERS[name]
    computed = row.computes(case.objective)
    if computed is None:
        raise Unavailable(f"it offers nothing like objective {case.objective}")
    loss = row.build(replace(case, objective=computed))

    def work() -> float:
        t.hidden_TH.grad = t.head_VH.grad = None
        value = loss(t)
        value.backward()
        return float(value.detach())

    return work


def _work(name: str, case: Case, t: Tensors, main_grad_VH: Tensor) -> Work:
    """One visit of what a row of `TITLES` names.

    Raises:
        Unavailable: it cannot run here.
    """
    if name == "gemms":
        return _products(t)
    if name == "fused_pytorch" and case.device != "cuda":
        raise Unavailable("on a CPU there is nothing but PyTorch")
    if name in ("fused", "fused_pytorch"):
        return _as_training(case, t, main_grad_VH, triton=name == "fused")
    if (size := name.removeprefix("fused_")).isdigit():
        return _as_training(replace(case, chunk_tokens=int(size)), t, main_grad_VH)
    return _contender("fused" if name == "fused_returned" else name, case, t)


def _tried(name: str, case: Case, t: Tensors, main_grad_VH: Tensor) -> Work | str:
    """What a row of `TITLES` names, built and visited once; why it cannot run, where it cannot.

    Raises:
        Exception: ours broke, which is the part's failure.
    """
    reason: str | None = None
    work: Work | None = None
    try:
        work = _work(name, case, t, main_grad_VH)
        work()
    except Unavailable as why:
        reason = str(why)
    except Exception as error:
        if name in OURS:
            raise
        reason = sentence(error)  # of another library: the other rows still tell something
    t.hidden_TH.grad = t.head_VH.grad = None
    if reason is None:
        assert work is not None
        return work
    del work
    tidy(case.device)  # only here is nothing left that holds what the error's frames held
    return reason


def times(case: Mapping[str, Any], rounds: int, names: Sequence[str] = tuple(TITLES)) -> dict[str, Any]:
    """Seconds of forward and backward of rows of `TITLES`, in interleaved rounds whose order moves on by one, after one that does not count.

    Returns:
        `seconds`: name -> one number a round; `skipped`: name -> why; `chunk_tokens` that "auto" takes.
    """
    size = Case(**case)
    tensors = make_tensors(size)
    main_grad_VH = _main_grad(tensors)
    works: dict[str, Work] = {}
    skipped: dict[str, str] = {}
    for name in names:
        at(f"the first visit of {name}")
        tried = _tried(name, size, tensors, main_grad_VH)
        if isinstance(tried, str):
            skipped[name] = tried
        else:
            works[name] = tried
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for number in range(rounds):
        at(f"round {number + 1} of {rounds}")
        for name in order:
            seconds[name].append(seconds_of(works[name], size.device))
            tensors.hidden_TH.grad = tensors.head_VH.grad = None
        order = order[1:] + order[:1]
    return {"seconds": seconds, "skipped": skipped, "chunk_tokens": fused_chunk_tokens(size)}


def memory(case: Mapping[str, Any], names: Sequence[str] = tuple(TITLES)) -> dict[str, Any]:
    """Peak bytes of one visit of rows of `TITLES`, above its inputs and the gradients that it returns; where it did not run, why.

    Rows warm up first. The fp32 buffer that dHead is added to is there before, as `main_grad` is, and counts as the returned gradient.
    """
    size = Case(**case)
    tensors = make_tensors(size)
    main_grad_VH = _main_grad(tensors)
    found: dict[str, Any] = {}
    for name in names:
        at(f"memory of {name}")
        work = _tried(name, size, tensors, main_grad_VH)
        if isinstance(work, str):
            found[name] = {"skipped": work}
            continue
        with peak_above(size.device) as peak:
            work()
        returned = sum(t.grad.nbytes for t in (tensors.hidden_TH, tensors.head_VH) if t.grad is not None)
        found[name] = {"bytes": peak["bytes"] - returned} if peak else {"skipped": "no allocator to ask"}
        tensors.hidden_TH.grad = tensors.head_VH.grad = None
        del work
        tidy(size.device)
    return found


def _exact(case: Case, t: Tensors, rows: int) -> tuple[float, Tensor, Tensor]:
    """The mean loss and its gradients in fp64 by the definition, `rows` tokens at a time: all logits at once would not fit."""
    chosen = build_objective(case.objective)
    head_VH = t.head_VH.detach().double().requires_grad_()
    ref_head_VH = t.ref_head_VH.double()
    total, gradients = 0.0, []
    for start in range(0, case.tokens, rows):
        part = slice(start, start + rows)
        hidden_NH = t.hidden_TH[part].detach().double().requires_grad_()
        output = dense_loss(
            hidden_NH @ head_VH.T,
            t.labels_T[part],
            t.mask_T[part],
            objective=chosen,
            ref_logits_TV=t.ref_hidden_TH[part].double() @ ref_head_VH.T,
        )
        (output.loss_sum / case.tokens).backward()
        total += output.loss_sum.item() / case.tokens
        assert hidden_NH.grad is not None
        gradients.append(hidden_NH.grad)
    assert head_VH.grad is not None
    return total, torch.cat(gradients), head_VH.grad


def errors(case: Mapping[str, Any], rows: int) -> dict[str, dict[str, float]]:
    """Relative errors of the loss and, in norm, of both gradients against fp64, of ours and of the naive way, from the same inputs."""
    size = Case(**case)
    tensors = make_tensors(size)
    at("the fp64 oracle")
    exact, exact_dhidden_TH, exact_dhead_VH = _exact(size, tensors, rows)
    found = {}
    for name in ("fused", "authors"):
        at(f"gradients of {name}")
        value = _contender(name, size, tensors)()
        grads = tensors.hidden_TH.grad, tensors.head_VH.grad
        assert grads[0] is not None
        assert grads[1] is not None
        found[name] = {
            "loss": abs(value / exact - 1),
            "dhidden": _distance(grads[0], exact_dhidden_TH),
            "dhead": _distance(grads[1], exact_dhead_VH),
        }
        tensors.hidden_TH.grad = tensors.head_VH.grad = None
        del grads
        tidy(size.device)
    return found


def _distance(found: Tensor, exact: Tensor, rows: int = 4096) -> float:
    """||found - exact|| / ||exact||, a block of rows at a time."""
    squares = sum(
        float((a.double() - b).square().sum())
        for a, b in zip(found.split(rows), exact.split(rows), strict=True)
    )
    return squares**0.5 / float(exact.norm())


def kernels(tokens: int, vocab: int, hidden: int, device: str) -> list[dict[str, Any]]:
    """Every objective with Triton's kernels and without, in fp32 and bf16, against fp64; see `bench.truth`."""
    return [one.record() for one in checks(tokens=tokens, vocab=vocab, hidden=hidden, device=device)]


def _case(check: Check) -> dict[str, Any]:
    size = SMALL if check.small else SIZE
    return {**size, "dtype": "bf16", "objective": "asft", "chunk_tokens": "auto", "device": check.device}


def check_loss(check: Check) -> dict[str, Any]:
    """Times, memory and errors, each in a child process."""
    case = _case(check)
    rounds, rows = (3, 40) if check.small else (ROUNDS, ORACLE_ROWS)
    found: dict[str, Any] = {"case": case}
    found |= check.alone("bench.gpu_loss:times", environment=NO_TF32, case=case, rounds=rounds)
    found["memory"] = check.alone("bench.gpu_loss:memory", environment=NO_TF32, case=case)
    found["errors"] = check.alone("bench.gpu_loss:errors", environment=NO_TF32, case=case, rows=rows)
    found["bars"] = loss_bars(found)
    return found


def ratios(seconds: Mapping[str, list[float]], name: str) -> list[float]:
    """A row's seconds over those of the bare products, round by round."""
    return [own / bare for own, bare in zip(seconds[name], seconds["gemms"], strict=True)]


def loss_bars(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the bars are judged by."""
    bars: dict[str, dict[str, Any]] = {}
    if "fused" in found["seconds"] and "gemms" in found["seconds"]:
        bars["time"] = {"measured": statistics.median(ratios(found["seconds"], "fused")), "limit": OUR_TIME}
    else:
        bars["time"] = {"reason": found["skipped"].get("fused") or found["skipped"].get("gemms")}
    ours, naive = found["memory"]["fused"], found["memory"]["authors"]
    if "bytes" in ours and "bytes" in naive:
        bars["memory"] = {"measured": ours["bytes"] / naive["bytes"], "limit": OUR_MEMORY}
    else:
        bars["memory"] = {"reason": ours.get("skipped") or naive.get("skipped")}
    for what, ours_error in found["errors"]["fused"].items():
        bars[f"{what}_error"] = {"measured": ours_error, "limit": found["errors"]["authors"][what]}
    return bars


def loss_table(found: Mapping[str, Any]) -> str:
    """As Markdown."""
    case = found["case"]
    lines = [
        f"T={case['tokens']}, V={case['vocab']}, H={case['hidden']}, {case['dtype']}, {case['objective']}, forward and backward. "
        f"Ours has {found['chunk_tokens']} tokens a chunk. Memory is the peak above inputs and returned gradients.",
        "",
        "| | ms, median (min) | of the bare products | memory, MiB |",
        "| --- | --- | --- | --- |",
    ]
    for name, title in TITLES.items():
        if name not in found["seconds"] and name not in found["skipped"]:
            continue
        bytes_ = found["memory"].get(name, {})
        held = f"{bytes_['bytes'] / MIB:.0f}" if "bytes" in bytes_ else cell(bytes_.get("skipped", ""))
        if name in found["skipped"]:
            lines.append(f"| {title} | {cell(found['skipped'][name])} |  |  |")
            continue
        own = found["seconds"][name]
        ratio = (
            f"{statistics.median(ratios(found['seconds'], name)):.3f}" if "gemms" in found["seconds"] else ""
        )
        lines.append(
            f"| {title} | {1000 * statistics.median(own):.2f} ({1000 * min(own):.2f}) | {ratio} | {held} |"
        )
    lines += ["", "| error against fp64 | loss | dHidden | dHead |", "| --- | --- | --- | --- |"]
    for name, title in (("fused", "ours"), ("authors", "naive, all in bf16")):
        row = found["errors"][name]
        lines.append(f"| {title} | {row['loss']:.1e} | {row['dhidden']:.1e} | {row['dhead']:.1e} |")
    return "\n".join(lines)


def check_kernels(check: Check) -> dict[str, Any]:
    """Triton's kernels and PyTorch's against the oracle."""
    options = check.options
    size = {"tokens": options.tokens, "vocab": options.vocab, "hidden": KERNEL_SIZE["hidden"]}
    rows = check.alone(
        "bench.gpu_loss:kernels",
        environment=NO_TF32,
        **(SMALL if check.small else size),
        device=check.device,
    )
    skipped = next((row["skipped"] for row in rows if row["triton"] and row["skipped"]), None)
    wrong = {"measured": sum(not row["right"] for row in rows), "limit": 0}
    return {"truth": rows, "bars": {"wrong": {"reason": skipped} if skipped else wrong}}


def truth_table(found: Mapping[str, Any]) -> str:
    """Errors of the loss as Markdown."""
    bounds = ", ".join(f"gradients in {dtype} {bound:.1e}" for dtype, bound in GRADIENT_BOUNDS.items())
    lines = [
        f"Relative errors against the dense fp64 oracle (gradients in norm), right within: loss {LOSS_BOUND:.0e}, {bounds}. Naive is the",
        "definition computed in the inputs' own dtype.",
        "",
        "| objective | inputs | kernels | loss | dHidden | dHead | naive dHidden | naive dHead | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["truth"]:
        cells = [row["objective"], row["dtype"], "Triton" if row["triton"] else "PyTorch"]
        if row["skipped"]:
            cells += [*[""] * 5, f"skipped: {row['skipped']}"]
        else:
            told = ("loss", "dhidden", "dhead", "naive_dhidden", "naive_dhead")
            cells += ["nan" if row[key] is None else f"{row[key]:.1e}" for key in told]
            cells.append("right" if row["right"] else "**off**")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_LIGHT = package("torch", "jaxtyping", called="what the losses import")
KERNELS = Part(
    "kernels",
    "Triton's kernels and PyTorch's against fp64",
    (_LIGHT,),
    60,
    check_kernels,
    truth_table,
    (Bar("wrong", "cases in which a loss or a gradient is off", "0"),),
)
LOSS = Part(
    "loss",
    "The fused loss at T=8192, V=152064, H=5120",
    (_LIGHT, gpu_gib(60)),
    120,
    check_loss,
    loss_table,
    (
        Bar("time", "time of ours over the head's four bare products", "1.6"),
        Bar("memory", "memory of ours over the naive way's", "1/8"),
        Bar("loss_error", "error of the loss in bf16", "the naive way's"),
        Bar("dhidden_error", "error of dHidden in bf16", "the naive way's"),
        Bar("dhead_error", "error of dHead in bf16", "the naive way's"),
    ),
)
