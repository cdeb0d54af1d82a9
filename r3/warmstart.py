"""Builds a built-in model: random Qwen3-MoE (or dense twin), tokenizer, supervised until a measured sampled reward.

Run by `r3.builtin` as `python -m r3.warmstart --recipe JSON --out DIR`, so that torch and transformers stay out of the
caller. Progress goes to stderr; stdout holds the reason when it fails.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from r3.builtin import Recipe
from r3.config import TaskConfig
from r3.errors import ConfigError, R3Error
from r3.tasks import Task, encode, open_task
from r3.types import Prompt

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reinforcement learning counts prompts up from 0 on both sides of the split; these begin far beyond any run.
DEMONSTRATIONS_FROM = 2_000_000
MEASURED_FROM = 2_000_000
IGNORED_LABEL = -100
# Width times depth up to which a recipe for a GPU is trained on a CPU, for tests.
_CPU_LIMIT = 1024


@dataclass(frozen=True, slots=True)
class Measurement:
    """Mean reward of one sample per held-out prompt at temperature 1.0 after `step` supervised updates."""

    step: int
    loss: float
    reward: float


def build_tokenizer(recipe: Recipe, prompts: Sequence[Prompt]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with single digits and a chat template, trained on the prompts' own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer_vocab,
        min_frequency=recipe.tokenizer_min_frequency,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for prompt in prompts for text in (f"user\n{prompt.text}", "assistant\n", prompt.answer)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Returns the fp32 model with random weights drawn from the recipe's seed."""
    shared: dict[str, Any] = {
        "vocab_size": math.ceil(len(tokenizer) / recipe.vocab_multiple) * recipe.vocab_multiple,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": recipe.dense_size,
        "max_position_embeddings": recipe.max_positions,
        # As the published ones: SGLang keeps an output layer of its own, empty when the checkpoint has none.
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel
    if recipe.experts:
        config = Qwen3MoeConfig(
            num_experts=recipe.experts,
            num_experts_per_tok=recipe.top_k,
            moe_intermediate_size=recipe.expert_size,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            router_aux_loss_coef=0.001,
            **shared,
        )
        model = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shared))
    with torch.no_grad():
        # transformers leaves the padding row zero. A policy may sample that token, and the norm behind the embedding
        # multiplies the gradient of a zero row by 1000: single steps with a gradient norm of hundreds were seen.
        model.model.embed_tokens.weight[tokenizer.pad_token_id].normal_(0.0, model.config.initializer_range)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _batch(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Returns right-padded int64 `[batch, longest]` ids, mask and labels; only the answer and its end are labelled."""
    rows = []
    for prompt in prompts:
        question = encode(tokenizer, prompt)
        answer = [*tokenizer.encode(prompt.answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((question, answer))
    longest = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def sampled_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, recipe: Recipe, seed: int
) -> float:
    """Returns the mean reward of one answer per held-out prompt, sampled from the whole distribution."""
    prompts = [task.heldout_prompt(MEASURED_FROM + index) for index in range(recipe.measure_prompts)]
    inputs = tokenizer.pad({"input_ids": [encode(tokenizer, prompt) for prompt in prompts]}, return_tensors="pt")
    if recipe.gpu:
        inputs = inputs.to(model.device)
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=recipe.max_new_tokens
        )
    model.train()
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(task.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)) / len(prompts)


class MainWeights:
    """fp32 copies of a model's bfloat16 weights, which AdamW updates in their place."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Copy the weights of `model`, then round them to bfloat16; buffers (rotary frequencies) stay as they are."""
        self._rounded = list(model.parameters())
        self.weights = [parameter.detach().float().clone() for parameter in self._rounded]
        for parameter in self._rounded:
            parameter.data = parameter.data.to(torch.bfloat16)

    def take_gradients(self) -> None:
        """Move the rounded weights' gradients to the fp32 ones."""
        for main, rounded in zip(self.weights, self._rounded, strict=True):
            main.grad = None if rounded.grad is None else rounded.grad.float()
            rounded.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the fp32 weights into the model."""
        torch._foreach_copy_(self._rounded, self.weights)


def supervise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, recipe: Recipe
) -> list[Measurement]:
    """Trains `model` in place until a measurement reaches the target and returns all measurements.

    Raises ConfigError when `max_steps` pass first.
    """

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.max_steps))
        return min(1.0, (step + 1) / recipe.warmup_steps) * (0.9 * cosine + 0.1)

    main = MainWeights(model) if recipe.gpu else None
    trained = main.weights if main else list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    measurements: list[Measurement] = []
    model.train()
    with tqdm(total=recipe.max_steps, desc="warm start", unit="step", disable=not sys.stderr.isatty()) as bar:
        for step in range(1, recipe.max_steps + 1):
            first = DEMONSTRATIONS_FROM + (step - 1) * recipe.batch_size
            prompts = [task.train_prompt(first + index) for index in range(recipe.batch_size)]
            # Router logits add the load-balancing term, without which a few experts take every token.
            balanced = {"output_router_logits": True} if recipe.experts else {}
            batch = {name: tensor.to(model.device) for name, tensor in _batch(tokenizer, prompts).items()}
            loss = model(**batch, **balanced, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            if main:
                main.take_gradients()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if main:
                main.give_weights()
            schedule.step()
            bar.update()
            if step % recipe.measure_every:
                continue
            reward = sampled_reward(model, tokenizer, task, recipe, seed=recipe.seed + step)
            measurements.append(Measurement(step, loss.item(), reward))
            _show(bar, measurements[-1], recipe)
            if reward >= recipe.target_reward:
                return measurements
    best = max((m.reward for m in measurements), default=0.0)
    raise ConfigError(
        f"the supervised warm start reached a sampled reward of {best:.2f} in {recipe.max_steps} steps, below "
        f"target_reward={recipe.target_reward}; lower the target"
    )


def _show(bar: Any, measured: Measurement, recipe: Recipe) -> None:
    if not bar.disable:
        bar.set_postfix_str(f"reward {measured.reward:.2f} of {recipe.target_reward}, loss {measured.loss:.2f}")
        return
    print(
        f"warm start: step {measured.step}/{recipe.max_steps}, loss {measured.loss:.3f}, "
        f"sampled reward {measured.reward:.3f} (target {recipe.target_reward})",
        file=sys.stderr,
        flush=True,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transformers 5 writes `num_local_experts`; published Qwen3-MoE checkpoints, and their readers, say `num_experts`.
    path = out / "config.json"
    config = json.loads(path.read_text())
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _device(recipe: Recipe) -> torch.device:
    """Returns where to train: a recipe for a GPU without training (random weights) is made anywhere."""
    if recipe.gpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if recipe.gpu and recipe.target_reward > 0 and recipe.hidden_size * recipe.layers > _CPU_LIMIT:
        raise ConfigError(
            "its warm start needs a GPU and torch sees none here. Build it once where there is one, with R3_CACHE on "
            "storage that this machine sees too, or set model.warm_start_reward: 0 for random weights"
        )
    return torch.device("cpu")


def build(recipe: Recipe, out: Path) -> None:
    """Writes config, weights, tokenizer, generation config and `warmstart.json` of a recipe into `out`."""
    started = time.perf_counter()
    where = _device(recipe)
    if where.type == "cpu":
        # Summation order, and so every weight, depends on the thread count: fixed, whatever the environment asks for.
        torch.set_num_threads(recipe.threads)
        torch.use_deterministic_algorithms(True)
    task = open_task(
        TaskConfig(name=recipe.task, args={"min_word_len": recipe.min_word_len, "max_word_len": recipe.max_word_len})
    )
    sample = [task.train_prompt(DEMONSTRATIONS_FROM + index) for index in range(recipe.tokenizer_prompts)]
    tokenizer = build_tokenizer(recipe, sample)
    # On the GPU at once: random numbers for a billion weights take a CPU half a minute.
    with where:
        model = build_model(recipe, tokenizer)
    measurements = supervise(model, tokenizer, task, recipe) if recipe.target_reward > 0 else []
    _save(model.to(torch.bfloat16) if recipe.gpu else model, tokenizer, out)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": measurements[-1].step if measurements else 0,
        "reward": measurements[-1].reward if measurements else None,
        "measured": [asdict(measured) for measured in measurements],
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "warmstart.json").write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `build` from the command line and returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m r3.warmstart", description=__doc__)
    parser.add_argument("--recipe", required=True, help="fields of r3.builtin.Recipe as JSON")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        build(Recipe(**json.loads(options.recipe)), options.out)
    except R3Error as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
