"""Scoring a model: batched generation and log-likelihood, the benchmarks' protocols, and the results they write."""
