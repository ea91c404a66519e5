"""`clippy generate`: complete a prompt with any causal LM of a Hugging Face folder."""

import torch

from clippy_train.config import GenerateConfig
from clippy_train.errors import ConfigError
from clippy_train.model.build import load_model
from clippy_train.tokenizer import load_tokenizer


@torch.no_grad()
def generate(config: GenerateConfig, prompt: str) -> list[str]:
    """Completions of `prompt`, without it: greedy at temperature 0, else sampled.

    Raises:
        ConfigError: no model there, or prompt and completion do not fit its positions.
    """
    model, tokenizer = load_model(config.model).eval(), load_tokenizer(config.model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = getattr(model.config, "max_position_embeddings", None)
    if not ids.size(1):
        raise ConfigError("prompt is empty")
    if room is not None and ids.size(1) + config.max_new_tokens > room:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens}: with a prompt of {ids.size(1)} tokens it exceeds the model's "
            f"{room} positions; at most {max(0, room - ids.size(1))} fit"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    torch.manual_seed(config.seed)
    out = model.to(device).generate(
        ids.to(device).expand(config.num_samples, -1),
        attention_mask=torch.ones_like(ids, device=device).expand(config.num_samples, -1),
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **(sampling if config.temperature > 0 else {"do_sample": False}),
    )
    return [tokenizer.decode(row[ids.size(1) :], skip_special_tokens=True) for row in out]
