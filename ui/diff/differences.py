"""Differences of two saliency files of one shape, and of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas

from configs.errors import UserError
from experts.saliency.measures import Saliency
from experts.saliency.ranks import over_layer_mean, rank_sums
from experts.saliency.saliency_report import compare_layers
from ui.run.records import perplexities
from ui.shared.heat_map import heat_map_value
from ui.shared.html import table

_TOP = 10


def relative_difference(first: Saliency, second: Saliency, metric: str) -> np.ndarray:
    """Score over the layer's mean in the second file minus that in the first, ``[L, E]``.

    Raises:
        UserError: files of other shapes.
    """
    if first.experts_per_layer != second.experts_per_layer:
        raise UserError(
            f"expected two files with the same experts per layer, got {first.experts_per_layer} and "
            f"{second.experts_per_layer}"
        )
    one, other = (over_layer_mean(each.scores(metric), each.routed) for each in (first, second))
    return other - one


def difference_picture(first: Saliency, second: Saliency, metric: str) -> str:
    """Content of a diverging heat map of ``relative_difference``."""
    found = relative_difference(first, second, metric)
    ranks = {
        f"rank in the {name}": rank_sums([each], metric, model_wide=False)
        for name, each in (("first", first), ("second", second))
    }
    rows = [str(layer) for layer in first.decoder_layers]
    return heat_map_value(found, rows=rows, fields={"difference": found, **ranks}, diverging=True)


def difference_figures(found: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, smallest and largest difference, and number of risen, fallen and equal experts."""
    known = found[~np.isnan(found)]
    return {
        "mean": float(known.mean()),
        "standard deviation": float(known.std()),
        "smallest": float(known.min()),
        "largest": float(known.max()),
        "risen": int((known > 0).sum()),
        "fallen": int((known < 0).sum()),
        "equal": int((known == 0).sum()),
    }


def largest_changes(found: np.ndarray, decoder_layers: Sequence[int]) -> str:
    """HTML table of up to ten experts that rose most, then of those that fell most."""
    pairs = np.argwhere(~np.isnan(found))
    values = found[tuple(pairs.T)]
    order = np.argsort(-values, kind="stable")
    risen = [index for index in order if values[index] > 0][:_TOP]
    fallen = [index for index in order[::-1] if values[index] < 0][:_TOP]
    rows = [
        (way, int(decoder_layers[pairs[index][0]]), int(pairs[index][1]), float(values[index]))
        for way, chosen in (("risen", risen), ("fallen", fallen))
        for index in chosen
    ]
    return table(("", "decoder layer", "expert", "difference"), rows)


def layers_table(first: Saliency, second: Saliency, metric: str) -> str:
    """HTML table of rank correlation and overlap of the worst quarter, by layer."""
    rows = [
        (
            each["decoder_layer"],
            "-" if each["spearman"] is None else float(each["spearman"]),
            float(each["bottom_quarter_overlap"]),
        )
        for each in compare_layers(first, second, metric)
    ]
    return table(("decoder layer", "rank correlation", "common in the worst quarter"), rows)


def run_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> pandas.DataFrame:
    """Perplexity over all clients by round and run; columns round, run, perplexity."""
    frames = []
    for name, rounds in runs.items():
        frame = perplexities(rounds)
        frames.append(frame[frame["clients"] == "all"].assign(run=name)[["round", "run", "perplexity"]])
    return pandas.concat(frames, ignore_index=True)


def runs_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """HTML table of rounds, last perplexity, bytes, edges and seconds of each run."""
    rows = [
        (
            name,
            len(rounds),
            "-" if not rounds or rounds[-1]["perplexity"] is None else float(rounds[-1]["perplexity"]),
            sum(row["bytes_up"] for row in rounds),
            sum(row["bytes_down"] for row in rounds),
            sum(rounds[-1]["edges"]) if rounds else 0,
            float(sum(row["seconds"] for row in rounds)),
        )
        for name, rounds in runs.items()
    ]
    return table(("run", "rounds", "perplexity", "bytes up", "bytes down", "edges", "seconds"), rows)
