"""A constraint in two processes under DistributedDataParallel is that of one process with the whole batch."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import condlr

BATCH, STEPS, TAU = 16, 4, 0.2
# Where each process has the moments of a part, they also move with the bases
MOMENTUM = {False: "after_projection", True: "transported"}

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.Tanh(), nn.Linear(12, 3)
    return condlr.factorize(nn.Sequential(*layers), 0.4)


def trained(net, images, labels, momentum, make=torch.optim.SGD):
    """The losses are means: the mean of the gradients of halves is the gradient of the whole."""
    optimizer = make(net.parameters(), lr=0.1, momentum=0.9)
    constraint = condlr.constrain(optimizer, net, tau=TAU, momentum=momentum)
    for number in range(STEPS):
        if number == STEPS - 1 and hasattr(optimizer, "consolidate_state_dict"):
            resume(optimizer)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return constraint.check()


def resume(optimizer):
    """Save the parts of all processes in the first one, and load them again in each."""
    optimizer.consolidate_state_dict(0)
    kept = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(kept, 0)
    optimizer.load_state_dict(kept[0])


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 2, 6, 6, generator=generator)
    return images, torch.randint(3, (BATCH,), generator=generator)


def work(rank, folder, zero):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        net = network()
        images, labels = batch()
        half = nn.parallel.DistributedDataParallel(net), images[rank::2], labels[rank::2]
        make = torch.optim.SGD
        if zero:  # each process has the moments of a part
            from torch.distributed.optim import ZeroRedundancyOptimizer

            make = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
        found = trained(*half, MOMENTUM[zero], make)
        torch.save((net.state_dict(), found), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("zero", [False, True])
def test_two_processes_keep_one_network_in_the_constraint(tmp_path, zero):
    mp.start_processes(work, args=(str(tmp_path), zero), nprocs=2, start_method="spawn")
    (first, found), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert found == other
    assert found["cond_S"] <= (1 + TAU) * (1 + 1e-4) and found["orthonormality_error"] <= 1e-5
    whole = network()
    trained(whole, *batch(), MOMENTUM[zero])
    for name, value in whole.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
