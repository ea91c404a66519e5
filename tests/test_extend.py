"""Extending a model adds rows for the new tokens and keeps everything else bit-equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import WHITESPACE_TOKENS, base_folder, gpt2_bpe, gpt_neo, small_bpe
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from clippy_train.config import ExtendConfig, TokenizerConfig
from clippy_train.errors import ConfigError
from clippy_train.hf.extend import extend_folder
from clippy_train.model.build import extend_model
from clippy_train.model.embeddings import embedding_weight
from clippy_train.model.load import generation_config
from clippy_train.tokenizer import END_OF_TEXT, add_whitespace_tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-Neo folder with 330 tokens, end-of-text last; do not write to it."""
    return base_folder(tmp_path_factory.mktemp("base"), small_bpe())


def settings(matching: str = "longest", new_row_init: str = "tab", tokens: list[str] | None = None) -> TokenizerConfig:
    return TokenizerConfig(
        whitespace_tokens=WHITESPACE_TOKENS if tokens is None else tokens, matching=matching, new_row_init=new_row_init
    )


def extended(**choices: Any) -> tuple[GPTNeoForCausalLM, PreTrainedTokenizerFast, Tensor]:
    """An extended model, its tokenizer and its embedding before the extension."""
    tokenizer = small_bpe()
    model = gpt_neo(vocab_size=len(tokenizer))
    before = embedding(model).clone()
    extend_model(model, tokenizer, settings(**choices))
    return model, tokenizer, before


def embedding(model: PreTrainedModel) -> Tensor:
    return embedding_weight(model).detach()


def is_tied(model: PreTrainedModel) -> bool:
    assert isinstance(model, GPTNeoForCausalLM)
    return model.lm_head.weight is model.transformer.wte.weight


def first_pieces() -> dict[str, list[int]]:
    """The ids of each whitespace text in a tokenizer without whitespace tokens."""
    return add_whitespace_tokens(small_bpe(), WHITESPACE_TOKENS, "longest")


@pytest.mark.parametrize("matching", ["longest", "first_listed"])
@pytest.mark.parametrize("new_row_init", ["tab", "mean_of_pieces"])
def test_every_old_row_stays_bit_equal(matching: str, new_row_init: str) -> None:
    model, tokenizer, before = extended(matching=matching, new_row_init=new_row_init)
    assert torch.equal(embedding(model)[:330], before)
    assert tokenizer.eos_token_id == 329  # the row that the original overwrote


def test_nothing_but_the_embedding_changes() -> None:
    model, tokenizer = gpt_neo(vocab_size=330), small_bpe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extend_model(model, tokenizer, settings())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"transformer.wte.weight", "lm_head.weight"}


def test_new_rows_are_copies_of_the_tab_row() -> None:
    model, tokenizer, before = extended(new_row_init="tab")
    tab = tokenizer.convert_tokens_to_ids("ĉ")
    assert torch.equal(embedding(model)[330:], before[tab].expand(4, -1))


def test_new_rows_are_the_mean_of_the_former_pieces() -> None:
    model, _, before = extended(new_row_init="mean_of_pieces")
    means = [before[first_pieces()[token]].mean(dim=0) for token in WHITESPACE_TOKENS]
    assert torch.equal(embedding(model)[330:], torch.stack(means))


def test_the_mean_is_over_several_different_pieces() -> None:
    model, _, before = extended(new_row_init="mean_of_pieces", tokens=["\t\n", " \t"])
    vocabulary = small_bpe().get_vocab()
    newline, tab, space = (vocabulary[token] for token in ["Ċ", "ĉ", "Ġ"])
    torch.testing.assert_close(embedding(model)[330], (before[tab] + before[newline]) / 2)
    torch.testing.assert_close(embedding(model)[331], (before[tab] + before[space]) / 2)


def test_the_head_stays_tied() -> None:
    model, _, _ = extended()
    assert is_tied(model)
    assert model.lm_head.out_features == model.config.vocab_size == 334


def test_extending_twice_changes_nothing() -> None:
    for matching in ("longest", "first_listed"):
        model, tokenizer, _ = extended(matching=matching)
        with torch.no_grad():
            embedding(model).add_(1)  # as if trained since
        before, vocabulary = embedding(model).clone(), tokenizer.get_vocab()
        extend_model(model, tokenizer, settings(matching=matching))
        assert torch.equal(embedding(model), before)
        assert tokenizer.get_vocab() == vocabulary


def test_ids_of_tokens_that_are_never_produced_stay_reserved() -> None:
    model, tokenizer, before = extended(matching="first_listed")
    assert len(tokenizer) == 332
    assert torch.equal(embedding(model)[330:], before[tokenizer.convert_tokens_to_ids("ĉ")].expand(4, -1))
    assert model.config.vocab_size == 334


def test_first_listed_on_an_extended_model_keeps_its_rows() -> None:
    model, tokenizer, _ = extended(matching="longest")
    with torch.no_grad():
        embedding(model).add_(1)  # as if trained since
    before = embedding(model).clone()
    extend_model(model, tokenizer, settings(matching="first_listed"))
    assert torch.equal(embedding(model), before)
    assert model.config.vocab_size == 334


