"""A trained network is compressed with its data in mind, and trained on while tau falls to its last value."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr

X, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
X = X.float() / 16
torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model, optimizer, epochs, before_epoch=lambda epoch: None):
    for epoch in range(epochs):
        before_epoch(epoch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[:1400]), y[:1400]).backward()
        optimizer.step()


def accuracy(model):
    return (model(X[1400:]).argmax(1) == y[1400:]).float().mean().item()


train(dense, torch.optim.Adam(dense.parameters(), lr=1e-2), 200)
print(f"dense {accuracy(dense):.3f}")

# Ranks that keep 99 % of the energy of each layer's outputs on a batch of data
model = condlr.factorize(dense, energy=0.99, exclude="4", data=[X[:500]])
print(condlr.summary(model, X[:1]))
print(f"factored {accuracy(model):.3f}")

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
constraint = condlr.constrain(optimizer, model, tau=20.0)


def tolerance(epoch):
    constraint.tau = max(0.1, 20.0 * 0.9**epoch)  # from a condition of 21 to 1.1 in 50 epochs


train(model, optimizer, 100, tolerance)
print(f"constrained {accuracy(model):.3f}, {constraint.check()}")
