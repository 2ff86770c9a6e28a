"""Memory and FLOPs against a budget: formulas, measurements in a subprocess, recommendation, sweep."""
