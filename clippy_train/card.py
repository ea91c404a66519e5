"""The model card of an exported run, filled from the run's own files only."""

from typing import Any

from clippy_train.config import OptimConfig, TrainConfig

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [code, gpt_neo, causal-lm]
{base}---

# {name}

A GPT-Neo causal language model of source code, trained with clippy_train {version}.

| | |
|---|---|
| started from | {started} |
| steps | {step:,} of {max_steps:,} |
| tokens seen | {tokens:,} |
| documents read | {documents:,} |
| sequence length | {seq_len} |
| sequences in a step | {batch} |
| learning rate | {lr:g}, warm-up {warmup}, cosine decay {decay}, then {floor:g} of it |
| optimizer | {optimizer}, clipping {clip} |
| precision, strategy | {precision}, {strategy} on {ranks} ranks |
| corpus fingerprint | `{fingerprint}` |
| versions | {versions} |

## Validation during training

{validation}

Bits per byte do not depend on the tokenizer; loss and perplexity are per token.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("def greet(name):\\n", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(out[0][ids.size(1):]))
```

## Limitations

Completions can look right and be wrong, or insecure: read and test them. They can repeat the training data, whose
licences may bind what is done with them. The model was not evaluated beyond the table above.
"""


def optimizer(optim: OptimConfig) -> str:
    """Its name and the settings that only it has."""
    own = {"betas": optim.betas, "eps": optim.eps, "weight decay": optim.weight_decay}
    return ", ".join([optim.name, *(f"{name} {value}" for name, value in own.items() if value is not None)])


def model_card(config: TrainConfig, environment: dict, manifest: Any, rows: list[dict]) -> str:
    """The card as Markdown. `rows` are the rows of the run's metrics up to any step."""
    optim, trainer, base = config.optim, config.trainer, config.model.base
    validations = [row for row in rows if "val/loss" in row and row["step"] <= manifest.step]
    table = ["| step | loss | perplexity | bits per byte |", "|---|---|---|---|"]
    table += [
        f"| {row['step']:,} | {row['val/loss']:.4f} | {row['val/perplexity']:.2f} | {row['val/bits_per_byte']:.4f} |"
        for row in validations
    ]
    return TEMPLATE.format(
        base=f"base_model: {base}\n" if base else "",
        name=config.run.name,
        version=environment["clippy_train"],
        started=base or "random weights",
        step=manifest.step,
        max_steps=trainer.max_steps,
        tokens=manifest.tokens,
        documents=manifest.counts["documents"],
        seq_len=config.data.seq_len,
        batch=trainer.global_batch_size,
        lr=optim.lr,
        warmup=optim.warmup_steps,
        decay=optim.decay_steps,
        floor=optim.min_lr_ratio,
        optimizer=optimizer(optim),
        clip=optim.grad_clip,
        precision=trainer.precision,
        strategy=f"{config.strategy.name}{config.strategy.stage or ''}",
        ranks=config.world_size,
        fingerprint=manifest.data["corpus fingerprint"],
        versions=", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        validation="\n".join(table) if validations else "None was run.",
    )
