"""The `.qcm` file: one compact file that holds every precision of a model."""
