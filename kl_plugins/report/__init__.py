"""Pages and pictures of runs: reads what a run logged, and shows it.

Loads neither torch nor a host; matplotlib and jinja2 where they are used.
"""

from kl_plugins.report.plots import plot_runs, read_metrics, summary_table

__all__ = ["plot_runs", "read_metrics", "summary_table"]
