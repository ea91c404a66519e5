"""Record `tests/data/adafactor_trace.npz`: ten updates by the original's Adafactor, from optax itself. Run by hand:

    python -m venv /tmp/optax && /tmp/optax/bin/pip install jax optax numpy
    /tmp/optax/bin/python tests/tools/make_adafactor_trace.py

The optimizer is the original's: `clip_by_global_norm(1)`, then `adafactor(schedule)` with every other argument at its
default. Written with jax 0.10.2 and optax 0.2.8 on CPU; the rule and the defaults are those of optax 0.0.9, 0.1.2 and
0.1.9, compared line by line.

Arrays of the file, fp32 unless said otherwise:
    NAME/start              int8 codes of the first weights; weights = codes * `weight_scale`[NAME]
    NAME/gradients          [updates, *shape] int8 codes; gradient of update k = codes[k] * `gradient_scale`[k]
    NAME/weights            [updates, *shape] after each update; of matrices only the last, [1, *shape]
    NAME/size               [updates] root mean square of what each update changed
    lr, peak, warmup_steps, decay_steps, min_lr_ratio, grad_norm (before clipping)
"""

from pathlib import Path

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
    gradients["matrix"][:, 5] = 0  # a position that no block reaches: only epsilon keeps its update finite
    gradients["matrix"][:4, :, 7] = 0  # a column that is first used late

    parameters = {name: jnp.float32(start[name] * scale) for name, (_, scale) in TENSORS.items()}
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, PEAK, WARMUP), optax.cosine_decay_schedule(PEAK, DECAY, MIN_LR_RATIO)], [WARMUP]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1), optax.adafactor(schedule))
    state = optimizer.init(parameters)
    weights: dict[str, list] = {name: [] for name in TENSORS}
    sizes: dict[str, list] = {name: [] for name in TENSORS}
    norms = []
    for update in range(UPDATES):
        given = {name: jnp.float32(gradients[name][update] * GRADIENT_SCALES[update]) for name in TENSORS}
        norms.append(optax.global_norm(given))
        changes, state = optimizer.update(given, state, parameters)
        parameters = optax.apply_updates(parameters, changes)
        for name in TENSORS:
            weights[name].append(parameters[name])
            sizes[name].append(jnp.sqrt(jnp.mean(changes[name] ** 2)))
    for name in ("matrix", "narrow"):
        weights[name] = weights[name][-1:]  # the file stays small; `size` follows every update

    out = Path(__file__).parents[1] / "data" / "adafactor_trace.npz"
    np.savez_compressed(
        out,
        **{f"{name}/start": start[name] for name in TENSORS},
        **{f"{name}/gradients": gradients[name] for name in TENSORS},
        **{f"{name}/weights": np.float32(weights[name]) for name in TENSORS},
        **{f"{name}/size": np.float32(sizes[name]) for name in TENSORS},
        weight_scale=np.float32([scale for _, scale in TENSORS.values()]),
        gradient_scale=np.float32(GRADIENT_SCALES),
        lr=np.float32([schedule(update) for update in range(UPDATES)]),
        grad_norm=np.float32(norms),
        peak=PEAK, warmup_steps=WARMUP, decay_steps=DECAY, min_lr_ratio=MIN_LR_RATIO,
    )  # fmt: skip
    print(f"{out}: {out.stat().st_size} bytes, jax {jax.__version__}, optax {optax.__version__}")


def codes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(np.round(random.normal(0, 5, shape)), -127, 127).astype(np.int8)


if __name__ == "__main__":
    main()
