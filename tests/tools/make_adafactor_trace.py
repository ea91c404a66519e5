"""Record `tests/data/adafactor_trace.npz`: ten updates of the original's Adafactor, computed by optax. Run by hand:

    python -m venv /tmp/optax && /tmp/optax/bin/pip install jax optax numpy
    /tmp/optax/bin/python tests/tools/make_adafactor_trace.py

The optimizer is the original's: `clip_by_global_norm(1)`, then `adafactor(schedule)` with its default arguments.
Recorded with jax 0.10.2 and optax 0.2.8 on CPU; a line-by-line comparison showed the same rule and defaults in optax
0.0.9, 0.1.2 and 0.1.9.

Arrays of the file, fp32 unless said otherwise:
    NAME/start              int8 codes of the first weights; weights = codes * `weight_scale`[NAME]
    NAME/gradients          [updates, *shape] int8 codes; gradient of update k = codes[k] * `gradient_scale`[k]
    NAME/weights            [updates, *shape] after each update; of matrices only the last, [1, *shape]
    NAME/size               [updates] root mean square of each update's change
    lr, peak, warmup_steps, decay_steps, min_lr_ratio, grad_norm (before clipping)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

UPDATES, PEAK, WARMUP, DECAY, MIN_LR_RATIO = 10, 2.0**-4, 3, 5, 0.125
# Each tensor's shape and the scale of its first weights. Scales are powers of 2: codes times scale is exact in fp32.
TENSORS = {
    "matrix": ((128, 160), 2.0**-8),  # factored: both sides are 128 or more, as in every matrix of GPT-Neo-125M
    "narrow": ((8, 160), 2.0**-8),  # one side below 128: optax keeps the second moment of every element
    "bias": ((160,), 0.0),  # starts at 0: its size counts as 1e-3
    "scale": ((160,), 2.0**-4),
}
GRADIENT_SCALES = 2.0 ** -np.array([9, 11, 8, 12, 10, 9, 13, 8, 11, 9])  # some above the clipping norm, some below


def main() -> None:
    random = np.random.default_rng(0)
    start = {name: codes(random, shape) for name, (shape, _) in TENSORS.items()}
    gradients = {name: codes(random, (UPDATES, *shape)) for name, (shape, _) in TENSORS.items()}
    gradients["matrix"] = (gradients["matrix"] * 2.0 ** (-np.arange(128) % 4)[:, None]).astype(np.int8)  # uneven rows
    gradients["matrix"][:, 5] = 0  # a row without gradients: only epsilon keeps its update finite
    gradients["matrix"][:4, :, 7] = 0  # a column without gradients in the first updates

    parameters = {name: jnp.float32(start[name] * scale) for name, (_, scale) in TENSORS.items()}
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, PEAK, WARMUP), optax.cosine_decay_schedule(PEAK, DECAY, MIN_LR_RATIO)], [WARMUP]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1), optax.adafactor(schedule))
    state = optimizer.init(parameters)
    weights: dict[str, list[Any]] = {name: [] for name in TENSORS}
    sizes: dict[str, list[Any]] = {name: [] for name in TENSORS}
    norms = []
    for update in range(UPDATES):
        scaled = {name: jnp.float32(gradients[name][update] * GRADIENT_SCALES[update]) for name in TENSORS}
        norms.append(optax.global_norm(scaled))
        changes, state = optimizer.update(scaled, state, parameters)
        parameters = optax.apply_updates(parameters, changes)
        for name in TENSORS:
            weights[name].append(parameters[name])
            sizes[name].append(jnp.sqrt(jnp.mean(changes[name] ** 2)))
    for name in ("matrix", "narrow"):
        weights[name] = weights[name][-1:]  # keeps the file small; `size` covers every update

    out = Path(__file__).parents[1] / "data" / "adafactor_trace.npz"
    arrays: dict[str, Any] = {
        **{f"{name}/start": start[name] for name in TENSORS},
        **{f"{name}/gradients": gradients[name] for name in TENSORS},
        **{f"{name}/weights": np.asarray(weights[name], np.float32) for name in TENSORS},
        **{f"{name}/size": np.asarray(sizes[name], np.float32) for name in TENSORS},
        "weight_scale": np.asarray([scale for _, scale in TENSORS.values()], np.float32),
        "gradient_scale": np.asarray(GRADIENT_SCALES, np.float32),
        "lr": np.asarray([schedule(update) for update in range(UPDATES)], np.float32),
        "grad_norm": np.asarray(norms, np.float32),
        "peak": PEAK, "warmup_steps": WARMUP, "decay_steps": DECAY, "min_lr_ratio": MIN_LR_RATIO,
    }  # fmt: skip
    np.savez_compressed(out, **arrays)
    print(f"{out}: {out.stat().st_size} bytes, jax {jax.__version__}, optax {optax.__version__}")


def codes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(np.round(random.normal(0, 5, shape)), -127, 127).astype(np.int8)


if __name__ == "__main__":
    main()
