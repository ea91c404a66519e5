"""What the order of the training data depends on. Apart from the loaders: a launcher needs it without torch."""

from collections.abc import Sequence
from typing import Any

from clippy_train.config import TrainConfig
from clippy_train.data.mixture import Source, fingerprint
from clippy_train.shards.filters import recorded_rules


def data_identity(config: TrainConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything that the order of the data depends on: a run can only be resumed while it stays the same.

    Of a mixture, that is neither the name of a source nor its place, and of its weight only the streams that it has.
    """
    data = config.data
    return {
        "corpus fingerprint": fingerprint(sources),
        "seed": config.seed,
        "data.streams": data.streams,
        "data.seq_len": data.seq_len,
        "data.window": data.window,
        "data.text_column": data.text_column,
        "data.prompt_column": data.prompt_column,
        "data.truncate": data.truncate,
        "data.packing": data.packing,
        "data.filter": recorded_rules(data.filter),
        "data.eos_between_documents": data.eos_between_documents,
        "data.fim_rate": data.fim_rate,
        "data.fim_spm_rate": data.fim_spm_rate,
        "data.fim_characters": data.fim_characters,
        "tokenizer.whitespace_tokens": config.tokenizer.whitespace_tokens,
        "tokenizer.matching": config.tokenizer.matching,
        "tokenizer.fim_tokens": config.tokenizer.fim_tokens,
        "trainer.global_batch_size": config.trainer.global_batch_size,
        **{
            f"{section} {name}": value
            for section, source in zip(data.corpora, sources if data.sources else [], strict=False)
            for name, value in _source_identity(source).items()
        },
    }


def _source_identity(source: Source) -> dict[str, Any]:
    return {
        "streams": len(source.streams),
        "fingerprint": source.corpus.fingerprint,
        "text_column": source.settings.text_column,
        "filter": recorded_rules(source.settings.filter),
    }


def identity_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in two results of `data_identity`. One from before a setting existed has its default."""
    default = data_identity(TrainConfig(), [])
    filters = {**default["data.filter"], **then.get("data.filter", {})}
    then = {**default, **then, "data.filter": filters}
    sources = [name for name in then if name.startswith("data.sources") and name not in now]
    names = [*now, *sources]
    return [f"{name} was {then.get(name)}, is {now.get(name)}" for name in names if then.get(name) != now.get(name)]
