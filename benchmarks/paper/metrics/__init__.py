"""The papers' metrics, by existing libraries, on local models: `METRICS` names them, `scorer.Scorer` computes them."""

from benchmarks.paper.metrics.table import (
    METRICS,
    MODELS,
    PRIOR,
    Choice,
    Compares,
    Drawn,
    Metric,
    Model,
    add_options,
    choose,
    models_of,
)

__all__ = [
    "METRICS",
    "MODELS",
    "PRIOR",
    "Choice",
    "Compares",
    "Drawn",
    "Metric",
    "Model",
    "add_options",
    "choose",
    "models_of",
]
