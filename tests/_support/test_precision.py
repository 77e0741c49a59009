"""bfloat16 is for the network; factors, constraints and what is saved are float32."""

import pytest
import torch

from condlr._support.precision import PRECISIONS, products, require, strict, training
from condlr.suite import config
from tests.training import METHODS, Stop, trainer

CPU = torch.device("cpu")


def test_the_command_line_knows_the_precisions():
    assert config.PRECISIONS == PRECISIONS


def test_strict_holds_within_autocast_and_ends():
    A, B = torch.randn(64, 64), torch.randn(64, 64)
    exact = A.double() @ B.double()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with strict(CPU):
            assert (A @ B).dtype == torch.float32
            assert (A @ B - exact).abs().max() < 1e-4
        assert (A @ B).dtype == torch.bfloat16
    with pytest.raises(Stop), strict(CPU):
        raise Stop
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_forward_pass_is_bfloat16_and_nothing_else():
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision, expected in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        with training(net, precision, CPU):
            logits = net(torch.randn(4, 5))
            logits.sum().backward()
        assert seen.pop() == expected
        assert logits.dtype == net[0].weight.grad.dtype == torch.float32
    net(torch.randn(4, 5))
    assert seen.pop() == torch.float32, "it ends with the context"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["condlr", "unit", "released", "dlrt", "vanilla", "svd_prune", "cayley_exact"]
)
def test_methods_keep_their_promises_in_bfloat16(name, data):
    t = trainer(METHODS[name], data, lr=0.02)
    t.precision = "bf16"
    t.fit()  # audits at the end of every epoch
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    plain = trainer(METHODS[name], data, lr=0.02)
    plain.fit()
    assert t.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"], rel=0.05)
    assert t.history[-1]["train_loss"] != plain.history[-1]["train_loss"]


@pytest.mark.slow
def test_an_interrupted_run_in_bfloat16_ends_with_the_same_bits(data):
    runs = [trainer(METHODS["condlr"], data) for _ in range(3)]
    for t in runs:
        t.precision = "bf16"
    whole, first, second = runs
    whole.fit()

    def stop(t):
        if t.step == 5:
            raise Stop

    with pytest.raises(Stop):
        first.fit(on_batch=stop)
    second.load_state_dict(first.state_dict())
    second.fit()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True)
    )


def test_what_a_device_does_not_have_is_refused():
    with pytest.raises(ValueError, match="precision=tf32 is for CUDA devices; on cpu choose float32 or bf16"):
        require("tf32", CPU)
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bf16; got 'fp8'"):
        require("fp8", CPU)
    require("tf32", torch.device("cuda"))


def test_what_was_inherited_is_inherited_afterwards():
    backends = torch.backends
    single = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    settings = backends, backends.cudnn, backends.mkldnn, *single

    def readings():
        return [setting.fp32_precision for setting in settings]

    before = readings()
    try:
        for setting in settings:  # a compiler, too, may have given them values of their own
            setting.fp32_precision = "none"
        for kind in ("ieee", "tf32"):
            with products(kind):
                assert {setting.fp32_precision for setting in single} == {kind}
            assert {*readings()} == {"none"}
        backends.fp32_precision = "tf32"
        with products("ieee"):
            pass
        backends.fp32_precision = "ieee"
        assert {*readings()} == {"ieee"}
        backends.mkldnn.matmul.fp32_precision = "tf32"  # a value of its own
        with products("ieee"):
            assert backends.mkldnn.matmul.fp32_precision == "ieee"
        assert backends.mkldnn.matmul.fp32_precision == "tf32"
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
