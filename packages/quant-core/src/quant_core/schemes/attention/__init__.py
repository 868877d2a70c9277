"""Schemes for attention layers, one file per quantisation type; found by the registry, imported by nobody else."""
