"""`make bench`: ratios of things measured side by side in one run (`python -m scripts.bench --help`)."""
