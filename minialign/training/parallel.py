"""Several processes, as torchrun starts them: who is who, what they tell each other, and weights in
shards (FSDP2).

Started by plain `python` a process is alone, and all of this leaves things as they are. A step's
records are dealt out to the processes, and what each adds to the loss is divided by the whole
step's pairs: so the sum of all gradients is the gradient of one process that sees all of them.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from minialign.cli import require, under_torchrun
from minialign.errors import UserError

PATIENCE = timedelta(minutes=30)  # before a process gives up waiting; rank 0 writes the weights


def start(device: str) -> None:
    """Join the processes that torchrun has started, if it has. Each takes a GPU of its own; only
    rank 0 speaks."""
    if not under_torchrun() or dist.is_initialized():
        return
    own = "under torchrun every process takes a GPU of its own"
    require(device in ("cpu", "cuda"), f"--device {device}: {own}; give `cuda`")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def rank() -> int:
    """This process's number; rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------- what they tell each other


def gather(value) -> list:
    """Every process's `value`, in their order, to all of them."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_across_ranks(values: dict[str, float]) -> dict[str, float]:
    """The sums over all processes, by name."""
    total: Counter = Counter()
    for each in gather(dict(values)):
        total.update(each)
    return dict(total)


def on_rank0(work: Callable[[], object]) -> None:
    """`work` by rank 0 alone; the others wait for it, and where it is refused all end."""
    refused = None
    if rank() == 0:
        try:
            work()
        except UserError as error:
            refused = error
    refused = gather(refused)[0]
    if refused is not None:
        raise refused


def tell_left_out(mine: list[str], what: str) -> None:
    """Say once how many records all processes have left out on the way, and what was wrong with
    the first."""
    left_out = sum(gather(mine), [])
    if left_out and rank() == 0:
        tqdm.write(f"{len(left_out)} {what} left out on the way, the first: {left_out[0]}")


def shard_batch(items: list) -> list:
    """Those of a step's `items` that are this process's."""
    return items[rank() :: size()]


def even(parts: list, idle) -> list:
    """`parts`, and `idle` ones until every process has as many: all go through shards together."""
    return parts + [idle] * (max(gather(len(parts))) - len(parts))


def sum_gradients_across_ranks(trained: list[Tensor]) -> None:
    """Give every process the sum of all their gradients; those of shards are summed already."""
    if size() == 1 or in_shards(trained[0]):
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in trained])
    dist.all_reduce(flat)
    sizes = [parameter.numel() for parameter in trained]
    for parameter, summed in zip(trained, flat.split(sizes), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))


# ---------------------------------------------------------------- weights in shards
#
# The scripts call `fully_shard` on the policy themselves, a model of the meta device; afterwards
# each process reads the weights and keeps its own rows of them (hf_folder.py).


def mesh(device: str):
    """All processes in one row, as `fully_shard` wants to know them."""
    from torch.distributed.device_mesh import init_device_mesh  # here: it takes a second

    return init_device_mesh(torch.device(device).type, (size(),))


def shard_frozen(model: nn.Module, device: str) -> None:
    """Deal out a model that is not trained, such as an annotator's, as the scripts do theirs."""
    from torch.distributed.fsdp import fully_shard  # here, as it takes a second

    processes = mesh(device)
    for unit in (*model.language_model.layers, model.vision_tower, model):
        fully_shard(unit, mesh=processes)
    after_sharding(model)


def after_sharding(model: nn.Module) -> None:
    """Gradients are summed, not averaged, as the loops have divided the losses; and
    `encode_images` gathers what it needs, as `forward` does.

    No policy of mixed precision is set: frozen weights keep their type, and what is trained is
    float32, and so are its gradients.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, "encode_images")
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered as one, if the model is in shards."""
    return [module for module in model.modules() if hasattr(module, "reshard")]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole model: to sample from, each at its own pace. All
    processes enter together."""
    for unit in units(model):
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units(model):
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)


def in_shards(tensor: Tensor) -> bool:
    """Whether this process holds its own rows of the tensor alone, perhaps none."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, which may be in shards; all processes ask for it together."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, one after another, in the main memory of rank 0; the others get an empty
    dict."""
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor.detach())
        if rank() == 0:
            found[name] = value.cpu().contiguous()
    return found


@torch.no_grad()
def fill_in(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, which is whole, into a tensor; of one in shards only this process's rows."""
    if not in_shards(tensor):
        tensor.copy_(value)
        return
    mine = tensor.to_local()
    first = rank() * -(-len(value) // size())  # FSDP2 deals rows out as `torch.chunk` does
    mine.copy_(value[first : first + len(mine)])