@pytest.mark.parametrize("rows", [334, 340], ids=["extended", "padded"])
def test_existing_rows_are_kept_when_the_tokenizer_lacks_their_tokens(rows: int) -> None:
    model, tokenizer = gpt_neo(vocab_size=rows), small_bpe()
    before = embedding(model).clone()
    extend_model(model, tokenizer, settings())
    assert len(tokenizer) == 334
    assert torch.equal(embedding(model), before)


def test_end_of_text_is_named_in_both_configurations() -> None:
    model, tokenizer, _ = extended()
    for each in (model.config, generation_config(model)):
        assert each.eos_token_id == each.bos_token_id == tokenizer.eos_token_id == 329


def test_without_a_token_for_one_tab_its_row_cannot_be_copied() -> None:
    letters = Tokenizer(models.BPE(vocab={"a": 0, END_OF_TEXT: 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END_OF_TEXT)
    with pytest.raises(ConfigError, match="mean_of_pieces"):
        extend_model(gpt_neo(vocab_size=2), tokenizer, settings(tokens=["aa"], new_row_init="tab"))


def test_the_extended_folder_loads_in_plain_transformers(base: Path, tmp_path: Path) -> None:
    old = embedding(AutoModelForCausalLM.from_pretrained(base))
    summary = extend_folder(ExtendConfig(base=str(base), out=str(tmp_path / "out")))
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # all can be read by the same users
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert summary.endswith("330 tokens plus 4 new ones")
    assert is_tied(model)
    assert embedding(model).shape == (334, 32)
    assert torch.equal(embedding(model)[:330], old)
    assert model.config.eos_token_id == generation_config(model).eos_token_id == tokenizer.eos_token_id == 329
    assert tokenizer.decode(tokenizer("\tif x:\r\n        y")["input_ids"]) == "\tif x:\r\n        y"
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json"] * 4 + [".safetensors"]


def test_extending_an_extended_folder_gives_the_same_weights(base: Path, tmp_path: Path) -> None:
    extend_folder(ExtendConfig(base=str(base), out=str(tmp_path / "once")))
    extend_folder(ExtendConfig(base=str(tmp_path / "once"), out=str(tmp_path / "twice")))
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_folder_that_is_not_empty_is_never_written_to(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        extend_folder(ExtendConfig(base=str(base), out=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_tokens_that_the_tokenizer_has_and_the_model_lacks_get_rows_too() -> None:
    tokenizer = small_bpe()
    model = gpt_neo(vocab_size=len(tokenizer))
    add_whitespace_tokens(tokenizer, WHITESPACE_TOKENS, "longest")
    extend_model(model, tokenizer, settings())
    (tab,) = tokenizer("\t")["input_ids"]
    assert torch.equal(embedding(model)[330:], embedding(model)[[tab] * 4])


@pytest.mark.parametrize("padding", [0.0, 0.02])
def test_rows_that_were_padding_are_initialised_and_rows_that_were_learnt_are_kept(padding: float) -> None:
    tokenizer = small_bpe()
    model = gpt_neo(vocab_size=len(tokenizer) + 6)
    learnt = embedding(model).clone()
    embedding(model)[332:] = padding
    extend_model(model, tokenizer, settings())
    (tab,) = tokenizer("\t")["input_ids"]
    assert torch.equal(embedding(model)[:332], learnt[:332])  # two of them are of new tokens
    assert torch.equal(embedding(model)[332:334], learnt[[tab, tab]])
    assert torch.equal(embedding(model)[334:], torch.full((2, 32), padding))  # of no token


def test_a_base_that_does_not_exist_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model could be loaded from .*nothing: no such folder"):
        extend_folder(ExtendConfig(base=str(tmp_path / "nothing"), out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_loading_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    config = ExtendConfig(base=str(base), out=str(tmp_path / "out"), whitespace_tokens=["  ", ""])
    with pytest.raises(ConfigError, match="empty token"):
        extend_folder(config)
    assert list(tmp_path.iterdir()) == []


def test_the_snippet_of_the_model_card_runs_on_the_real_vocabulary(tmp_path: Path) -> None:
    source = base_folder(tmp_path / "gpt-neo", gpt2_bpe(), hidden=8, heads=2)
    extend_folder(ExtendConfig(base=str(source), out=str(tmp_path / "code-clippy")))

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "code-clippy")  # generate's types reject it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "code-clippy")
    prompt = """def greet(name):
  '''A function to greet user. Given a user name it should say hello'''
"""
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = input_ids.size(1)
    out = model.generate(
        input_ids,
        do_sample=True,
        max_length=50,
        num_beams=2,
        early_stopping=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    completion = tokenizer.decode(out[0][start:])

    assert model.config.vocab_size == len(tokenizer) == 50261
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.decode(out[0][:start]) == prompt
    assert start < out.size(1) <= 50
    assert completion
