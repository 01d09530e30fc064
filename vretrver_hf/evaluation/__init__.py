"""Evaluation as the field does it: benchmarks, metrics, jobs that go on, tables beside the paper's."""
