"""A constraint in two processes under DistributedDataParallel is that of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import condlr

BATCH, STEPS, TAU = 16, 4, 0.2

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed"),
]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.Tanh(), nn.Linear(12, 3)
    return condlr.factorize(nn.Sequential(*layers), 0.4)


def trained(net, images, labels):
    """The losses are means: the mean of the gradients of halves is the gradient of the whole."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    constraint = condlr.constrain(optimizer, net, tau=TAU)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return constraint.check()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 2, 6, 6, generator=generator)
    return images, torch.randint(3, (BATCH,), generator=generator)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        net = network()
        images, labels = batch()
        found = trained(nn.parallel.DistributedDataParallel(net), images[rank::2], labels[rank::2])
        torch.save((net.state_dict(), found), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_keep_one_network_in_the_constraint(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    (first, found), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert found == other
    assert found["cond_S"] <= (1 + TAU) * (1 + 1e-4) and found["orthonormality_error"] <= 1e-5
    whole = network()
    trained(whole, *batch())
    for name, value in whole.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
