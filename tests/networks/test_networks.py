"""Networks and optimisers of other people, from outside: factor, constrain, train, export.

`make test-networks` writes a line for each pair; what is not installed (timm, pytorch_optimizer) is left out.
"""

import itertools
import os
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import condlr

pytestmark = pytest.mark.networks
TAU = 0.1

TORCHVISION = (
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vit_b_16",
    "wide_resnet50_2",
)  # fmt: skip
# Of two rooms of torchvision whose networks take more than images, or return more than logits
SEGMENTATION, VIDEO = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"), ("mc3_18", "r2plus1d_18")
TIMM = (
    "caformer_s18", "cait_xxs24_224", "coat_tiny", "coatnet_pico_rw_224", "convit_tiny", "convmixer_768_32",
    "convnextv2_atto", "cs3darknet_s", "deit_tiny_patch16_224", "dpn48b", "edgenext_xx_small",
    "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8", "fbnetc_100", "gernet_s",
    "ghostnet_050", "halonet26t", "hardcorenas_a", "hgnetv2_b0", "inception_next_atto", "lambda_resnet26t",
    "lcnet_050", "legacy_seresnet18", "levit_128s", "maxvit_rmlp_pico_rw_256", "mobilenetv4_conv_small",
    "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "nf_regnet_b0", "pit_ti_224", "poolformer_s12",
    "pvt_v2_b0", "regnetz_b16", "repvgg_a0", "repvit_m0_9", "resmlp_12_224", "resnest14d", "rexnet_100",
    "shvit_s1", "skresnet18", "starnet_s1", "swiftformer_xs", "tinynet_e", "tiny_vit_5m_224",
    "visformer_tiny", "xcit_nano_12_p16_224",
)  # fmt: skip
SIZES = {"alexnet": 96, "inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TWO_SIDED = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
}
# A class of transformers before `Model` and `Config`, the options of its config, and what it takes
TRANSFORMERS = {
    "Albert": ({"embedding_size": 16, **SMALL, **WORDS}, "tokens"),
    "Bart": ({"d_model": 32, "decoder_start_token_id": 1, **TWO_SIDED, **WORDS}, "pairs"),
    "Beit": ({"image_size": 32, "patch_size": 8, **SMALL}, "images"),
    "Bert": ({**SMALL, **WORDS}, "tokens"),
    "CLIPVision": ({"image_size": 32, "patch_size": 8, **SMALL}, "images"),
    "ConvNext": ({"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, "images"),
    "DebertaV2": ({**SMALL, **WORDS}, "tokens"),
    "DistilBert": ({"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 20}, "tokens"),
    "Electra": ({"embedding_size": 16, **SMALL, **WORDS}, "tokens"),
    "Gemma": ({"num_key_value_heads": 2, "head_dim": 8, **SMALL, **WORDS}, "tokens"),
    "GPT2": ({"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, **WORDS}, "tokens"),
    "GPTNeoX": ({**SMALL, **WORDS}, "tokens"),
    "Llama": ({"num_key_value_heads": 2, **SMALL, **WORDS}, "tokens"),
    "Mamba": ({"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "tokens"),
    "Mixtral": ({"num_key_value_heads": 2, "num_local_experts": 2, **SMALL, **WORDS}, "tokens"),
    "Qwen2": ({"num_key_value_heads": 2, **SMALL, **WORDS}, "tokens"),
    "ResNet": ({"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, "images"),
    "Segformer": ({"hidden_sizes": [16, 32, 32, 32], "depths": [1] * 4}, "images"),
    "Swin": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2],
         "window_size": 4},
        "images",
    ),
    "T5": (
        {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}, "pairs"
    ),
    "ViT": ({"image_size": 32, "patch_size": 8, **SMALL}, "images"),
    "Wav2Vec2": (
        {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, **SMALL},
        "sound",
    ),
}  # fmt: skip

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-4, amsgrad=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-4),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-4),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-4),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-5),
}
# Of the package pytorch_optimizer, with its own learning rates
OTHERS = (
    "adabelief", "adabound", "adai", "adamg", "adamod", "adamp", "adan", "adapnm", "ademamix", "adopt",
    "aggmo", "apollo", "came", "dadaptadam", "diffgrad", "fadam", "fromage", "grams", "kron", "lamb",
    "laprop", "lars", "lion", "madgrad", "mars", "nero", "novograd", "pid", "prodigy", "qhadam",
    "scalableshampoo", "schedulefreeadamw", "shampoo", "sm3", "soap", "stableadamw", "swats", "tiger", "yogi",
)  # fmt: skip
# Those that differentiate gradients, that take a second one at other weights, and that are none of PyTorch's
GRAPHS = ("AdaHessian", "SophiaH")
PERTURBING = ("SAM", "LookSAM", "FriendlySAM", "WSAM", "BSAM")
FASTAI = ("SGD", "RMSProp", "Adam", "RAdam", "QHAdam", "Larc", "Lamb", "ranger")


def of_torchvision(name):
    from torchvision import models

    options: dict[str, Any] = {"num_classes": 10}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    if name in SEGMENTATION:
        options["weights_backbone"] = None
    size = SIZES.get(name, 64)
    shape = (2, 3, 4, 32, 32) if name in VIDEO else (2, 3, size, size)
    return models.get_model(name, **options), torch.randn(shape)


def of_timm(name):
    import timm

    model = timm.create_model(name, num_classes=10)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def of_transformers(name):
    import transformers

    options, takes = TRANSFORMERS[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    words, others = torch.randint(3, 20, (2, 6)), torch.randint(3, 20, (2, 5))
    given = {
        "tokens": {"input_ids": words},
        "pairs": {"input_ids": words, "decoder_input_ids": others},
        "images": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "sound": {"input_values": torch.randn(2, 400)},
    }
    return model, given[takes]


def of_pytorch(name):
    if name == "Transformer":
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
    **{f"torchvision {name}": (of_torchvision, name) for name in (*TORCHVISION, *SEGMENTATION, *VIDEO)},
    **{f"timm {name}": (of_timm, name) for name in TIMM if find_spec("timm")},
    **{f"transformers {name}": (of_transformers, name) for name in TRANSFORMERS},
    **{f"torch {name}": (of_pytorch, name) for name in ("Transformer", "convolutions in 1-d")},
}
PAIRS = [*zip(MAKERS, itertools.cycle(OPTIMIZERS))]


def without_dropout(model):
    """In train mode, since some networks keep products of their weights in eval mode, but with no draws."""
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "DropPath":
            module.eval()
    return model


def outputs(y):
    """The tensors of floating numbers in what a network returns."""
    if isinstance(y, torch.Tensor):
        return [y] if y.is_floating_point() else []
    parts = y.values() if isinstance(y, dict) else y if isinstance(y, list | tuple) else ()
    return [found for part in parts for found in outputs(part)]


def called(model, x):
    return outputs(model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x))


@pytest.fixture(scope="module")
def table(request):
    """Gathers the lines of the table; `make test-networks` names the file that they are written to."""
    lines: list[list[str]] = []
    yield lines.append
    if (path := os.environ.get("NETWORKS_TABLE")) and not request.session.testsfailed:
        head = ["network", "optimiser", "parameters removed", "max abs(UᵀU − I)", "cond(S)", "export"]
        rows = [head, ["---", "---", "---:", "---:", "---:", "---:"], *lines]
        packages = ("torch", "torchvision", "timm", "transformers", "pytorch_optimizer", "fastai")
        made = ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name))
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        Path(path).write_text(f"{text}\nMade with {made}.\n", encoding="utf-8")


