"""Grow the embedding for new tokens. The head is tied to it, so only one matrix changes.

Promises: every row that was trained stays bit-equal and the head stays tied. The original overwrote the end-of-text row
and left its last new rows random.
"""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clippy_train.errors import ConfigError


@torch.no_grad()
def grow_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pieces: dict[str, list[int]], rows: range, init: str
) -> None:
    """Grow the embedding so that it has `rows`, and initialise those of them that are new or were padding, in place.

    Any other row is never written, even if its token is new to the tokenizer: a released model loaded with the base
    tokenizer keeps the rows that it has learnt.

    Args:
        pieces: for each new token, the ids that its text had before it was added.
        rows: of the tokens that the tokenizer lacked, including tokens that are never produced.
        init: `tab` copies the row of the tab character; `mean_of_pieces` averages the rows of the former ids.

    Raises:
        ConfigError: `init` is `tab` and the tokenizer has no token for a single tab.
    """
    old_rows = embedding_weight(model).shape[0]
    if rows.stop > old_rows:
        model.resize_token_embeddings(rows.stop, mean_resizing=False)
    weight = embedding_weight(model)
    tab = tokenizer("\t", add_special_tokens=False)["input_ids"]
    if init == "tab" and len(tab) != 1:
        raise ConfigError("new_row_init=tab: the tokenizer has no token for a single tab; use mean_of_pieces")

    vocabulary = tokenizer.get_vocab()
    new_ids = {vocabulary[token]: ids for token, ids in pieces.items()}
    rows = range(min(rows.start, old_rows), rows.stop)  # the tokenizer may have tokens that the model lacks
    for row in [row for row in rows if row >= old_rows or is_padding(weight[:old_rows], row)]:
        weight[row] = weight[tab[0]] if init == "tab" or row not in new_ids else weight[new_ids[row]].mean(dim=0)


def is_padding(weight: Tensor, row: int) -> bool:
    """Whether a row is zero or equal to another one, as no trained row is. Random padding passes for trained."""
    return not weight[row].any() or int((weight == weight[row]).all(dim=1).sum()) > 1


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight, `[rows, hidden]`."""
    return cast(Tensor, model.get_input_embeddings().weight)
