"""An independent float32 forward of a Hugging Face checkpoint: log-probs and routed experts of given tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Forward:
    """`logits` `[S, vocab]`; `experts` `[S, layers, k]` sorted ids; `margins` `[S, layers]`: probability of the last
    chosen expert minus that of the first one left out."""

    logits: Any
    experts: np.ndarray
    margins: np.ndarray


@cache
def load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def forward(directory: Path, tokens: np.ndarray, forced: np.ndarray | None = None) -> Forward:
    """`forced` `[S, layers, k]`: experts that the layers go on with; each router's own choice is still returned."""
    import torch

    model = load(directory)
    k = model.config.num_experts_per_tok
    with torch.no_grad(), nullcontext() if forced is None else use(model, forced):
        output = model(torch.from_numpy(tokens.astype(np.int64))[None], output_router_logits=True)
    probabilities = torch.stack([layer.softmax(-1) for layer in output.router_logits], dim=1)
    top, experts = probabilities.topk(k + 1, dim=-1)
    return Forward(
        logits=output.logits[0],
        experts=np.sort(experts[:, :, :k].numpy(), axis=-1),
        margins=(top[:, :, k - 1] - top[:, :, k]).numpy(),
    )


@contextmanager
def use(model: Any, experts: np.ndarray) -> Iterator[None]:
    """Let the routers of a Qwen3-MoE use experts `[rows, layers, k]`, weighted by their own scores of these."""
    import torch

    def scored(ids: Any, router: Any, arguments: Any, output: Any) -> Any:
        logits, scores, _ = output
        chosen = logits.softmax(-1).gather(-1, ids)
        return logits, (chosen / chosen.sum(-1, keepdim=True)).to(scores.dtype), ids

    layers = torch.from_numpy(experts.astype(np.int64)).unbind(1)
    routers = [layer.mlp.gate for layer in model.model.layers]
    hooks = [r.register_forward_hook(partial(scored, ids)) for r, ids in zip(routers, layers, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logprobs(found: Forward, tokens: np.ndarray, prompt_len: int, temperature: float) -> np.ndarray:
    """Log-probs `[S - prompt_len]` of the response tokens at a temperature."""
    import torch

    scaled = torch.log_softmax(found.logits[prompt_len - 1 : -1] / temperature, dim=-1)
    return scaled.gather(1, torch.from_numpy(tokens[prompt_len:].astype(np.int64))[:, None])[:, 0].numpy()


def greedy(directory: Path, prompt: np.ndarray, new_tokens: int) -> list[int]:
    """Greedy continuation, one full forward per token."""
    tokens = prompt.astype(np.int64)
    for _ in range(new_tokens):
        tokens = np.append(tokens, int(forward(directory, tokens).logits[-1].argmax()))
    return tokens[len(prompt) :].tolist()
