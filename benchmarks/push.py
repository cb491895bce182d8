"""What a push needs of memory: the peak of 100,000 rows against that of 10,000, streamed to a Hub on loopback.

The Hub runs in this process and each push in a child of its own, so that the figures are the pusher's alone::

    python benchmarks/push.py [rows ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.hub_server import HubServer

PUSHER = """
import resource, sys, time
from datasets import Dataset, IterableDataset
from tessy_hf import push_to_hub
from tests.hub_sweep import finished, finished_row

rows, kind = int(sys.argv[1]), sys.argv[2]
TEXT = "Wait, let me check that again: if n is even then n/2 has to be odd, so we can go on. " * 12

def generate():
    for number in range(rows):
        yield {**finished_row(number), "thinking": f"{number} {TEXT}"}

stream = IterableDataset.from_generator(generate, features=finished(1).features)
if kind == "mapped":
    from tests.test_transform import scripted
    transform = scripted(rows_in_flight=64)
    prompts = IterableDataset.from_generator(
        lambda: ({"id": f"r{number}", "prompt": f"{number} {TEXT}"} for number in range(rows))
    )
    stream = prompts.map(transform, batched=True, features=transform.features(prompts))
begin = time.perf_counter()
release = push_to_hub(stream, f"ada/{kind}-{rows}", max_shard_size="8MB", say=lambda step: None)
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f'{{"rows": {release.rows + release.failed}, "peak": {peak}, "seconds": {seconds}}}')
"""


def measure(hub, home, rows, kind):
    """Push so many rows in a child; return its peak memory in MiB and its seconds."""
    environment = {**hub.environment(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PUSHER, str(rows), kind], env=environment, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rows"] == rows
    return told


def main(sizes, kinds=("generated", "mapped")):
    """Print the figures."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder, "storage")) as hub:
            peaks = []
            for rows in sizes:
                told = measure(hub, Path(folder, "home"), rows, kind)
                peaks.append(told["peak"])
                speed = rows / told["seconds"]
                print(f"{kind}: {rows} rows, peak {told['peak']:.0f} MiB, {speed:.0f} rows/s", flush=True)
            print(f"{kind}: peak {peaks[-1] / peaks[0]:.2f} times that of {sizes[0]} rows", flush=True)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [10_000, 100_000])
