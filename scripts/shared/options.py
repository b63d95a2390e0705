"""Options that several verbs share: models, text, devices and output paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from configs.choices import Device, Precision, Split

_OUT = ("--out", "--output")

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")
]
DenseModel = Annotated[str, typer.Option("--model", help="Directory, GGUF file or hub id of a dense Llama.")]
GraphModel = Annotated[str, typer.Option("--model", help="Directory of an expert graph.")]
ExpertModel = Annotated[
    str,
    typer.Option(
        "--model", help="Directory or hub id of an expert graph or a Hugging Face mixture of experts."
    ),
]
CausalModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="Directory, GGUF file or hub id of an expert graph or any Hugging Face causal language model.",
    ),
]
DATA = typer.Option(
    "--data",
    "--dataset",
    help="wikimix, wikimix:DOMAIN[,DOMAIN], a text, JSON, CSV or Parquet file, a folder, or a hub dataset; repeatable.",
)
DataSources = Annotated[list[str], DATA]
SplitOption = Annotated[
    Split, typer.Option("--split", help="Documents to use: held out (valid), training, or all.")
]
LOSS_ON = typer.Option(
    "--loss-on", help="Tokens with a loss: all, or the answers of chats and instruction records."
)
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="Device of the computation; auto: CUDA if there is one, else the CPU."),
]


@dataclass(frozen=True)
class RuntimeOptions:
    """Precision of the weights and device of the computation."""

    precision: Annotated[
        Precision,
        typer.Option(
            help="Precision of the weights; auto: as stored, but fp32 where the device multiplies faster in fp32 than "
            "in 16 bits (measured; fp32 takes twice the memory)."
        ),
    ] = Precision.AUTO
    device: DeviceOption = Device.AUTO


@dataclass(frozen=True)
class BlockOptions:
    """Token blocks of each domain."""

    block_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens per block; the smaller of 256 and the model's context unless given."
        ),
    ] = None
    max_blocks: Annotated[int, typer.Option(min=0, help="Most blocks per domain; 0: all.")] = 0


@dataclass(frozen=True)
class BatchOptions(BlockOptions):
    """Token blocks of each domain, and their batches."""

    batch_size: Annotated[int, typer.Option(min=1, help="Blocks per forward pass.")] = 8


EvaluationTokens = Annotated[
    int, typer.Option("--evaluation-tokens", min=256, help="Held-out tokens of the report.")
]
CALIBRATION_BLOCKS = BatchOptions(max_blocks=64)
OverwriteDirectory = Annotated[bool, typer.Option(help="Replace an output directory that is not empty.")]


@dataclass(frozen=True)
class NewCheckpoint:
    """Directory of the checkpoint that a verb writes."""

    out: Annotated[Path, typer.Option(*_OUT, help="Directory of the new checkpoint.")]
    overwrite: OverwriteDirectory = False


@dataclass(frozen=True)
class NewFiles:
    """Path of the file, or of the directory of files, that a verb writes."""

    out: Annotated[
        Path, typer.Option(*_OUT, help="Path of the result: a file, or a directory for several files.")
    ]
    overwrite: Annotated[bool, typer.Option(help="Replace existing output files.")] = False


@dataclass(frozen=True)
class ShrunkCheckpoints:
    """Outputs of a verb that removes experts: a checkpoint for each choice of experts, or a preview."""

    out: Annotated[
        Path | None,
        typer.Option(
            *_OUT, help="Directory of the new checkpoint; with several expert lists, of a folder for each."
        ),
    ] = None
    preview: Annotated[
        bool, typer.Option("--preview", help="Print the experts that would be removed; write nothing.")
    ] = False
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize",
            "--equalise",
            help="Raise every layer to the largest number of experts kept, by restoring the best-ranked ones.",
        ),
    ] = False
    overwrite: OverwriteDirectory = False
