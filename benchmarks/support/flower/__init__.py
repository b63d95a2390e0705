"""Deployments of the benchmarks and tests: real SuperLink and SuperNodes, and the project with other apps."""
