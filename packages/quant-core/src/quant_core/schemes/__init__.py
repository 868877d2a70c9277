"""Schemes: what a quantisation type stores and computes."""
