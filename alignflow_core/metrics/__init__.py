"""Measurements: overlap of masks, distances between image sets, copies, paired statistics. numpy in, numpy out."""
