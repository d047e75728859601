"""A Hugging Face sequence classifier as reward: prompt and completion in, one logit out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlalign.rewards.text import text_of
from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, read_value


class RewardModel:
    """The reward made by `reward_model`; the weights are loaded by `load`."""

    def __init__(
        self,
        path: str,
        index: int | None,
        as_chat: bool,
        batch_tokens: int,
        max_length: int | None,
        device: str,
        dtype: str,
    ) -> None:
        self._path = path
        self._index = index
        self._as_chat = as_chat
        self._batch_tokens = batch_tokens
        self._max_length = max_length
        self._device = device
        self._dtype = dtype

    def load(self) -> None:
        """Read tokenizer and weights. RewardError when the folder is no classifier, or has several
        labels and `index` does not choose."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._path)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self._path, dtype=self._dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise RewardError(f"reward model {self._path!r} cannot be loaded: {error}") from error
        if info["missing_keys"]:
            raise RewardError(
                f"{self._path!r} is no reward model: its weights lack "
                f"{sorted(info['missing_keys'])}, which would be random. Give the folder of a "
                "trained sequence classifier"
            )
        self._column = self._choose_label(model.config)
        text_config, pad = model.config.get_text_config(), self._tokenizer.pad_token_id
        if text_config.pad_token_id is None and pad != self._tokenizer.eos_token_id:
            text_config.pad_token_id = pad  # a text never ends in it, so the score stays the same
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        limits = (self._max_length, getattr(model.config, "max_position_embeddings", None))
        self._limit = min((limit for limit in limits if limit is not None), default=None)

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[Verdict]:
        rows = [self._tokens(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        verdicts: list[Verdict] = [Verdict(VerdictKind.INVALID)] * len(rows)
        fitting = []
        for i, row in enumerate(rows):
            if not row or (self._limit is not None and len(row) > self._limit):
                detail = f"{len(row)} tokens; the reward model reads 1 to {self._limit}"
                verdicts[i] = Verdict(VerdictKind.INVALID, detail=detail)
            else:
                fitting.append(i)
        for batch in self._batches(rows, fitting):
            for i, verdict in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                verdicts[i] = verdict
        return verdicts

    def _tokens(self, prompt: Any, completion: str) -> list[int]:
        """Through the model's chat template for messages, else by concatenation."""
        if isinstance(prompt, str) and not self._as_chat:
            return self._tokenizer(prompt + completion)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        messages.append({"role": "assistant", "content": completion})
        if self._tokenizer.chat_template is None:
            raise RewardError(
                f"reward model {self._path!r} has no chat template, and the prompts are messages; "
                "use string prompts, or add a template to its tokenizer"
            )
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batches(self, rows: list[list[int]], index: list[int]) -> Iterator[list[int]]:
        """Rows of similar length, at most `batch_tokens` with padding; one at a time without a
        padding token, because HF classifiers read the last token that is not one."""
        alone = self._model.config.get_text_config().pad_token_id is None
        batch: list[int] = []
        for i in sorted(index, key=lambda i: len(rows[i])):
            full = (len(batch) + 1) * len(rows[i]) > self._batch_tokens
            if batch and (full or alone):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score(self, rows: list[list[int]]) -> list[Verdict]:
        import torch

        width = max(map(len, rows))
        pad = self._model.config.get_text_config().pad_token_id or 0
        ids_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        seen_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        try:
            with torch.inference_mode():
                logits_BC = self._model(
                    input_ids=ids_BT.to(self._device), attention_mask=seen_BT.to(self._device)
                ).logits
        except torch.OutOfMemoryError as error:
            if len(rows) > 1:
                half = len(rows) // 2
                return self._score(rows[:half]) + self._score(rows[half:])
            return [Verdict(VerdictKind.OOM, detail=str(error))]
        return [read_value(value) for value in logits_BC[:, self._column].float().tolist()]

    def _choose_label(self, config: Any) -> int:
        if self._index is None and config.num_labels == 1:
            return 0
        if self._index is None or not 0 <= self._index < config.num_labels:
            raise RewardError(
                f"reward model {self._path!r} has {config.num_labels} labels ({config.id2label}); "
                f"params.index = {self._index} must choose one"
            )
        return self._index


def reward_model(
    path: str,
    index: int | None = None,
    as_chat: bool = False,
    batch_tokens: int = 16384,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> RewardModel:
    """The logit of a sequence classifier (label `index` where it has several).

    `path` is an HF folder or hub id. Messages go through the model's chat template; string prompts
    are concatenated with the completion, or become a user message with `as_chat`. `batch_tokens`
    bounds a forward pass, padding included. A text longer than the model reads is invalid, not cut.
    """
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if not folder.is_dir() and looks_local:
        raise RewardError(f"reward model {path!r}: there is no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RewardError(f"reward model {path!r}: the folder has no config.json")
    if batch_tokens < 1:
        raise RewardError(f"reward 'reward_model': batch_tokens = {batch_tokens}; allowed: >= 1")
    return RewardModel(path, index, as_chat, batch_tokens, max_length, device, dtype)
