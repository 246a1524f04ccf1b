"""Several processes, as torchrun starts them: who is who, what they tell each other, and weights in shards (FSDP2).

Started by plain `python` a process is alone, and all of this leaves things as they are. A step's records are dealt
out to the processes, and what each adds to the loss is divided by the whole step's pairs: so the sum of all gradients
is the gradient of one process that sees all of them.
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
from minialign.llava import Llava

PATIENCE = timedelta(minutes=30)  # before a process gives up waiting; the first one alone writes the weights


def start(device: str) -> None:
    """Join the processes that torchrun has started, if it has. Each takes a GPU of its own; only the first speaks."""
    if not under_torchrun() or dist.is_initialized():
        return
    said = f"--device {device}: under torchrun every process takes a GPU of its own; give `cuda`"
    require(device in ("cpu", "cuda"), said)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def rank() -> int:
    """This process's number; the first one, 0, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """Every process's `value`, in their order, to all of them."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def added(values: dict[str, float]) -> dict[str, float]:
    """The sums over all processes, by name."""
    total: Counter = Counter()
    for each in gather(dict(values)):
        total.update(each)
    return dict(total)


def once(work: Callable[[], object]) -> None:
    """`work` by the first process alone; the others wait for it, and where it is refused all end."""
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
    """Say once how many records all processes have left out on the way, and what was wrong with the first."""
    left_out = sum(gather(mine), [])
    if left_out and rank() == 0:
        tqdm.write(f"{len(left_out)} {what} left out on the way, the first: {left_out[0]}")


def share(items: list) -> list:
    """Those of `items` that are this process's."""
    return items[rank() :: size()]


def even(parts: list, idle) -> list:
    """`parts`, and `idle` ones until every process has as many: all pass through shards together."""
    return parts + [idle] * (max(gather(len(parts))) - len(parts))


# ---------------------------------------------------------------- weights


def load(config, read: Callable[[str], Llava]) -> Llava:
    """The model that `read(device)` gives, in shards with `--shard full`; then no GPU ever holds all of it."""
    if config.shard == "none":
        return read(config.device)
    model = read("cpu")
    shard(model, config.device)
    return model


def shard(model: Llava, device: str) -> None:
    """FSDP2: a process keeps its part of every tensor; a layer is gathered for its turn and let go after it.

    Frozen weights keep their type, and what is trained is float32: so are the gradients that are summed.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, as it takes a second that few runs need
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (size(),))
    for unit in (*model.language_model.layers, model.vision_tower, model):  # the last takes what is left
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(model, "encode_images")
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # sums: `weight` in the loops has divided
        unit.set_force_sum_reduction_for_comms(True)


def units(model: Llava) -> list[nn.Module]:
    """The modules that are gathered as one, if the model is in shards."""
    return [module for module in model.modules() if hasattr(module, "reshard")]


@contextmanager
def gathered(model: Llava) -> Iterator[None]:
    """Inside, every process holds the whole model, gathered once: to sample from, each at its own pace."""
    for unit in units(model):
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units(model):
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, which may be in shards; all processes ask for it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, one after another, in the main memory of the first process; the others get an empty dict."""
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor.detach())
        if rank() == 0:
            found[name] = value.cpu().contiguous()
    return found


def fill_in(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, which is whole, into a tensor that may be in shards."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh = tensor.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def add_gradients(trained: list[Tensor]) -> None:
    """Give every process the sum of all their gradients; those of shards are summed already."""
    if size() == 1 or hasattr(trained[0], "full_tensor"):
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in trained])
    dist.all_reduce(flat)
    for parameter, summed in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))
