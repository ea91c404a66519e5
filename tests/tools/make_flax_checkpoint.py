"""Write `data/flax_checkpoint`: a checkpoint in the original project's format, by its own libraries. Run by hand:

    pip install --group parity                                  # in a separate environment: it needs transformers 4
    pip install --no-deps --target OLD flax==0.3.4
    python tests/tools/make_flax_checkpoint.py OLD/flax/serialization.py

A small FlaxGPTNeoForCausalLM takes `UPDATES` updates of the original's optimizer on synthetic gradients (`gradient`),
and one micro-step of the next update. The optimizer state is written twice in small chunks: by a current Flax, and by
Flax 0.3.4 of summer 2021, which wrote named tuples as name, fields and values.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

OUT = Path(__file__).parents[1] / "data" / "flax_checkpoint"
ACCUMULATION, UPDATES = 2, 3
MICRO_STEPS = ACCUMULATION * UPDATES + 1
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
LEARNING_RATE = 1e-2
CHUNK_BYTES = 1200  # Flax splits arrays above 1 GiB; this limit splits the embedding
RECORDED = slice(-3, None)  # positions whose logits are kept


def gradient(micro_step: int, index: int, size: int) -> np.ndarray:
    """The flat gradient of tensor `index`, in order of sorted Flax names. Every other update is clipped."""
    scale = 0.1 if micro_step // ACCUMULATION % 2 else 0.001
    values = np.sin(np.arange(size, dtype=np.float64) * 0.37 + 7 * index + 0.5 * micro_step)
    return (scale * values).astype(np.float32)


def main(old_serialization: str) -> None:
    import flax
    import jax.numpy as jnp
    import optax
    from transformers import FlaxGPTNeoForCausalLM, GPTNeoConfig  # type: ignore[attr-defined]  # in transformers 4 only

    config = GPTNeoConfig(
        vocab_size=520, max_position_embeddings=64, hidden_size=8, num_layers=2, num_heads=2, window_size=8,
        attention_types=[[["global", "local"], 1]], embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
        bos_token_id=511, eos_token_id=511, initializer_range=0.3,
    )  # fmt: skip
    model = FlaxGPTNeoForCausalLM(config, seed=0)
    params, state = model.params, optimizer(optax).init(model.params)
    names = sorted(flax.traverse_util.flatten_dict(params))
    for micro_step in range(MICRO_STEPS):
        flat = flax.traverse_util.flatten_dict(params)
        gradients = {
            name: jnp.asarray(gradient(micro_step, index, flat[name].size).reshape(flat[name].shape))
            for index, name in enumerate(names)
        }
        updates, state = optimizer(optax).update(flax.traverse_util.unflatten_dict(gradients), state, params)
        params = optax.apply_updates(params, updates)

    OUT.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(OUT, params=params)  # config.json, generation_config.json, flax_model.msgpack
    (OUT / "training_state.json").write_text(json.dumps({"step": MICRO_STEPS}))
    old = load_old(old_serialization)
    writers: dict[str, Any] = {"opt_state.msgpack": flax.serialization, "opt_state_0_3_4.msgpack": old}
    for name, serialization in writers.items():
        serialization.MAX_CHUNK_SIZE = CHUNK_BYTES
        (OUT / name).write_bytes(serialization.to_bytes(state))
    kinds = {
        "bfloat16": jnp.asarray([[1.0, -2.5], [3.0e38, 0.0]], jnp.bfloat16),
        "float16": np.asarray([0.5, 2.0], np.float16),
        "scalar": np.float32(1.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    (OUT / "kinds.msgpack").write_bytes(flax.serialization.msgpack_serialize(kinds))
    input_ids = np.arange(2 * 24).reshape(2, 24) * 37 % 520
    logits = np.asarray(model(input_ids, params=params).logits)[:, RECORDED]
    np.savez_compressed(OUT / "logits.npz", input_ids=input_ids, logits=logits)


def optimizer(optax: Any) -> Any:
    """The original's optimizer: clipping, AdamW with its decay mask, several micro-steps per update."""
    import flax

    def mask(params: Any) -> Any:
        flat = flax.traverse_util.flatten_dict(params)
        kept = {
            path: path[-1] != "bias" and path[-2:] not in [(n, "scale") for n in ("ln_1", "ln_2", "ln_f")]
            for path in flat
        }
        return flax.traverse_util.unflatten_dict(kept)

    warm_up = optax.linear_schedule(0.0, LEARNING_RATE, 2)
    adamw = optax.adamw(warm_up, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, mask=mask)
    return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(CLIP), adamw), ACCUMULATION)


def load_old(path: str) -> ModuleType:
    """Load Flax 0.3.4's serialization unchanged; the only name that today's JAX lacks is an array's class."""
    import jax

    jax.xla = SimpleNamespace(DeviceArray=jax.Array)
    spec = importlib.util.spec_from_file_location("flax_0_3_4_serialization", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
