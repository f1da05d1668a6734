"""A SoftPromptModel in transformers' Trainer: saves prompts only, stops cleanly at Ctrl-C, shows progress."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from ..hf.heads import head_parameters
from ..models.head_weights import install_head, stored_head
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import UPDATE_A, UPDATE_B
from ..prompts.reparameterization import Offset
from .objective import AnswerLoss, HeadLoss, MixedLoss

Evaluator = Callable[[int, float], dict[str, float]]
"""Called with the step and the seconds of tuning so far; returns the scores of the current prompts."""
BANK_FILE = "bank.safetensors"


class PromptTrainer(Trainer):
    """Trains the prompts of a :class:`SoftPromptModel` that require a gradient, and its head if that does.

    Args:
        evaluator: replaces Trainer's own evaluation loop.
        losses: the loss of each task; the ``groups`` of a batch say which task each row belongs to.
        update_learning_rate: the learning rate of the prompts' token updates.
        head_learning_rate: the learning rate of the head.
        sampler: the order of the training rows.
    """

    def __init__(
        self,
        model: SoftPromptModel,
        *args: Any,
        evaluator: Evaluator,
        losses: Sequence[AnswerLoss | HeadLoss],
        update_learning_rate: float,
        head_learning_rate: float,
        sampler: Sampler[int],
        **kwargs: Any,
    ) -> None:
        self.evaluator = evaluator
        self.losses = losses
        self.update_learning_rate, self.head_learning_rate = update_learning_rate, head_learning_rate
        self.sampler = sampler
        self.tokens_seen = 0
        self.evaluation_seconds = 0.0
        self.started = 0.0
        if isinstance(losses[0], HeadLoss):
            kwargs["compute_loss_func"] = losses[0]
        super().__init__(model, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.started = time.perf_counter()
        return super().train(*args, **kwargs)

    def tuning_seconds(self) -> float:
        """Seconds since training started, without evaluations."""
        return time.perf_counter() - self.started - self.evaluation_seconds

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        start = time.perf_counter()
        scores = self.evaluator(self.state.global_step, self.tuning_seconds())
        scores = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.evaluation_seconds += time.perf_counter() - start
        self.log(dict(scores))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Only distances from the initial prompt decay; token updates and heads have their own learning rates."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[str, dict[str, Any]] = {
            "prompts": {"params": [], "weight_decay": 0.0},
            "offsets": {"params": [], "weight_decay": self.args.weight_decay},
            "updates": {"params": [], "weight_decay": 0.0, "lr": self.update_learning_rate},
            "head": {"params": [], "weight_decay": 0.0, "lr": self.head_learning_rate},
        }
        model = self._prompts_model()
        bank = model.prompts
        if model.trains_head:
            groups["head"]["params"] += head_parameters(model.base_model, model.head_modules)
        every = [forms for name in bank if (forms := bank.forms(name)) is not None]
        offsets = {id(forms.original) for forms in every if isinstance(forms[0], Offset)}
        for name, parameter in bank.named_parameters():
            if parameter.requires_grad:
                group = "updates" if name.startswith((UPDATE_A, UPDATE_B)) else "prompts"
                groups["offsets" if id(parameter) in offsets else group]["params"].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = optimizer_class([group for group in groups.values() if group["params"]], **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.tokens_seen += sum(inputs["lengths"])
        groups = inputs.pop("groups")
        if self.compute_loss_func is not None:  # a head's loss, which reads the model's output
            inputs.pop("num_targets")
        else:
            losses = [loss for loss in self.losses if isinstance(loss, AnswerLoss)]
            inputs["loss_function"] = MixedLoss(losses, groups) if len(losses) > 1 else losses[0]
        return super().compute_loss(model, inputs, *args, **kwargs)

    # Checkpoints hold the prompts, what they are computed from and a trained head; the base model is never written.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        model = self._prompts_model()
        model.save_pretrained(folder)
        save_file(
            {name: value.detach().cpu().clone() for name, value in model.prompts.state_dict().items()},
            folder / BANK_FILE,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model, folder = self._prompts_model(), Path(resume_from_checkpoint)
        model.prompts.load_state_dict(load_file(folder / BANK_FILE))
        if model.trains_head:  # it is saved with each prompt
            install_head(stored_head(folder / model.prompts.names[0], model.base_model), model.base_model)

    def _load_best_model(self) -> None:
        """`BestPrompts` does this instead: each prompt has its own best step."""

    def _prompts_model(self) -> SoftPromptModel:
        model: SoftPromptModel = self.accelerator.unwrap_model(self.model)
        return model


class GracefulStop(TrainerCallback):
    """The first Ctrl-C ends training after the current step, with a checkpoint; the second ends it immediately."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if dist.is_initialized():  # all processes stop after the same step, or the others would wait for this one
            flag = torch.tensor(float(self.requested), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print(
            "[yellow]Stopping after this step and saving; press Ctrl-C again to stop immediately.[/yellow]"
        )
