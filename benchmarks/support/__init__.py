"""Material, runners and peers shared by the benchmarks."""
