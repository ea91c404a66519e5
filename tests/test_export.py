"""A run is exported, evaluated, described and published; only a verified folder of this run is published."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from support import hub_server
from support.runs import Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from clippy_train.cli import main
from clippy_train.config import FilterConfig, TrainConfig, load
from clippy_train.data.mixture import corpus_name
from clippy_train.errors import ConfigError
from clippy_train.evaluate.results import weights_hash
from clippy_train.hf.card import BEGIN, END, hub_name, keep_edits, public_settings, settings_by_step
from clippy_train.hf.sections import (
    corpus_section,
    evaluation_section,
    evenly,
    headline_metrics,
    measured_on,
    public_command,
    sampling_of,
)
from clippy_train.run.checkpoint import (
    find_best,
    read_checkpoint,
)
from clippy_train.run.folder import checkpoint_folders
from clippy_train.run.history import Phase

TOKEN = "hf_good"


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three problems with reference solutions, in two languages."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [
        {
            "task_id": f"{kind}/{number}",
            "prompt": f"def f_{number}(x):\n",
            "canonical_solution": "    return x\n" * size,
        }
        for number, (kind, size) in enumerate([("Python", 1), ("CPP", 9), ("HumanEval", 3)])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_tokenizer: Path, problems: Path) -> Runs:
    """One finished run in fp32 in one process, whose first validation is its best."""
    runs = Runs(tmp_path_factory.mktemp("export"), tiny_corpus, tiny_tokenizer)
    settings = [
        "strategy=single",
        "trainer.devices=1",
        "trainer.precision=fp32",
        "trainer.max_steps=4",
        "model.max_position_embeddings=128",
    ]
    steps = [
        "trainer.val_every_steps=2",
        "checkpoint.keep_last=4",
        "optim.warmup_steps=1",
        "model.max_position_embeddings=128",
    ]
    runs.train("run", *settings, *steps, f"data.val_problems={problems}")
    return runs


@pytest.fixture(scope="module")
def exported(runs: Runs) -> Path:
    out = runs.root / "exported"
    assert main(["export", f"run={runs.folder('run')}", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def evaluation(runs: Runs, exported: Path) -> Path:
    """The results file of an evaluation on the run's validation blocks."""
    config, out = load(runs.folder("run") / "config.yaml"), runs.root / "results.json"
    assert main([
        "evaluate", "task=perplexity", f"model={exported}", f"data.path={config.data.path}", f"out={out}",
        f"seq_len={config.data.seq_len}", f"max_rows={config.trainer.val_samples}",
    ]) == 0  # fmt: skip
    return out


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_an_evaluation_equals_the_validation_of_the_same_weights_on_the_same_blocks(
    runs: Runs, exported: Path, evaluation: Path
) -> None:
    last = runs.rows("run", "val/loss")[-1]
    found = json.loads(evaluation.read_text())["results"][str(exported)]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found["total"][name] == pytest.approx(last[f"val/{name}"], rel=1e-6)
    assert found["languages"]["Python"]["loss"] == pytest.approx(last["val/loss/Python"], rel=1e-6)
    assert found["languages"]["Python"]["bits_per_byte"] == pytest.approx(last["val/bits_per_byte/Python"], rel=1e-6)


