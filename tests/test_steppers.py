"""Optimisers around optimisers: which step is hooked, and which state is saved."""

import copy
import functools
import gc
import io
import weakref
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


class MovingSam(Sam):
    """It moves the parameters once more after its optimiser (WSAM, Yue et al., KDD 2023)."""

    def second_step(self):
        super().second_step()
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.add_(0.001 * torch.ones_like(p))


class Parts(torch.optim.SGD):
    """Two calls a step, and no optimiser in it (bSAM, Moellenhoff and Khan, ICLR 2023)."""

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.add_(0.01 * torch.ones_like(p))

    def second_step(self):
        super().step()


class Twofold(torch.optim.Optimizer):
    """It takes both gradients of a step from the closure, then has its optimiser step (GSAM)."""

    def __init__(self, parameters, base):
        super().__init__(parameters, {})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    def step(self, closure):
        closure()
        closure()
        self.base_optimizer.step()


class Foreign:
    """None of PyTorch's, with the calls and the state of fastai's."""

    def __init__(self, parameters, lr):
        self.lists, self.hypers, self.state = [[*parameters]], [{"lr": lr}], {}

    param_groups = property(lambda self: [{"params": self.lists[0], **self.hypers[0]}])

    def zero_grad(self):
        for p in self.lists[0]:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()

    def step(self):
        for p in self.lists[0]:
            moment = self.state.setdefault(p, {}).setdefault("grad_avg", torch.zeros_like(p))
            moment.mul_(0.9).add_(p.grad)
            p.data.add_(moment, alpha=-self.hypers[0]["lr"])

    def state_dict(self):
        return {"state": [self.state[p] for p in self.lists[0]], "hypers": self.hypers}

    def load_state_dict(self, state):
        self.hypers = state["hypers"]
        self.state = dict(zip(self.lists[0], state["state"], strict=True))


class ForeignLookahead(Foreign):
    def __init__(self, inner):
        self.opt, self.lists, self.hypers, self.state = inner, inner.lists, inner.hypers, inner.state

    def step(self):
        self.opt.step()
        for p in self.lists[0]:
            p.data.lerp_(torch.ones_like(p), 0.01)

    def state_dict(self):
        return self.opt.state_dict()

    def load_state_dict(self, state):
        self.opt.load_state_dict(state)


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


class BareLookahead(torch.optim.Optimizer):
    """The same without any hook."""

    def __init__(self, inner):
        self.optimizer = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.lerp_(torch.ones_like(p), 0.001)
        return loss

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Wrapper:
    """No optimiser itself, and with a name of its own for the one in it, as of fastai's OptimWrapper."""

    def __init__(self, optimizer):
        self.opt = optimizer
        self.zero_grad, self.state_dict, self.load_state_dict = (
            optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict
        )  # fmt: skip

    def step(self):
        self.opt.step()


class Delegating:
    """A wrapper that has nothing but what the optimiser in it has, as fastai's OptimWrapper."""

    def __init__(self, optimizer):
        self.opt = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["opt"], name)


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


torch.manual_seed(0)
x, y = torch.randn(32, 20), torch.randint(5, (32,))


def backward(net):
    F.cross_entropy(net(x), y).backward()


def step(net, optimizer):
    optimizer.zero_grad()
    backward(net)
    if hasattr(optimizer, "second_step"):
        optimizer.first_step()
        backward(net)
        optimizer.second_step()
    elif isinstance(optimizer, Twofold):
        optimizer.step(lambda: backward(net))
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
    "SAM that moves after": lambda net: MovingSam(net.parameters(), torch.optim.SGD, lr=0.1),
    "parts": lambda net: Parts(net.parameters(), lr=0.1),
    "twofold": lambda net: Twofold([*net.parameters()], torch.optim.SGD(net.parameters(), lr=0.1)),
    "foreign": lambda net: Foreign(net.parameters(), 0.05),
    "foreign Lookahead": lambda net: ForeignLookahead(Foreign(net.parameters(), 0.05)),
    "Lookahead": lambda net: Lookahead(torch.optim.AdamW(net.parameters(), lr=0.05)),
    "Lookahead without hooks": lambda net: BareLookahead(torch.optim.SGD(net.parameters(), lr=0.1)),
    "a wrapper": lambda net: Wrapper(torch.optim.SGD(net.parameters(), lr=0.1)),
    "delegating": lambda net: Delegating(torch.optim.SGD(net.parameters(), lr=0.1)),
    "delegating to SAM": lambda net: Delegating(Sam(net.parameters(), torch.optim.SGD, lr=0.1)),
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


