"""Grow the embedding for new tokens. The head is tied to it, so one matrix is touched.

Promises: every old row stays bit-equal and the head stays tied. The original overwrote the end-of-text row and left its
last new rows random.
"""

from typing import Any

import torch

from clippy_train.errors import ConfigError


@torch.no_grad()
def grow_embeddings(model: Any, tokenizer: Any, pieces: dict[str, list[int]], num_rows: int, init: str) -> None:
    """Give `model` at least `num_rows` embedding rows and initialise those that it did not have, in place.

    A row that the model already has is never written, even where the tokenizer is only now given the token for it:
    a released model with the base tokenizer keeps what it has learnt.

    Args:
        pieces: for each new token, the ids that its text had before it was added.
        num_rows: rows that the extended vocabulary needs, rows of tokens that are never produced included.
        init: `tab` copies the row of the tab character; `mean_of_pieces` averages the rows of the former ids.

    Raises:
        ConfigError: `init` is `tab` and the tokenizer has no token for one tab.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    if num_rows > old_rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    tab = tokenizer("\t", add_special_tokens=False)["input_ids"]
    if init == "tab" and len(tab) != 1:
        raise ConfigError("new_row_init=tab: the tokenizer has no token for a single tab; use mean_of_pieces")

    new_ids = {tokenizer.convert_tokens_to_ids(token): ids for token, ids in pieces.items()}
    for row in range(old_rows, num_rows):
        weight[row] = weight[tab[0]] if init == "tab" or row not in new_ids else weight[new_ids[row]].mean(dim=0)