def test_solutions_during_training_are_scored_as_by_an_evaluation(
    runs: Runs, exported: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "solutions.json"
    arguments = [
        f"model={exported}",
        f"problems={problems}",
        f"seq_len={load(runs.folder('run') / 'config.yaml').data.seq_len}",
    ]
    assert main(["evaluate", "task=perplexity", f"out={out}", *arguments]) == 0
    found, last = json.loads(out.read_text())["results"][str(exported)], runs.rows("run", "val/loss")[-1]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found["total"][name] == pytest.approx(last[f"val/solutions/{name}"], rel=1e-6)
    for language in ("Python", "C++"):
        expected = last[f"val/solutions/bits_per_byte/{language}"]
        assert found["languages"][language]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert last["val/loss"] != last["val/solutions/loss"]


def test_the_files_can_be_read_by_transformers_4(exported: Path) -> None:
    described = json.loads((exported / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] in ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
    assert {path.suffix for path in exported.iterdir()} == {".md", ".json", ".safetensors", ".png"}
    generation, tokenizer = GenerationConfig.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    end = tokenizer.eos_token_id
    assert tokenizer.decode([end]) == "<|endoftext|>"
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (end, end, end)


def test_batches_of_prompts_are_padded_and_cut_on_the_left(exported: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    prompts = ["def greet(name):\n", "x"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    alone = [generate(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    together = [each[0]["generated_text"] for each in generate(prompts, batch_size=2, **settings)]
    assert together == alone
    assert (tokenizer.pad_token, tokenizer.padding_side) == (tokenizer.eos_token, "left")
    cut = tokenizer("a = 1\nb = 2\n", truncation=True, max_length=4)["input_ids"]
    assert cut == tokenizer("a = 1\nb = 2\n")["input_ids"][-4:]


def test_the_best_step_and_bf16_weights_are_exported(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.folder("run")
    assert main(["export", f"run={folder}", f"out={tmp_path / 'best'}", "step=best", "dtype=bf16"]) == 0
    best = find_best(folder)
    assert best
    assert f"step {read_checkpoint(best).manifest.step} of" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype="auto").dtype == torch.bfloat16
    steps = [read_checkpoint(path).manifest.step for path in checkpoint_folders(folder)]
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"step={max(steps) + 1}"]) == 4
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", "step=first"]) == 2
    assert "step=first" in capsys.readouterr().err


def test_the_card_states_the_facts_of_the_run_and_of_the_evaluation(
    runs: Runs, evaluation: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "out", runs.folder("run")
    assert main(["export", f"run={folder}", f"out={out}", f"evaluations=[{evaluation}]"]) == 0
    head, text = card(out)
    results = json.loads(evaluation.read_text())
    (measured,) = results["results"].values()
    (index,) = head["model-index"]
    (on_the_corpus,) = index["results"]
    assert (on_the_corpus["dataset"]["name"], on_the_corpus["dataset"]["split"]) == ("tiny", "validation")
    assert [each["value"] for each in on_the_corpus["metrics"]] == [round(measured["total"]["bits_per_byte"], 4)]
    manifest = read_checkpoint(checkpoint_folders(folder)[0]).manifest
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    complete = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: settings[name] for name in ("seed", "optim", "trainer")} == {
        name: complete[name] for name in ("seed", "optim", "trainer")
    }
    model = AutoModelForCausalLM.from_pretrained(out)
    for fact in (
        f"| parameters | {model.num_parameters():,} |", "2 tabs, 2 spaces, 4 spaces, 8 spaces",
        f"{manifest.tokens:,}", manifest.data["corpus fingerprint"], "Python",
        "clippy evaluate task=perplexity model=out data.path=tiny seq_len=32 max_rows=6",
        f"{measured['total']['bits_per_byte']:.4f}", torch.__version__, "![curves](curves.png)",
    ):  # fmt: skip
        assert str(fact) in text
    with Image.open(out / "curves.png") as image:
        assert image.format == "PNG"
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours
    assert len(colours) > 4  # something was drawn


def test_the_snippet_of_the_card_runs_unchanged(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = card(exported)
    monkeypatch.chdir(exported.parent)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})  # type: ignore[index]
    assert capsys.readouterr().out.startswith("def greet(name):\n")


def test_results_of_other_weights_are_refused(
    runs: Runs, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.folder("run")
    for arguments in (["step=2"], ["dtype=bf16"]):
        assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"evaluations={evaluation}", *arguments]) == 2
        assert "was not run on these weights" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["export", f"run={folder}", f"out={tmp_path / 'x'}", f"evaluations={tmp_path / 'other.json'}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_the_card_names_no_folder_and_no_machine(
    runs: Runs, exported: Path, evaluation: Path, tiny_corpus: Path, problems: Path, tmp_path: Path
) -> None:
    solved = tmp_path / "pass.json"
    sampling = {"n": 20, "temperature": 0.2, "top_p": 0.95, "problems": "164 of 164"}
    samples = {**sampling, "seed": 1, "stop": ["\n#"]}
    command = f"clippy evaluate task=humaneval problems={tmp_path}/HumanEval.jsonl.gz samples={tmp_path}/s.jsonl"
    about = {"task": "humaneval", "command": command, "models": {"m": weights_hash(exported)}, "samples": samples}
    solved.write_text(json.dumps({"pass@1": 0.0378, "about": about}))
    out, folder = tmp_path / "out", runs.folder("run")
    assert main(["export", f"run={folder}", f"out={out}", f"evaluations=[{evaluation},{solved}]"]) == 0
    head, text = card(out)
    whole = (out / "README.md").read_text()
    assert str(tmp_path) not in whole
    assert not [folder for folder in (runs.root, tiny_corpus, runs.tokenizer, problems) if str(folder) in whole]
    assert (
        not {"launcher", "logger", "sweep", "run", "resume"}
        & yaml.safe_load(text.split("```yaml")[1].split("```")[0]).keys()
    )
    assert "| HumanEval | pass@1 | 3.78 % | 20 | 0.2 | 0.95 | 164 of 164 |" in text
    assert head["model-index"][0]["results"][1]["metrics"] == [{"type": "pass@1", "value": 0.0378, "args": sampling}]
    assert ModelCard.load(out / "README.md").data.eval_results  # huggingface_hub reads the index back
    assert "base_model" not in head


def test_the_card_describes_the_corpus_by_its_manifest(runs: Runs, exported: Path, tiny_corpus: Path) -> None:
    _, text = card(exported)
    manifest = json.loads((tiny_corpus / "manifest.json").read_text())
    for split, counts in manifest["splits"].items():
        size = counts["text_bytes"] / 1e6
        assert f"| {split} | {counts['documents']:,} | {size:,.2f} | {manifest['repositories'][split]} |" in text
    assert f"| unknown | {manifest['documents']:,} |" in text  # of a licence
    assert "`filter.min_bytes=64`, `filter.max_bytes=1000000`, `dedup.exact=True`" in text
    assert corpus_section("tiny", {}, FilterConfig()).startswith("`tiny` has no record")
    many = {**manifest, "languages": {f"L{n}": {"documents": 1, "text_bytes": 2_000_000} for n in range(25)}}
    assert "| L19 | 1 | 2.00 |\n| 5 others | 5 | 10.00 |" in corpus_section("tiny", many, FilterConfig())


def test_the_card_says_what_the_corpus_was_checked_against(tiny_corpus: Path) -> None:
    manifest = json.loads((tiny_corpus / "manifest.json").read_text())
    plain = corpus_section("tiny", manifest, FilterConfig())
    assert "not checked against any benchmark" in plain
    assert "Secrets and personal data were not replaced" in plain
    rules = {**manifest["settings"]["filter"], "decontaminate": ["HumanEval.jsonl.gz@0123456789ab"], "redact": ["keys"]}
    clean = {**manifest, "settings": {**manifest["settings"], "filter": rules}, "redacted": {"keys": 1234}}
    text = corpus_section("tiny", clean, FilterConfig(decontaminate=["/mine/MBPP.jsonl"], redact=["ips"]))
    assert "hold a problem of `HumanEval.jsonl.gz`, `MBPP.jsonl` were left out" in text
    assert "Placeholders replace keys (1,234), ips," in text
    assert "/mine" not in text


def test_the_settings_on_the_card_name_the_files_of_rules_without_folders(
    train_config: Callable[..., TrainConfig],
) -> None:
    rules = ("decontaminate=[/mine/MBPP.jsonl]", "opt_out=/mine/out.txt")
    text = public_settings(train_config(*(f"data.filter.{rule}" for rule in rules)))
    assert "- MBPP.jsonl\n" in text
    assert "opt_out: out.txt\n" in text
    assert "/mine" not in text


def test_the_card_shows_solutions_and_next_lines_by_language() -> None:
    def evaluated(task: str, arguments: str, parts: dict[str, Any]) -> dict[str, Any]:
        about = {"task": task, "command": f"clippy evaluate task={task} model=/m {arguments}", "model": "/m"}
        return {"about": about, "results": {"/m": {"total": parts, "languages": {"Go": parts}}}}

    lines = {"exact_match": 0.125, "edit_similarity": 0.5, "lines": 1000}
    bits = {"bits_per_byte": 1.5, "loss": 2.0, "perplexity": 7.39, "bytes": 4321}
    evaluations = [
        evaluated("completion", "data.path=/d/corpus split=test", lines),
        evaluated("perplexity", "problems=/d/HumanEval.jsonl.gz", bits),
    ]
    text = evaluation_section(evaluations, "me/model")
    assert "| corpus, test | exact match | edit similarity | lines |\n|---|---|---|---|\n| total | 12.50 % |" in text
    assert "| Go | 12.50 % | 50.00 % | 1,000 |" in text
    assert "| HumanEval, solutions | bits per byte | loss | perplexity | bytes |" in text
    assert "| Go | 1.5000 | 2.0000 | 7.39 | 4,321 |" in text
    assert "clippy evaluate task=perplexity model=me/model problems=HumanEval.jsonl.gz" in text
    filled = evaluated("completion", "data.path=/d/corpus infill=span", lines)
    assert "| corpus, validation, spans filled in | exact match |" in evaluation_section([filled], "me/model")
    assert sampling_of(filled) == {"infill": "span"}
    unread = evaluated("perplexity", "data.path=/d/corpus infill=line", bits)
    assert "| corpus, validation | bits per byte |" in evaluation_section([unread], "me/model")
    assert sampling_of(unread) == {}
    assert headline_metrics(evaluations[0]) == {"exact_match": 0.125, "edit_similarity": 0.5}
    assert measured_on(evaluations[0]) == ("corpus", "test")


def test_a_command_on_the_card_names_no_folder() -> None:
    files = "data.path=mine/corpus samples=mine/s.jsonl problems=/mine/MBPP.jsonl data.hub=me/code"
    rules = "data.filter.opt_out=mine/out.txt 'data.filter.decontaminate=[/mine/a.jsonl,mine/b.jsonl]'"
    shown = public_command(f"clippy evaluate 'model=[mine/model]' {files} {rules} stride=8", "me/model")
    assert "mine" not in shown
    assert shown.startswith("clippy evaluate model=me/model data.path=corpus samples=s.jsonl problems=MBPP.jsonl ")
    assert shown.endswith("=me/code data.filter.opt_out=out.txt 'data.filter.decontaminate=[a.jsonl,b.jsonl]' stride=8")


@pytest.mark.parametrize(
    ("path", "hub", "name"),
    [
        ("/home/me/corpus", None, "corpus"), ("data/{split}/*.parquet", None, "data"), ("s3://a/b/", None, "b"),
        (None, "me/code@v1", "me/code"), (None, "/copies/code", "code"), ("{split}", None, "corpus"),
    ],
)  # fmt: skip
def test_a_corpus_has_a_short_name(path: str | None, hub: str | None, name: str) -> None:
    assert corpus_name(path, hub) == name


def test_long_runs_show_twenty_validations_with_the_first_and_the_last() -> None:
    rows = [{"step": step} for step in range(995)]
    shown = [row["step"] for row in evenly(rows, 20)]
    assert (len(shown), shown[0], shown[-1]) == (20, 0, 994)
    assert shown == sorted(set(shown))
    assert evenly(rows[:20], 20) == rows[:20]


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("EleutherAI/gpt-neo-125m", True), ("me/data@v1", True), ("gpt-neo-extended", False), ("./a/b", False),
        ("/models/neo", False), ("support/runs.py", False), ("s3://a/b", False), (None, False),
    ],
)  # fmt: skip
def test_only_a_name_that_others_find_on_the_hub_is_a_base(
    name: str | None, hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert bool(hub_name(name)) == hub


def test_a_setting_that_changed_is_shown_unless_it_is_about_a_place_or_the_cluster() -> None:
    then = {"optim.lr": 1e-3, "data.path": "/a", "launcher.preflight": True, "checkpoint.keep_last": 2}
    now = {"optim.lr": 1e-4, "data.path": "/b", "launcher.preflight": False, "checkpoint.keep_last": 3}
    text = settings_by_step([Phase(0, then), Phase(5, now)])
    assert "`optim.lr` | 0.001 to step 5, then 0.0001" in text
    assert text.count("to step") == 1


# Publishing


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub


def test_a_verified_folder_is_published_privately(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", f"run={runs.folder('run')}", f"out={out}", "push_to=me/model"]) == 0
    repository = hub.repositories["me/model"]
    assert "POST /api/validate-yaml" in hub.requests
    assert repository["private"]
    assert repository["files"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'from_pretrained("me/model")' in (out / "README.md").read_text()
    assert TOKEN not in "".join(capsys.readouterr()) + "".join(path.read_text() for path in out.glob("*.*[nd]"))


def test_a_second_publication_keeps_what_was_edited_on_the_hub(hub: hub_server.Hub, runs: Runs, tmp_path: Path) -> None:
    push = ["export", f"run={runs.folder('run')}", "push_to=me/model"]
    assert main([*push, f"out={tmp_path / 'first'}", "step=2"]) == 0
    files = hub.repositories["me/model"]["files"]
    first = files["README.md"].decode()
    edited = (
        first.replace("library_name: transformers", "library_name: transformers\nlicense: mit\nwidget: []")
        .replace("# run\n", "# The best model\n")
        .replace("## Intended use", "## Intended use\n\nAsk me first.")
        .replace("| steps | 2 of 4 |", "| steps | many |")
    )
    files["README.md"] = edited.encode()
    assert main([*push, f"out={tmp_path / 'second'}"]) == 0
    head, text = card(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_bytes() == files["README.md"]
    assert (head["license"], head["widget"]) == ("mit", [])
    last = runs.rows("run", "val/loss")[-1]["val/bits_per_byte"]
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(last, 4)
    assert "# The best model\n" in text
    assert "Ask me first." in text
    assert "| steps | 4 of 4 |" in text
    assert main([*push, f"out={tmp_path / 'third'}", "license=Apache-2.0"]) == 0
    assert card(tmp_path / "third")[0]["license"] == "apache-2.0"


def test_a_card_without_marks_gets_the_generated_part_at_its_end(exported: Path) -> None:
    ours = (exported / "README.md").read_text()
    bare = keep_edits(ours, "---\nlicense: mit\n---\n", None)
    assert bare.count("## Limitations") == 1
    assert "license: mit" in bare
    own = keep_edits(ours, "---\nlicense: mit\n---\n# Mine\n", None)
    assert own.index("# Mine") < own.index("## Training data")
    assert keep_edits(ours, own, None) == own
    with pytest.raises(ConfigError, match="cannot be read"):
        keep_edits(ours, "---\na: [\n---\n", None)


OURS = f"---\nlibrary_name: transformers\n---\n# M\n\n{BEGIN}\nfacts\n{END}\n\n## Use\n"


def test_text_behind_a_mark_that_lost_its_end_is_kept() -> None:
    broken = OURS.replace(END, "").replace("## Use", "Ask me first.\n\n## Use")
    again = keep_edits(OURS, keep_edits(OURS, broken, None), None)
    assert "Ask me first." in again
    assert again.count(END) == 1


def test_a_card_on_the_hub_may_begin_with_a_byte_order_mark_and_name_its_own_licence() -> None:
    theirs = OURS.replace("---\n", "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n", 1)
    kept = keep_edits(OURS, f"\ufeff{theirs}", None)
    assert kept.count("library_name") == 1
    assert "license_name: mine" in kept
    assert "license_" not in keep_edits(OURS, theirs, "mit")


def test_a_licence_that_the_hub_does_not_know_is_reported(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push = ["export", f"run={runs.folder('run')}", "push_to=me/model", f"out={tmp_path / 'out'}", "license=free"]
    assert main(push) == 2
    assert '"license: free" is not a licence' in capsys.readouterr().err
    assert hub.repositories["me/model"]["files"] == {}


def test_publishing_to_a_public_repository_requires_public_true(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/open"] = {"private": False, "files": {}}
    push = ["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", "push_to=me/open"]
    assert main(push) == 2
    assert "set public=true" in capsys.readouterr().err
    assert hub.repositories["me/open"]["files"] == {}
    assert main([*push, "public=true"]) == 0
    assert "model.safetensors" in hub.repositories["me/open"]["files"]


@pytest.mark.parametrize(
    ("token", "name", "expected"),
    [(None, "me/model", "HF_TOKEN"), ("hf_bad", "me/model", "refuses"), (TOKEN, "not a name", "refuses")],
)
def test_nothing_is_published_without_permission(
    token: str | None,
    name: str,
    expected: str,
    hub: hub_server.Hub,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", f"push_to={name}"]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "hf_bad" not in message
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_a_folder_that_fails_verification_is_not_published(
    hub: hub_server.Hub, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a text that decoding without special tokens never gives
    monkeypatch.setattr("clippy_train.hf.export.PROBE", "<|endoftext|>")
    assert main(["export", f"run={runs.folder('run')}", f"out={tmp_path / 'out'}", "push_to=me/model"]) == 4
    assert hub.repositories["me/model"]["files"] == {}
    assert not (tmp_path / "out").exists()
