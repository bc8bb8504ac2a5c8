"""Self-contained pages with pictures: what the demo's report and a run's report share."""
