"""A small transformer with AdamW: does a sequence have more ones than zeros? In seconds."""

import torch
from torch import nn

import condlr


class Majority(nn.Module):
    def __init__(self, width=32, length=15):
        super().__init__()
        self.embed = nn.Embedding(2, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens) + self.place).mean(1))


torch.manual_seed(0)
model = condlr.factorize(Majority(), 0.5, exclude="head")  # also the projections of attention
optimizer = torch.optim.AdamW(condlr.parameter_groups(model, weight_decay=0.01), lr=3e-3)
constraint = condlr.constrain(optimizer, model, tau=0.1)
for _ in range(150):
    tokens = torch.randint(2, (64, 15))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), (tokens.sum(1) > 7).long()).backward()
    optimizer.step()

tokens = torch.randint(2, (1000, 15))
plain = condlr.export(model.eval(), form="factored")  # "smallest" would make attention dense
accuracy = (plain(tokens).argmax(1) == (tokens.sum(1) > 7)).float().mean()
print(condlr.summary(model))
print(f"accuracy {accuracy:.3f}, {constraint.check()}")
