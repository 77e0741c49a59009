"""CondLR in Lightning: pip install 'condlr[lightning]'."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import condlr
from condlr.integrations.lightning import CondLR

X, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
X = X.float() / 16


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.net = condlr.factorize(net, 0.5, exclude="2")

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(condlr.parameter_groups(self, weight_decay=0.01), lr=3e-3)


lightning.seed_everything(0)
module, callback = Digits(), CondLR(tau=0.1, exports=True)  # logs cond_S wherever the trainer logs
trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
)
trainer.fit(module, DataLoader(TensorDataset(X[:1400], y[:1400]), 64, shuffle=True))
accuracy = (callback.exported.net(X[1400:]).argmax(1) == y[1400:]).float().mean()
print(f"accuracy {accuracy:.3f}, {condlr.audit(module)}")
