"""Low-rank SPEL: norm and condition number of every layer are 1. Digits, clean and under FGSM, in seconds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr
from condlr.methods.spel import Spel

X, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
X = X.float() / 16


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model, optimizer, epochs=40):
    # A step of SPEL has the length lr, whatever the gradient's size: lr must fall for the network to settle
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()


def accuracies(model, eps=0.1):
    images = X[1400:].clone().requires_grad_()
    nn.functional.cross_entropy(model(images), y[1400:]).backward()
    attacked = (images + eps * images.grad.sign()).clamp(0, 1)
    clean, fgsm = ((model(x).argmax(1) == y[1400:]).float().mean().item() for x in (images, attacked))
    return f"{clean:.3f} clean, {fgsm:.3f} under FGSM"


dense = network()
train(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.3))
print(f"dense: {accuracies(dense)}")

# U Vᵀ without S, and a classifier that stays whole: all of them become orthonormal
model = condlr.factorize(network(), budget=0.3, exclude="4", core="none")
method = Spel()
train(model, method.optimizer(model, lr=0.1, momentum=0.3))
print(condlr.summary(model, X[:1]))
print(f"low-rank SPEL: {accuracies(model)}, {method.audit(model)}")
plain = condlr.export(model, X[:1])
