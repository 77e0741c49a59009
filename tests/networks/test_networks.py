"""Networks and optimisers of other people, from outside: factor, constrain, train, export.

`make test-networks` prints a line for each pair; what is not installed (timm) is left out.
"""

import itertools
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import condlr

pytestmark = pytest.mark.networks
IMAGES = (2, 3, 64, 64)
TAU = 0.1

TORCHVISION = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_0", "swin_v2_t", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
TIMM = (
    "beit_base_patch16_224", "convmixer_768_32", "deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224"
)  # fmt: skip
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-4),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-5),
}


def images(name):
    size = SIZES.get(name, 64)
    return torch.randn(2, 3, size, size)


def of_torchvision(name):
    from torchvision import models

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if options:
        options["aux_logits"] = False
    return models.get_model(name, num_classes=10, **options), images(name)


def of_timm(name):
    import timm

    return timm.create_model(name, num_classes=10), torch.randn(2, 3, 224, 224)


def of_transformers(name):
    import transformers as T

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tokens = {"input_ids": torch.randint(3, 20, (2, 6))}
    if name == "bert":
        return T.BertModel(T.BertConfig(vocab_size=20, **sizes), add_pooling_layer=False), tokens
    if name == "gpt2":
        return T.GPT2Model(T.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, **words)), tokens
    if name == "llama":
        return T.LlamaModel(T.LlamaConfig(num_key_value_heads=2, **sizes, **words)), tokens
    if name == "t5":
        config = T.T5Config(vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        return T.T5Model(config), {**tokens, "decoder_input_ids": tokens["input_ids"]}
    return T.ViTModel(T.ViTConfig(image_size=32, patch_size=8, **sizes)), {
        "pixel_values": torch.randn(2, 3, 32, 32)
    }


def of_pytorch(name):
    if name == "transformer":
        net = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        return net, (torch.randn(2, 5, 32), torch.randn(2, 4, 32))
    layers = (
        nn.Conv1d(4, 32, 5),
        nn.ReLU(),
        nn.ConvTranspose1d(32, 8, 4, 2),
        nn.Flatten(),
        nn.Linear(8 * 50, 10),
    )
    return nn.Sequential(*layers), torch.randn(2, 4, 28)


MAKERS = {
    **{f"torchvision {name}": (of_torchvision, name) for name in TORCHVISION},
    **{f"timm {name}": (of_timm, name) for name in TIMM if find_spec("timm")},
    **{f"transformers {name}": (of_transformers, name) for name in ("bert", "gpt2", "llama", "t5", "vit")},
    **{f"torch {name}": (of_pytorch, name) for name in ("transformer", "conv1d")},
}
PAIRS = [*zip(MAKERS, itertools.cycle(OPTIMIZERS))]


def called(model, x):
    y = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    while not isinstance(y, torch.Tensor):
        y = next(iter(y.values() if isinstance(y, dict) else y))
    return y


@pytest.mark.parametrize(("name", "optimizer"), PAIRS, ids=[f"{n} {o}" for n, o in PAIRS])
def test_a_network_keeps_the_promise_and_is_exported(name, optimizer, capsys):
    torch.manual_seed(0)
    make, key = MAKERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make(key)
        low = condlr.factorize(model.eval(), 0.5)
    size = condlr.measure(low)
    chosen = OPTIMIZERS[optimizer](low.parameters())
    constraint = condlr.constrain(chosen, low, tau=TAU)
    for _ in range(2):
        chosen.zero_grad()
        called(low, x).float().square().mean().backward()
        chosen.step()
    found = constraint.check()
    with torch.no_grad():
        expected = called(low, x)
        plain = condlr.export(low, x)
        error = ((called(plain, x) - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    with capsys.disabled():
        print(
            f"{name:36} {optimizer:12} {100 * size.network_train_compression:5.1f} % removed"
            f"  |U'U - I| {found['orthonormality_error']:.1e}  cond(S) {found['cond_S']:.5f}"
            f"  export {error:.1e}"
        )
    assert found["cond_S"] <= (1 + TAU) * (1 + 1e-4)
    assert error < 1e-3


@pytest.mark.parametrize("core", ["full", "none"])
def test_onnx_computes_the_same(core, tmp_path):
    """With a batch size that is free, of low-rank layers and of what `export` makes of them."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 4)
    low = condlr.factorize(nn.Sequential(*layers).eval(), 0.5, core=core)
    for number, net in enumerate((low, condlr.export(low, torch.randn(2, 3, 8, 8)))):
        path = tmp_path / f"{number}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net.eval(), (torch.randn(2, 3, 8, 8),), path, dynamo=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (name,) = (given.name for given in session.get_inputs())
        for count in (1, 5):
            x = torch.randn(count, 3, 8, 8)
            (found,) = session.run(None, {name: x.numpy()})
            torch.testing.assert_close(torch.as_tensor(found), net(x).detach(), rtol=1e-4, atol=1e-5)
