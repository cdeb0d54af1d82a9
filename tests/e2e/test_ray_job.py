"""The unchanged command under `ray job submit`, and on a cluster of two nodes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from r3.run import read_rows
from tests.e2e.launch import SMALL, child_environment, kill, processes, started, status, steps, wait_until

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RULES = """
def reward(prompt, response):
    return float(len(response) % 3 == 0)
"""


@dataclass(frozen=True)
class LocalCluster:
    """A cluster of one node with its dashboard, started by `ray start`."""

    api: str
    mark: str

    def ray(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a `ray job` sub-command against the dashboard."""
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", arguments[0], "--address", self.api, *arguments[1:]],
            cwd=cwd, env=child_environment("client"), capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    mark = uuid.uuid4().hex
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    # Not pytest's own directory: Ray's sockets live here, and their paths are short.
    begun = subprocess.run(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={gcs}", "--num-cpus=2",
            f"--dashboard-port={dashboard}", "--include-dashboard=true", "--disable-usage-stats",
            # The fixed defaults are taken where another Ray runs; jobs are started by the agent.
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        ],
        env=child_environment(mark), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert begun.returncode == 0, begun.stdout + begun.stderr
    yield LocalCluster(f"http://127.0.0.1:{dashboard}", mark)
    kill(mark)
    wait_until(lambda: not processes(mark), 60, "the end of the cluster")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's directory: the shipped runtime environment and a reward of their own."""
    directory = tmp_path / "project"
    directory.mkdir()
    shutil.copy(ROOT / "configs" / "runtime_env.yaml", directory)
    (directory / "my_rules.py").write_text(RULES)
    return directory


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def submit(
    cluster: LocalCluster, project: Path, *arguments: str, wait: bool = True
) -> subprocess.CompletedProcess[str]:
    options = ["--runtime-env", "runtime_env.yaml", *([] if wait else ["--no-wait"])]
    return cluster.ray("submit", *options, "--", "python", "-m", "r3.train", *arguments, cwd=project)


def test_a_job_trains_and_reports(warm_model: Path, cluster: LocalCluster, project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(
        cluster, project, "--config", "grpo_qwen3moe", f"run.dir={run}", "run.steps=2", *SMALL,
        "task.reward=my_rules:reward",
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert "step 2/2 |" in job.stdout, "the job's log is streamed"
    assert status(run)["state"] == "done"
    assert steps(run) == [1, 2]
    assert (run / "hf" / "model.safetensors").is_file()
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000002\n"
    rewards = [row["rollout/reward_mean"] for row in read_rows(run / "metrics.jsonl")]
    assert all(reward * 32 == round(reward * 32) for reward in rewards)


def test_a_job_that_fails_says_why_in_the_status(cluster: LocalCluster, project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, project, "--config", "grpo_qwen3moe", f"run.dir={run}", "model=/no/such/model")
    assert job.returncode == 1
    assert "error: /no/such/model" in job.stdout
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 2)


def test_a_relative_run_directory_is_refused(cluster: LocalCluster, project: Path) -> None:
    job = submit(cluster, project, "--config", "grpo_qwen3moe")
    assert job.returncode == 1
    assert "set run.dir to an absolute path" in job.stdout


@pytest.mark.slow
def test_a_stopped_job_leaves_no_process(
    warm_model: Path, cluster: LocalCluster, project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    name = f"stopped-{uuid.uuid4().hex[:8]}"
    job = cluster.ray(
        "submit", "--no-wait", "--submission-id", name, "--runtime-env", "runtime_env.yaml", "--",
        "python", "-m", "r3.train", "--config", "grpo_qwen3moe", f"run.dir={run}", "run.steps=500", *SMALL, cwd=project,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    wait_until(lambda: bool(steps(run)), 240, "the first step")
    assert cluster.ray("stop", name, cwd=project).returncode == 0
    wait_until(lambda: not working(cluster.mark), 90, lambda: f"the end of {working(cluster.mark)}")
    assert (status(run)["state"], status(run)["exit_code"]) == ("interrupted", 143)


def working(mark: str) -> list[str]:
    """Driver, actors and engines of the cluster; Ray's own daemons and idle workers are none of them."""
    own = ("r3.train", "ray::Actor", "ray::TrainerRank", "sglang", "multiprocessing.spawn", "wandb-core")
    return [line for line in processes(mark).values() if any(part in line for part in own)]


@pytest.mark.slow
def test_two_nodes_share_one_run(warm_model: Path, tmp_path: Path) -> None:
    """Two trainer ranks on two nodes, the engine on one of them; the driver connects through RAY_ADDRESS."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        run = tmp_path / "run"
        overrides = ("trainer.processes=2", "trainer.placement=spread", "run.steps=2", f"run.dir={run}", *SMALL)
        with started(run, "--config", "grpo_qwen3moe", *overrides, RAY_ADDRESS=str(cluster.address)) as command:
            assert command.process.wait(timeout=400) == 0, command.output()
            assert steps(run) == [1, 2]
            assert len(list((run / "checkpoints" / "step-00000002").glob("rank-*.pt"))) == 2
            command.require_nothing_left()
    finally:
        cluster.shutdown()
