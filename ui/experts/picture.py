"""Heat map of a selection: rank and scores of every expert, removed and exempt ones marked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experts.saliency.ranks import over_layer_mean
from experts.selection.expert_list import ExpertList
from ui.experts.selection import SaliencyFile, SelectionForm, marks
from ui.shared.heat_map import heat_map_value


def selection_picture(chosen: ExpertList, files: Sequence[SaliencyFile], form: SelectionForm) -> str:
    """Content of the heat map: mean of the scores over the mean score of the layer, in ranks of color.

    Args:
        chosen: selection.
        files: saliency files that it is made of.
        form: its form.
    """
    saliency = files[0].saliency
    relative = np.mean(
        [over_layer_mean(each.saliency.scores(form.metric), each.saliency.routed) for each in files], axis=0
    )
    fields = {"rank sum" if len(files) > 1 else "rank": chosen.rank_sum}
    fields |= {
        f"{form.metric} of {each.name}" if len(files) > 1 else form.metric: each.saliency.scores(form.metric)
        for each in files
    }
    return heat_map_value(
        -chosen.rank_sum if np.nanmax(relative) <= 0 else np.sqrt(np.maximum(relative, 0)),
        rows=[str(layer) for layer in saliency.decoder_layers],
        fields=fields | {"times the layer's mean": relative},
        marks=marks(chosen, saliency, form.rules()),
    )
