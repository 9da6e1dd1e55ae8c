"""Answers out of a provider's batches: cheaper, and within a day."""
