from typing import Any

from clippy_train.config import EvaluateConfig


def humaneval(config: EvaluateConfig) -> dict[str, Any]:
    raise NotImplementedError
