"""The DP engine, its randomness and its accounting. Deliberately imports nothing: accounting must not wait for torch."""
