"""What ranked responses teach under one objective or another: data, objectives, runs and their table."""
