"""The model card of an exported run, filled only from the run's own files and from evaluations of the same weights.

Its head is the hub's metadata, with the results as a model index. The text on risks holds for any model of this kind;
no number in the card is typed by hand.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from clippy_train.config import OptimConfig, TrainConfig, as_document
from clippy_train.optim import describe_schedule
from clippy_train.run.checkpoint import Manifest
from clippy_train.run.history import Phase, changed

CURVES = "curves.png"

TEMPLATE = """---
{metadata}
---

# {name}

A GPT-Neo causal language model of source code, trained with clippy_train {version}.

| | |
|---|---|
| started from | {started} |
| steps | {step:,} of {max_steps:,} |
| tokens seen | {tokens:,} |
| documents read | {documents:,} |
| languages of the validation split | {languages} |
| sequence length | {seq_len} |
| sequences in a step | {batch} |
| learning rate | {schedule} |
| optimizer | {optimizer}, clipping {clip} |
| precision, strategy | {precision}, {strategy} on {ranks} ranks |
| corpus fingerprint | `{fingerprint}` |
| versions | {versions} |

{history}

<details><summary>Every setting at the last step</summary>

```yaml
{settings}```

</details>

## Evaluation

{evaluation}

## Validation during training

![curves]({curves})

{validation}

Bits per byte do not depend on the tokenizer; loss and perplexity are per token.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
inputs = tokenizer("def greet(name):\\n", return_tensors="pt", return_token_type_ids=False)
out = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=0.7)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```

## Intended use

Research on language models of code, and code completion for people who read and test its suggestions. It does not
follow instructions or answer questions. It should not run unattended, nor write code that safety or security depends
on.

## Limitations

- **Trust.** A completion that reads well can still be wrong. People who accept suggestions without checking them,
  beginners above all, accept the mistakes as well.
- **Security.** Public code contains vulnerable and malicious examples, and they were not filtered out. The model can
  repeat them, and can be prompted to.
- **Licences.** Documents keep their authors' licences, whatever the licence of this model. A completion may repeat a
  document closely enough to fall under its terms; courts have decided little on this so far.
- **Personal and offensive content.** Such content in public repositories was not removed, and the model can repeat it.
- **Uneven skill.** It does best on the languages it saw most; in the original model's corpus these were JavaScript and
  Python. The validation by language above shows how this model differs.
- **Work.** Tools that write code change the work of people who write code, and not always for the better.
- **Inherited limits.** {inherited}
"""


def model_card(
    config: TrainConfig,
    history: list[Phase],
    environment: dict[str, Any],
    manifest: Manifest,
    rows: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    place: str,
) -> str:
    """Return the card as Markdown.

    Args:
        config: the settings of the last step.
        history: the settings of all steps up to that of `manifest`.
        rows: the run's metrics up to the step of `manifest`.
        evaluations: contents of results files, with this model's name as `model` in their `about`.
        place: the argument of `from_pretrained` that loads the model.
    """
    optim, trainer, base = config.optim, config.trainer, config.model.base
    validations = [row for row in rows if "val/loss" in row]
    return TEMPLATE.format(
        metadata=card_metadata(config, validations[-1:], evaluations),
        name=config.run.name,
        version=environment["clippy_train"],
        started=base or "random weights",
        step=manifest.step,
        max_steps=trainer.max_steps,
        tokens=manifest.tokens,
        documents=manifest.counts["documents"],
        languages=", ".join(bits_per_byte_by_language(validations[-1]) if validations else ()) or "not known",
        seq_len=config.data.seq_len,
        batch=trainer.global_batch_size,
        schedule=describe_schedule(optim),
        optimizer=describe_optimizer(optim),
        clip=optim.grad_clip,
        precision=trainer.precision,
        strategy=f"{config.strategy.name}{config.strategy.stage or ''}",
        ranks=config.world_size,
        fingerprint=manifest.data["corpus fingerprint"],
        versions=", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        history=settings_by_step(history),
        settings=as_document(config),
        evaluation="\n\n".join(map(evaluation_section, evaluations)) or "None beyond the validation below.",
        validation=validation_tables(validations),
        curves=CURVES,
        place=place,
        inherited=f"It started from {base} and keeps that model's."
        if base
        else "None: it started from random weights.",
    )


def settings_by_step(history: list[Phase]) -> str:
    """Which settings changed during the run, and when."""
    table = [
        ["setting", "value"],
        *([f"`{name}`", text.replace("|", r"\|")] for name, text in changed(history).items()),
    ]
    if len(table) == 1:
        return "No setting was changed during the run."
    return f"Settings that were changed during the run; their last values are above.\n\n{markdown_table(table)}"


def card_metadata(config: TrainConfig, validations: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    """The YAML head: the fields that the hub filters models by, and the results as a model index."""
    split = f"{config.data.hub or 'corpus'} ({config.data.validation_split})"
    results = [_result("validation", split, "bits_per_byte", row["val/bits_per_byte"]) for row in validations]
    for each in evaluations:
        for name, value in headline_metrics(each).items():
            results.append(_result(each["about"]["task"], each["about"]["command"], name, value))
    data = ModelCardData(
        model_name=config.run.name,
        base_model=config.model.base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["code", "gpt_neo", "causal-lm"],
        eval_results=results or None,
    )
    return data.to_yaml()


def _result(dataset_type: str, dataset_name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        metric_type=metric,
        metric_value=round(value, 4),
    )


def headline_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers that summarise an evaluation: pass@k, or bits per byte."""
    if results["about"]["task"] == "humaneval":
        return {name: value for name, value in results.items() if name.startswith("pass@")}
    return {"bits_per_byte": results["results"][results["about"]["model"]]["total"]["bits_per_byte"]}


def evaluation_section(results: dict[str, Any]) -> str:
    """An evaluation as a table, below the command that reproduces it."""
    about = results["about"]
    if about["task"] == "humaneval":
        table = [["metric", "value"], *([name, f"{value:.4f}"] for name, value in headline_metrics(results).items())]
    else:
        found = results["results"][about["model"]]
        parts = {"total": found["total"], **found["languages"]}
        table = [["", "bits per byte", "loss", "perplexity"]]
        table += [
            [name, f"{each['bits_per_byte']:.4f}", f"{each['loss']:.4f}", f"{each['perplexity']:.2f}"]
            for name, each in parts.items()
        ]
    return f"`{about['command']}`\n\n{markdown_table(table)}"


def validation_tables(validations: list[dict[str, Any]]) -> str:
    """A table of all validations, and one of the last validation by language."""
    if not validations:
        return "None was run."
    total = [["step", "loss", "perplexity", "bits per byte"]] + [
        [
            f"{row['step']:,}",
            f"{row['val/loss']:.4f}",
            f"{row['val/perplexity']:.2f}",
            f"{row['val/bits_per_byte']:.4f}",
        ]
        for row in validations
    ]
    found = sorted(bits_per_byte_by_language(validations[-1]).items())
    languages = [["language", "bits per byte at the end"], *([name, f"{value:.4f}"] for name, value in found)]
    return f"{markdown_table(total)}\n\n{markdown_table(languages)}"


def bits_per_byte_by_language(row: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of each language in a validation's metrics row."""
    prefix = "val/bits_per_byte/"
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def markdown_table(table: list[list[str]]) -> str:
    """Format rows of cells, the header first."""
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([header, "|---" * len(table[0]) + "|", *rows])


def describe_optimizer(optim: OptimConfig) -> str:
    """The optimizer's name and the settings that apply to it."""
    own = {"betas": optim.betas, "eps": optim.eps, "weight decay": optim.weight_decay}
    return ", ".join([optim.name, *(f"{name} {value}" for name, value in own.items() if value is not None)])


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss and the learning rate over the optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("train/loss", "val/loss")), (right, ("train/lr",))):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot([step for step, _ in points], [value for _, value in points], ".-", label=name)
        axes.set_xlabel("optimizer step")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
