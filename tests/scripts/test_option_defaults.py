"""Options have the defaults of the library's records, which help must not import."""

from __future__ import annotations

from configs.choices import RouterFit
from experts.saliency.expert_scan import check_scan_options
from experts.selection.rules import SelectionRules
from models.bootstrap.build import BootstrapOptions
from models.moe.merge import MergeOptions
from models.moe.planner import PlanOptions
from scripts.verbs.experts.merge import GroupOptions
from scripts.verbs.experts.plan import StepOptions
from scripts.verbs.experts.scan import ScoreOptions
from scripts.verbs.experts.select import SelectOptions
from scripts.verbs.graph.bootstrap import ExpertOptions


def test_options_and_records_of_the_library_have_the_same_defaults():
    assert SelectOptions().selection() == SelectionRules()
    assert GroupOptions().merge_options() == MergeOptions()
    assert StepOptions().plan_options(3) == PlanOptions(SelectionRules(n_prune=3, model_wide=True))
    assert ExpertOptions().bootstrap_options(4, 32) == BootstrapOptions.of_router(4, 32)
    assert ExpertOptions(router=RouterFit.RIDGE).bootstrap_options(4, 32) == BootstrapOptions(4)
    check_scan_options(**vars(ScoreOptions()))
