"""Weights of which each of several processes holds a part, and jobs that these processes do in lockstep.

The layers are divided (FSDP2): a process gathers the weights of a layer when it comes to it, and drops them afterwards.
All processes compute the same, each the whole of it, so that nothing is added up across them and results are those of
undivided weights. Embeddings and output layer stay whole in each.

What must never happen is that one process is in another layer than the others: layers are alike, and it would be handed
the weights of the wrong one. So the processes compare what they are about to read before every pass.

Shapes: N rows, T tokens of the longest, K processes.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.distributed_c10d import Store
from torch.nn import Module, ModuleDict, ModuleList, Parameter

from dspy_greater.errors import GreaterError, WeightsError, WorkerLostError
from dspy_greater.model.backward_probe import try_backward
from dspy_greater.model.engine import Engine
from dspy_greater.model.handshake import shake_hands
from dspy_greater.workers.jobs import Answer, Job, JobRunner

_LEAST_SHARE = 0.1  # of the model's parameters that a list of blocks has to hold, to be divided
_PLACE = re.compile(r"^\[[^\]]*\]\s*")  # in C++, at the beginning of what collectives say


def join(store: Store, rank: int, count: int, *, device: torch.device, seconds: float) -> dist.ProcessGroup:
    """Make this process one of `count` that divide weights among themselves; all of them call this.

    Args:
        store: where they find each other.
        rank: which of them this is, from 0.
        count: how many there are, K.
        device: what they compute on; on a GPU weights are gathered with NCCL, else with gloo.
        seconds: after which one that does not answer is taken for dead.

    Returns:
        The group in which they compare what they are about to read: always gloo, and apart from the weights.
    """
    backend, patience = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    control: Any = dist.new_group(backend="gloo", timeout=patience)
    return control


class LockstepRunner:
    """Does jobs as `JobRunner` does, on weights of which this process holds a part; the others do the same jobs.

    Args:
        engine: the whole weights, on the CPU. They are divided in place, frozen for good, and moved to the device.
        device: what to compute on.
        control: what `join` returned.

    Attributes:
        identity: of the whole weights.
        blocks: the layers that were divided.

    Raises:
        WeightsError: the weights cannot be divided; says why.
    """

    def __init__(self, engine: Engine, device: torch.device, control: dist.ProcessGroup) -> None:
        self.identity = engine.identity
        self.blocks = _divide(engine, device)
        self._runner, self._control, self._passes = JobRunner(engine), control, 0
        engine.model.register_forward_pre_hook(self._agree, with_kwargs=True)

    @property
    def engine(self) -> Engine:
        """The weights, as far as they are here."""
        return self._runner.engine

    def check(self) -> None:
        """Try the divided weights out, all processes together; a whole model passed before it was divided.

        Raises:
            WeightsError: they are not found to be what the whole ones are.
        """
        engine = self.engine
        try:
            found = shake_hands(engine.model, engine.tokenizer, engine.name)
            fault = try_backward(engine.model, engine.tokenizer).fault
        except WeightsError as error:
            raise _indivisible(engine.name, str(error)) from error
        if found != engine.checks.handshake:
            raise _indivisible(engine.name, "Divided, they remember what they read in another way than whole.")
        if fault is not None:
            raise _indivisible(engine.name, fault)

    def run(self, job: Job) -> Answer:
        """The job's answer; raises what `interface.Model` raises.

        Raises:
            WorkerLostError: another process is gone, or does something else. This one is of no use from then on.
        """
        try:
            return self._runner.run(job)
        except GreaterError:
            raise
        except RuntimeError as error:  # what collectives raise has no type of its own
            said = _PLACE.sub("", str(error)).split(". ")[0].strip().rstrip(".") or type(error).__name__
            raise WorkerLostError(f"A process of a group could not go on: {said}.") from error

    def _agree(self, _model: Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before each pass; raises `WorkerLostError` where the processes are about to read unlike tokens."""
        for block in self.blocks:  # what a pass left behind that was given up for lack of memory
            if not all(_is_part(parameter) for parameter in block.parameters()):
                getattr(block, "reset_iter_state", block.reshard)()
        read: Any = inputs.get("input_ids", args[0] if args else None)  # [N, T]
        content = b"" if read is None else read.detach().cpu().contiguous().numpy().tobytes()
        self._passes += 1
        mine = torch.tensor([self._passes, zlib.crc32(content), *(() if read is None else read.shape)])
        all_of = [torch.empty_like(mine) for _ in range(dist.get_world_size())]  # K
        dist.all_gather(all_of, mine, group=self._control)
        if not all(torch.equal(theirs, mine) for theirs in all_of):
            raise WorkerLostError("The processes of a group were about to read unlike tokens.")


