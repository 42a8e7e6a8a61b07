"""Data: sources -> readers -> ranked type -> prompts -> tokens. Nothing here imports a model."""
