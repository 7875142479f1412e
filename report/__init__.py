"""A run explained on one page: `python evaluation.py RUN --report`."""
