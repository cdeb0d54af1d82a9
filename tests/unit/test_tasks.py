"""Prompts, their split, their rewards, and a user's own functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from r3.config import TaskConfig
from r3.errors import ConfigError
from r3.tasks import encode, is_heldout, open_task
from r3.types import Prompt
from tests.command import ROOT

SPELL = TaskConfig(args={"min_word_len": 3, "max_word_len": 6})


def test_spell_backward_scores_with_its_own_verifier():
    task = open_task(SPELL)
    prompt = task.train_prompt(3)
    assert task.score(prompt, prompt.answer) == 1
    assert task.score(prompt, f" {prompt.answer}\n") == 1
    assert task.score(prompt, prompt.answer[:-1] + "?") == 0


def test_the_syntax_warnings_of_one_dependency_alone_are_not_shown(tmp_path):
    # Stand-ins: Python warns where it compiles, so only where no cached bytecode lies.
    for name in ("cellpylib", "another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"from {name} import functions\n")
        (tmp_path / name / "functions.py").write_text("def same(how):\n    return how is 'recursive'\n")
    (tmp_path / "reasoning_gym.py").write_text("import another, cellpylib\ndef create_dataset(*_, **__): pass\n")
    program = "from r3.config import TaskConfig; from r3.tasks import _open_dataset; _open_dataset(TaskConfig())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    warned = [line for line in result.stderr.splitlines() if "SyntaxWarning" in line]
    assert len(warned) == 1
    assert "another" in warned[0]


def test_partial_credit_is_the_datasets_own_score():
    task = open_task(SPELL.model_copy(update={"partial_credit": True}))
    prompt = task.train_prompt(3)
    assert 0 < task.score(prompt, prompt.answer[:-1] + "?") < 1


def test_heldout_questions_are_never_trained_on():
    task = open_task(SPELL)
    train = {task.train_prompt(i).text for i in range(3000)}
    heldout = {task.heldout_prompt(i).text for i in range(300)}
    assert not train & heldout
    assert len(heldout) > 100


def test_two_processes_see_the_same_prompts():
    assert [open_task(SPELL).train_prompt(i) for i in (0, 5)] == [open_task(SPELL).train_prompt(i) for i in (0, 5)]


def test_a_jsonl_task_cycles_through_its_lines(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}=", "answer": 2 * i, "level": i}) for i in range(200)))
    task = open_task(TaskConfig(kind="jsonl", path=path))
    first = task.train_prompt(0)
    assert task.score(first, f" {first.answer} ") == 1
    assert json.loads(first.payload)["level"] == first.index
    train = [task.train_prompt(i) for i in range(400)]
    assert train[0] in train[1:]
    assert all(is_heldout(task.heldout_prompt(i).text, 0.1) for i in range(50))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"prompt": "a"}', '"answer" is required'), ("{", "not JSON"), ('{"prompt": "a", "answer": "b"}', "held-out")],
)
def test_bad_jsonl_files_are_named_by_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        open_task(TaskConfig(kind="jsonl", path=path))
    assert "bad.jsonl" in str(caught.value)


def test_the_math_verifier_knows_equal_numbers(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"half of {i}", "answer": "1/2"}) for i in range(100)))
    task = open_task(TaskConfig(kind="jsonl", path=path, verifier="math"))
    assert task.score(task.train_prompt(0), "The answer is $0.5$") == 1
    assert task.score(task.train_prompt(0), "$0.25$") == 0


def test_own_prompts_and_reward_come_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_task_module.py").write_text(
        "def prompts(i):\n    return {'prompt': f'say {i}', 'answer': i}\n"
        "def reward(prompt, response):\n    return 0.25 if response == prompt.answer else 0\n"
    )
    monkeypatch.chdir(tmp_path)
    task = open_task(TaskConfig(kind="custom", prompts="my_task_module:prompts", reward="my_task_module:reward"))
    prompt = task.train_prompt(1)
    assert prompt.text == f"say {prompt.index}"
    assert task.score(prompt, prompt.answer) == 0.25


def test_a_reward_that_is_no_number_is_refused():
    task = open_task(SPELL.model_copy(update={"reward": "tests.unit.test_tasks:no_number"}))
    with pytest.raises(ConfigError, match="nan"):
        task.score(task.train_prompt(0), "x")


def no_number(prompt, response):
    return float("nan")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(name="no_such_dataset"), "no_such_dataset"),
        (TaskConfig(args={"min_word_len": 9, "max_word_len": 2}), "max_word_len"),
        (TaskConfig(reward="no_such_module:f"), r"task\.reward=no_such_module:f"),
        (TaskConfig(reward="json:nothing"), "nothing"),
    ],
)
def test_missing_pieces_are_config_errors(config, message):
    with pytest.raises(ConfigError, match=message):
        open_task(config)


class Tokenizer:
    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [int(add_special_tokens), *map(ord, text)]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<{messages[0]['content']}>"


def test_prompts_go_through_the_chat_template_where_there_is_one():
    prompt = Prompt(0, "ab", "")
    plain = Tokenizer()
    assert encode(plain, prompt) == [1, 97, 98]
    plain.chat_template = "{{ messages }}"
    assert encode(plain, prompt) == [0, ord("<"), 97, 98, ord(">")]
