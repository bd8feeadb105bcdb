"""FSDP2 for train_4m.py --shard=true: weights, gradients and momentum of the blocks divided among the processes."""
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


def shard_blocks(model, blocks, world, device, dtype):
    """Divide the weights of the blocks by rows among the ranks; FSDP2 gathers a block while it is computed.

    What is outside of them, embeddings and heads, stays whole: it is a few percent. Gradients are summed, not averaged.
    """
    inside = {p for block in blocks for p in block.parameters()}
    weights = dtype if device.type == "cuda" else None  # what is gathered; autocast rounds them too
    policy = MixedPrecisionPolicy(weights, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params={p for p in model.parameters() if p not in inside})
    register_fsdp_forward_method(model, "hidden")


def whole_weights(model):
    """The weights of a divided model, whole on every rank."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


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
