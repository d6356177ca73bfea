"""What several test files use: problems and how close answers must be, ranks, servers, tiny trainers, kernels on the host."""
