"""CondLR in one's own training loop: handwritten digits, in seconds. Needs scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import condlr

X, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
X = X.float() / 16
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

model = condlr.factorize(model, budget=0.3, exclude="4")  # 30 % of all parameters, the classifier dense
optimizer = torch.optim.AdamW(condlr.parameter_groups(model, weight_decay=1e-2), lr=3e-3)
constraint = condlr.constrain(optimizer, model, tau=0.1)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X[:1400]), y[:1400]).backward()
    optimizer.step()

accuracy = (model(X[1400:]).argmax(1) == y[1400:]).float().mean()
print(condlr.summary(model, X[:1]))
print(f"accuracy {accuracy:.3f}, {constraint.check()}")
plain = condlr.export(model, X[:1])  # nn.Linear alone
