"""Optimisers around optimisers: which step is hooked, and which state is saved."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr
from condlr._support.errors import ConstraintBreach
from condlr.steppers import Stepper


class Sam(torch.optim.Optimizer):
    """Two gradients in a step, taken by two calls (Foret et al., ICLR 2021)."""

    def __init__(self, parameters, base, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def _all(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self._all()]).norm()
        for p in self._all():
            self.state[p]["before"] = p.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self._all():
            p.copy_(self.state[p]["before"])
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(torch.optim.Optimizer):
    """Slow weights (Zhang et al., NeurIPS 2019), made as such wrappers are: without PyTorch's constructor."""

    def __init__(self, inner, k=2, alpha=0.5):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, self.alpha)
                p.copy_(slow)
        return loss

    def zero_grad(self, set_to_none=True):
        self._base_optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state):
        self._base_optimizer.load_state_dict(state)


class Wrapper:
    """No optimiser itself, and with a name of its own for the one in it, as of fastai's OptimWrapper."""

    def __init__(self, optimizer):
        self.opt = optimizer
        self.zero_grad, self.state_dict, self.load_state_dict = (
            optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict
        )  # fmt: skip

    def step(self):
        self.opt.step()


class Private(torch.optim.Optimizer):
    """Noise on the gradients before the step, made as Opacus's DPOptimizer: without PyTorch's constructor."""

    def __init__(self, optimizer):
        self.original_optimizer = optimizer

    param_groups = property(lambda self: self.original_optimizer.param_groups)

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = p.grad + 1e-3 * torch.randn_like(p)
        return self.original_optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.original_optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state):
        self.original_optimizer.load_state_dict(state)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5))
    return condlr.factorize(net, 0.5)


x, y = torch.randn(32, 20), torch.randint(5, (32,))


def backward(net):
    F.cross_entropy(net(x), y).backward()


def step(net, optimizer):
    optimizer.zero_grad()
    backward(net)
    if isinstance(optimizer, Sam):
        optimizer.first_step()
        backward(net)
        optimizer.second_step()
    else:
        optimizer.step()


class Average:
    """In place of the average over processes: it pulls all weights towards a point."""

    step = 0

    def average_parameters(self, params):
        self.step += 1
        with torch.no_grad():
            for p in (p for group in params for p in group["params"]):
                p.lerp_(torch.ones_like(p), 0.01)


def averaged(net):
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), Average())


