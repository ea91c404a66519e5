"""Floating-point operations per trained token, and the peak FLOP/s of devices: the two sides of MFU.

MFU = tokens/s per device x operations per token / the device's peak. There are two conventions; always say which one:

    exact   6 x (weights of all matrices, head included) + 12 x hidden size x visible keys, summed over the layers: the
            operations that causal, windowed attention requires. Extra work of a kernel does not count
    palm    6 x parameters (without position embeddings) + 12 x layers x hidden size x seq_len, as in the PaLM paper,
            nanoGPT, llm.c and llm-foundry: full S x S attention in every layer. 1.19 x `exact` at GPT-Neo-125M
"""

from clippy_train.config import TrainConfig

# Dense bf16 peak in FLOP/s, by words of CUDA's device name; from NVIDIA's data sheets.
PEAKS = {
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def vocab_size(config: TrainConfig) -> int:
    """Rows of the embedding of a model that is built from the configuration: with the tokens that are added."""
    return config.model.vocab_size + len(config.tokenizer.whitespace_tokens) + len(config.fim_tokens)


def count_parameters(config: TrainConfig, vocab_size: int) -> int:
    """Parameters of a GPT-Neo: embeddings (the head is tied), blocks of 12 d^2 + 10 d, final LayerNorm."""
    width, positions = config.model.hidden_size, config.model.max_position_embeddings
    block = 12 * width**2 + 10 * width
    return (vocab_size + positions) * width + config.model.num_layers * block + 2 * width


def flops_per_token(config: TrainConfig, vocab_size: int) -> dict[str, float]:
    """Operations per token of a forward and a backward pass, by convention (`exact`, `palm`)."""
    model, seq = config.model, config.data.seq_len
    width, layers = model.hidden_size, model.num_layers
    keys = sum(visible_keys(seq, model.window_size if layer % 2 else seq) for layer in range(layers))
    counted = count_parameters(config, vocab_size) - model.max_position_embeddings * width
    return {
        "exact": 6 * (12 * width**2 * layers + vocab_size * width) + 12 * width * keys,
        "palm": 6 * counted + 12 * layers * width * seq,
    }


def visible_keys(seq: int, window: int) -> float:
    """Mean number of keys that a token of a sequence attends to, itself included."""
    window = min(window, seq)
    return window - window * (window - 1) / 2 / seq


def peak_flops(device: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s by its name; None if unknown."""
    words = set(device.replace("-", " ").split())
    known = [name for name in PEAKS if set(name.split()) <= words]
    return PEAKS[max(known, key=len)] if known else None
