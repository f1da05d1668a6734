"""Sentence embeddings after a soft prompt: the first module of a ``SentenceTransformer``.

The package ``sentence-transformers`` must be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sentence_transformers.base.modules import InputModule
from torch import Tensor

from ..base.errors import either
from ..base.files import read_json, write_json
from ..hf import architecture
from ..hf.adapters import adapter_parameters
from ..models.deep_prompt_model import DeepPromptModel
from ..models.pooling import POOLINGS, pooled_text
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.peft_files import is_deep

__all__ = ["SoftPromptEmbedder"]

PROMPT_FOLDER, BASE_FOLDER = "soft_prompt", "base_model"
"""Folders of a saved module. The base model is saved only if it has no name by which it is found again."""


class SoftPromptEmbedder(InputModule):
    """Embeds texts after a soft prompt; only the texts' own tokens are pooled, and only the prompt is trained.

    A text's embedding does not depend on the other texts of its batch. It gives ``token_embeddings`` too, so another
    pooling module can follow.

    Args:
        model: with its prompts. The base model is best one without a head (``transformers.AutoModel``).
        tokenizer: the base model's.
        prompt: name of the prompt; None: the only one.
        pooling: "mean" of the text's tokens, its "first" token, or its "last", usual for decoders.
        max_seq_length: longer texts lose their end. None: as many tokens as the model can read after the prompt.

    Raises:
        TypeError: an encoder-decoder, or adapters of PEFT in the base model.
        ValueError: an unknown pooling or prompt, or several prompts and no name.
    """

    config_file_name = "soft_prompt_config.json"
    config_keys: ClassVar[list[str]] = ["base_model", "base_class", "prompt", "pooling", "max_seq_length"]

    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any,
        *,
        prompt: str | None = None,
        pooling: str = "mean",
        max_seq_length: int | None = None,
    ) -> None:
        super().__init__()
        if architecture.is_encoder_decoder(model.base_model):
            raise TypeError(f"`model` must be an encoder or a decoder, got {type(model.base_model).__name__}")
        if hasattr(model.base_model, "peft_config") or any(True for _ in adapter_parameters(model.base_model)):
            raise TypeError(  # after `save` they would be missing
                f"`model` must have a base model without adapters, got {type(model.base_model).__name__}; "
                "merge them (merge_and_unload), save that model and load it"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be {either(POOLINGS)}, got {pooling!r}")
        names = list(model.prompts.names)
        if prompt is None and len(names) != 1:
            raise ValueError(f"`prompt` must name one of the model's prompts {names}, got None")
        if prompt is not None and prompt not in names:
            raise ValueError(f"`prompt` must be one of {', '.join(names)}, got {prompt!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = names[0] if prompt is None else prompt
        self.pooling = pooling
        room = architecture.context_length(model.base_model)
        if max_seq_length is None and room is not None:
            max_seq_length = room - len(model.prompts[self.prompt])
        self.max_seq_length = max_seq_length

    @property
    def base_model(self) -> str | None:
        """Name or folder of the base model; None: it is saved with the module, because it has no name of its own."""
        name = self.model.name_or_path
        return None if not name or Path(name).name == BASE_FOLDER else name

    @property
    def base_class(self) -> str:
        """Name of the base model's class in transformers."""
        return type(self.model.base_model).__name__

    def get_embedding_dimension(self) -> int:
        """Numbers of an embedding."""
        config = self.model.config.get_text_config()
        size: int = config.hidden_size
        return size

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Tokenises texts.

        Args:
            prompt: words in front of each text, as ``SentenceTransformer.encode`` calls them; not the soft prompt.

        Raises:
            ValueError: a text without a token.
        """
        texts = list(inputs) if prompt is None else self._prepend_prompt(list(inputs), prompt)
        ids = self.tokenizer(texts, truncation=self.max_seq_length is not None, max_length=self.max_seq_length)
        empty = [i for i, row in enumerate(ids["input_ids"]) if not row]
        if empty:
            raise ValueError(f"`inputs` must hold a token each, got {inputs[empty[0]]!r} at {empty[0]}")
        if self.tokenizer.pad_token_id is None:  # padding is masked, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        return dict(self.tokenizer.pad(ids, padding=True, return_tensors="pt"))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds ``token_embeddings`` [B, T, D] and ``sentence_embedding`` [B, D]."""
        mask = features["attention_mask"]
        types = {name: features[name] for name in ("token_type_ids",) if name in features}
        output = self.model(features["input_ids"], mask, prompt_ids=self.prompt, output_hidden_states=True, **types)
        states = getattr(output, "last_hidden_state", None)
        states = output.hidden_states[-1] if states is None else states
        return features | {"token_embeddings": states, "sentence_embedding": self._pooled(states, mask)}

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        return pooled_text(states.float(), mask, self.pooling).to(states.dtype)

    # --- files ---

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the prompt, the tokenizer and the settings; the base model too if it has no name of its own.

        Raises:
            TypeError: the base model's class is none of transformers.
        """
        _class_named(self.base_class)
        folder = Path(output_path)
        self.model.save_pretrained(folder / PROMPT_FOLDER, [self.prompt])
        self.save_tokenizer(str(folder))
        write_json(folder / self.config_file_name, self.get_config_dict())
        if self.base_model is None:
            self.model.base_model.save_pretrained(folder / BASE_FOLDER)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> SoftPromptEmbedder:
        """Reads what :meth:`save` wrote; ``model_kwargs`` are options of the base model's ``from_pretrained``.

        Raises:
            FileNotFoundError: no such module.
            TypeError: the base model's class is none of transformers.
        """
        from transformers import AutoTokenizer

        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        found = cls.load_dir_path(model_name_or_path, **where)
        folder = Path(found or model_name_or_path)
        config = read_json(folder / cls.config_file_name)
        if config is None:
            raise FileNotFoundError(f"{folder} must hold {cls.config_file_name}")
        kind = _class_named(config["base_class"])
        base = kind.from_pretrained(config["base_model"] or folder / BASE_FOLDER, **(model_kwargs or {}))
        prompt = folder / PROMPT_FOLDER
        kind_of_prompt = DeepPromptModel if is_deep(prompt / config["prompt"]) else SoftPromptModel
        return cls(
            kind_of_prompt.from_pretrained(base, prompt),
            AutoTokenizer.from_pretrained(folder),
            prompt=config["prompt"],
            pooling=config["pooling"],
            max_seq_length=config["max_seq_length"],
        )


def _class_named(name: str) -> Any:
    """The class of transformers' models of this name, by which a saved module finds its base model's.

    Raises:
        TypeError: there is none.
    """
    import transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise TypeError(f"`base_class` must be a model of transformers, got {name!r}")
    return kind