MAKE = {
    "averaged": averaged,
    "SAM": lambda net: Sam(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
    "Lookahead": lambda net: Lookahead(torch.optim.AdamW(net.parameters(), lr=0.05)),
    "a wrapper": lambda net: Wrapper(torch.optim.SGD(net.parameters(), lr=0.1)),
    "noise": lambda net: Private(torch.optim.SGD(net.parameters(), lr=0.1)),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_promise_holds_after_every_step(name):
    net = network()
    optimizer = MAKE[name](net)
    constraint = condlr.constrain(optimizer, net)
    before = F.cross_entropy(net(x), y).item()
    for _ in range(7):
        step(net, optimizer)
        constraint.check()
    assert F.cross_entropy(net(x), y).item() < before
    constraint.remove()
    step(net, optimizer)
    with pytest.raises(ConstraintBreach):
        constraint.check()


@pytest.mark.parametrize("name", MAKE)
def test_the_state_between_steps_is_saved_with_the_optimizer(name):
    def fresh():
        net = network()
        optimizer = MAKE[name](net)
        return net, optimizer, condlr.constrain(optimizer, net, 1.0, preconditioner="released_code")

    net, optimizer, constraint = fresh()
    for _ in range(4):
        step(net, optimizer)
    buffer = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other, optimizer2, constraint2 = fresh()
    other.load_state_dict(weights)
    optimizer2.load_state_dict(state)
    scales = [[held.scale for held in c._held.values()] for c in (constraint, constraint2)]
    assert scales[0] == scales[1] != [1.0] * 3


def test_moments_of_the_optimizer_within_move_with_the_bases():
    """A Lookahead that never looks ahead is the optimiser within."""
    nets = [network(), network()]
    inner = [torch.optim.AdamW(net.parameters(), lr=0.05) for net in nets]
    optimizers = [Lookahead(inner[0], k=10**6), inner[1]]
    for net, optimizer in zip(nets, optimizers, strict=True):
        condlr.constrain(optimizer, net, momentum="transported")
        for _ in range(4):
            step(net, optimizer)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_compiled_step_calls_the_constraint_as_it_is():
    """Traced, its branches would be compiled for each layer, until the compiler gives up."""
    nets = [network(), network()]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for net, compiled in zip(nets, (False, True), strict=True):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            constraint = condlr.constrain(optimizer, net)
            move = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
            for _ in range(3):
                optimizer.zero_grad()
                backward(net)
                move()
            constraint.check()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_compiled_step_with_a_closure_calls_the_constraint_as_it_is():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    move = torch.compile(optimizer.step, backend="eager")

    def closure():
        optimizer.zero_grad()
        backward(net)

    for _ in range(3):
        move(closure)
    constraint.check()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6, (
        "those of the optimiser and the network"
    )


def test_a_scheduler_that_holds_the_step_comes_after():
    class Fresh(Lookahead):
        step = Lookahead.__dict__["step"].__wrapped__ if hasattr(Lookahead.step, "hooked") else Lookahead.step

    net = network()
    optimizer = Fresh(torch.optim.SGD(net.parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(ValueError, match="make the scheduler after constrain"):
        condlr.constrain(optimizer, net)


@pytest.mark.parametrize("wrapper_first", [True, False])
def test_one_layer_is_constrained_once_through_a_wrapper_too(wrapper_first):
    net = network()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    both = [inner, Lookahead(inner)]
    first, second = reversed(both) if wrapper_first else both
    constraint = condlr.constrain(first, net)
    with pytest.raises(ValueError, match="constrained already"):
        condlr.constrain(second, net)
    constraint.remove()
    condlr.constrain(second, net)


def test_all_hooks_or_none():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    optimizer.register_load_state_dict_post_hook = None  # stands for whatever fails last
    with pytest.raises(TypeError):
        Stepper.of(optimizer).attach(*[lambda *_: None] * 4)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_optimizers_that_cannot_be_constrained_are_one_line():
    class SophiaH(torch.optim.SGD):
        pass

    class Parts(torch.optim.SGD):
        def first_step(self): ...

    class Overlapping(torch.optim.SGD):
        _overlap_with_ddp = True  # as of a ZeroRedundancyOptimizer

    net = network()
    for kind, message in (
        (SophiaH, "differentiates the gradients"),
        (Parts, "in parts of its own"),
        (Overlapping, "within the backward pass: use overlap_with_ddp=False"),
    ):
        with pytest.raises(ValueError, match=message):
            condlr.constrain(kind(net.parameters(), lr=0.1), net)


def test_layers_whose_parameters_are_added_later_are_recalled():
    """Gradual unfreezing: the new group is seen at the first step, or when a state is loaded."""

    def fresh():
        net = network()
        optimizer = torch.optim.AdamW(net[4].parameters(), lr=0.02)
        constraint = condlr.constrain(optimizer, net, 1.0, preconditioner="released_code")
        optimizer.add_param_group({"params": [*net[0].parameters()]})
        return net, optimizer, constraint

    net, optimizer, _ = fresh()
    for _ in range(5):
        step(net, optimizer)
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, optimizer2, _ = fresh()
    other.load_state_dict(kept[0])
    optimizer2.load_state_dict(kept[1])
    for one, its in ((net, optimizer), (other, optimizer2)):
        for _ in range(3):
            step(one, its)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_numbers_as_keys_of_an_older_state_are_read():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net, 1.0, preconditioner="released_code")
    for _ in range(2):
        step(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    group = state["param_groups"][0]
    assert all(isinstance(key, str) for key in group["condlr"])
    group["condlr"] = {int(key): memory for key, memory in group["condlr"].items()}
    before = [held.scale for held in constraint._held.values()]
    for held in constraint._held.values():
        held.scale = 1.0
    optimizer.load_state_dict(state)
    assert [held.scale for held in constraint._held.values()] == before
