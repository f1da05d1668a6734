"""Training of keys and values: PEFT's recipe of self-study for cartridges, and ``compress``.

    python benchmarks/bench_self_study.py --csv benchmarks/results/self_study_cpu.csv
    python benchmarks/bench_self_study.py --steps 6 --queries 16 --held-out 8 --tokens 64

The recipe is that of ``examples/cartridge_self_study`` of PEFT 0.21.2: transformers' Trainer, one row in a step, 1e-3
with linear decay. In each step the model reads text, query and continuation without the adapter, then query and
continuation after the cartridge. The loss is the cross entropy of the teacher's 20 most probable tokens at all places
of the row.

``compress`` learns from probabilities that the teacher has given once, at the places of the continuation. Steps, rate,
schedule, initial values and rows, in their order, are the recipe's. Both have a copy of the model and take turns in one
process: one step of PEFT, one of ours. One more row is ``compress`` with its own defaults on as many queries.

The same code measures all prompts. `training_kl` is the loss of ``compress`` on all training queries, `kl` the
divergence over the whole vocabulary on held-out ones.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Row, add_base_arguments, append_rows, argument_parser, environment, synchronise
from rich.console import Console
from study_compress import NEW_TOKENS, given_queries, text_of
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from softprompt_fast.distillation import DistillationSettings, Retention, compress
from softprompt_fast.distillation.divergence import kl_divergence
from softprompt_fast.distillation.preparation import Prepared, prepare
from softprompt_fast.distillation.retention import Contestant, measure_retention
from softprompt_fast.distillation.teacher import Target, logits_of
from softprompt_fast.distillation.training import batch_loss
from softprompt_fast.hf import SMOLLM2, load_base_model

FROZEN, TOP_K, RATE, MAX_GRAD_NORM = 1, 20, 1e-3, 1.0
"""The recipe's settings; the last one is Trainer's default."""
START, PEFT, SAME, OWN = "initial_values", "peft_recipe", "compress_same_settings", "compress_defaults"
"""What the rows are of; also the names of the prompts."""
TOLERANCE = 0.01
"""Largest divergence per token of PEFT's student from ours before the training. Rounding in bfloat16 stays below."""


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    steps: int
    tokens: int
    """Positions of the prompt."""
    seed: int
    new_tokens: int
    """Longest continuation."""
    device: str


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--text", choices=list(NEW_TOKENS), default="instruction")
    add_base_arguments(parser)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=192, help="queries to train on")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="keys and values that are trained")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ours, tokenizer = load_base_model(arguments.model, arguments.dtype, arguments.device)
    theirs = copy.deepcopy(ours)
    if arguments.model == SMOLLM2:  # its weights are de-quantised when loaded; Trainer reads this flag and would refuse
        theirs.is_quantized, theirs.hf_quantizer = False, None
    train, held_out = given_queries(arguments.text, arguments.held_out)
    new_tokens = NEW_TOKENS[arguments.text]
    plan = Plan(arguments.steps, arguments.tokens, arguments.seed, new_tokens, arguments.device)
    rows = study(ours, theirs, tokenizer, text_of(arguments.text), train[: arguments.queries], held_out, plan)
    facts = {"text": arguments.text, "model": Path(arguments.model).name, "dtype": arguments.dtype}
    rows = [{**facts, **row, **environment(arguments.device)} for row in rows]
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.csv:
        append_rows(arguments.csv, rows)


