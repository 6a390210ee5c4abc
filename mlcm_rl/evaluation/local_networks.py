"""Networks in transformers' format from a local folder: whole, or refused with the recipe's key that names them."""

from pathlib import Path
from typing import Any

from ..storage import finite
from ..storage.untrusted import in_a_line

COUNTERS = "num_batches_tracked"  # of batch norms, which no result depends on


def load_part(part: Any, folder: Path | str, key: str, **settings: Any) -> Any:
    """Return what `part`, a class of transformers, makes of the files in `folder`: a configuration, a tokenizer.

    Raise ValueError that begins with `key` where it cannot.
    """
    try:
        return part.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # of files that are not what their names say
        raise ValueError(f"{key}: {folder} could not be loaded: {in_a_line(error)}") from error


def load_network(kind: Any, folder: Path | str, key: str) -> Any:
    """Return the network of the class `kind` in `folder`, from safetensors alone.

    Raise ValueError that begins with `key` where it cannot be loaded, for weights that are missing, which transformers
    would draw at random, and for NaN or infinity.
    """
    model, state = load_part(kind, folder, key, use_safetensors=True, output_loading_info=True)
    if missing := sorted(name for name in state["missing_keys"] if not name.endswith(COUNTERS)):
        raise ValueError(
            f"{key}: {len(missing)} weights are not in the files of {folder}, such as {missing[0]}: fetch them again"
        )
    if (bad := finite.first_nonfinite(model.state_dict())) is not None:
        raise ValueError(f"{key}: {bad} in {folder} is not made of finite numbers: fetch it again")
    return model
