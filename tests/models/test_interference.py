"""Random sequences of operations on several objects over one base model: no object ever changes another's results.

After every operation each object equals the rows run alone on an untouched copy of the base (or has refused), and the
base itself gives the bits that it gave first. ``SOFTPROMPT_FAST_SEQUENCES=300`` runs more sequences.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_alone
from support.rows_alone import relative
from support.tiny_models import LLAMA

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank
from softprompt_fast.inference.engine import Engine

SEQUENCES = int(os.environ.get("SOFTPROMPT_FAST_SEQUENCES", "24"))
OPERATIONS = 30
OBJECTS = 4
IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(3))
NAMES = ["p", None]
ATTENTION = ("sdpa", "eager")


def base_model() -> Any:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA | {"num_hidden_layers": 2})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, 0, 0.25)
    return model


class Member:
    """One object over the base, and what it must return."""

    def __init__(self, kind: str, model: Any, seed: int) -> None:
        self.kind = kind
        self.given_up = False
        self.expected: torch.Tensor | None = None
        values = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        if kind == "bank":
            self.bank = PromptBank(model)
            self.bank.add("p", values)
            self.engine = Engine(self.bank)
            self.tuned = self.bank.model
            return
        classes: dict[str, Any] = {"plain": spf.SoftPromptModel, "deep": spf.DeepPromptModel}
        options = {"execution": "padded"} if kind == "padded" else {}
        self.tuned = classes.get(kind, spf.SoftPromptModel)(model, **options)
        self.tuned.add_prompt("p", init=values)

    def logits(self) -> torch.Tensor:
        """[2, V] after each row."""
        if self.kind != "bank":
            return self.tuned(IDS, prompt_ids=NAMES).logits[:, -1].detach()
        with self.bank.use(NAMES) as view:
            return self.engine.logits_at(view, IDS.tolist(), NAMES, torch.tensor([[0, 4], [1, 4]]))

    def alone(self, pristine: Any) -> torch.Tensor:
        """The same from the untouched base, row by row; kept until the prompt is trained."""
        if self.expected is None:
            prompt = self.bank["p"] if self.kind == "bank" else self.tuned.prompts["p"].detach()
            with torch.no_grad():
                if self.kind == "deep":
                    holder = type("Holder", (), {"base_model": pristine, "runner": self.tuned.runner})
                    first = deep_alone(holder, IDS[0], prompt)[-1]  # type: ignore[arg-type]
                else:
                    vectors = torch.cat([prompt, pristine.get_input_embeddings()(IDS[0])])
                    first = pristine(inputs_embeds=vectors[None]).logits[0, -1]
                self.expected = torch.stack([first, pristine(IDS[1:]).logits[0, -1]])
        return self.expected

    def is_right(self, pristine: Any) -> bool:
        try:
            return relative(self.logits(), self.alone(pristine)) < 1e-4
        except TypeError as error:
            return self.kind == "deep" and self.given_up and "cannot run deep prompts" in str(error)


class World:
    """A base model, the objects over it, and the operations on them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.model = base_model()
        self.pristine = copy.deepcopy(self.model)
        self.members: list[Member] = []
        self.attention = "sdpa"
        self.first: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name in ATTENTION:
                self.pristine.set_attn_implementation(name)
                self.first[name] = self.pristine(IDS).logits
        self.pristine.set_attn_implementation("sdpa")

    def step(self) -> str:
        names = [name for name in dir(self) if name.startswith("do_")]
        name = "do_wrap" if not self.members else self.random.choice(names)
        member = self.random.choice(self.members) if self.members else None
        getattr(self, name)(member)
        return f"{name[3:]} {member.kind if member else ''}"

    def check(self) -> None:
        with torch.no_grad():
            assert torch.equal(self.model(IDS).logits, self.first[self.attention])
            assert all(member.is_right(self.pristine) for member in self.members)

    def do_wrap(self, member: Member | None) -> None:
        if len(self.members) < OBJECTS:
            kind = self.random.choice(["plain", "plain", "deep", "bank", "padded"])
            self.members.append(Member(kind, self.model, self.random.randrange(1000)))

    def do_forward(self, member: Member) -> None:
        if not member.given_up or member.kind != "deep":
            tokens = self.random.randrange(1, 7)
            ids = torch.randint(3, 90, (3, tokens))
            prompts = None if member.kind == "bank" else [None, "p", "p"]
            assert member.tuned(ids, prompt_ids=prompts).logits.isfinite().all()

    def do_generate(self, member: Member) -> None:
        if member.given_up and member.kind == "deep":
            return
        options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if member.kind == "bank":
            with member.bank.use(NAMES) as view:
                tokens = member.engine.generate(view, IDS.tolist(), NAMES, options)
        else:
            tokens = member.tuned.generate(IDS, prompt_ids=NAMES, **options)[:, IDS.shape[1] :]
        assert torch.equal(tokens[:, 0], member.alone(self.pristine).argmax(-1))

    def do_stray_keyword(self, member: Member) -> None:
        if not member.given_up or member.kind != "deep":
            prompts = None if member.kind == "bank" else NAMES
            member.tuned(IDS, prompt_ids=prompts, token_type_ids=IDS * 0, novelty=1)

    def do_bad_call(self, member: Member) -> None:
        wrong = self.random.choice(
            [{"input_ids": IDS[0]}, {"input_ids": IDS + 500}, {"input_ids": IDS.repeat(1, 40)}, {"prompt_ids": "none"}]
        )
        with pytest.raises((ValueError, IndexError, KeyError, TypeError)):
            member.tuned(**{"input_ids": IDS, "prompt_ids": None, **wrong})

    def do_give_up(self, member: Member) -> None:
        if member.tuned.runner is not None and self.random.random() < 0.5:
            member.tuned.runner.give_up("asked to")
            member.given_up = True

    def do_set_attention(self, member: Member) -> None:
        self.attention = self.random.choice(ATTENTION)
        self.model.set_attn_implementation(self.attention)

    def do_delete(self, member: Member) -> None:
        self.members.remove(member)
        if self.random.random() < 0.3:
            member.tuned.unload()
        if not self.members:
            del member
            gc.collect()

    def do_pickle(self, member: Member) -> None:
        if member.kind == "bank":
            return
        other = copy.copy(member)
        other.tuned = pickle.loads(pickle.dumps(member.tuned))
        assert other.tuned.base_model is not self.model
        with torch.no_grad():
            assert other.is_right(self.pristine)

    def do_train(self, member: Member) -> None:
        if member.kind == "bank" or (member.given_up and member.kind == "deep"):
            return
        with torch.enable_grad():
            member.tuned.train()
            member.tuned(IDS, labels=IDS, prompt_ids="p").loss.backward()
            member.tuned.eval()
        parameter = member.tuned.prompts["p"]
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None
        member.expected = None

    def do_compile(self, member: Member) -> None:
        if member.kind == "bank":
            name = f"q{self.random.randrange(1000)}"
            member.bank.add(name, torch.randn(2, 32), replace=True)
            member.bank.compile()


@pytest.mark.parametrize("part", range(8))
def test_no_object_changes_another(part: int) -> None:
    for seed in range(part, SEQUENCES, 8):
        world = World(seed)
        done = []
        for _ in range(OPERATIONS):
            try:
                done.append(world.step())
                world.check()
            except Exception as error:
                raise AssertionError(f"sequence {seed} after {done}: {error!r}") from error
        world.members.clear()
        gc.collect()
        assert world.model.config._attn_implementation == world.attention
        assert all(parameter.requires_grad for parameter in world.model.parameters())
