"""Weights, gradients and optimizer state in shards over the ranks, for towers that one device cannot hold (FSDP2).

Each block's weights are gathered when it is needed and let go again (Rajbhandari et al., ZeRO, 1910.02054, stage 3).
The numbers are those of data-parallel training up to rounding, and the checkpoint is the same: whole tensors under the
same names, gathered to the first rank, which any process can evaluate and the same number of processes can resume.

Scalars (the logit scale) cannot be cut; every rank keeps them, and their gradients are averaged here.

Every call of a block is a collective, and so is every gather of a loss; they share one process group. That is right on
gloo and on NCCL as long as all ranks issue the same collectives in the same order, and needs no second group, which
would not help where they do not: ranks would wait for each other forever. So blocks may not be called more often on one
rank than on another for what is in its batch. The text towers, which on a CPU read short texts apart from long ones,
are told to read a batch in one call. With dropout they then draw other masks than the same run without ``shard``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlbench.core.errors import UserError
from vlbench.models.bert import BertTower
from vlbench.models.text import TextTower
from vlbench.train.blocks import blocks
from vlbench.train.distributed import ranks


def shard_weights(module: nn.Module, device: torch.device, *, bf16: bool) -> None:
    """Cut the weights of ``module`` over all ranks, block by block, and move it to ``device``. Names stay.

    Args:
        module: the same on every rank, best on the CPU: no more than one whole block is then on the device at a time.
        device: where to train.
        bf16: gather the weights of blocks in bfloat16 (on a GPU), and reduce their gradients in float32. What is
            outside of blocks stays float32, and autocast decides as it does without sharding.

    Raises:
        UserError: in a process that is alone, and for a tower whose blocks are not known.
    """
    world = ranks().world
    if world == 1:
        raise UserError("shard=true: there is one process only; start several (torchrun --nproc-per-node N -m vlbench)")
    mesh = init_device_mesh(device.type, (world,))
    kept = {parameter for parameter in module.parameters() if not parameter.ndim}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if bf16 and device.type == "cuda" else MixedPrecisionPolicy()
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=kept)
    fully_shard(module, mesh=mesh, ignored_params=kept)
    for part in module.modules():
        if isinstance(part, TextTower | BertTower):
            part.in_one_call = True  # its texts may not decide how many collectives a rank issues
    module.to(device)  # the scalars


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """As ``nn.utils.clip_grad_norm_``: the norm of all gradients before clipping, on every rank.

    The gradients of scalars are averaged over the ranks first. What is not sharded passes through unchanged.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    cut = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if cut:
        for gradient in whole:
            dist.all_reduce(gradient)
            gradient /= ranks().world
    norms = [nn.utils.get_total_norm(group) for group in (cut, whole) if group]
    norm: torch.Tensor = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in (cut, whole):
        for gradient in group:
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole_state(state: Any) -> Any:
    """A state dict with whole tensors on the CPU in the place of shards. Every rank must ask; the first keeps them."""
    if isinstance(state, DTensor):
        return _kept(state.full_tensor())
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value) for value in state)
    return state


def cut_model_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors of a model's state, cut as ``module`` is; what it does not shard stays."""
    mine = module.state_dict()
    return {name: _cut_like(mine[name], tensor) if name in mine else tensor for name, tensor in state.items()}


def cut_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tensors of an optimizer's state, cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {
        number: {name: _cut_like(parameters[number], value) for name, value in slot.items()}
        for number, slot in state["state"].items()
    }
    return {**state, "state": slots}


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu() if ranks().first else tensor.new_empty(0)


def _cut_like(mine: torch.Tensor, value: Any) -> Any:
    if not isinstance(mine, DTensor) or not isinstance(value, torch.Tensor) or value.shape != mine.shape:
        return value
    # Every rank has read the checkpoint, so that nothing need be sent.
    return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements, src_data_rank=None)
