"""Metrics: from features to scores. They know no network, file or process; `evaluation` hands everything in."""
