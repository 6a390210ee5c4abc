"""From an evaluation's record to report.json, its tables, plots and page."""
