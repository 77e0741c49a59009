"""CondLR in Hugging Face's Trainer: pip install 'condlr[transformers]'. A small BERT, from scratch."""

import tempfile

import torch
import transformers

import condlr
from condlr.integrations.transformers import CondLR

transformers.set_seed(0)
config = transformers.BertConfig(
    vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=16, num_labels=2,
)  # fmt: skip
model = condlr.factorize(transformers.BertForSequenceClassification(config), 0.5, exclude="classifier")
print(condlr.measure(model))

tokens = torch.randint(2, 32, (512, 15))  # is the first token above the middle?
labels = (tokens[:, 0] > 16).long()
data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
arguments = transformers.TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=5, per_device_train_batch_size=32, learning_rate=3e-3,
    logging_steps=20, report_to=[], use_cpu=True, save_strategy="no",
)  # fmt: skip
trainer = transformers.Trainer(model, arguments, train_dataset=data)
callback = CondLR(tau=0.1, exports=True).add_to(trainer)  # adds cond_S to what the trainer reports
trainer.train()
right = (callback.exported.eval()(tokens).logits.argmax(1) == labels).float().mean()
print(f"accuracy {right:.3f}, {condlr.audit(model)}")