def repeated_blocks(model: Module) -> list[Module]:
    """The blocks that hold most of a model's weights: the entries of its large outermost lists of blocks.

    >>> from torch.nn import Linear
    >>> model = ModuleDict({"embed": Linear(4, 4), "layers": ModuleList([Linear(4, 4) for _ in range(3)])})
    >>> len(repeated_blocks(model))
    3
    """
    least = _LEAST_SHARE * sum(parameter.numel() for parameter in model.parameters())
    lists: dict[str, ModuleList] = {}
    for name, module in model.named_modules():
        if (
            not isinstance(module, ModuleList)
            or len(module) < 2
            or any(name.startswith(f"{listed}.") for listed in lists)
        ):
            continue
        called = not any(isinstance(block, (ModuleList, ModuleDict)) for block in module)
        if called and sum(parameter.numel() for parameter in module.parameters()) >= least:
            lists[name] = module
    return list(dict.fromkeys(block for blocks in lists.values() for block in blocks))


def refuse_indivisible(engine: Engine) -> None:
    """Raises `WeightsError` where a look at the weights says that they cannot be divided."""
    parameters = list(engine.model.parameters())
    if any(type(parameter) not in (Tensor, Parameter) or not parameter.is_floating_point() for parameter in parameters):
        raise _indivisible(engine.name, "They are quantised, or parts of others already.")
    if not repeated_blocks(engine.model):
        raise _indivisible(engine.name, "The model has no list of layers that could be divided.")


def _divide(engine: Engine, device: torch.device) -> list[Any]:
    """Divide the blocks of a model that is on the CPU, then move what is left whole; returns the blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    refuse_indivisible(engine)
    model: Module = engine.model
    blocks = repeated_blocks(model)
    model.requires_grad_(False).eval()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    kept = _kept_whole(model, blocks)
    options: dict[str, Any] = {"ignored_params": kept} if kept else {}
    for block in blocks:  # one after the other: no device ever holds more than one of them whole
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **options)
        _gather_for_gradients(block)
    model.to(device)
    return blocks


def _kept_whole(model: Module, blocks: list[Module]) -> set[Parameter]:
    """Parameters of blocks that something else uses as well, and those without an axis to divide."""
    within = {module for block in blocks for module in block.modules()}
    outside = {
        parameter
        for module in model.modules()
        if module not in within
        for parameter in module.parameters(recurse=False)
    }
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    return {parameter for parameter, count in uses.items() if count > 1 or parameter in outside or parameter.ndim == 0}


def _gather_for_gradients(block: Any) -> None:
    """Let a backward pass gather the block's weights again by whatever way it comes into the block.

    FSDP does so where a gradient comes through the block's output. It also comes through keys and values, which leave a
    block in a cache; those of the last block by no other way.
    """
    forward = block.forward

    def gathered(tensor: Tensor) -> Tensor:
        if tensor.numel() and not tensor.untyped_storage().nbytes():  # a weight, dropped after the forward pass
            block.unshard()
        return tensor

    @wraps(forward)
    def watched(*args: Any, **named: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor, gathered):
            return forward(*args, **named)

    block.forward = watched


def _is_part(parameter: Parameter) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _indivisible(name: str, why: str) -> WeightsError:
    return WeightsError(f"The weights of {name!r} cannot be divided among processes. {why} Leave shards= out.")
