"""ResNet-18 of torchvision on CIFAR-10: python resnet18.py FOLDER [EPOCHS]. Fetches missing images."""

import sys

import torch
from torch import nn
from torchvision import datasets, models, transforms

import condlr

folder, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10
changes = transforms.Compose(
    [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)
train = datasets.CIFAR10(folder, train=True, transform=changes, download=True)
test = datasets.CIFAR10(folder, train=False, transform=transforms.ToTensor(), download=True)
device = "cuda" if torch.cuda.is_available() else "cpu"

model = models.resnet18(num_classes=10)
model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # for small images
model = condlr.factorize(model, 0.5, exclude="fc").to(device)
print(condlr.measure(model))

optimizer = torch.optim.SGD(condlr.parameter_groups(model, 5e-4), lr=0.05, momentum=0.9)
constraint = condlr.constrain(optimizer, model, tau=0.1)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
for epoch in range(epochs):
    for images, labels in torch.utils.data.DataLoader(train, 128, shuffle=True, num_workers=2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {constraint.audit()}")

model.eval()
with torch.no_grad():
    batches = torch.utils.data.DataLoader(test, 500)
    right = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in batches)
print(f"accuracy {right / len(test):.4f}")
torch.save(condlr.export(model, torch.zeros(1, 3, 32, 32, device=device)).state_dict(), "resnet18.pt")
