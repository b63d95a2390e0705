"""Writing a checkpoint whose experts were merged in memory."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from configs.output import new_directory
from models.checkpoints.load import load_tokenizer
from models.checkpoints.save import save_graph
from models.files.side_files import copy_side_files
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def save_merged(
    model: PreTrainedModel, source: Path, out: Path, *, graph_version: int, overwrite: bool
) -> None:
    """Write a model whose experts were merged, with all that lies beside the weights of ``source``.

    Args:
        model: uniform in its number of experts where its format holds one number.
        source: folder that the model was opened from.
        out: new folder; nothing is left there on a failure.
        graph_version: of an expert graph of ours after the merge.
        overwrite: whether ``out`` may be replaced.
    """
    with new_directory(out, overwrite=overwrite) as directory:
        copy_side_files(source, directory)
        if isinstance(model, FedGraftForCausalLM):
            model.config.graph_version = graph_version
            save_graph(model, load_tokenizer(str(source)), directory)
        else:
            model.save_pretrained(directory)
