"""What each process of test_distributed.py runs: a step on its share of a batch, compared with one process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import softprompt_fast as spf

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny_models import batch, build

ROWS = ["long", None, "short", "long"]


def tuned_model() -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build("llama", dtype=torch.float64), spf.FastSoftPrompt(32, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for name, length in {"short": 2, "long": 7}.items():
        tuned.add_prompt(name, init=torch.randn(length, 32, generator=generator))
    return tuned


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    ids, mask = batch()
    labels = torch.full_like(ids, -100)
    for row in range(len(ids)):  # two targets in every row: ranks weigh the same
        labels[row, mask[row].nonzero()[-2:, 0]] = 9
    alone = tuned_model()
    alone(ids, mask, labels=labels, prompt_ids=ROWS).loss.backward()

    tuned = tuned_model()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for layer in tuned.base_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(tuned.base_model, mesh=mesh)
        assert hasattr(tuned.base_model.model.layers[0].mlp.up_proj.weight, "full_tensor")
    model = tuned
    if kind == "ddp":  # a rank's rows need not use every prompt
        model = torch.nn.parallel.DistributedDataParallel(tuned, find_unused_parameters=True)
    mine = slice(rank * 2, rank * 2 + 2)
    model(ids[mine], mask[mine], labels=labels[mine], prompt_ids=ROWS[mine]).loss.backward()
    if kind == "fsdp":  # only the frozen base is sharded; prompts are whole everywhere
        for parameter in tuned.prompts.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    assert tuned.execution_report().execution == "shared", tuned.execution_report()
    for name in ("short", "long"):
        got, expected = tuned.prompts[name].grad, alone.prompts[name].grad
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < 1e-6, (name, error)
    print(f"rank {rank}: equal", flush=True)
    dist.barrier()  # no rank takes its threads down while the other still talks to it
    dist.destroy_process_group()
    print(f"rank {rank}: left", flush=True)


def train(output: str) -> None:
    """The main job as torchrun and accelerate launch start it."""
    from support.tiny_tuning import tune_tiny

    tune_tiny(Path(output), batch_size=4)
    print("equal", flush=True)  # the test compares what was saved


if __name__ == "__main__":
    train(sys.argv[2]) if sys.argv[1] == "trainer" else main(sys.argv[1])
