"""Clustering, one algorithm per file: arrays in, arrays out."""