def tried(name, chosen, optimizer, low, x, show):
    """Two steps, the promise, the export; the line of the table goes to `show`."""
    constraint = condlr.constrain(optimizer, low, tau=TAU)
    size = condlr.measure(low)

    @torch.enable_grad()
    def backward():
        optimizer.zero_grad()
        loss = torch.stack([y.float().square().mean() for y in called(low, x)]).sum()
        loss.backward(create_graph=type(optimizer).__name__ in GRAPHS)
        return loss

    for _ in range(2):
        backward()
        optimizer.step(*([backward] if hasattr(optimizer, "second_step") else []))
    found = constraint.check()
    low.eval()
    with torch.no_grad():
        expected = called(low, x)
        plain = condlr.export(low, x)
        error = max(
            ((y - z).norm() / z.norm().clamp_min(1e-30)).item()
            for y, z in zip(called(plain, x), expected, strict=True)
        )
    show(
        [
            name, chosen, f"{100 * size.network_train_compression:.1f} %",
            f"{found['orthonormality_error']:.1e}", f"{found['cond_S']:.5f}", f"{error:.1e}",
        ]
    )  # fmt: skip
    assert found["cond_S"] <= (1 + TAU) * (1 + 1e-4)
    assert error < 1e-3


@pytest.mark.parametrize(("name", "optimizer"), PAIRS, ids=[f"{n} {o}" for n, o in PAIRS])
def test_a_network_keeps_the_promise_and_is_exported(name, optimizer, table):
    torch.manual_seed(0)
    make, key = MAKERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make(key)
        low = condlr.factorize(without_dropout(model), 0.5)
    tried(name, optimizer, OPTIMIZERS[optimizer](low.parameters()), low, x, table)


def small():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    return condlr.factorize(nn.Sequential(*layers), 0.5)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *OTHERS])
def test_an_optimizer_keeps_the_promise(optimizer, table):
    low = small()
    if optimizer in OTHERS:
        others = pytest.importorskip("pytorch_optimizer")
        chosen, label = others.load_optimizer(optimizer)(low.parameters()), f"pytorch_optimizer {optimizer}"
    else:
        chosen, label = OPTIMIZERS[optimizer](low.parameters()), optimizer
    tried("a small network", label, chosen, low, torch.randn(8, 3, 8, 8), table)


@pytest.mark.parametrize("optimizer", [*GRAPHS, *PERTURBING])
def test_an_optimizer_with_steps_of_its_own_keeps_the_promise(optimizer, table):
    low, make = small(), getattr(pytest.importorskip("pytorch_optimizer"), optimizer)
    given = {"WSAM": (low, low.parameters(), torch.optim.SGD), "BSAM": (low.parameters(), 1000)}
    for name in GRAPHS:
        given[name] = (low.parameters(),)
    chosen = make(*given.get(optimizer, (low.parameters(), torch.optim.SGD)), lr=1e-5)
    tried("a small network", f"pytorch_optimizer {optimizer}", chosen, low, torch.randn(8, 3, 8, 8), table)


@pytest.mark.parametrize("optimizer", FASTAI)
def test_an_optimizer_of_fastai_keeps_the_promise(optimizer, table):
    low, library = small(), pytest.importorskip("fastai.optimizer")
    chosen = getattr(library, optimizer)([*low.parameters()], lr=1e-3)
    tried("a small network", f"fastai {optimizer}", chosen, low, torch.randn(8, 3, 8, 8), table)


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
