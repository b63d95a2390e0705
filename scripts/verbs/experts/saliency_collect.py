"""``fedgraft saliency collect``: saliency measures of all experts in one pass over text."""

from __future__ import annotations

from time import monotonic

from configs.choices import Split
from federated.data.model_text import open_model_text
from scripts.shared.console import print_result, progress, quiet_libraries
from scripts.shared.options import (
    BatchOptions,
    DataSources,
    ExpertModel,
    JsonFlag,
    NewFiles,
    RuntimeOptions,
    SplitOption,
)
from scripts.shared.verb import verb


@verb
def collect(
    model: ExpertModel,
    data: DataSources,
    write: NewFiles,
    split: SplitOption = Split.TRAIN,
    blocks: BatchOptions = BatchOptions(),
    runtime: RuntimeOptions = RuntimeOptions(),
    as_json: JsonFlag = False,
) -> None:
    """Collect saliency: routing frequency, summed gate weight, summed output L2 norm (EAN), and REAP.

    An interrupted collection leaves OUT.partial; the same command resumes from it.
    """
    from configs.output import check_output_file
    from experts.saliency.measures import save_saliency
    from models.moe.saliency_collection import collect_saliency
    from models.runtime.precision import precision_name

    quiet_libraries()
    out = write.out
    check_output_file(out, overwrite=write.overwrite)
    opened = open_model_text(model, **vars(runtime), **vars(blocks))
    precision = precision_name(opened.model)
    batches = opened.batches(data, split)
    start, partial = monotonic(), out.with_name(out.name + ".partial")
    with progress(precision) as on_step:
        saliency = collect_saliency(
            opened.model,
            batches,
            provenance=opened.provenance(data, split),
            partial=partial,
            on_batch=lambda done: on_step("collecting saliency, batches", done, None),
        )
    seconds = monotonic() - start
    save_saliency(saliency, out)
    partial.unlink(missing_ok=True)
    tokens = saliency.provenance["tokens"]
    result = {"out": str(out), "tokens": tokens, "seconds": seconds, "precision": precision}
    print_result(result, as_json=as_json, lines=[_line(result)])


def _line(result: dict) -> str:
    return f"wrote {result['out']}: {result['tokens']:,} tokens in {result['seconds']:.1f} s"