def study(
    ours: Any,
    theirs: Any,
    tokenizer: Any,
    about: Mapping[str, Any],
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    plan: Plan,
) -> list[Row]:
    """The rows of the results.

    Args:
        ours, theirs: two copies of a model.
        about: "text" and "template", as for ``compress``.
        train, held_out: queries, with the template's columns.
    """
    settings = DistillationSettings(form="kv", new_tokens=plan.new_tokens, top_k=TOP_K, seed=plan.seed)
    own = replace(settings, steps=max(1, round(plan.steps / settings.batch_size)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepared_for(ours, tokenizer, about, train, held_out, plan, settings, folder)
        start = time.perf_counter()
        targets, tests = (prepared.teacher.targets(queries) for queries in (prepared.train, prepared.held_out))
        teacher_seconds = time.perf_counter() - start
        times = train_in_turns(prepared, theirs, targets, plan, folder)
        prepared.student.add_prompt(PEFT, init=folder / "peft")
        options = {"tokens": plan.tokens, "held_out": held_out, "settings": own, "cache": prepared.teacher.cache}
        rest = {"template": about["template"]}
        console = Console(quiet=True)
        result = compress(
            ours, tokenizer, about["text"], folder / "own", train, console=console, **rest, **options
        ).prompts[0]
        prepared.student.add_prompt(OWN, init=result.folder)
        names = (START, PEFT, SAME, OWN)
        contestants = [Contestant(one, plan.tokens, prepared.student, one) for one in names]
        retention = measure_retention(prepared.teacher, contestants, tests, settings)
        losses = [divergence(prepared, one, targets) for one in names]
    common = {
        "text_tokens": len(prepared.source),
        "tokens": plan.tokens,
        "queries": len(targets),
        "held_out": len(tests),
        "seed": plan.seed,
        "teacher_seconds": round(teacher_seconds, 1),
    }
    peft_step = statistics.median(times[PEFT])
    recipe = {"batch": 1, "rate": RATE, "steps": plan.steps}
    costs: dict[str, Row] = {
        START: {"batch": "", "rate": "", "steps": 0, "step_s": "", "peft_over_this": "", "seconds": 0},
        **{one: {**recipe, **cost(times[one], peft_step)} for one in (PEFT, SAME)},
        OWN: {
            **{"batch": min(own.batch_size, len(targets)), "rate": result.learning_rate, "steps": own.steps},
            **{"step_s": "", "peft_over_this": "", "seconds": round(result.training_seconds, 1)},
        },
    }
    return [
        {**common, "training": one.label, **costs[one.label], "training_kl": round(loss, 4), **measures(one)}
        for one, loss in zip(retention, losses, strict=True)
    ]


def prepared_for(
    model: Any,
    tokenizer: Any,
    about: Mapping[str, Any],
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    plan: Plan,
    settings: DistillationSettings,
    folder: Path,
) -> Prepared:
    """Text, queries, teacher and student as ``compress`` makes them."""
    return prepare(
        model,
        tokenizer,
        about["text"],
        folder,
        train,
        tokens=plan.tokens,
        self_queries=0,
        text_column="text",
        template=about["template"],
        chat=False,
        held_out=held_out,
        name="prompt",
        base_name=None,
        max_drop=0.0,
        cache=folder / "cache",
        settings=settings,
        console=Console(quiet=True),
    )


def train_in_turns(
    prepared: Prepared, theirs: Any, targets: Sequence[Target], plan: Plan, folder: Path
) -> dict[str, list[float]]:
    """Seconds of each step of both. PEFT's cartridge is saved in ``folder / "peft"``; ours stays in the student."""
    import peft

    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=plan.tokens, num_frozen_tokens=FROZEN)
    cartridge = peft.get_peft_model(theirs, config)
    values = start_from_text(cartridge, prepared.source.ids)
    trained = [name for name, parameter in cartridge.named_parameters() if parameter.requires_grad]
    if trained != ["prompt_encoder.default.trainable_embedding"]:
        raise ValueError(f"PEFT must train the cartridge alone, got {trained}")
    prepared.student.add_prompt(START, init=values)
    check_same_start(cartridge, prepared, targets[0])
    step = our_step(prepared, values, targets, plan)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        learning_rate=RATE,
        max_steps=plan.steps,
        logging_steps=10,
        save_strategy="no",  # checkpoints would be no part of the timed steps
        report_to=[],
        remove_unused_columns=False,
        use_cpu=plan.device == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=plan.seed,
    )
    if arguments.max_grad_norm != MAX_GRAD_NORM or arguments.weight_decay or arguments.warmup_steps:
        raise ValueError("Trainer's defaults must be a gradient norm of 1, no weight decay and no warm-up")
    trainer = RecipeTrainer(
        model=cartridge,
        args=arguments,
        train_dataset=recipe_rows(prepared.source.ids, targets),
        data_collator=collate,
        text_tokens=len(prepared.source),
    )
    turns = Turns(lambda: step(trainer.row), plan.device)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()
    cartridge.save_pretrained(str(folder / "peft"))
    return {PEFT: turns.theirs, SAME: turns.ours}