def test_a_copy_of_a_foreign_optimizer_has_no_hooks():
    net = network()
    optimizer = Foreign(net.parameters(), 0.05)
    constraint = condlr.constrain(optimizer, net)
    other_net, other = copy.deepcopy((net, optimizer))
    step(other_net, other)
    constraint.check()
    assert condlr.audit(other_net)["orthonormality_error"] > 1e-4


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


class Differentiating(torch.optim.SGD):
    """Products with the Hessian, from the graph of the gradients (AdaHessian, SophiaH)."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        parameters = self.param_groups[0]["params"]
        self.z = [torch.randn_like(p) for p in parameters]
        self.products = torch.autograd.grad([p.grad for p in parameters], parameters, self.z)
        self.hooks = [p._backward_hooks for p in parameters]
        for p in parameters:
            p.grad = p.grad.detach()
        super().step()
        return loss


@pytest.mark.parametrize("preconditioner", ["exact", "scalar"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_may_differentiate_the_directions(with_closure, preconditioner):
    """It sees Q H P z: the Hessian H, the map P of equation (5), and the projection Q; here in float64."""
    torch.manual_seed(3)
    net = condlr.factorize(nn.Sequential(nn.Linear(6, 5)), ranks=3).double()
    optimizer = Differentiating(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net, 0.5, preconditioner=preconditioner)
    data, target = torch.randn(16, 6).double(), torch.randn(16, 5).double()

    def loss_of(U, S, Vt, bias):
        return (data @ (U @ S @ Vt).mT + bias - target).pow(4).mean()

    for _ in range(3):
        layer = net[0]
        U, S, V = (X.detach().clone() for X in (layer.U, layer.S, layer.V))
        names = [name for name, _ in net.named_parameters()]
        shapes = [p.shape for p in net.parameters()]
        start = torch.cat([p.detach().flatten() for p in net.parameters()])

        def of(flat, names=names, shapes=shapes):
            parts = flat.split([shape.numel() for shape in shapes])
            known = {n[2:]: x.reshape(s) for n, x, s in zip(names, parts, shapes, strict=True)}
            return loss_of(*(known[name] for name in ("U", "S", "Vt", "bias")))

        def closure():
            optimizer.zero_grad()
            loss = (net(data) - target).pow(4).mean()
            loss.backward(create_graph=True)
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        left, right = torch.linalg.inv(S @ S.mT), torch.linalg.inv(S.mT @ S)
        if preconditioner == "scalar":
            left = right = torch.eye(3).double() * 3 / S.square().sum()
        moved = []
        for name, z in zip(names, optimizer.z, strict=True):
            if name.endswith("Vt"):
                z = right @ (z - z @ V @ V.mT)
            elif name.endswith("U"):
                z = (z - U @ U.mT @ z) @ left
            moved.append(z.flatten())
        products = torch.autograd.functional.hessian(of, start) @ torch.cat(moved)
        parts = [
            x.reshape(s) for x, s in zip(products.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        for i, name in enumerate(names):
            if name.endswith("Vt"):
                parts[i] = parts[i] - parts[i] @ V @ V.mT
            elif name.endswith("U"):
                parts[i] = parts[i] - U @ U.mT @ parts[i]
        expected = torch.cat([part.flatten() for part in parts])
        found = torch.cat([product.flatten() for product in optimizer.products])
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert not any(optimizer.hooks), "later gradients are whole"
        constraint.check()


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_scheduler_holds_the_step_before_or_after(scheduler_first):
    net = network()
    optimizer = Lookahead(torch.optim.SGD(net.parameters(), lr=0.1))
    if scheduler_first:
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    constraint = condlr.constrain(optimizer, net)
    if not scheduler_first:
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for _ in range(3):
        step(net, optimizer)
        constraint.check()


class Averaging(torch.optim.AdamW):
    """It calls the step of its superclass, whose hooks are its own, and moves the parameters after that."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p.mul_(self.param_groups[0].get("shrink", 1.0))
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_the_step_of_a_superclass_is_a_part_of_the_step(with_closure):
    nets = [network(), network(), network()]
    for net, kind, shrink in zip(nets, (torch.optim.AdamW, Averaging, Averaging), (1, 1, 0.99), strict=True):
        optimizer = kind(net.parameters(), lr=0.01)
        optimizer.param_groups[0]["shrink"] = shrink
        constraint = condlr.constrain(optimizer, net)
        for _ in range(3):
            optimizer.zero_grad()
            if with_closure:
                optimizer.step(lambda net=net: backward(net))
            else:
                backward(net)
                optimizer.step()
            constraint.check()
    for a, b in zip(*(net.parameters() for net in nets[:2]), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_fails_is_forgotten():
    net, optimizer = network(), None
    optimizer = Averaging(net.parameters(), lr=0.01)
    constraint = condlr.constrain(optimizer, net)

    def fail():
        raise KeyError("a closure")

    for _ in range(2):
        with pytest.raises(KeyError):
            optimizer.step(fail)
        step(net, optimizer)
        constraint.check()


@pytest.mark.parametrize("make", [Lookahead, Wrapper])
def test_other_wrappers_of_the_class_are_left_alone(make):
    net, other = network(), network()
    constraint = condlr.constrain(make(torch.optim.SGD(net.parameters(), lr=0.1)), net)
    bare = make(torch.optim.SGD(other.parameters(), lr=0.1))
    step(other, bare)
    assert condlr.audit(other)["orthonormality_error"] > 1e-4
    constraint.check()


@pytest.mark.parametrize("name", MAKE)
def test_a_constraint_keeps_nothing_alive(name):
    net = network()
    optimizer = MAKE[name](net)
    constraint = condlr.constrain(optimizer, net)
    step(net, optimizer)
    seen = [weakref.ref(x) for x in (net, optimizer, constraint)]
    del net, optimizer, constraint
    gc.collect()
    assert [x() for x in seen] == [None] * 3


def test_a_subclass_that_wraps_the_step_of_a_constrained_class():
    net = network()
    condlr.constrain(Foreign(net.parameters(), 0.05), net)

    class Wrapping(Foreign):
        @functools.wraps(Foreign.step)
        def step(self):
            Foreign.step(self)

    other = network()
    optimizer = Wrapping(other.parameters(), 0.05)
    constraint = condlr.constrain(optimizer, other)
    step(other, optimizer)
    constraint.check()


def test_parts_that_the_step_does_not_call():
    class Idle(torch.optim.SGD):
        def second_step(self): ...

    net = network()
    optimizer = Idle(net.parameters(), lr=0.5)
    constraint = condlr.constrain(optimizer, net)
    for _ in range(3):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        constraint.check()


class Fabricated:
    """A wrapper of the class of the optimiser in it, which shares its attributes, as Lightning's Fabric."""

    def __init__(self, optimizer, shares):
        if shares:
            self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("step", "state_dict")}
        self.__class__ = type("Fabricated", (Fabricated, type(optimizer)), {})
        self._optimizer = optimizer

    optimizer = property(lambda self: self._optimizer)

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name)

    def step(self):
        self._optimizer.step()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("constrained_first", [False, True])
