"""Bases on the hub: fetched once on each node, so that its ranks ask the hub for nothing.

Otherwise every rank would look up every file of a base, 512 of them at the same moment. The cache is the user's
(`HF_HOME`): on a shared file system the first node fills it for the others.
"""

import logging
import os
from pathlib import Path

from clippy_train.config import TrainConfig
from clippy_train.errors import first_line
from clippy_train.files import looks_local
from clippy_train.run.folder import checkpoint_folders

FILES = ["*.json", "*.txt", "*.safetensors"]  # of a model and its tokenizer
OLD_WEIGHTS = ["*.bin"]  # of a model without safetensors
OFFLINE = {"HF_HUB_OFFLINE": "1"}

log = logging.getLogger(__name__)


def fetch_bases(config: TrainConfig) -> dict[str, str]:
    """Fetch the bases of a new run into this machine's cache, and return the variables for its ranks.

    If that fails, the ranks try by themselves, and the first one says what is missing.
    """
    names = {config.model.base, config.tokenizer.base}
    wanted = [name for name in names if name and not looks_local(name) and not Path(name).is_dir()]
    if not wanted or os.environ.get("HF_HUB_OFFLINE") or checkpoint_folders(config.run_dir):
        return {}
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folders = []
    try:
        for name in wanted:
            folder = Path(snapshot_download(name, allow_patterns=FILES))
            if not any(folder.glob("*.safetensors")):
                snapshot_download(name, allow_patterns=FILES + OLD_WEIGHTS)
            folders.append(folder)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        log.warning("%s could not be fetched from the hub: %s", name, first_line(error))
        return {}
    # Without the hub, transformers does not believe that a repository of a tokenizer alone has no config.json
    complete = all((folder / "config.json").is_file() for folder in folders)
    return OFFLINE if complete and not _data_on_hub(config) else {}


def _data_on_hub(config: TrainConfig) -> bool:
    problems, corpora = config.data.val_problems, config.data.corpora.values()
    on_hub = any(each.hub or str(each.path).startswith("hf://") for each in corpora)
    return on_hub or (problems is not None and not Path(problems).is_file())
