"""Prompts and verifiable rewards: reasoning-gym, JSONL files, or a user's own functions.

A task is a pure function of its config and an index, so driver and rollout actors open it independently and agree.
Questions are split into training and held-out ones by a hash of their text: no held-out question is ever trained on.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from r3.config import TaskConfig
from r3.errors import ConfigError
from r3.types import Prompt

# Index blocks per prompt in an endless source: enough tries to meet a question of the wanted half of the split.
_TRIES = 256
Reward = Callable[[Prompt, str], float]


class Source(Protocol):
    """Where prompts come from: `prompt(index)` for a train or held-out index."""

    def train_prompt(self, index: int) -> Prompt: ...
    def heldout_prompt(self, index: int) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts of one task with their reward."""

    source: Source
    reward: Reward

    def train_prompt(self, index: int) -> Prompt:
        """Return training prompt `index`; any index >= 0 is valid."""
        return self.source.train_prompt(index)

    def heldout_prompt(self, index: int) -> Prompt:
        """Return held-out prompt `index`; any index >= 0 is valid."""
        return self.source.heldout_prompt(index)

    def score(self, prompt: Prompt, response: str) -> float:
        """Return the reward of a response text; raise `ConfigError` when a user's function returns no finite number."""
        value = self.reward(prompt, response)
        if not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"the reward of prompt {prompt.index} is {value!r}; a finite number is required")
        return float(value)


def open_task(config: TaskConfig) -> Task:
    """Open the task of a config; raise `ConfigError` when a file, dataset or function is missing."""
    if config.kind == "reasoning_gym":
        dataset = _open_dataset(config)
        source: Source = EndlessSource(lambda i: _dataset_prompt(dataset, i), config.heldout_fraction)
        reward = _dataset_reward(dataset, config.partial_credit)
    elif config.kind == "jsonl":
        assert config.path is not None
        source = FileSource(_read_jsonl(config.path), config.heldout_fraction, config.path)
        reward = VERIFIERS[config.verifier]
    else:
        assert config.prompts is not None
        make = resolve(config.prompts, "task.prompts")
        source = EndlessSource(lambda i: _own_prompt(make(i), i, str(config.prompts)), config.heldout_fraction)
        reward = VERIFIERS[config.verifier]
    if config.reward is not None:
        reward = resolve(config.reward, "task.reward")
    return Task(source, reward)


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, through the tokenizer's chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(prompt.text))


def is_heldout(text: str, fraction: float) -> bool:
    """Tell by crc32 whether a question belongs to the held-out share."""
    return zlib.crc32(text.encode()) < fraction * 2**32


@dataclass(frozen=True, slots=True)
class EndlessSource:
    """Prompts of a procedural source; index i owns a block of source indices and takes the first of the wanted half."""

    make: Callable[[int], Prompt]
    heldout_fraction: float

    def train_prompt(self, index: int) -> Prompt:
        return self._first(index, heldout=False)

    def heldout_prompt(self, index: int) -> Prompt:
        return self._first(index, heldout=True)

    def _first(self, index: int, heldout: bool) -> Prompt:
        candidates = (self.make(index * _TRIES + attempt) for attempt in range(_TRIES))
        for prompt in candidates:
            if is_heldout(prompt.text, self.heldout_fraction) == heldout:
                return prompt
        half = "held-out" if heldout else "training"
        raise ConfigError(
            f"no {half} prompt among {_TRIES} at index {index}; "
            f"task.heldout_fraction={self.heldout_fraction} does not fit so small a prompt source"
        )


class FileSource:
    """Prompts of a file, cycled in order; both halves of the split must be non-empty."""

    def __init__(self, prompts: list[Prompt], heldout_fraction: float, path: Path) -> None:
        self._train = [p for p in prompts if not is_heldout(p.text, heldout_fraction)]
        self._heldout = [p for p in prompts if is_heldout(p.text, heldout_fraction)]
        if not self._train or not self._heldout:
            raise ConfigError(
                f"{path}: {len(self._train)} training and {len(self._heldout)} held-out prompts of {len(prompts)}; "
                f"add lines or change task.heldout_fraction={heldout_fraction}"
            )

    def train_prompt(self, index: int) -> Prompt:
        return self._train[index % len(self._train)]

    def heldout_prompt(self, index: int) -> Prompt:
        return self._heldout[index % len(self._heldout)]


def resolve(path: str, key: str) -> Callable[..., Any]:
    """Import `module:function`, the current directory included; raise `ConfigError` naming the config key."""
    module_name, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={path}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{key}={path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def exact(prompt: Prompt, response: str) -> float:
    """Return 1 when the stripped response equals the answer."""
    return float(response.strip() == prompt.answer.strip())


def math(prompt: Prompt, response: str) -> float:
    """Return 1 when math-verify finds the response equal to the answer (LaTeX, fractions, sets...)."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ConfigError("task.verifier=math needs math-verify: pip install 'rollout-router-replay[tasks]'") from None
    return float(verify(parse(prompt.answer), parse(response)))


VERIFIERS: Mapping[str, Reward] = {"exact": exact, "math": math}


def _open_dataset(config: TaskConfig) -> Any:
    try:
        with warnings.catch_warnings():
            # A dependency compares with a literal; Python says so wherever it compiles the file, by the file's path.
            warnings.filterwarnings("ignore", category=SyntaxWarning, module=r"(.*[/\\])?cellpylib\b")
            import reasoning_gym
    except ImportError:
        raise ConfigError(
            "task.kind=reasoning_gym needs reasoning-gym: pip install 'rollout-router-replay[tasks]'"
        ) from None
    try:
        return reasoning_gym.create_dataset(config.name, seed=config.seed, size=10**9, **config.args)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"task.name={config.name} with task.args={config.args}: {error}") from error


def _dataset_prompt(dataset: Any, index: int) -> Prompt:
    entry = dataset[index]
    return Prompt(index=index, text=str(entry["question"]), answer=str(entry["answer"]))


def _dataset_reward(dataset: Any, partial_credit: bool) -> Reward:
    def reward(prompt: Prompt, response: str) -> float:
        # The entry may hold objects that no wire format carries; it is a function of the index, so it is made again.
        score = float(dataset.score_answer(response.strip(), dataset[prompt.index]))
        return score if partial_credit else float(score >= 1.0)

    return reward


def _read_jsonl(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"task.path={path}: {error.strerror}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_own_prompt(json.loads(line), number - 1, f"{path}:{number}"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number} is not JSON: {error.msg}") from error
    return prompts


def _own_prompt(entry: object, index: int, source: str) -> Prompt:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str) or "answer" not in entry:
        shown = list(islice(entry, 5)) if isinstance(entry, Mapping) else repr(entry)[:60]
        raise ConfigError(f'{source}: a mapping with a text "prompt" and an "answer" is required, got {shown}')
    extra = {key: value for key, value in entry.items() if key not in ("prompt", "answer")}
    return Prompt(index, entry["prompt"], str(entry["answer"]), json.dumps(extra, default=str) if extra else "")
