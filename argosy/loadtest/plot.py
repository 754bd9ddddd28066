"""A picture of one run's latencies."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from argosy.loadtest.records import LABELS, METRICS, RequestRecord


def plot_latencies(records: Sequence[RequestRecord], path: str) -> None:
    """For every metric, the share of values at or below each time; the format is that of the file's ending."""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 2).flat, METRICS, strict=True):
        values = sorted(ms for record in records if record.is_complete for ms in record.times_ms(metric))
        axes.ecdf(values) if values else None
        axes.set(title=LABELS[metric], xlabel="ms", ylabel="share of values", ylim=(0, 1))
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path)
