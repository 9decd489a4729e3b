"""How an objective is spread over processes: DDP or FSDP2, recomputed activations, compiled blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from dtm_triton.train.config import RunConfig
from dtm_triton.train.engine.compiled import compile_blocks
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.objectives.objective import Objective

ENTRIES = ("features", "tokens", "attention")  # methods besides forward by which a sharded module is entered


class Parallel:
    """An objective ready to train on all processes.

    Args:
        objective: on its device, in its own initial state, equal in all processes.
        run: strategy, compile, activation_checkpointing, precision.
        processes: with one of them the strategy changes nothing.

    Blocks are what lies in a list called `blocks` of the network, the moving average and the teacher: each is one unit
    of sharding, of compilation and of recomputation.
    """

    def __init__(self, objective: Objective, run: RunConfig, processes: Processes) -> None:
        self.objective = objective
        network, average = objective.network, objective.ema
        self.sharded = processes.count > 1 and run.strategy == "fsdp"
        self.plain = copy.deepcopy(network).cpu() if self.sharded else network
        if run.activation_checkpointing:
            network.set_grad_checkpointing(True)
        if run.compile:
            compile_blocks(blocks_of(objective))
        self.call: Any = objective
        if self.sharded:
            for module in (network, average):
                if module is not None:
                    _shard(module, run, processes)
        elif processes.count > 1:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            known = inspect.signature(DistributedDataParallel).parameters
            # the new name, or the old one, of what would send buffers around before every forward
            unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: Any = {"device_ids": ids, "gradient_as_bucket_view": True, unsynced: False}
            self.call = DistributedDataParallel(objective, **options)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.call(batch)

    @contextmanager
    def backward_of(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged at the last one of a step only."""
        if self.sharded:
            self.objective.network.set_requires_gradient_sync(last)
            yield
        elif last or self.call is self.objective:
            yield
        else:
            with self.call.no_sync():
                yield

    def whole_network(self) -> nn.Module:
        """The network with all its weights, to export; every process must call it."""
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.objective.network, options=options)
            if state:  # the first process has it
                self.plain.load_state_dict(state)
        return self.plain


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks below a module: what its lists called `blocks` hold.

    >>> tower = nn.Module()
    >>> tower.blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> len(blocks_of(nn.Sequential(tower)))
    2
    """
    lists = (part for name, part in module.named_modules() if name.rpartition(".")[2] == "blocks")
    return [block for part in lists for block in part.children()]


def _shard(module: nn.Module, run: RunConfig, processes: Processes) -> None:
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    policy = MixedPrecisionPolicy()
    if run.half_precision(processes.device):  # half the traffic; sums of gradients stay in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*blocks_of(module), module):
        # always sharded again: a forward without a backward (an evaluation, the average) must leave shards too
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name in ENTRIES:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
