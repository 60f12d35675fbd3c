"""A model and the Trainer of Hugging Face, K-FAC at mupx's values: a wide BERT with those of a narrow one.

    pip install transformers accelerate
    python examples/05_hugging_face.py

Nothing is downloaded: the model is built from its configuration, and the task, whether a token
occurs twice, is made here. Only `CurvedTrainer` is new to somebody who knows the Trainer, and only
K-FAC needs it: for SGD, AdamW and Shampoo the groups and the plain Trainer do.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import mupx
from mupx.optim import KFAC


def build(width: int) -> BertForSequenceClassification:
    """Heads keep their size and grow in number, so that attention needs no factor of its own."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=width // 8,
            num_hidden_layers=2,
            max_position_embeddings=16,
        )
    )


class CurvedTrainer(Trainer):
    """The Trainer with its forward and backward pass inside K-FAC's context."""

    # BERT returns the mean over a micro-batch, whatever its signature makes the Trainer think.
    loss_is_scaled_for_ga = False

    def training_step(self, model: Any, inputs: dict[str, Tensor], *more: Any) -> Tensor:
        kfac = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        scale = 1 / self.current_gradient_accumulation_steps  # what the Trainer multiplies the loss by
        with kfac.curvature(inputs["labels"], loss_scale=scale):
            loss: Tensor = super().training_step(model, inputs, *more)
        return loss


def examples(count: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 8, (count, 15))
    labels = ((tokens == 1).sum(1) >= 2).long()
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, groups = mupx.parametrize(
        build,
        width=64,
        base_width=16,
        optimizer="kfac",
        lr=0.05,
        damping=0.01,
        example=torch.ones(1, 15).long(),
    )
    optimizer = KFAC(groups, model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=80,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            logging_steps=10,
            lr_scheduler_type="cosine",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = CurvedTrainer(model, arguments, train_dataset=examples(2048), optimizers=(optimizer, None))
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first ten steps {losses[0]:.3f}, of the last {losses[-1]:.3f}")
    print(f"K-FAC trains {len(groups) - len(optimizer.fallback)} tensors, AdamW {len(optimizer.fallback)}")


if __name__ == "__main__":
    main()
