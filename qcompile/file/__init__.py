"""The `.qcm` file: one file that holds every precision of a model."""
