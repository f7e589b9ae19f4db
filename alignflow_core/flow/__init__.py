"""Flow matching: path, coupling, loss, solvers, guidance, EMA and the training loop."""