@pytest.mark.parametrize("kind", ["SAM", "SAM that moves after", "parts", "Lookahead"])
def test_a_wrapper_of_the_class_in_it(kind, constrained_first, shares):
    net = network()
    optimizer = MAKE[kind](net)
    if constrained_first:
        constraint = condlr.constrain(optimizer, net)
        around = Fabricated(optimizer, shares)
    else:
        around = Fabricated(optimizer, shares)
        constraint = condlr.constrain(around, net)
    for _ in range(3):
        step(net, around)
        constraint.check()


def test_gradients_with_a_graph_are_no_views():
    net = network()
    optimizer = Differentiating(net.parameters(), lr=0.01)
    constraint = condlr.constrain(optimizer, net)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), y).backward(create_graph=True)
        optimizer.step()
        constraint.check()


def test_a_step_that_a_wrapper_skips_leaves_the_weights_of_the_user_alone():
    class Skipping(BareLookahead):
        skips = False

        def step(self, closure=None):
            return None if self.skips else super().step(closure)

    net = network()
    optimizer = Skipping(torch.optim.SGD(net.parameters(), lr=0.1))
    constraint = condlr.constrain(optimizer, net)
    step(net, optimizer)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.2)
    before, optimizer.skips = copy.deepcopy(net.state_dict()), True
    step(net, optimizer)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    optimizer.skips = False
    step(net, optimizer)
    constraint.check()


