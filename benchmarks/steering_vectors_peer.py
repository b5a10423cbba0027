"""Time steering-vectors in an environment of its own: PYTHON steering_vectors_peer.py IN OUT.

Imports nothing of this project, because it is run where the project is not installed.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from steering_vectors import SteeringVector
from torch import Tensor


@torch.no_grad()
def compare(given: str, found: str) -> None:
    task = torch.load(given)
    torch.set_num_threads(task["threads"])
    config = transformers.AutoConfig.for_model(**task["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(task["weights"])
    model.eval().to(task["device"])
    tokens = task["tokens"].to(task["device"])
    vector = SteeringVector({task["layer"]: task["direction"].to(task["device"])})

    def bare() -> Tensor:
        return model(input_ids=tokens).logits

    def addition() -> Tensor:
        with vector.apply(model, min_token_index=None, token_indices=[task["column"]]):
            return model(input_ids=tokens).logits

    runs: dict[str, Callable[[], Tensor]] = {"bare": bare, "addition": addition}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(task["repeats"] + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if task["device"] != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    result = {name: statistics.median(values[1:]) for name, values in times.items()}
    torch.save(
        {**result, "logits": addition().cpu(), "transformers": transformers.__version__}, found
    )


if __name__ == "__main__":
    compare(*sys.argv[1:])
