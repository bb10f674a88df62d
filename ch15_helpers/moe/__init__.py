"""Mixture of experts over many ranks: routing, dispatch, overlap, topology and balance."""
