"""Stage 2's parts: encoders, distances, gradient paths, gates."""
