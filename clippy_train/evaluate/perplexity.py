"""`clippy evaluate task=perplexity`: how well models predict a split, in total, by language and by repository; or the
reference solutions of programming problems, given their prompts, in total and by language.

Promises: it uses the code of validation during training (`data.scored`, `model.score`), so the same blocks give the
same numbers. Bits per byte do not depend on the tokenizer, so compare models by them; with `stride` every model is
scored on exactly the same bytes. Costs one forward pass over the rows, and memory for one batch.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import GPTNeoForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from clippy_train.config import EvaluateConfig
from clippy_train.data.objectives import Encode, LeftToRight
from clippy_train.data.scored import (
    Groups,
    ScoredSequence,
    collate_scored,
    first_blocks,
    repository_label,
    scored_blocks,
    scored_solutions,
    scored_windows,
)
from clippy_train.data.stream import Stream
from clippy_train.errors import ConfigError, DataError
from clippy_train.model.embeddings import embedding_weight
from clippy_train.model.load import load_model_and_tokenizer
from clippy_train.model.loss import token_losses
from clippy_train.model.score import add_scores, measures, new_sums
from clippy_train.shards.problems import read_references
from clippy_train.shards.sources import open_corpus
from clippy_train.tokenizer import encode_texts, fim_tokens, is_byte_level, token_bytes, without_whitespace_tokens

PARTS = ("languages", "repositories")  # what results are grouped by
Label = tuple[str, ...]  # the language and, in a split, the repository


def perplexity(config: EvaluateConfig) -> dict[str, Any]:
    """Return each model's results by its name: `total`, `languages`, `repositories` and `tokens_per_byte`.

    Raises:
        ConfigError: a model cannot be loaded, or has fewer than `seq_len` positions.
        DataError: the split has nothing to score.
    """
    models = {name: load_model_and_tokenizer(name) for name in config.model}
    lengths = (max_positions(model) for model, _ in models.values())
    seq_len = config.seq_len or min(filter(None, lengths), default=1024)
    if config.stride is not None and config.stride >= seq_len:
        raise ConfigError(f"stride={config.stride} must be below seq_len={seq_len}, so that windows overlap")
    results = {}
    for name, (model, tokenizer) in models.items():
        positions = max_positions(model) or seq_len
        if positions < seq_len:
            raise ConfigError(f"seq_len={seq_len} exceeds the {positions} positions of {name}")
        if not is_byte_level(tokenizer):
            raise ConfigError(f"{name}: the tokenizer is not a byte-level BPE, so the bytes of its tokens are unknown")
        results[name] = score_model(config, model, tokenizer, seq_len, name)
    return results


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence in tokens that a model takes; None if its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def score_model(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seq_len: int, name: str
) -> dict[str, Any]:
    """Return one model's results on the split."""
    groups: Groups[Label] = Groups()
    counter = TokenCounter(tokenizer)
    rows = split_rows(config, tokenizer, counter.encode, seq_len, groups)
    bar = tqdm(islice(rows, config.max_rows), name, config.max_rows, unit=" rows", leave=False, disable=None)
    sums = score_rows(model, token_bytes(tokenizer, len(embedding_weight(model))), bar, config.batch_size)
    if not sums[:, 1].any():
        place = config.problems or config.data.path or config.data.hub
        raise DataError(
            f"{place} has nothing to score"
            if config.problems
            else f"split={config.split} of {place} has nothing to score"
        )
    return {**group_results(sums, list(groups)), "seq_len": seq_len, **counter.tokens_per_byte()}


