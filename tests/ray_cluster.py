"""Ray clusters of several nodes on this machine, on the loopback only, whose nodes and actors can be killed."""

import logging
import os
import signal
import time
from contextlib import contextmanager

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported, as in `conftest.py`
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import psutil
import ray
from ray.cluster_utils import Cluster

ACTOR = "ray::MapWorker(MapBatches(RowWriter))"


class Nodes:
    """A cluster of a head without cores and of nodes, each with a `datasets` cache, and so a journal, of its own."""

    def __init__(self, count, folder, cores=2):
        here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **here})
        self._folder, self._cores, self._here = folder, cores, here
        self.nodes = [self.add() for _ in range(count)]
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def add(self):
        """Start one more node."""
        cache = self._folder / f"node-{time.monotonic_ns()}"
        environment = {"HF_DATASETS_CACHE": str(cache / "datasets"), "OMP_NUM_THREADS": "1"}
        return self._cluster.add_node(num_cpus=self._cores, env_vars=environment, **self._here)

    def kill_node(self):
        """End a node and all that runs on it at once; return how many actors were lost."""
        node = max(self.nodes, key=lambda node: len(actors(node)))
        lost = len(actors(node))
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        return lost

    def kill_actor(self):
        """End the process of an actor."""
        pid = next(pid for node in self.nodes for pid in actors(node))
        os.kill(pid, signal.SIGKILL)
        return pid

    def journals(self):
        """The journals that the nodes have written."""
        return list(self._folder.glob("node-*/tessy/*.journal"))

    def shutdown(self):
        """End the cluster."""
        ray.shutdown()
        self._cluster.shutdown()


def actors(node):
    """Return the process ids of a node's actors."""
    raylet = next(info.process for infos in [node.all_processes["raylet"]] for info in infos)
    children = psutil.Process(raylet.pid).children(recursive=True)
    return [child.pid for child in children if name_of(child).startswith(ACTOR)]


def name_of(process):
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextmanager
def nodes(count, folder, **options):
    """Run a cluster."""
    cluster = Nodes(count, folder, **options)
    try:
        yield cluster
    finally:
        cluster.shutdown()