@pytest.mark.parametrize(
    "held",
    [
        property(lambda self: self.optimizer.step),
        staticmethod(lambda: None),
        functools.partial(lambda: None),
    ],
)
def test_a_wrapper_whose_step_is_no_function_is_left_as_it_is(held):
    class Odd:
        step = held

        def __init__(self, optimizer):
            self.optimizer = optimizer

    net = network()
    optimizer = Odd(torch.optim.SGD(net.parameters(), lr=0.1))
    constraint = condlr.constrain(optimizer, net)
    backward(net)
    optimizer.step()
    constraint.check()
    constraint.remove()
    assert vars(Odd)["step"] is held


def test_a_layer_without_a_gradient_that_a_wrapper_moves():
    net = network()
    optimizer = BareLookahead(torch.optim.SGD(net.parameters(), lr=0.1))
    constraint = condlr.constrain(optimizer, net)
    for _ in range(2):
        optimizer.zero_grad()
        backward(net)
        for p in net[0].parameters():
            p.grad = None
        optimizer.step()
        constraint.check()


def test_a_step_without_gradient_may_move_all_the_same():
    net = network()
    optimizer = Averaging(net.parameters(), lr=0.01)
    constraint = condlr.constrain(optimizer, net)
    step(net, optimizer)
    for group in optimizer.param_groups:
        group["lr"], group["shrink"] = 0.0, 0.9
    for p in net.parameters():
        p.grad.zero_()
    optimizer.step()
    constraint.check()


def test_a_step_that_fails_leaves_later_gradients_whole():
    class Failing(Differentiating):
        def step(self, closure=None):
            super().step()
            raise KeyError("after the parameters have moved")

    net = network()
    optimizer = Failing(net.parameters(), lr=0.01)
    condlr.constrain(optimizer, net)
    F.cross_entropy(net(x), y).backward(create_graph=True)
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.zero_grad()
    backward(net)
    bare = copy.deepcopy(net)
    for p in bare.parameters():
        p.grad, p._backward_hooks = None, None
    backward(bare)
    for a, b in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_subclass_of_one_that_steps_in_parts():
    class Whole(Parts):
        def step(self, closure):
            self.first_step()
            closure()
            closure()
            self.second_step()

    class Sub(Whole):
        def step(self, closure):
            return super().step(closure)

    net = network()
    optimizer = Sub(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net)
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), backward(net)))
        constraint.check()


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_may_be_loaded_by_name_into_a_fresh_optimizer(kind, lr):
    """PyTorch takes a step without gradient and without a learning rate to make the moments."""
    from torch.distributed.checkpoint import state_dict as by_name

    net = network()
    optimizer = kind(net.parameters(), lr=lr)
    condlr.constrain(optimizer, net)
    for _ in range(3):
        step(net, optimizer)
    weights, state = by_name.get_state_dict(net, optimizer)
    other = network()
    optimizer2 = kind(other.parameters(), lr=lr)
    constraint = condlr.constrain(optimizer2, other)
    by_name.set_model_state_dict(other, copy.deepcopy(weights))
    by_name.set_optimizer_state_dict(other, optimizer2, copy.deepcopy(state))
    for _ in range(2):
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        step(net, optimizer)
        step(other, optimizer2)
    constraint.check()


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
    class Fused(torch.optim.SGD):
        def fused_backward(self): ...

    class Overlapping(torch.optim.SGD):
        _overlap_with_ddp = True  # as of a ZeroRedundancyOptimizer

    net = network()
    for kind, message in (
        (Fused, "Fused steps within the backward pass"),
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
