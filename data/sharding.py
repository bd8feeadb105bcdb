"""FSDP2 for train_4m.py --shard=true: weights, gradients and momentum of the blocks divided among the processes."""
import types

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


def check(run, valid_scenes):
    """Raises the script's Fault for a run that cannot be divided."""
    script, world = run.script, run.world
    if world == 1:
        raise script.Fault("--shard=true divides the model among processes: start several with torchrun, or "
                           "--shard=false")
    if -(-valid_scenes // script.EVAL_BATCH) % world:
        raise script.Fault(f"--shard=true needs as many evaluation batches on every process: {world} processes cannot "
                           f"share {valid_scenes} scenes in batches of {script.EVAL_BATCH} evenly")


def shard_blocks(model, blocks, run, init_weights):
    """Divide the blocks of a model on the meta device by rows among the ranks, and only then give it weights, which no
    process ever holds all of. FSDP2 gathers a block while it is computed.

    What is outside of them, embeddings and heads, stays whole: it is a few percent. Gradients are summed, not averaged.
    """
    device, dtype = run.device, run.script.PRECISIONS[run.precision]
    inside = {p for block in blocks for p in block.parameters()}
    weights = dtype if device.type == "cuda" else None  # what is gathered; autocast rounds them too
    policy = MixedPrecisionPolicy(weights, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (run.world,))
    for block in blocks:
        if run.config.recompute:
            block.forward = recomputed(block.forward)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params={p for p in model.parameters() if p not in inside})
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    init_weights(types.SimpleNamespace(named_parameters=lambda: whole_parameters(model, device)))


def recomputed(forward):
    """A block's forward that keeps nothing but what enters it: the backward pass calls it once more."""
    def again(*inputs, **named):
        return checkpoint(forward, *inputs, use_reentrant=False, **named)
    return again


@torch.no_grad()
def whole_parameters(model, device):
    """A model's named_parameters, each one whole: once it has its values this rank keeps its rows of it."""
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape, device=device)
        yield name, whole
        if isinstance(p, DTensor):
            whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)  # all ranks drew the same
        p.copy_(whole)


def whole_weights(model):
    """The weights of a divided model, whole on rank 0's CPU; {} on others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def whole_on_rank_0(model, run, layout):
    """A divided model's weights in a whole one on rank 0, which draws the samples; elsewhere the divided model."""
    weights = whole_weights(model)
    if run.rank:
        return model
    whole = run.script.Nano4M(run.config, layout).to(run.device)
    whole.load_state_dict(weights)
    return whole


def sharded(Muon, orthogonalise):
    """A script's Muon for matrices that FSDP2 divides: each rank orthogonalises whole ones, its share of every stack."""

    class ShardedMuon(Muon):
        @torch.no_grad()
        def step(self, lr):
            for params, buffer in self.stacks:
                shard, first = torch.zeros_like(buffer), self.rank * len(buffer)
                for i, p in enumerate(params):
                    grad = p.grad.full_tensor()
                    if first <= i < first + len(shard):
                        shard[i - first] = grad
                buffer.lerp_(shard, 1 - self.momentum)
                update, _ = self.gather(orthogonalise(shard.lerp_(buffer, self.momentum), self.dtype))
                rows, columns = params[0].shape
                start = min(self.rank * -(-rows // self.world), rows)  # of this rank's rows
                for p, whole in zip(params, update):
                    local = p.to_local()
                    local.add_(whole[start:start + len(local)], alpha=-lr * max(1, rows / columns) ** 0.5)

    return ShardedMuon