def split_rows(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerFast,
    encode: Encode,
    seq_len: int,
    groups: Groups[Label],
) -> Iterator[ScoredSequence]:
    """Yield reference solutions, or the split: windows over each document with `stride`, else training's blocks."""
    if config.problems is not None:
        problems, start = read_references(config.problems), tokenizer.eos_token_id
        return scored_solutions(problems, encode, start, seq_len, lambda each: (each.language,), groups)
    described = open_corpus(config.data, config.split, with_meta=True)
    end = tokenizer.eos_token_id
    if config.stride is not None:
        return scored_windows(described, encode, end, seq_len, config.stride, repository_label, groups)
    eos = end if config.eos_between_documents else None
    stream = Stream(open_corpus(config.data, config.split), LeftToRight(encode, eos), seq_len, shuffle=False)
    return scored_blocks(first_blocks(stream), described, repository_label, groups)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, num_bytes: np.ndarray, rows: Iterable[ScoredSequence], batch_size: int
) -> np.ndarray:
    """Sum nats, targets and bytes by group, without group 0: `[groups, 3]` float64."""
    device = next(model.parameters()).device
    per_token = torch.from_numpy(num_bytes).to(device)
    sums = new_sums(0, device)
    rows = iter(rows)
    while some := list(islice(rows, batch_size)):
        batch = {name: each.to(device) for name, each in collate_scored(some).items()}
        missing = int(batch["group"].max()) + 1 - len(sums)
        sums = F.pad(sums, (0, 0, 0, max(0, missing)))
        add_scores(sums, causal_lm_losses(model, batch["input_ids"]), batch["input_ids"], batch["group"], per_token)
    return sums[1:].cpu().numpy()


def causal_lm_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """`token_losses` for any causal LM: `[batch, seq - 1]` nats in fp32."""
    if isinstance(model, GPTNeoForCausalLM):
        return token_losses(model, input_ids, "auto")
    logits = model(input_ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")


def group_results(sums: np.ndarray, labels: list[Label]) -> dict[str, Any]:
    """Measures in total, by language and by repository, ordered by bytes from the most to the least."""
    found: dict[str, Any] = {"total": _measured(sums.sum(axis=0))}
    for part, name in enumerate(PARTS[: len(labels[0])]):
        added: dict[str, np.ndarray] = {}
        for label, its_sums in zip(labels, sums, strict=False):
            added[label[part]] = added.get(label[part], 0) + its_sums
        ordered = sorted(added.items(), key=lambda item: -item[1][2])
        found[name] = {label: _measured(its_sums) for label, its_sums in ordered if its_sums[1]}
    return found


def _measured(sums: np.ndarray) -> dict[str, float]:
    return {**measures(sums), "tokens": int(sums[1]), "bytes": int(sums[2])}


class TokenCounter:
    """Encode texts, and count their bytes and their tokens with and without the whitespace tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._cores = [tokenizer.backend_tokenizer, without_whitespace_tokens(tokenizer)]
        self._literal = bool(fim_tokens(tokenizer))  # as `tokenizer.encoder`, which training uses
        self._tokens = [0, 0]
        self._bytes = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids, plain = (encode_texts(core, texts, self._literal) for core in self._cores)
        for index, each in enumerate((ids, plain)):
            self._tokens[index] += sum(map(len, each))
        self._bytes += sum(len(text.encode()) for text in texts)
        return ids

    def tokens_per_byte(self) -> dict[str, float]:
        names = ("tokens_per_byte", "tokens_per_byte_without_whitespace_tokens")
        return {name: tokens / self._bytes for name, tokens in zip(names, self._tokens, strict=True)}


MAX_ROWS = 30  # of a printed table; `out` has all rows
HEADER = ["", "bits per byte", "loss", "perplexity", "tokens", "bytes"]


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the title, header and rows of each printed table: totals by model, then languages and repositories."""
    header = ["model", *HEADER[1:], "tokens per byte", "without whitespace tokens"]
    totals = [
        [name, *_cells(each["total"]), *(f"{each[key]:.4f}" for key in each if key.startswith("tokens_per_byte"))]
        for name, each in results.items()
    ]
    yield "total", header, totals
    for part in [name for name in PARTS if all(name in each for each in results.values())]:
        labels = dict.fromkeys(label for each in results.values() for label in each[part])
        rows = [
            [f"{label}, {name}" if len(results) > 1 else label, *_cells(each[part][label])]
            for label in labels
            for name, each in results.items()
            if label in each[part]
        ]
        yield part, HEADER, rows[:MAX_ROWS]


def _cells(measured: dict[str, float]) -> list[str]:
    numbers = [f"{measured[name]:.4f}" for name in ("bits_per_byte", "loss")]
    return [*numbers, f"{measured['perplexity']:.2f}", f"{measured['tokens']:,}", f"{measured['bytes']:,}"]
