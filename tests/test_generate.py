"""Completions: batching does not change them, they end at the stop, and streaming gives the returned text."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.models import CODE, base_folder, gpt_neo, small_bpe
from transformers import GPTNeoForCausalLM, PreTrainedTokenizerFast

from clippy_train.cli import main
from clippy_train.config import GenerateConfig
from clippy_train.errors import ConfigError
from clippy_train.files import LFS_POINTER
from clippy_train.generate import generate, interact, read_prompt
from clippy_train.model.sample import (
    Sampling,
    complete_prompts,
    generate_tokens,
    never_stop,
    stop_at_function_end,
    stop_at_sequences,
)

PROMPTS = ["def greet(name):\n", "x", "class Stack:\n\tdef __init__(self):\n"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_bpe()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> GPTNeoForCausalLM:
    model = gpt_neo(vocab_size=len(tokenizer))
    model.eval()
    return model


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("model"), tokenizer)


def test_a_batch_is_completed_like_each_prompt_alone_without_a_cache(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = complete_prompts(model, tokenizer, PROMPTS, Sampling(max_new_tokens=12))
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = generate_tokens(model, ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)
        assert completion == tokenizer.decode(out[0][ids.size(1) :], skip_special_tokens=True)


def test_the_seed_determines_the_samples(model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    def sampled(seed: int) -> list[str]:
        return complete_prompts(model, tokenizer, ["x"] * 4, Sampling(8, temperature=1.0, seed=seed))

    assert sampled(1) == sampled(1) != sampled(2)
    assert len(set(sampled(1))) > 1


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return x\n\n\nprint(1)\n", "    return x\n\n\n"),
        ("    return x\n# done\n", "    return x\n"),
        ("    return x\n", None),
        ("def f(\n    a,\n):\n    return a\nx", "def f(\n    a,\n):\n    return a\n"),
        ("    return 1;\n}\nint main", "    return 1;\n}\n"),
        ("    return 1;\n}", None),
        (" + 1\n\t\treturn\r\n\tx\nclass", " + 1\n\t\treturn\r\n\tx\n"),
    ],
)
def test_a_function_ends_at_the_next_text_in_column_0(text: str, kept: str | None) -> None:
    end = stop_at_function_end(text)
    assert (None if end is None else text[:end]) == kept


@given(st.text("ab\n}x "))
def test_text_after_the_end_of_a_function_does_not_move_the_end(text: str) -> None:
    ends = [stop_at_function_end(text[:length]) for length in range(len(text) + 1)]
    found = [end for end in ends if end is not None]
    assert len(set(found)) <= 1
    assert all(end >= ends.index(end) - 1 for end in found)  # text that has been let pass is never cut
    assert ends == [None] * (len(ends) - len(found)) + found


def test_a_completion_ends_at_the_first_stop_sequence_and_no_tokens_are_wasted(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    free = complete_prompts(model, tokenizer, ["x"], Sampling(40))[0]
    stop = free[10:12]
    assert (
        complete_prompts(model, tokenizer, ["x"], Sampling(40), stop_at_sequences([stop, "nowhere"]))[0]
        == free[: free.index(stop)]
    )
    assert stop_at_sequences([])(free) is None
    steps: list[str] = []

    def counted(text: str) -> int | None:
        steps.append(text)
        return stop_at_sequences([stop])(text)

    complete_prompts(model, tokenizer, ["x"], Sampling(40), counted)
    assert len(steps) < 40


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_the_streamed_text_is_the_returned_text(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    pieces: list[str] = []
    sampling = Sampling(24, temperature=2.0, seed=seed)
    stop = stop_at_function_end if seed % 2 else never_stop
    texts = complete_prompts(model, tokenizer, [CODE[0]], sampling, stop, pieces.append)
    assert "".join(pieces) == texts[0]


def test_every_token_is_decoded_once(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = PreTrainedTokenizerFast.decode

    def counted(self: PreTrainedTokenizerFast, ids: list[int], **settings: bool) -> object:
        decoded.append(len(ids))
        return decode(self, ids, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", counted)
    complete_prompts(model, tokenizer, ["x", "y"], Sampling(20), stop_at_sequences(["nowhere"]))
    assert sum(decoded) <= 2 * 20  # the results; a stream has decoded the same tokens for the stop


@pytest.mark.slow
def test_a_long_prompt_is_cut_on_the_left(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = model.config.max_position_embeddings - 5
    prompt = "x = 1\n" * model.config.max_position_embeddings
    ids = tokenizer(prompt)["input_ids"]
    used = str(tokenizer.decode(ids[-room:]))
    assert tokenizer(used)["input_ids"] == ids[-room:]
    cut, whole = (complete_prompts(model, tokenizer, [each, "y"], Sampling(5))[0] for each in (prompt, used))
    assert cut == whole
    assert main(["generate", f"model={folder}", f"prompt={prompt}", "max_new_tokens=5"]) == 0
    assert f"the first {len(ids) - room} tokens of the prompt are not used" in capsys.readouterr().err
    assert main(["generate", f"model={folder}", "prompt=x", f"max_new_tokens={room + 5}"]) == 2
    assert f"max_new_tokens={room + 5}: this model has room for {room + 4}" in capsys.readouterr().err


def test_the_line_ends_of_a_file_are_kept(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"def f():\r\n\tpass\r\n")
    assert read_prompt(GenerateConfig(model="m", file=str(tmp_path / "prompt"))) == "def f():\r\n\tpass\r\n"


def test_several_greedy_completions_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"model={folder}", "prompt=x", "num_samples=2"]) == 2
    assert "num_samples=2: greedy completions are all the same" in capsys.readouterr().err
    assert main(["generate", f"model={folder}", "prompt=x", "temperature=1e-40"]) == 2
    assert "temperature=1e-40: must be 0 (greedy) or at least 0.001" in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_come_from_a_text_a_file_or_standard_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text(PROMPTS[0])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPTS[0].encode())))
    shown = []
    for source in (f"prompt={PROMPTS[0]}", f"file={tmp_path / 'prompt'}", "prompt=-"):
        assert main(["generate", f"model={folder}", source, "max_new_tokens=5"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith(PROMPTS[0])
    assert shown[0] == shown[1] == shown[2]


def test_several_samples_are_numbered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"model={folder}", "prompt=x", "num_samples=2", "temperature=1", "max_new_tokens=4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("# 1 of 2\nx") == shown.count("# 2 of 2\nx") == 1


@pytest.mark.parametrize("arguments", [[], ["prompt=x", "file=y"], ["file=none"], ["prompt=x", "--interactive"]])
def test_a_missing_or_a_second_prompt_is_refused(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"model={folder}", *arguments]) == 2
    assert "prompt" in capsys.readouterr().err or arguments == ["file=none"]


def test_bytes_that_are_not_text_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"model={folder}", "prompt=a\udcff"]) == 2
    assert "prompt is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("pointer", [False, True])
def test_weights_that_are_not_all_there_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, pointer: bool
) -> None:
    copy = shutil.copytree(folder, tmp_path / "cut")
    weights = copy / "model.safetensors"
    torch.save(load_file(weights), copy / "pytorch_model.bin")
    if name != weights.name:
        weights.unlink()
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(LFS_POINTER + b"v1" if pointer else content[: len(content) // 2])
    assert main(["generate", f"model={copy}", "prompt=x"]) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert f"no model could be loaded from {copy}: " in said
    assert (f"{name} is only a pointer of Git LFS" if pointer else "is incomplete or damaged: ") in said


def test_interactive_prompts_are_completed_one_after_another(folder: Path) -> None:
    config = GenerateConfig(model=str(folder), max_new_tokens=6)
    bad = "a\udcff"
    out = io.StringIO()
    interact(config, io.StringIO(f"{PROMPTS[0]}\n\n{bad}\n\nx\n"), out)
    for prompt in (PROMPTS[0], "x\n"):
        assert prompt + generate(config, prompt)[0] in out.getvalue()
    assert "prompt is not UTF-8" in out.getvalue()  # one is refused, and the loop continues
