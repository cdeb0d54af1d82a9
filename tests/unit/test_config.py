"""A wrong config is refused with every mistake named; a right one loads the same way from every place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r3.config import Config, describe, find_config, load_config, run_directory
from r3.errors import ConfigError

# `runtime_env.yaml` configures a Ray job, not a run.
CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("*.yaml") if p.name != "runtime_env.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert load_config_text(config.to_yaml()) == config


@pytest.mark.parametrize(("given", "stages", "found"), [(None, 1, None), (None, 2, 8), (3, 1, 3), (3, 2, 3)])
def test_a_record_is_cut_into_blocks_for_a_pipeline_or_when_asked(given, stages, found):
    tree = {"routing": {"block_layers": given}, "trainer": {"pipeline_parallel": stages, "processes": stages}}
    assert Config.model_validate(tree).block_layers == found


def test_sections_are_the_agreed_ones():
    assert list(Config.model_fields) == [
        "run", "model", "task", "rollout", "routing", "replay", "trainer", "grpo", "weights", "metrics", "tracking",
    ]  # fmt: skip


def test_every_key_has_a_help_line():
    for key, _, text in describe():
        assert text.endswith((".", ")")), f"{key} has no help line"


def test_overrides_reach_nested_keys_and_the_model_shorthand():
    config = load_config(None, ["trainer.lr=1e-6", "model=some/dir", "replay.mode=none", "task.args={max_word_len: 4}"])
    assert config.trainer.lr == 1e-6
    assert config.model.path == "some/dir"
    assert config.replay.mode == "none"
    assert config.task.args == {"max_word_len": 4}
    assert load_config(None, ["model=some/dir", "model.warm_start_reward=0"]).model.path == "some/dir"


def test_yaml_floats_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trainer:\n  lr: 1e-6\n")
    assert yaml.safe_load(path.read_text())["trainer"]["lr"] == "1e-6"
    assert load_config(path).trainer.lr == 1e-6


def test_every_mistake_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["trainer.lrr=1", "rollout.tempreture=1", "grpo.group_size=many", "replay.mode=off"])
    message = str(caught.value)
    assert "4 errors" in message
    assert "did you mean trainer.lr?" in message
    assert "did you mean rollout.temperature?" in message
    assert "grpo.group_size" in message
    assert "'many'" in message
    assert "replay.mode" in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.top_p=0.9"], "rollout.top_p=0.9: the recorded log-probs would not be those of the sampled"),
        (["rollout.top_k=20"], "rollout.top_k=20"),
        (["rollout.min_p=0.1"], "rollout.min_p=0.1"),
        (["rollout.repetition_penalty=1.1"], "repetition_penalty"),
        (["rollout.presence_penalty=1"], "presence_penalty"),
        (["rollout.frequency_penalty=1"], "frequency_penalty"),
        (["rollout.logit_processor=x"], "logit_processor"),
        (["rollout.temperature=0"], "greater than 0"),
        (["routing.capture=false"], "replay.mode is r3, but routing.capture is false"),
        (["grpo.mini_steps=5"], "not divisible by grpo.mini_steps=5"),
        (["rollout.workers=33"], "rollout.workers=33 exceeds"),
        (["task.kind=jsonl"], "task.path is not set"),
        (["task.kind=custom"], "set task.prompts"),
        (["task.reward=no_colon"], "'package.module:name'"),
        (["run.name=a/b"], "run.name"),
        (["lr"], "not of the form key.path=value"),
        (["run.name.x=1", "run.name=3"], "run.name"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "mapping of sections")])
def test_files_that_are_no_config_are_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert load_config(path) == Config()


def test_configs_are_found_by_path_then_locally_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("grpo_qwen3moe.yaml").parent.name == "configs"
    assert find_config("grpo_qwen3moe").name == "grpo_qwen3moe.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "grpo_qwen3moe.yaml").write_text("run: {steps: 7}")
    assert load_config("grpo_qwen3moe.yaml").run.steps == 7
    (tmp_path / "grpo_qwen3moe.yaml").write_text("run: {steps: 8}")
    assert load_config("grpo_qwen3moe.yaml").run.steps == 8
    with pytest.raises(ConfigError, match=r"nothing\.yaml.*ships .*grpo_qwen3moe\.yaml"):
        find_config("nothing.yaml")


def test_run_directories_are_absolute_and_must_be_so_in_a_ray_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory(Config(), "stamp") == tmp_path / "runs" / "grpo-qwen3moe-stamp"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="absolute"):
        run_directory(Config(), "stamp")
    absolute = load_config(None, [f"run.dir={tmp_path}/r"])
    assert run_directory(absolute, "stamp") == tmp_path / "r"


def test_help_and_dry_run_import_nothing_heavy():
    code = (
        "import sys\nfrom r3.train import main\n"
        "main(['--config', 'grpo_qwen3moe', '--dry-run'])\n"
        "print([m for m in ('torch', 'ray', 'sglang', 'megatron', 'wandb', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "warm_start_reward" in result.stdout


def load_config_text(text):
    return Config.model_validate(yaml.safe_load(text))


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_defaults_are_another_file_under_this_one(tmp_path):
    write(
        tmp_path,
        base="model: some/dir\ntrainer: {lr: 1.0e-5, clip_grad: 2}\ntask: {args: {a: 1, b: 2}}",
        mine="defaults: base.yaml\ntrainer: {lr: 1.0e-6}\nmodel: {warm_start_reward: 0}\ntask: {args: {c: 3}}",
    )
    config = load_config(tmp_path / "mine.yaml", ["trainer.clip_grad=3"])
    assert (config.trainer.lr, config.trainer.clip_grad) == (1e-6, 3)
    assert (config.model.path, config.model.warm_start_reward) == ("some/dir", 0)
    assert config.task.args == {"c": 3}, "a key replaces the key, whatever it holds"


def test_defaults_are_looked_up_beside_the_file_then_as_config_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", mine="defaults: base.yaml", shipped="defaults: grpo_qwen3moe\nrun: {steps: 3}")
    write(tmp_path, base="run: {steps: 4}")
    assert load_config("inner/mine.yaml").run.steps == 4
    write(tmp_path / "inner", base="run: {steps: 5}")
    assert load_config("inner/mine.yaml").run.steps == 5
    shipped = load_config("inner/shipped.yaml")
    assert (shipped.run.steps, shipped.trainer) == (3, load_config("grpo_qwen3moe").trainer)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ("defaults: [base.yaml]", r"defaults is \['base.yaml'\]; name one other config file"),
        ("defaults: nothing.yaml", r"no config 'nothing\.yaml'"),
        ("defaults: nested.yaml", r"nested\.yaml, which has defaults of its own \('base\.yaml'\)"),
        ("defaults: mine.yaml", "one level is allowed"),
    ],
)
def test_defaults_that_cannot_be_are_refused(tmp_path, mine, message):
    write(tmp_path, base="", nested="defaults: base.yaml", mine=mine)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("overrides", "messages", "absent"),
    [
        (["trainer.lrr=1", "grpo.mini_steps=5"], ["2 errors", "trainer.lrr", "divisible"], []),
        (["rollout.top_p=0.5", "rollout.workers=33"], ["2 errors", "rollout.top_p=0.5", "rollout.workers=33"], []),
        (["task.kind=jsonl", "routing.capture=false"], ["2 errors", "task.path", "routing.capture"], []),
        # The check behind a wrong value would speak of the default in its place.
        (["replay.mode=maybe", "routing.capture=false"], ["1 error:", "replay.mode"], ["capture"]),
        (["task.path=[]", "task.kind=jsonl"], ["1 error:", "task.path"], ["not set"]),
        (["grpo=3", "rollout.workers=33"], ["2 errors", "grpo:", "rollout.workers=33"], []),
    ],
)
def test_checks_across_keys_are_in_the_same_report(overrides, messages, absent):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert not [text for text in messages if text not in str(caught.value)], str(caught.value)
    assert not [text for text in absent if text in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.gpus_per_process=2"], "a rank works on one GPU"),
        (["trainer.gpus_per_process=0.5", "trainer.processes=2"], "NCCL connects no two ranks on one GPU"),
        (["rollout.gpus_per_worker=1.5"], "name a share of one GPU, or a whole number"),
        (
            ["rollout.gpus_per_worker=0.5", "rollout.mem_fraction=0.5", "trainer.gpus_per_process=0.5"],
            r"mem_fraction=0.5 \(times 1\) and trainer.mem_fraction=1 share a GPU and add up to 1.5; leave 10%",
        ),
        (
            [
                "rollout.gpus_per_worker=0.25",
                "rollout.workers=2",
                "rollout.mem_fraction=0.35",
                "trainer.gpus_per_process=0.5",
                "trainer.mem_fraction=0.5",
            ],
            r"mem_fraction=0.35 \(times 2\) and trainer.mem_fraction=0.5 share a GPU and add up to 1.2",
        ),
        (
            [
                "rollout.gpus_per_worker=0.5",
                "rollout.workers=2",
                "rollout.mem_fraction=0.8",
                "trainer.gpus_per_process=1",
            ],
            "of 2 engines that may share a GPU adds up to 1.6",
        ),
        (
            ["trainer.processes=2", "trainer.expert_tensor_parallel=2"],
            "Megatron-core would reduce the experts' gradients over the wrong ranks",
        ),
    ],
)
def test_shares_of_a_gpu_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)