@torch.no_grad()
def start_from_text(cartridge: Any, text_ids: Sequence[int]) -> Tensor:
    """Gives a cartridge the keys and values of the text's first tokens, by PEFT's own function, and returns them."""
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    ids = torch.tensor([list(text_ids)], device=cartridge.device)
    with cartridge.disable_adapter():
        cache = cartridge(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(cartridge, past_key_values=cache).float()


@torch.no_grad()
def check_same_start(cartridge: Any, prepared: Prepared, target: Target) -> None:
    """Raises ValueError if PEFT's model and ours do not say the same after the same keys and values."""
    ids = torch.tensor([target.query + target.continuation], device=cartridge.device)
    logits = cartridge(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    theirs = logits[0, len(target.query) - 1 : -1].float().log_softmax(-1)
    ours = logits_of(prepared.student, START, [target]).float().log_softmax(-1)
    found = kl_divergence(theirs, ours).mean().item()
    if not found <= TOLERANCE:
        raise ValueError(f"both must start with the same probabilities, got a divergence of {found:.1e} per token")


def our_step(prepared: Prepared, values: Tensor, targets: Sequence[Target], plan: Plan) -> Callable[[int], float]:
    """A function that trains our prompt on one row and returns the loss; what ``compress`` does in a step."""
    student = prepared.student
    parameter = student.add_prompt(SAME, init=values, num_frozen_tokens=FROZEN)
    optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(0.0, 1 - done / plan.steps))

    def step(row: int) -> float:
        loss = batch_loss(student, SAME, [targets[row]], temperature=1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter], MAX_GRAD_NORM)
        value: float = loss.item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return value

    return step


def recipe_rows(text_ids: Sequence[int], targets: Sequence[Target]) -> list[Row]:
    """What teacher and student read of each row."""
    answers = [target.query + target.continuation for target in targets]
    return [{"row": row, "whole": [*text_ids, *answer], "answer": answer} for row, answer in enumerate(answers)]


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """The recipe's batch of one row, so nothing is padded."""
    (row,) = rows
    tensors = {name: torch.tensor([row[name]]) for name in ("whole", "answer")}
    masks = {f"{name}_mask": torch.ones_like(ids) for name, ids in tensors.items()}
    return {**tensors, **masks, "row": row["row"]}


class RecipeTrainer(Trainer):
    """Trainer with the recipe's loss.

    Args:
        text_tokens: length of the text in front of the teacher's rows.
    """

    def __init__(self, *, text_tokens: int, **options: Any) -> None:
        super().__init__(**options)
        self.text_tokens = text_tokens
        self.row = -1
        """The row of the last step."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        self.row = inputs["row"]
        with torch.no_grad(), model.disable_adapter():
            whole = model(input_ids=inputs["whole"], attention_mask=inputs["whole_mask"], use_cache=False).logits
        student = model(input_ids=inputs["answer"], attention_mask=inputs["answer_mask"], use_cache=False).logits
        return recipe_loss(student[0, :-1], whole[0, self.text_tokens : -1])


def recipe_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all places of the cross entropy of the teacher's most probable tokens; logits [M, V]."""
    top_ids = teacher.topk(min(TOP_K, teacher.shape[-1]), -1).indices
    p = teacher.log_softmax(-1).gather(-1, top_ids).exp()
    return -(p * student.log_softmax(-1).gather(-1, top_ids)).sum(-1).mean()


class Turns(TrainerCallback):
    """Times each step of a Trainer, from the batch to the optimiser, and runs one of ours after it."""

    def __init__(self, step: Callable[[], Any], device: str) -> None:
        self.step, self.device = step, device
        self.theirs: list[float] = []
        self.ours: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise(self.device)
        begin = time.perf_counter()
        self.theirs.append(begin - self.start)
        self.step()
        synchronise(self.device)
        self.ours.append(time.perf_counter() - begin)


@torch.no_grad()
def divergence(prepared: Prepared, prompt: str, targets: Sequence[Target]) -> float:
    """The loss of ``compress`` per token of all training continuations."""
    total, size = 0.0, prepared.settings.batch_size
    for start in range(0, len(targets), size):
        batch = targets[start : start + size]
        loss = batch_loss(prepared.student, prompt, batch, temperature=1.0).item()
        total += loss * sum(len(target.continuation) for target in batch)
    return total / sum(len(target.continuation) for target in targets)


def cost(times: Sequence[float], peft_step: float) -> Row:
    median = statistics.median(times)
    return {"step_s": round(median, 4), "peft_over_this": round(peft_step / median, 2), "seconds": round(sum(times), 1)}


def measures(one: Retention) -> Row:
    return {name: round(getattr(one, name), 4) for name in ("kl", "agreement", "first_token")}


if __name__ == "__main__":
    main()
