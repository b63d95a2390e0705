"""Choices of settings as enumerations, from which the command line and the libraries check values."""

from __future__ import annotations

from enum import StrEnum

from configs.errors import UserError, nearest


def check_choice(setting: str, value: str, choices: type[StrEnum]) -> None:
    """Check that a setting has a value of an enumeration.

    Args:
        setting: name of the setting in the message, a field in backquotes.
        value: value of the setting.
        choices: enumeration of the known values.

    Raises:
        UserError: names the known values, and the one nearest to ``value``.
    """
    known = [choice.value for choice in choices]
    if value not in known:
        listed = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise UserError(f"expected {setting} to be {listed}, got {value!r}{nearest(str(value), known)}")


class Metric(StrEnum):
    """Saliency measures of experts (see ``experts.saliency.measures``)."""

    REAP = "reap"
    EAN = "ean"
    FREQ = "freq"
    WEIGHTED_FREQ = "weighted_freq"


class Strategy(StrEnum):
    """Order in which ranked experts are removed."""

    BOTTOM = "bottom"
    STRIDED = "strided"


class SelectionMode(StrEnum):
    """Scope of ranking and removal."""

    PER_LAYER = "per_layer"
    MODEL_WIDE = "model_wide"


class Action(StrEnum):
    """Use of the experts that a selection removes."""

    ANALYZE = "analyze"
    PRUNE = "prune"
    MERGE = "merge"


class SafetyMode(StrEnum):
    """Use of the experts that a safety map flags."""

    PROTECT = "protect"
    TARGET = "target"


class DomainMode(StrEnum):
    """Use of the experts that a domain map flags."""

    PROTECT = "protect"


class Similarity(StrEnum):
    """Similarity of two experts' outputs by which merging groups them."""

    GATED = "gated"
    AVERAGE = "average"


class Alignment(StrEnum):
    """Alignment of neurons before the weights of experts are averaged."""

    NONE = "none"
    SIGN = "sign"
    CENTROID = "centroid"


class Average(StrEnum):
    """Weights of the average that a merged expert starts from."""

    CENTROID = "centroid"
    SALIENCY = "saliency"
    MEAN_SALIENCY = "mean-saliency"
    PLAIN = "plain"


class Features(StrEnum):
    """Features of an FFN neuron that k-means clusters."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate+up"
    JOINT = "joint"
    ACTIVATION = "activation"
    GATE_ACTIVATION = "gate-activation"


class Clustering(StrEnum):
    """Implementation of balanced k-means."""

    FLOW = "flow"
    K_MEANS_CONSTRAINED = "k-means-constrained"


class RouterFit(StrEnum):
    """Fit of the routers at bootstrap."""

    RIDGE = "ridge"
    CENTROID = "centroid"
    CONTRIBUTION = "contribution"


class Report(StrEnum):
    """Extent of the perplexity report of the bootstrap."""

    NONE = "none"
    SHORT = "short"
    FULL = "full"


class HealedParts(StrEnum):
    """Parameters that healing trains (see ``models.healing.parameters``)."""

    DEFAULTS = "defaults"
    LORA = "lora"
    EXPERTS = "experts"
    ALL = "all"


class HealingLoss(StrEnum):
    """Loss of healing: divergence from the logits of the dense model, distance of hidden states, or their sum."""

    KL = "kl"
    HIDDEN = "hidden"
    BOTH = "both"


class Split(StrEnum):
    """Documents of a source: training, held-out, or all."""

    TRAIN = "train"
    VALID = "valid"
    ALL = "all"


class LossOn(StrEnum):
    """Tokens whose loss is summed: all, or those of answers in chats and instruction records."""

    ALL = "all"
    ANSWERS = "answers"


class SamplingWeights(StrEnum):
    """Quantity that a client's probability to be drawn for a round is proportional to (see ``Participation``)."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"
    STALENESS = "staleness"


class Precision(StrEnum):
    """Precision in which weights are held; auto: as stored, or fp32 where that is faster than 16 bits."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    NF4 = "nf4"


class Device(StrEnum):
    """Device of the computation."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ExportFormat(StrEnum):
    """Formats of exported checkpoints."""

    DENSE = "dense"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2-moe"
    GRANITE_MOE = "granite-moe"
    GGUF = "gguf"


class GgufModel(StrEnum):
    """Model in a GGUF file of an expert graph; auto: Qwen2-MoE if the graph has shared experts, else Mixtral."""

    AUTO = "auto"
    DENSE = "dense"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2-moe"


class ExportedWeights(StrEnum):
    """Type of the weights of an export; auto: as stored, or fp16 in GGUF files."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    Q8_0 = "q8_0"
