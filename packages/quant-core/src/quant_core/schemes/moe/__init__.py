"""Schemes for moe layers, one file per quantisation type; found by the registry, imported by nobody else."""
